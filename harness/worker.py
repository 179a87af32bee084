"""One trial, start to record, in one process per rank. Knows no Ray, pandas or Plotly.

    python -m harness.worker SPEC.json OUT_DIR

writes OUT_DIR as a run directory (`revnet report OUT_DIR` works) and exits with 0 when the trial has a result, 1 when
it failed, 2 for bad input. With `workers` above 1 it starts the ranks itself, unless RANK and WORLD_SIZE are set
(torchrun): then every rank runs this command, and rank 0 writes. REVNET_EXPORTS=snapshot,perfetto asks for one step's
memory for other viewers, under OUT_DIR/exports.
"""

import ctypes
import faulthandler
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from harness.cores import bind
from harness.errors import HarnessError
from harness.exports import asked_exports
from harness.record import RESULT_STATUSES, Attempt, Record, Status, TraceRow, as_metrics
from harness.sharing import withhold_shared
from harness.store import RunStore
from harness.trials import TrialSpec

# Set by whoever supervises this process: the pid of that process, without which the trial has no purpose.
PARENT_PID = "REVNET_PARENT_PID"
# Set where each rank has an OUT_DIR of its own, and leaves its record there.
RANK_WRITES = "REVNET_RANK_WRITES"


class Finished(NamedTuple):
    record: Record
    trace: Sequence[TraceRow]
    exports: Mapping[str, bytes]


def main(arguments: list[str]) -> int:
    die_with_parent()
    # On SIGUSR1 and when Python itself dies: where every thread is, into the log.
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)
    if len(arguments) != 2:
        print("usage: python -m harness.worker SPEC.json OUT_DIR", file=sys.stderr)
        return 2
    try:
        asked_exports()
        spec = read_spec(Path(arguments[0]))
        bind(spec.resources.cpus_per_worker)
        store = RunStore(arguments[1])
        if spec.workers > 1 and "RANK" not in os.environ:
            from harness.ranks import run_ranks

            record, trace, exports = run_ranks(spec)
        else:
            record, trace, exports = run_trial(spec)
    except HarnessError as error:
        print(error, file=sys.stderr)
        return 2
    if RANK_WRITES in os.environ or os.environ.get("RANK", "0") == "0":
        store.write_trial(record, trace, exports=exports)
    if record.status != "ok":
        print(f"{record.status}: {record.reason}", file=sys.stderr)
    return 0 if record.status in RESULT_STATUSES else 1


def read_spec(path: Path) -> TrialSpec:
    try:
        text = path.read_text()
    except OSError as error:
        raise HarnessError(
            f"{path}: cannot be read ({error.strerror}). Give a file that holds the spec of one trial."
        ) from None
    return TrialSpec.from_json(text, source=str(path))


def run_trial(spec: TrialSpec) -> Finished:
    """This rank's part of the trial. Whatever happens to the trial is in the record; raises HarnessError only for
    input that cannot be used (an unknown model, a missing data folder)."""
    from harness import training
    from harness.measure.machine import describe_git, describe_machine, describe_versions

    started_at, start = datetime.now(UTC).isoformat(timespec="seconds"), time.perf_counter()
    result = training.Result()
    reason = None
    try:
        with tempfile.TemporaryDirectory() as scratch:
            training.train(spec, Path(scratch), result)
        status: Status = "ok"
    except HarnessError:
        raise
    except Exception as error:  # noqa: BLE001 - a trial may fail in any way, and each way is a record
        if result.device.type == "cpu":
            # What is left of the limit may not be enough to write the record with.
            training.limit_memory(result.device, None)
        traceback.print_exc()
        status, reason = classify(error)
        if status == "oom" and spec.resources.memory_bytes is not None:
            reason = f"over the limit of {spec.resources.memory_bytes / 2**20:.0f} MiB: {reason}"
    withhold_shared(result, spec.resources.trials_per_device)
    metrics, unmeasured = as_metrics(result.metrics, result.unmeasured)
    attempt = Attempt(
        status=status,
        reason=reason,
        started_at=started_at,
        wall_s=round(time.perf_counter() - start, 3),
        node=socket.gethostname(),
    )
    record = Record(
        id=spec.id,
        spec=spec.model_dump(mode="json"),
        status=status,
        reason=reason,
        attempts=[attempt],
        metrics=metrics,
        unmeasured=unmeasured,
        machine=describe_machine(result.device),
        versions=describe_versions(),
        git=describe_git(),
    )
    return Finished(record, result.trace, result.exports)


def classify(error: BaseException) -> tuple[Status, str]:
    """The status that an exception of a trial means, and the reason in one line."""
    import torch

    from harness.training import DivergedError
    from revnet_core import DriftError, UnsupportedError

    lines = str(error).strip().splitlines()
    message = lines[0] if lines else ""
    reason = f"{type(error).__name__}: {message}" if message else type(error).__name__
    if isinstance(error, (DivergedError, DriftError)):
        return "diverged", message
    if isinstance(error, UnsupportedError):
        return "unsupported", message
    # The CPU allocator has no exception class of its own; oneDNN reports a failed allocation as a failed primitive.
    shortage = ("can't allocate memory", "not enough memory", "bad_alloc", "could not create a memory")
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(text in str(error) for text in shortage):
        return "oom", reason
    return "failed", reason


def die_with_parent() -> None:
    """End this process when its supervisor ends, however that happens (Linux only)."""
    parent = os.environ.get(PARENT_PID)
    if parent is None or sys.platform != "linux":
        return
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != int(parent):  # it ended before the line above
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

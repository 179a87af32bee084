"""Run one trial in a process of its own and turn whatever becomes of it into a record.

The time limit, the exit signal, the log and the status live here and nowhere else. Knows no Ray: a Ray task calls
`supervise`, and so may anything else.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from harness.exports import exports_environment
from harness.ranks import signal_name
from harness.record import Attempt, Record, Status, TraceRow
from harness.store import RunStore
from harness.trials import TrialSpec
from harness.worker import PARENT_PID

LOG_TAIL_BYTES = 4 * 2**20
# glibc's own first thresholds, fixed: left alone, they rise with what is freed, to tensors of 32 MiB.
GIVE_MEMORY_BACK = {"MALLOC_TRIM_THRESHOLD_": str(2**17), "MALLOC_MMAP_THRESHOLD_": str(2**17)}
# Long enough to print the stacks of a process that hangs.
STACKS_S = 1.0
# glibc gives memory back and takes it again, page by page, in each step. Kept, as CUDA's caching allocator keeps it, a
# step has no page faults. 32 MiB is the most that glibc takes for the size from which it maps each block anew.
KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": "4000000000", "MALLOC_MMAP_THRESHOLD_": "33554432"}


class Supervised(NamedTuple):
    record: Record
    trace: list[TraceRow]
    log: bytes
    exports: dict[str, bytes]


def supervise(spec: TrialSpec, timeout_s: float, exports: Collection[str] = ()) -> Supervised:
    """Start the trial, wait for it at most `timeout_s` seconds, and say what came of it.

    exports  names of what it is to leave beside its record

    Whatever ends this call early (KeyboardInterrupt, say) ends the trial's processes too.
    """
    with tempfile.TemporaryDirectory(prefix=f"revnet-{spec.id}-") as scratch:
        spec_path, out, log_path = Path(scratch, "spec.json"), Path(scratch, "run"), Path(scratch, "log")
        spec_path.write_text(spec.canonical_json())
        started_at, start = datetime.now(UTC).isoformat(timespec="seconds"), time.perf_counter()
        with log_path.open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "harness.worker", str(spec_path), str(out)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=_environment(spec) | exports_environment(exports),
                start_new_session=True,
            )
            exit_code: int | None = None
            try:
                exit_code = process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                pass
            finally:
                if exit_code is None:
                    _end(process)
        tail = _tail(log_path)
        store = RunStore(out)
        trace: list[TraceRow] = []
        if spec.id in store.finished_ids():
            record = store.read_record(spec.id)
            trace = store.read_trace_rows(spec.id)
        else:
            status, reason = _without_record(exit_code, timeout_s, tail)
            record = Record(id=spec.id, spec=spec.model_dump(mode="json"), status=status, reason=reason)
        attempt = Attempt(
            status=record.status,
            reason=record.reason,
            started_at=started_at,
            wall_s=round(time.perf_counter() - start, 3),
            node=socket.gethostname(),
            exit_code=exit_code,
        )
        return Supervised(record.model_copy(update={"attempts": [attempt]}), trace, tail, store.read_exports(spec.id))


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the trial's whole group (its ranks are its children), with the stack of each in the log."""
    with contextlib.suppress(subprocess.TimeoutExpired, ProcessLookupError):
        os.killpg(process.pid, signal.SIGUSR1)
        process.wait(STACKS_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _environment(spec: TrialSpec) -> dict[str, str]:
    threads = str(spec.resources.cpus_per_worker)
    # Threads that wait by spinning make a step up to ten times longer where another process shares their cores.
    unless_set = {"OMP_WAIT_POLICY": "PASSIVE"}
    # A limit counts what the process keeps, so a trial that has one gives back what it frees.
    unless_set |= KEEP_MEMORY if spec.resources.memory_bytes is None else GIVE_MEMORY_BACK
    return {
        **unless_set,
        **os.environ,
        PARENT_PID: str(os.getpid()),
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "PYTHONUNBUFFERED": "1",
    }


def _without_record(exit_code: int | None, timeout_s: float, log: bytes) -> tuple[Status, str]:
    if exit_code is None:
        return "timeout", f"still running after {timeout_s:g} s, the study's resources.timeout_s"
    if exit_code < 0:
        name = signal_name(exit_code)
        hint = " (by a person, a scheduler, or the system when it ran out of memory)" if name == "SIGKILL" else ""
        return "crashed", f"the process was ended by {name}{hint}"
    lines = log.decode(errors="replace").strip().splitlines()
    return "failed", f"exit code {exit_code}: {lines[-1] if lines else 'no output'}"


def _tail(path: Path) -> bytes:
    """The end of the log, which holds the cause; a trial that prints without end must not fill the store."""
    size = path.stat().st_size
    with path.open("rb") as log:
        log.seek(max(0, size - LOG_TAIL_BYTES))
        return log.read()

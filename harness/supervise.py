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
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from harness.cores import CORES, held_cores
from harness.exports import exports_environment
from harness.ranks import TAKEN_BACK, signal_name
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


WORKER = "harness.worker"
# From one look at a running trial to the next.
WATCH_S = 0.5


class Supervised(NamedTuple):
    """What came of a trial; `log` is None where there was no process to print anything."""

    record: Record
    trace: list[TraceRow]
    log: bytes | None
    exports: dict[str, bytes]


class Verdict(NamedTuple):
    """Why a trial is ended from outside."""

    status: Status
    reason: str
    lost: bool


# Called about every WATCH_S seconds with the file that the trial prints to.
Watcher = Callable[[Path], Verdict | None]


def supervise(
    spec: TrialSpec,
    timeout_s: float,
    exports: Collection[str] = (),
    *,
    environment: Mapping[str, str] | None = None,
    watch: Watcher = lambda log: None,
    worker: str = WORKER,
) -> Supervised:
    """Start the trial, wait for it at most `timeout_s` seconds, and say what came of it.

    exports      names of what it is to leave beside its record
    environment  of its process, besides what each trial's has
    watch        may end it early
    worker       the module that runs it, as `harness.worker` does

    Whatever ends this call early (KeyboardInterrupt, say) ends the trial's processes too.
    """
    given = dict(environment or {})
    with tempfile.TemporaryDirectory(prefix=f"revnet-{spec.id}-") as scratch, held_cores(_cores(spec, given)) as cores:
        spec_path, out, log_path = Path(scratch, "spec.json"), Path(scratch, "run"), Path(scratch, "log")
        spec_path.write_text(spec.canonical_json())
        started_at, start = datetime.now(UTC).isoformat(timespec="seconds"), time.perf_counter()
        kills_before = _memory_kills()
        with log_path.open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", worker, str(spec_path), str(out)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=_environment(spec, cores) | exports_environment(exports) | given,
                start_new_session=True,
            )
            verdict: Verdict | None = None
            exit_code: int | None = None
            try:
                while exit_code is None and verdict is None:
                    left_s = timeout_s - (time.perf_counter() - start)
                    try:
                        exit_code = process.wait(max(0.0, min(WATCH_S, left_s)))
                    except subprocess.TimeoutExpired:
                        verdict = _timed_out(timeout_s) if left_s <= WATCH_S else watch(log_path)
            finally:
                if exit_code is None:
                    _end(process)
        tail = tail_of(log_path)
        store = RunStore(out)
        trace: list[TraceRow] = []
        if spec.id in store.finished_ids():
            record = store.read_record(spec.id)
            trace = store.read_trace_rows(spec.id)
            lost = bool(record.attempts) and record.attempts[-1].lost
        else:
            if verdict is None:
                assert exit_code is not None
                verdict = _without_record(exit_code, tail)
            record = Record(id=spec.id, spec=spec.model_dump(mode="json"), status=verdict.status, reason=verdict.reason)
            lost = verdict.lost
        if lost and _memory_kills() > kills_before:
            lost, reason = False, f"{record.reason}: the system ran out of memory (its count of such kills rose)"
            record = record.model_copy(update={"status": "oom", "reason": reason})
        attempt = Attempt(
            status=record.status,
            reason=record.reason,
            started_at=started_at,
            wall_s=round(time.perf_counter() - start, 3),
            node=socket.gethostname(),
            exit_code=exit_code,
            lost=lost,
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


def _cores(spec: TrialSpec, environment: Mapping[str, str]) -> int:
    """As many as it computes on here. None of those that share theirs."""
    ranks = 1 if "RANK" in environment else spec.workers
    return 0 if spec.resources.trials_per_device > 1 else ranks * spec.resources.cpus_per_worker


def _environment(spec: TrialSpec, cores: Sequence[int]) -> dict[str, str]:
    threads = str(spec.resources.cpus_per_worker)
    # Threads that wait by spinning make a step up to ten times longer where another process shares their cores.
    unless_set = {"OMP_WAIT_POLICY": "PASSIVE"}
    # A limit counts what the process keeps, so a trial that has one gives back what it frees.
    unless_set |= KEEP_MEMORY if spec.resources.memory_bytes is None else GIVE_MEMORY_BACK
    return {
        **unless_set,
        **os.environ,
        PARENT_PID: str(os.getpid()),
        CORES: ",".join(map(str, cores)),
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "PYTHONUNBUFFERED": "1",
    }


def _timed_out(timeout_s: float) -> Verdict:
    return Verdict("timeout", f"still running after {timeout_s:g} s, the study's resources.timeout_s", lost=False)


def _without_record(exit_code: int, log: bytes) -> Verdict:
    if exit_code < 0:
        name = signal_name(exit_code)
        hint = " (by a person, a scheduler, or the system when it ran out of memory)" if name == "SIGKILL" else ""
        return Verdict("crashed", f"the process was ended by {name}{hint}", lost=exit_code in TAKEN_BACK)
    lines = log.decode(errors="replace").strip().splitlines()
    return Verdict("failed", f"exit code {exit_code}: {lines[-1] if lines else 'no output'}", lost=False)


def _memory_kills() -> int:
    """How often the system ended a process of this one's control group for want of memory; 0 where it does not say."""
    with contextlib.suppress(OSError, ValueError, StopIteration):
        group = next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
        events = Path("/sys/fs/cgroup", group[3:].lstrip("/"), "memory.events").read_text()
        return int(next(line for line in events.splitlines() if line.startswith("oom_kill ")).split()[1])
    return 0


def tail_of(path: Path) -> bytes:
    """The end of the log, which holds the cause; a trial that prints without end must not fill the store."""
    size = path.stat().st_size
    with path.open("rb") as log:
        log.seek(max(0, size - LOG_TAIL_BYTES))
        return log.read()

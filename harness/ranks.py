"""The ranks of one trial on this node, each a process of its own: started together, ended together."""

import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from harness.record import RESULT_STATUSES, Attempt, Record
from harness.store import RunStore
from harness.trials import TrialSpec
from harness.worker import PARENT_PID, RANK_WRITES, Finished

# How the ranks find each other, as torch.distributed's init_method; a file where they share one node.
INIT_METHOD = "REVNET_INIT_METHOD"
# Exit codes of processes that were ended by systems that want a machine back, or by people.
TAKEN_BACK = (-signal.SIGKILL, -signal.SIGTERM)
# Ranks of one node need no interface that others can reach.
LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}


def run_ranks(spec: TrialSpec) -> Finished:
    """Run all ranks and return rank 0's record, or that of the first rank that came to no good end; of one with a
    result (oom, diverged, unsupported) before those that failed, since they may have done so for want of it."""
    with tempfile.TemporaryDirectory() as scratch, selectors.DefaultSelector() as ended:
        spec_path = Path(scratch, "spec.json")
        spec_path.write_text(spec.canonical_json())
        ranks = [_start(rank, spec, spec_path, Path(scratch)) for rank in range(spec.workers)]
        for rank, process in enumerate(ranks):
            ended.register(os.pidfd_open(process.pid), selectors.EVENT_READ, rank)
        try:
            for _ in ranks:
                key, _ = ended.select()[0]
                ended.unregister(key.fd)
                os.close(key.fd)
                finished = _finished(spec, key.data, ranks[key.data].wait(), Path(scratch))
                if finished.record.status != "ok":
                    # The others would wait for it in their next collective.
                    return _with_result(spec, Path(scratch)) or finished
            return _finished(spec, 0, 0, Path(scratch))
        finally:
            for process in ranks:
                process.kill()
                process.wait()


def signal_name(exit_code: int) -> str:
    """The name of the signal that a negative exit code stands for."""
    try:
        return signal.Signals(-exit_code).name
    except ValueError:
        return f"signal {-exit_code}"


def _start(rank: int, spec: TrialSpec, spec_path: Path, scratch: Path) -> subprocess.Popen[bytes]:
    out = scratch / f"rank{rank}"
    environment = (
        os.environ
        | LOOPBACK
        | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(spec.workers),
            INIT_METHOD: f"file://{scratch}/rendezvous",
            RANK_WRITES: "1",
            PARENT_PID: str(os.getpid()),
        }
    )
    return subprocess.Popen([sys.executable, "-m", "harness.worker", str(spec_path), str(out)], env=environment)


def _with_result(spec: TrialSpec, scratch: Path) -> Finished | None:
    for rank in range(spec.workers):
        if spec.id in RunStore(scratch / f"rank{rank}").finished_ids():
            finished = _finished(spec, rank, 0, scratch)
            if finished.record.status in RESULT_STATUSES - {"ok"}:
                return finished
    return None


def _finished(spec: TrialSpec, rank: int, exit_code: int, scratch: Path) -> Finished:
    store = RunStore(scratch / f"rank{rank}")
    if spec.id in store.finished_ids():
        record = store.read_record(spec.id)
        if record.status != "ok":
            record = record.model_copy(update={"reason": f"rank {rank}: {record.reason}"})
        return Finished(record, store.read_trace_rows(spec.id), store.read_exports(spec.id))
    status = "crashed" if exit_code < 0 else "failed"
    how = f"was ended by {signal_name(exit_code)}" if exit_code < 0 else f"exited with {exit_code} and left no record"
    attempt = Attempt(
        status=status,
        reason=f"rank {rank} {how}",
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
        wall_s=0.0,
        node=socket.gethostname(),
        exit_code=exit_code,
        lost=exit_code in TAKEN_BACK,
    )
    spec_data = spec.model_dump(mode="json")
    return Finished(
        Record(id=spec.id, spec=spec_data, status=status, reason=attempt.reason, attempts=[attempt]), (), {}
    )

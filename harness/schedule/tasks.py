"""What Ray runs on the nodes: attempts at trials, and the ranks of those that are spread over several nodes."""

import contextlib
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from harness.attempts import Ended, Job, attempt
from harness.ranks import INIT_METHOD
from harness.record import RESULT_STATUSES
from harness.store import RunStore
from harness.supervise import Supervised, Verdict, Watcher, supervise
from harness.trials import TrialSpec
from harness.worker import RANK_WRITES

# For the other ranks' last words, once this one has ended: those that hang are at their time limits too.
LAST_WORDS_S = 10.0


class Order(NamedTuple):
    """What a task needs besides its trial."""

    uri: str
    timeout_s: float
    exports: tuple[str, ...]
    worker: str


def submit(job: Job, group: PlacementGroup, order: Order) -> "ray.ObjectRef":
    """The attempt on the group's first bundle, from which a spread trial starts its other ranks."""
    job_data = job.trial.canonical_json(), job.seen, job.number, job.max_attempts
    return in_bundle(_attempt, group, 0, f"trial-{job.trial.id}").remote(job_data, order, group)


@ray.remote(max_retries=0)
def _attempt(job_data: tuple[str, int, int, int], order: Order, group: PlacementGroup) -> Ended:
    spec_json, *numbers = job_data
    job = Job(TrialSpec.from_json(spec_json), *numbers)

    def run(watch: Watcher) -> Supervised:
        if group.bundle_count == 1:
            return supervise(job.trial, order.timeout_s, order.exports, watch=watch, worker=order.worker)
        return lead(job.trial, order, group, watch)

    return attempt(job, RunStore(order.uri), run)


def lead(spec: TrialSpec, order: Order, group: PlacementGroup, watch: Watcher) -> Supervised:
    """Run rank 0 here and the others in the group's other bundles; started together, ended together."""
    address = ray.util.get_node_ip_address()
    environment = {"WORLD_SIZE": str(spec.workers), INIT_METHOD: f"tcp://{address}:{_free_port(address)}"}
    with _others(spec, order.timeout_s, environment, group) as others:

        def watch_all(log: Path) -> Verdict | None:
            return watch(log) or others.fault()

        own = {**environment, **_as_rank(0, address)}
        done = supervise(spec, order.timeout_s, order.exports, environment=own, watch=watch_all)
        fault = others.last_words()
    last = done.record.attempts[-1]
    if fault is not None and last.status in ("failed", "crashed"):
        # What it ran into when the other ended is not the reason.
        record = done.record.model_copy(update={"status": fault.status, "reason": fault.reason})
        last = last.model_copy(update={"status": fault.status, "reason": fault.reason, "lost": fault.lost})
        done = done._replace(record=record)
    last = last.model_copy(update={"node": ", ".join([last.node, *others.nodes])})
    return done._replace(
        record=done.record.model_copy(update={"attempts": [last]}), log=(done.log or b"") + others.logs()
    )


class _Others:
    """The ranks of a trial besides the first."""

    def __init__(self, tasks: "list[ray.ObjectRef]") -> None:
        self._tasks = tasks
        self._done: dict[int, Supervised | RayError] = {}

    def fault(self) -> Verdict | None:
        """Of a rank that ended and should not have; one that was lost, or has a result (oom, diverged), before those
        that may only have run into that."""
        self._collect(0)
        faults = [fault for rank, done in self._done.items() if (fault := _fault(rank, done))]
        return max(faults, key=lambda fault: (fault.lost, fault.status in RESULT_STATUSES), default=None)

    def last_words(self) -> Verdict | None:
        self._collect(LAST_WORDS_S)
        return self.fault()

    @property
    def nodes(self) -> list[str]:
        return [done.record.attempts[-1].node for done in self._done.values() if isinstance(done, Supervised)]

    def logs(self) -> bytes:
        parts = [
            f"\n--- rank {rank} on {done.record.attempts[-1].node} ---\n".encode() + (done.log or b"")
            for rank, done in sorted(self._done.items())
            if isinstance(done, Supervised)
        ]
        return b"".join(parts)

    def cancel(self) -> None:
        for rank, task in enumerate(self._tasks, start=1):
            if rank not in self._done:
                ray.cancel(task)

    def _collect(self, wait_s: float) -> None:
        left = {task: rank for rank, task in enumerate(self._tasks, start=1) if rank not in self._done}
        if not left:
            return
        for task in ray.wait(list(left), num_returns=len(left), timeout=wait_s)[0]:
            try:
                self._done[left[task]] = ray.get(task)
            except RayError as error:
                self._done[left[task]] = error


def _fault(rank: int, done: Supervised | RayError) -> Verdict | None:
    if isinstance(done, RayError):
        return Verdict("crashed", f"rank {rank} was lost, with its node or its supervising process", lost=True)
    record = done.record
    if record.status == "ok":
        return None
    return Verdict(record.status, f"rank {rank}: {record.reason}", record.attempts[-1].lost)


@contextlib.contextmanager
def _others(
    spec: TrialSpec, timeout_s: float, environment: Mapping[str, str], group: PlacementGroup
) -> Iterator[_Others]:
    spec_json = spec.canonical_json()
    tasks = [
        in_bundle(_run_rank, group, rank, f"trial-{spec.id}-rank{rank}").remote(
            spec_json, rank, dict(environment), timeout_s
        )
        for rank in range(1, spec.workers)
    ]
    others = _Others(tasks)
    try:
        yield others
    finally:
        others.cancel()


@ray.remote(max_retries=0)
def _run_rank(spec_json: str, rank: int, environment: dict[str, str], timeout_s: float) -> Supervised:
    own = {**environment, **_as_rank(rank, ray.util.get_node_ip_address())}
    done = supervise(TrialSpec.from_json(spec_json), timeout_s, environment=own)
    # Rank 0 has what was measured.
    return done._replace(trace=[], exports={})


def in_bundle(task: Any, group: PlacementGroup, index: int, name: str) -> Any:
    bundle = group.bundle_specs[index]
    return task.options(
        num_cpus=bundle["CPU"],
        num_gpus=bundle.get("GPU", 0),
        scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index),
        name=name,
    )


def _as_rank(rank: int, address: str) -> dict[str, str]:
    # Ray shows each task the devices of its own.
    named = {"RANK": str(rank), "LOCAL_RANK": "0", RANK_WRITES: "1"}
    interface = _interface_of(address)
    if interface is not None:
        named |= {name: os.environ.get(name, interface) for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")}
    return named


def _interface_of(address: str) -> str | None:
    """The network interface that has an IPv4 address; None where it cannot be told."""
    import fcntl
    import struct

    get_address = 0x8915  # SIOCGIFADDR
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                found = fcntl.ioctl(probe.fileno(), get_address, struct.pack("256s", name[:15].encode()))
                if socket.inet_ntoa(found[20:24]) == address:
                    return name
    return None


def _free_port(address: str) -> int:
    with socket.socket() as probe:
        probe.bind((address, 0))
        return probe.getsockname()[1]

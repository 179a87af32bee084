"""The only importer of ray: trials as tasks in placement groups, each supervising a process of its own.

The store, not Ray, knows what is done: a task writes its record before it returns.
"""

import contextlib
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

# Read when ray is imported: no usage report, no advance notice of a change that does not concern us.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray
from ray._private import ray_constants
from ray.exceptions import RayError, TaskCancelledError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from harness.errors import ResourceError
from harness.record import Record, Status
from harness.store import RunStore
from harness.supervise import supervise
from harness.trials import TrialSpec

# Placement groups that wait for room; enough that no core idles, few enough that a sweep of thousands starts at once.
WAITING_GROUPS = 4
TICK_S = 0.5
STOP_S = 15.0


class Outcome(NamedTuple):
    trial: TrialSpec
    status: Status
    reason: str | None
    wall_s: float


class Tick(NamedTuple):
    """Where the sweep stands: trials that run at the moment, and those that finished since the last tick."""

    running: int
    finished: list[Outcome]


@contextlib.contextmanager
def ray_session(address: str | None) -> Iterator[None]:
    """Join the cluster at `address`, or start a Ray of our own on this machine that ends with the block.

    Raises ResourceError when the cluster does not answer.
    """
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is not None:
        try:
            ray.init(address=address, **quiet)
        except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
            raise ResourceError(
                f"--address {address}: no Ray cluster answers ({error}). Start one with `ray start --head`, or leave "
                "--address out to run on this machine."
            ) from None
        try:
            yield
        finally:
            ray.shutdown()
        return
    with _loopback_only(), _own_temp_dir() as temp_dir:
        try:
            ray.init(
                address="local",
                num_cpus=len(os.sched_getaffinity(0)),
                include_dashboard=False,
                object_store_memory=100 * 2**20,
                _node_ip_address="127.0.0.1",
                _temp_dir=temp_dir,
                **quiet,
            )
            yield
        finally:
            ray.shutdown()


@contextlib.contextmanager
def _own_temp_dir() -> Iterator[str]:
    # Of our own, since /tmp/ray belongs to whoever came first on a shared node; short, since sockets lie in it.
    temp_dir = tempfile.mkdtemp(prefix="revnet-ray-", dir="/tmp" if os.path.isdir("/tmp") else None)
    try:
        yield temp_dir
    finally:
        shutil.rmtree(temp_dir, ignore_errors=True)


@contextlib.contextmanager
def _loopback_only() -> Iterator[None]:
    """Keep every port of the Ray that starts within on 127.0.0.1.

    On Linux Ray replaces a loopback address by one that others can reach, unless this switch (made for systems
    without clusters) says that there are no others; it is read from the environment by Ray's processes, and once,
    at import, by this one.
    """
    before, in_environment = ray_constants.ENABLE_RAY_CLUSTER, os.environ.get(ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR)
    ray_constants.ENABLE_RAY_CLUSTER = False
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        os.environ.pop(ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR)
        if in_environment is not None:
            os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = in_environment


def run_trials(
    trials: Sequence[TrialSpec], store: RunStore, timeout_s: float, exports: Collection[str] = ()
) -> Iterator[Tick]:
    """Run the trials in the order given, as many at a time as there is room for; yields about twice a second.

    Every trial has its record in `store` when its outcome is yielded. Closing the iterator early ends the trials
    that run, which leave no record. Raises ResourceError, before anything starts, for a trial that fits no node.

    exports  names of what each trial is to leave beside its record
    """
    todo = deque((trial, _bundle(trial)) for trial in trials)
    waiting: dict[PlacementGroup, TrialSpec] = {}
    running: dict[ray.ObjectRef, tuple[TrialSpec, PlacementGroup]] = {}

    def start(trial: TrialSpec, group: PlacementGroup) -> None:
        running[_submit(trial, group, store.absolute_uri, timeout_s, sorted(exports))] = trial, group

    try:
        while todo or waiting or running:
            while todo and len(waiting) < WAITING_GROUPS:
                trial, bundle = todo.popleft()
                waiting[placement_group([bundle], strategy="STRICT_PACK")] = trial
            for group in [group for group in waiting if group.wait(timeout_seconds=0 if running else TICK_S)]:
                start(waiting.pop(group), group)
            ready, _ = ray.wait(list(running), num_returns=1, timeout=TICK_S) if running else ([], [])
            finished = []
            for task in ready:
                trial, group = running.pop(task)
                finished.append(_outcome(trial, task, store))
                # Handed on, since Ray takes seconds to give a freed place to a group that waits for one.
                heir = next((other for other in waiting if other.bundle_specs == group.bundle_specs), None)
                if heir is None:
                    remove_placement_group(group)
                else:
                    start(waiting.pop(heir), group)
                    remove_placement_group(heir)
            yield Tick(len(running), finished)
    finally:
        for task in running:
            ray.cancel(task)
        if running:
            ray.wait(list(running), num_returns=len(running), timeout=STOP_S)
        for group in [*waiting, *(group for _, group in running.values())]:
            remove_placement_group(group)


def _submit(trial: TrialSpec, group: PlacementGroup, uri: str, timeout_s: float, exports: list[str]) -> "ray.ObjectRef":
    bundle = group.bundle_specs[0]
    return _supervise.options(  # pyright: ignore[reportFunctionMemberAccess]
        num_cpus=bundle["CPU"],
        num_gpus=bundle.get("GPU", 0),
        scheduling_strategy=PlacementGroupSchedulingStrategy(placement_group=group),
        name=f"trial-{trial.id}",
    ).remote(trial.canonical_json(), uri, timeout_s, exports)


@ray.remote(max_retries=0)
def _supervise(spec_json: str, uri: str, timeout_s: float, exports: list[str]) -> tuple[Status, str | None, float]:
    done = supervise(TrialSpec.from_json(spec_json), timeout_s, exports)
    store = RunStore(uri)
    earlier = store.find_record(done.record.id)
    attempts = [*(earlier.attempts if earlier else ()), *done.record.attempts]
    store.write_trial(done.record.model_copy(update={"attempts": attempts}), done.trace, done.log, done.exports)
    return done.record.status, done.record.reason, attempts[-1].wall_s


def _outcome(trial: TrialSpec, task: "ray.ObjectRef", store: RunStore) -> Outcome:
    try:
        return Outcome(trial, *ray.get(task))
    except TaskCancelledError:
        raise KeyboardInterrupt from None
    except RayError as error:
        # The supervisor itself was lost: with its node, or ended by the system or by Ray's memory monitor.
        reason = f"the supervising task was lost: {type(error).__name__}: {str(error).strip().splitlines()[0]}"
        record = Record(id=trial.id, spec=trial.model_dump(mode="json"), status="crashed", reason=reason)
        store.write_trial(record)
        return Outcome(trial, "crashed", reason, 0.0)


def _bundle(trial: TrialSpec) -> dict[str, float]:
    """What one trial takes, all of it on one node. Raises ResourceError when no node has it."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus_per_worker = trial.resources.gpus_per_worker
    if gpus_per_worker is None:
        gpus_per_worker = int(any(node.get("GPU", 0) for node in nodes))
    bundle = {"CPU": float(trial.workers * trial.resources.cpus_per_worker)}
    if gpus_per_worker:
        bundle["GPU"] = float(trial.workers * gpus_per_worker)
    if not any(all(node.get(kind, 0) >= amount for kind, amount in bundle.items()) for node in nodes):
        wanted = " and ".join(f"{amount:g} {kind}" for kind, amount in bundle.items())
        largest = "; ".join(f"{node.get('CPU', 0):g} CPU, {node.get('GPU', 0):g} GPU" for node in nodes)
        raise ResourceError(
            f"trial {trial.id} ({trial.workers} workers) needs {wanted} on one node; the nodes have: {largest}. Lower "
            "workers, resources.cpus_per_worker or resources.gpus_per_worker in the study, or give a larger cluster "
            "with --address."
        )
    return bundle

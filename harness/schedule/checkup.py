"""What each node of a cluster has, as a task there sees it, and one trial over two nodes."""

import socket
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from harness.doctor import gpu_names, versions
from harness.schedule.tasks import Order, in_bundle, lead
from harness.storage_check import clear_marks, reach
from harness.supervise import WORKER, Supervised, Verdict
from harness.trials import TrialSpec

TASK_S = 60.0


class Node(NamedTuple):
    """
    name           as its programs see it
    storage_error  why the storage cannot be used from there
    sees_others    whether it finds in the storage what the nodes before it wrote
    error          why no task runs there; nothing else is known then
    """

    name: str
    cpus: float
    versions: dict[str, str]
    gpus: list[str]
    storage_error: str | None = None
    sees_others: bool = True
    error: str | None = None


def seen_from_each(storage: str | None) -> Iterator[Node]:
    """Every node that is alive, one after the other."""
    token, marked = uuid.uuid4().hex, set[str]()
    try:
        for node in (node for node in ray.nodes() if node["Alive"]):
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            look = _look.options(num_cpus=0, scheduling_strategy=there)  # pyright: ignore[reportFunctionMemberAccess]
            cpus = node["Resources"].get("CPU", 0)
            try:
                found = Node(*ray.get(look.remote(cpus, storage, token, node["NodeID"], marked), timeout=TASK_S))
            except RayError as error:
                yield Node(node["NodeManagerHostname"], cpus, {}, [], error=type(error).__name__)
                continue
            if found.storage_error is None:
                marked.add(node["NodeID"])
            yield found
    finally:
        if storage is not None and marked:
            clear_marks(storage, token)


@ray.remote(max_retries=0)
def _look(cpus: float, storage: str | None, token: str, node_id: str, marked: set[str]) -> Node:
    storage_error, sees_others = reach(storage, token, node_id, marked) if storage is not None else (None, True)
    return Node(socket.gethostname(), cpus, versions(), gpu_names(), storage_error, sees_others)


def over_two_nodes(spec: TrialSpec, timeout_s: float) -> Supervised:
    """A trial of two ranks, one on each of two nodes."""
    bundle = {"CPU": float(spec.resources.cpus_per_worker)}
    group = placement_group([bundle, bundle], strategy="STRICT_SPREAD")
    try:
        task = in_bundle(_lead_two, group, 0, "doctor").remote(spec.canonical_json(), timeout_s, group)
        return ray.get(task, timeout=timeout_s + TASK_S)
    finally:
        remove_placement_group(group)


@ray.remote(max_retries=0)
def _lead_two(spec_json: str, timeout_s: float, group: PlacementGroup) -> Supervised:
    def watch(log: Path) -> Verdict | None:
        return None

    return lead(TrialSpec.from_json(spec_json), Order("", timeout_s, (), WORKER), group, watch)

"""What each node of a cluster has, as a task there sees it, and one trial over two nodes."""

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from harness.doctor import gpu_names, versions
from harness.schedule.reach import asked_of_each
from harness.schedule.tasks import Order, in_bundle, lead
from harness.storage_check import reach
from harness.supervise import WORKER, Supervised, Verdict
from harness.trials import TrialSpec

TASK_S = 60.0


class Node(NamedTuple):
    """
    name           as its programs see it
    storage_error  why the storage cannot be used from there
    sees_first     whether it finds in the storage what was written there from elsewhere
    error          why no task runs there; nothing else is known then
    """

    name: str
    cpus: float
    versions: dict[str, str]
    gpus: list[str]
    storage_error: str | None = None
    sees_first: bool = True
    error: str | None = None


def seen_from_each(storage: str | None, token: str) -> Iterator[Node]:
    """Every node that is alive; `token` is that of the storage's first mark."""
    for node, answer in asked_of_each(_look, storage, token):
        cpus = node["Resources"].get("CPU", 0)
        if isinstance(answer, RayError):
            yield Node(node["NodeManagerHostname"], cpus, {}, [], error=type(answer).__name__)
        else:
            name, *found = answer
            yield Node(name, cpus, *found)


@ray.remote(max_retries=0)
def _look(storage: str | None, token: str, node_id: str) -> tuple[str, dict[str, str], list[str], str | None, bool]:
    storage_error, sees_first = (None, True) if storage is None else reach(storage, token, node_id)
    return socket.gethostname(), versions(), gpu_names(), storage_error, sees_first


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

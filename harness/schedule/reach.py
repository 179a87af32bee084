"""Whether all nodes of a cluster keep their records where the driver looks for them; asked before a sweep begins."""

import time
from collections.abc import Iterator
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from harness.errors import ResourceError
from harness.storage_check import REMEDY, marked, reach
from harness.store import RunStore

ANSWER_S = 60.0


def refuse_unreached(store: RunStore) -> None:
    """Raise ResourceError where the run directory cannot be written from a node, or is another one there. A node that
    does not answer is left to the sweep, which goes around it."""
    uri = store.absolute_uri
    with marked(uri) as (token, error):
        faults = [f"here: {error}"] if error else [*_faults(uri, token)]
    if faults:
        raise ResourceError(f"--out {store.uri}: {'; '.join(faults)}. {REMEDY}")


def asked_of_each(task: Any, *arguments: object) -> "Iterator[tuple[dict[str, Any], Any]]":
    """Run the task on every node that is alive, on all at once; each node as Ray describes it, with what the task
    returned there, or the RayError that came of it."""
    alive = sorted((node for node in ray.nodes() if node["Alive"]), key=lambda node: node["NodeManagerHostname"])
    asked = []
    for node in alive:
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        asked.append((node, task.options(num_cpus=0, scheduling_strategy=there).remote(*arguments, node["NodeID"])))
    deadline = time.monotonic() + ANSWER_S
    for node, answer in asked:
        try:
            yield node, ray.get(answer, timeout=max(0.0, deadline - time.monotonic()))
        except RayError as error:
            ray.cancel(answer)
            yield node, error


def _faults(uri: str, token: str) -> Iterator[str]:
    for node, answer in asked_of_each(_reach, uri, token):
        if isinstance(answer, RayError):
            continue
        error, sees_first = answer
        if error or not sees_first:
            yield f"{node['NodeManagerHostname']}: {error or 'another place there than here'}"


@ray.remote(max_retries=0)
def _reach(uri: str, token: str, node_id: str) -> tuple[str | None, bool]:
    return reach(uri, token, node_id)

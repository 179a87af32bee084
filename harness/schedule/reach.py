"""Whether all nodes of a cluster keep their records where the driver looks for them; asked before a sweep begins."""

import uuid

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from harness.errors import ResourceError
from harness.storage_check import clear_marks, leave_mark, reach
from harness.store import RunStore

WAIT_S = 60.0
DRIVER = "driver"


def refuse_unreached(store: RunStore) -> None:
    """Raise ResourceError where the run directory cannot be written from a node, or is another one there. A node that
    does not answer is left to the sweep, which goes around it."""
    token, uri = uuid.uuid4().hex, store.absolute_uri
    try:
        leave_mark(uri, token, DRIVER)
        names = {}
        for node in (node for node in ray.nodes() if node["Alive"]):
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            look = _reach.options(num_cpus=0, scheduling_strategy=there)  # pyright: ignore[reportFunctionMemberAccess]
            names[look.remote(uri, token, node["NodeID"])] = node["NodeManagerHostname"]
        answered, silent = ray.wait(list(names), num_returns=len(names), timeout=WAIT_S)
        for task in silent:
            ray.cancel(task)
        faults = sorted(fault for task in answered if (fault := _fault(task, names[task])))
    finally:
        clear_marks(uri, token)
    if faults:
        raise ResourceError(
            f"--out {store.uri}: {'; '.join(faults)}. Give a path or URI that this machine and all nodes reach as the "
            "same place (a shared file system, s3://, gs://), with the credentials for it on each."
        )


@ray.remote(max_retries=0)
def _reach(uri: str, token: str, name: str) -> tuple[str | None, bool]:
    return reach(uri, token, name, {DRIVER})


def _fault(task: "ray.ObjectRef", name: str) -> str | None:
    try:
        error, sees_driver = ray.get(task)
    except RayError:
        return None
    return f"{name}: {error}" if error else None if sees_driver else f"{name}: another place there than here"

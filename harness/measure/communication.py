"""What a rank's step hands to collectives, and for how long they are under way.

Bytes by a dispatch mode, which sees every collective of torch.distributed, whoever calls it; times by PyTorch's
profiler. DeepSpeed's comms logger knows the bytes of its own collectives only, and its times are no use here: each
holds those of the earlier calls of that collective, and of an asynchronous one it has the start alone.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from harness.record import TraceRow

COMMUNICATION_METRICS = ("communication_bytes", "communication_s")
_NAMESPACES = ("c10d", "_c10d_functional")
# What an operator's name holds, underscores left out, and what the collective is called; the first that fits. Barriers,
# receiving and waiting hand nothing over.
_COLLECTIVES = {
    "allreduce": "all_reduce",
    "allgather": "all_gather",
    "reducescatter": "reduce_scatter",
    "alltoall": "all_to_all",
    "broadcast": "broadcast",
    "reduce": "reduce",
    "gather": "gather",
    "scatter": "scatter",
    "send": "send",
}


class Handed(NamedTuple):
    """To all calls of one collective in a step."""

    calls: int
    nbytes: int


class Communication(NamedTuple):
    """One rank's. under_way_s: of each timed step; empty where `untimed` says why."""

    handed: Mapping[str, Handed]
    under_way_s: Sequence[float]
    untimed: str = ""

    @property
    def nbytes(self) -> int:
        return sum(handed.nbytes for handed in self.handed.values())


class Collectives(TorchDispatchMode):
    """Use as a context around one step: what is handed to each collective."""

    def __init__(self) -> None:
        super().__init__()
        self._payloads_bytes: dict[str, list[int]] = defaultdict(list)

    @property
    def handed(self) -> dict[str, Handed]:
        return {name: Handed(len(nbytes), sum(nbytes)) for name, nbytes in self._payloads_bytes.items()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace in _NAMESPACES and (name := _collective(func)) is not None:
            self._payloads_bytes[name].append(_payload_bytes(func, args, kwargs))
        return func(*args, **kwargs)


def measure_communication(step: Callable[[], None], timed_steps: int) -> Communication:
    """Takes the step once to count and `timed_steps` times for the times; call it on all ranks at once."""
    with Collectives() as collectives:
        step()
    handed = collectives.handed
    backend = dist.get_backend()
    if backend == "nccl":
        return Communication(handed, [], "NCCL's collectives run on the device, whose time for them is not taken")
    spans = [_spans_ns(step, f"{backend}:") for _ in range(timed_steps)]
    if handed and not all(spans):
        return Communication(handed, [], f"the profiler recorded no collective of the backend {backend}")
    return Communication(handed, [covered_ns(of_step) / 1e9 for of_step in spans])


def summarize_communication(ranks: Sequence[Communication]) -> tuple[dict[str, int | float], dict[str, str]]:
    """Metrics of all ranks' readings, and why one is missing: of each the largest rank, and how far they are apart."""
    of_ranks_bytes = [rank.nbytes for rank in ranks]
    metrics: dict[str, int | float] = {
        "communication_bytes": max(of_ranks_bytes),
        "communication_rank_spread_bytes": max(of_ranks_bytes) - min(of_ranks_bytes),
    }
    untimed = next((rank.untimed for rank in ranks if rank.untimed), None)
    if untimed:
        return metrics, {"communication_s": untimed}
    of_ranks_s = [median(rank.under_way_s) for rank in ranks]
    steps_s = zip(*(rank.under_way_s for rank in ranks), strict=True)
    metrics["communication_s"] = median(max(of_step) for of_step in steps_s)
    metrics["communication_rank_spread_s"] = max(of_ranks_s) - min(of_ranks_s)
    return metrics, {}


def communication_rows(rank: Communication) -> list[TraceRow]:
    rows = [
        TraceRow("communication", index, "communication_s", seconds) for index, seconds in enumerate(rank.under_way_s)
    ]
    for name, handed in rank.handed.items():
        rows += [
            TraceRow("communication", 0, f"{name}_bytes", handed.nbytes),
            TraceRow("communication", 0, f"{name}_calls", handed.calls),
        ]
    return rows


def covered_ns(spans: Iterable[tuple[int, int]]) -> int:
    """How long at least one of the spans (start, end) was open."""
    total_ns, covered_to_ns = 0, 0
    for start_ns, end_ns in sorted(spans):
        total_ns += max(0, end_ns - max(start_ns, covered_to_ns))
        covered_to_ns = max(covered_to_ns, end_ns)
    return total_ns


def _collective(func: Any) -> str | None:
    name = func._schema.name.rpartition("::")[2].replace("_", "")
    return next((spelled for part, spelled in _COLLECTIVES.items() if part in name), None)


def _payload_bytes(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Of what goes in. Where the operator names no input, its tensors are changed in place and go in too."""
    given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | dict(kwargs)
    inputs = [value for name, value in given.items() if name.startswith("input")]
    handed = inputs or [value for name, value in given.items() if name in ("tensor", "tensors")]
    return sum(leaf.nbytes for leaf in tree_leaves(handed) if isinstance(leaf, Tensor))


def _spans_ns(step: Callable[[], None], prefix: str) -> list[tuple[int, int]]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    profiler = profile.profiler
    results = None if profiler is None else profiler.kineto_results
    events: Iterable[Any] = [] if results is None else results.events()
    return [(e.start_ns(), e.start_ns() + e.duration_ns()) for e in events if e.name().startswith(prefix)]

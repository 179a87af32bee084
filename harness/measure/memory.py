"""Saved activations and activation peak of one step, in bytes above the level at its start.

Parameters, gradients, optimizer state and the batch are to be allocated before the step, so that what rises is
activations, reconstruction buffers and temporaries. On CUDA from the caching allocator's counters; on the CPU from
the allocator's own events, which the profiler records and which see the scratch of kernels too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

FORWARD_END = "revnet_forward_end"
TIMELINE_POINTS = 400


@dataclass(frozen=True)
class MemoryUse:
    """activation_saved_bytes  alive between forward and backward
    activation_peak_bytes   highest rise during forward and backward
    timeline                (seconds since the start, bytes above the start), thinned but with every extreme that
                            the thinning would lose; empty on CUDA, whose counters keep no history
    """

    activation_saved_bytes: int
    activation_peak_bytes: int
    timeline: list[tuple[float, int]]


def measure_memory(
    device: torch.device, forward: Callable[[], Tensor], backward: Callable[[Tensor], None]
) -> MemoryUse:
    """Run forward and backward once and read what they allocated on `device`.

    The profiler slows the step on the CPU, so a step measured here is never a timed one.
    """
    if device.type == "cuda":
        return _measure_cuda(device, forward, backward)
    return _measure_cpu(forward, backward)


def _measure_cuda(device: torch.device, forward: Callable[[], Tensor], backward: Callable[[Tensor], None]) -> MemoryUse:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    start = torch.cuda.memory_allocated(device)
    loss = forward()
    saved = torch.cuda.memory_allocated(device) - start
    backward(loss)
    torch.cuda.synchronize(device)
    return MemoryUse(saved, torch.cuda.max_memory_allocated(device) - start, [])


def _measure_cpu(forward: Callable[[], Tensor], backward: Callable[[Tensor], None]) -> MemoryUse:
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        loss = forward()
        with torch.profiler.record_function(FORWARD_END):
            pass
        backward(loss)
    assert profile.profiler is not None
    assert profile.profiler.kineto_results is not None
    events: list[Any] = profile.profiler.kineto_results.events()
    forward_end_ns = next(event.start_ns() for event in events if event.name() == FORWARD_END)
    # Frees of what was allocated before the profiler are no events, so the sum starts at the level of the start.
    changes = sorted(
        ((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"), key=lambda change: change[0]
    )
    if not changes:
        raise RuntimeError("the profiler recorded no allocation; memory cannot be measured with this build of torch")
    levels = list(accumulate(nbytes for _, nbytes in changes))
    saved = max((i for i, (ns, _) in enumerate(changes) if ns <= forward_end_ns), default=None)
    seconds = [(ns - changes[0][0]) / 1e9 for ns, _ in changes]
    return MemoryUse(
        activation_saved_bytes=0 if saved is None else levels[saved],
        activation_peak_bytes=max(0, *levels),
        timeline=_thin(list(zip(seconds, levels, strict=True))),
    )


def _thin(points: list[tuple[float, int]]) -> list[tuple[float, int]]:
    """At most 2 * TIMELINE_POINTS points: the lowest and the highest of each stretch, in order."""
    stretch = max(1, -(-len(points) // TIMELINE_POINTS))
    thinned: list[tuple[float, int]] = []
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        low, high = min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])
        thinned += sorted({low, high})
    return thinned

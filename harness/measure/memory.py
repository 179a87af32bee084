"""Saved activations and activation peak of one step, in bytes above the level at its start.

Parameters, gradients, optimizer state and the batch are to be allocated before the step, so that what rises is
activations, reconstruction buffers and temporaries. On CUDA from the caching allocator's counters; on the CPU from
the allocator's own events, which the profiler records and which see the scratch of kernels too.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.measure.events import ProfilerRecorder

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
    recorder = ProfilerRecorder()
    with recorder:
        loss = forward()
        recorder.end_forward()
        backward(loss)
    history = recorder.history()
    seconds = [(event.time_ns - history.start_ns) / 1e9 for event in history.events]
    return MemoryUse(
        activation_saved_bytes=history.saved_bytes,
        activation_peak_bytes=history.peak_bytes,
        timeline=_thin(list(zip(seconds, history.levels, strict=True))),
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

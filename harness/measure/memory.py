"""Saved activations and activation peak of one step, in bytes above the level at its start.

Parameters, gradients, optimizer state and the batch are to be allocated before the step, so that what rises is
activations, reconstruction buffers and temporaries. On CUDA from the caching allocator's counters; on the CPU from
the allocator's own events, which the profiler records and which see the scratch of kernels too.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.errors import MeasurementError
from harness.measure.counters import Counters, CudaCounters, resident_peak_bytes
from harness.measure.events import ProfilerRecorder
from harness.measure.timeline import thin


@dataclass(frozen=True)
class MemoryUse:
    """activation_saved_bytes  alive between forward and backward
    activation_peak_bytes   highest rise during forward and backward
    timeline                (seconds since the start, bytes above the start), thinned but with every extreme that
                            the thinning would lose; empty on CUDA, whose counters keep no history
    allocated_peak_bytes    all that was allocated at the peak; None on the CPU, whose allocator keeps no total
    reserved_peak_bytes     what the allocator had taken from the device; None on the CPU, whose allocator keeps nothing
    device_used_bytes       the device's own figure: what is not free on the GPU, whoever uses it; on the CPU the peak
                            resident set of this process; None where the system does not say
    measured_s              forward and backward as measured, the meter's start and end not included
    """

    activation_saved_bytes: int
    activation_peak_bytes: int
    timeline: list[tuple[float, int]]
    allocated_peak_bytes: int | None
    reserved_peak_bytes: int | None
    device_used_bytes: int | None
    measured_s: float


def measure_memory(
    device: torch.device, forward: Callable[[], Tensor], backward: Callable[[Tensor], None]
) -> MemoryUse:
    """Run forward and backward once and read what they allocated on `device`.

    The profiler slows the step on the CPU, so a step measured here is never a timed one. Raises MeasurementError when
    something else in the step took the profiler or the counters for itself.
    """
    if device.type == "cuda":
        return measure_with_counters(CudaCounters(device), forward, backward)
    return _measure_cpu(forward, backward)


def measure_with_counters(
    counters: Counters, forward: Callable[[], Tensor], backward: Callable[[Tensor], None]
) -> MemoryUse:
    """Run forward and backward once and read what the allocator counted meanwhile."""
    resets: list[str] = []
    start_bytes = counters.allocated_bytes()
    counters.reset_peaks()
    start_s = time.perf_counter()
    with counters.resets_noted(lambda: resets.append("the forward")):
        loss = forward()
    saved_bytes, forward_peak_bytes = counters.allocated_bytes() - start_bytes, counters.allocated_peak_bytes()
    with counters.resets_noted(lambda: resets.append("the backward")):
        backward(loss)
        # On CUDA it waits for the device.
        counters.allocated_bytes()
    measured_s, peak_bytes = time.perf_counter() - start_s, counters.allocated_peak_bytes()
    if not resets and not start_bytes + saved_bytes <= forward_peak_bytes <= peak_bytes:
        resets.append("the step")
    if resets:
        raise MeasurementError(
            f"the allocator's peak counter was reset within {resets[0]}, so that it does not hold the step's peak. "
            "Leave out what resets it: reset_peak_memory_stats or DeepSpeed's see_memory_usage in the model, or "
            "`memory_breakdown` in the study's deepspeed section."
        )
    return MemoryUse(
        activation_saved_bytes=saved_bytes,
        activation_peak_bytes=peak_bytes - start_bytes,
        timeline=[],
        allocated_peak_bytes=peak_bytes,
        reserved_peak_bytes=counters.reserved_peak_bytes(),
        device_used_bytes=counters.device_used_bytes(),
        measured_s=measured_s,
    )


def _measure_cpu(forward: Callable[[], Tensor], backward: Callable[[Tensor], None]) -> MemoryUse:
    recorder = ProfilerRecorder()
    with recorder:
        start_s = time.perf_counter()
        loss = forward()
        recorder.end_forward()
        backward(loss)
        measured_s = time.perf_counter() - start_s
    history = recorder.history()
    levels = history.levels
    return MemoryUse(
        activation_saved_bytes=history.saved_bytes,
        activation_peak_bytes=history.peak_bytes,
        timeline=[(history.seconds(index), levels[index]) for index in thin(levels)],
        allocated_peak_bytes=None,
        reserved_peak_bytes=None,
        device_used_bytes=resident_peak_bytes(),
        measured_s=measured_s,
    )

"""Step times by a monotonic clock, each kept, and their median and quartiles."""

import time
from collections.abc import Callable
from statistics import median, quantiles

import torch


def time_step(device: torch.device, step: Callable[[], None]) -> float:
    """Seconds of one call; on CUDA from an idle device to an idle device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def summarize(step_s: list[float], samples_per_step: int) -> dict[str, float]:
    """Median and quartiles in seconds, and samples per second at the median. At least one step."""
    q1, _, q3 = quantiles(step_s, n=4, method="inclusive") if len(step_s) > 1 else (step_s[0],) * 3
    middle = median(step_s)
    return {
        "step_median_s": middle,
        "step_q1_s": q1,
        "step_q3_s": q3,
        "samples_per_s": samples_per_step / middle,
    }

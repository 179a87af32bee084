"""Step times, each kept: by CUDA's own events on a GPU, by a monotonic clock elsewhere, and what they amount to."""

import time
from collections.abc import Callable, Sequence
from statistics import median, quantiles

import numpy as np
import torch

CONFIDENCE = 0.95
RESAMPLES = 10_000
# Of fewer values a resampled median is one of them as often as not, and the interval is their range.
INTERVAL_STEPS = 3
# Fixed, so that the same times give the same interval.
SEED = 0
# As many at a time: of a thousand steps all resamples at once would be 80 MB, which a memory limit would count.
RESAMPLES_AT_ONCE = 100


def time_step(device: torch.device, step: Callable[[], None]) -> float:
    """Seconds of one call; on CUDA from an idle device until it has done what the call put on its current stream."""
    if device.type == "cuda":
        return _time_on_cuda(device, step)
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def summarize(
    ranks_step_s: Sequence[Sequence[float]], *, samples_per_step: int, tokens_per_sample: int | None
) -> tuple[dict[str, float], dict[str, str]]:
    """Metrics of the measured steps, and why one is missing.

    ranks_step_s      seconds of each step on each rank: at least one rank and one step, each rank the same steps.
                      Ranks wait for each other in every step, so the slowest rank's time is the step's.
    samples_per_step  of all ranks together
    """
    step_s = [max(ranks) for ranks in zip(*ranks_step_s, strict=True)]
    q1, _, q3 = quantiles(step_s, n=4, method="inclusive") if len(step_s) > 1 else (step_s[0],) * 3
    middle = median(step_s)
    of_ranks = [median(own) for own in ranks_step_s]
    metrics = {
        "step_median_s": middle,
        "step_q1_s": q1,
        "step_q3_s": q3,
        "step_median_rank_spread_s": max(of_ranks) - min(of_ranks),
        "samples_per_s": samples_per_step / middle,
    }
    unmeasured: dict[str, str] = {}
    if reason := _why_no_interval(step_s):
        unmeasured |= dict.fromkeys(("step_median_low_s", "step_median_high_s"), reason)
    else:
        metrics["step_median_low_s"], metrics["step_median_high_s"] = _interval(step_s)
    if tokens_per_sample is None:
        unmeasured["tokens_per_s"] = "the model does not say tokens_per_sample; its samples are images"
    else:
        metrics["tokens_per_s"] = samples_per_step * tokens_per_sample / middle
    return metrics, unmeasured


def _time_on_cuda(device: torch.device, step: Callable[[], None]) -> float:
    stream = torch.cuda.current_stream(device)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    start.record(stream)
    step()
    end.record(stream)
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1e3


def _why_no_interval(step_s: Sequence[float]) -> str | None:
    if len(step_s) < INTERVAL_STEPS:
        return f"{len(step_s)} measured steps; an interval of their median takes {INTERVAL_STEPS}"
    if len(set(step_s)) == 1:
        return "all measured steps took the same time, which says nothing about how far their median may be off"
    return None


def _interval(step_s: Sequence[float]) -> tuple[float, float]:
    """Of the median, by the percentile bootstrap: what `scipy.stats.bootstrap` gives, whose import would be a tenth of
    a small trial. Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13."""
    times, rng = np.asarray(step_s), np.random.default_rng(SEED)
    draws = (
        rng.integers(len(times), size=(RESAMPLES_AT_ONCE, len(times))) for _ in range(RESAMPLES // RESAMPLES_AT_ONCE)
    )
    medians = np.concatenate([np.median(times[drawn], axis=1) for drawn in draws])
    low, high = np.quantile(medians, ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
    return float(low), float(high)

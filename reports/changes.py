"""How far a metric of a cell went from BASE to RUN, and how sure that is."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from reports.cells import Trial
from reports.comparable import kind_of

CONFIDENCE = 0.95
RESAMPLES = 2_000
# Of fewer repeats a resampled median is one of them as often as not.
INTERVAL_REPEATS = 3
# Fixed, so that the same runs give the same interval.
SEED = 0
# Metrics that are the median step in other words: whether they rise with it.
_OF_STEP = {"step_median_s": True, "samples_per_s": False, "tokens_per_s": False, "mfu": False, "hfu": False}


class Change(NamedTuple):
    """The medians over the repeats of one cell.

    differing  how many of the repeats are not equal
    low, high  the ends of the change as fractions of `before`; None where there is no interval, as of bytes and counts
    method     what the interval is
    """

    where: str
    metric: str
    before: float
    now: float
    repeats: int
    differing: int
    low: float | None
    high: float | None
    method: str

    @property
    def fraction(self) -> float | None:
        """None where it was 0."""
        return (self.now - self.before) / abs(self.before) if self.before else None

    @property
    def within_noise(self) -> bool:
        """Whether the interval includes no change. Of times only: what is deterministic has no noise to be within."""
        if self.low is None or self.high is None or kind_of(self.metric) != "time":
            return False
        return self.low <= 0 <= self.high


def change_of(where: str, metric: str, pairs: Sequence[tuple[Trial, Trial]]) -> Change:
    """Of the repeats of one cell, all of which have the metric in both runs."""
    before = np.array([trial["metrics"][metric] for trial, _ in pairs], dtype=float)
    now = np.array([trial["metrics"][metric] for _, trial in pairs], dtype=float)
    low, high, method = _interval(metric, before, now, pairs)
    medians = float(np.median(before)), float(np.median(now))
    return Change(where, metric, *medians, len(pairs), int((before != now).sum()), low, high, method)


def _interval(
    metric: str, before: np.ndarray, now: np.ndarray, pairs: Sequence[tuple[Trial, Trial]]
) -> tuple[float | None, float | None, str]:
    kind = kind_of(metric)
    if kind == "memory":
        return None, None, ""
    if len(pairs) >= INTERVAL_REPEATS and before.min() > 0:
        # The seed decides drift and loss, so the same seeds are drawn on both sides; of times it decides nothing.
        paired = kind != "time" and all(a["spec"].get("seed") == b["spec"].get("seed") for a, b in pairs)
        low, high = _bootstrap(before, now, paired=paired)
        how = "in pairs by seed" if paired else "each side on its own"
        return low, high, f"95 %, bootstrap of {len(pairs)} repeats {how}"
    if metric in _OF_STEP and len(pairs) < INTERVAL_REPEATS:
        return _of_steps(_OF_STEP[metric], pairs)
    return None, None, ""


def _bootstrap(before: np.ndarray, now: np.ndarray, *, paired: bool) -> tuple[float, float]:
    """Percentile bootstrap. Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13."""
    rng = np.random.default_rng(SEED)
    first = rng.integers(len(before), size=(RESAMPLES, len(before)))
    second = first if paired else rng.integers(len(now), size=(RESAMPLES, len(now)))
    changes = np.median(now[second], axis=1) / np.median(before[first], axis=1) - 1
    low, high = np.quantile(changes, ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
    return float(low), float(high)


def _of_steps(rises: bool, pairs: Sequence[tuple[Trial, Trial]]) -> tuple[float | None, float | None, str]:
    """From the ends of the records' own intervals of the median step: 0 is within just when those overlap."""
    ends = [_step_ends([pair[side] for pair in pairs]) for side in (0, 1)]
    if any(math.isnan(end) or end <= 0 for side in ends for end in side):
        return None, None, ""
    (low_before, high_before), (low_now, high_now) = ends
    method = "from the intervals of the median steps"
    if rises:
        return low_now / high_before - 1, high_now / low_before - 1, method
    return low_before / high_now - 1, high_before / low_now - 1, method


def _step_ends(trials: Sequence[Trial]) -> tuple[float, float]:
    lows = [trial["metrics"].get("step_median_low_s", math.nan) for trial in trials]
    highs = [trial["metrics"].get("step_median_high_s", math.nan) for trial in trials]
    # Not min and max of Python, which may pass over what is not a number.
    return float(np.min(lows)), float(np.max(highs))

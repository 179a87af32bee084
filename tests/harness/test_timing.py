"""Step times and what they amount to. The clocks are wound by hand: nothing here waits."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from harness.measure import timing
from harness.measure.timing import INTERVAL_STEPS, summarize, time_step

CPU = torch.device("cpu")
# A clock's ticks rather than any floats: times that differ in their last bits only are no two times.
TICK_S = 2.0**-20
step_times = st.lists(st.integers(1, 2**30).map(lambda ticks: ticks * TICK_S), min_size=INTERVAL_STEPS, max_size=40)
spread_step_times = step_times.filter(lambda step_s: len(set(step_s)) > 1)
INTERVAL = ("step_median_low_s", "step_median_high_s")


def of_one_rank(step_s: list[float]) -> tuple[dict[str, float], dict[str, str]]:
    return summarize([step_s], samples_per_step=8, tokens_per_sample=None)


def width_s(metrics: dict[str, float]) -> float:
    return metrics["step_median_high_s"] - metrics["step_median_low_s"]


@given(spread_step_times)
def test_the_interval_holds_the_median_and_lies_within_the_times(step_s: list[float]) -> None:
    metrics, unmeasured = of_one_rank(step_s)
    low_s, high_s = (metrics[name] for name in INTERVAL)
    assert min(step_s) <= low_s <= metrics["step_median_s"] <= high_s <= max(step_s)
    assert not metrics.keys() & unmeasured.keys()


@given(spread_step_times)
def test_the_same_times_give_the_same_interval(step_s: list[float]) -> None:
    assert of_one_rank(step_s) == of_one_rank(step_s)


@given(spread_step_times, st.integers(2, 16))
def test_the_interval_widens_as_the_times_spread(step_s: list[float], factor: int) -> None:
    narrow = of_one_rank(step_s)[0]
    middle_s = narrow["step_median_s"]
    # Times need not be positive to be summarized, and about the median they keep it.
    wide = of_one_rank([middle_s + factor * (seconds - middle_s) for seconds in step_s])[0]
    assert wide["step_median_s"] == pytest.approx(middle_s)
    assert width_s(wide) == pytest.approx(factor * width_s(narrow), abs=TICK_S)


def test_the_interval_is_scipy_s_percentile_bootstrap() -> None:
    step_s = [0.5 + 0.01 * (step * step % 17) for step in range(20)]
    expected = scipy.stats.bootstrap(
        (step_s,),
        np.median,
        n_resamples=timing.RESAMPLES,
        batch=timing.RESAMPLES_AT_ONCE,
        confidence_level=timing.CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(timing.SEED),
    ).confidence_interval
    metrics, _ = of_one_rank(step_s)
    assert [metrics[name] for name in INTERVAL] == pytest.approx([expected.low, expected.high], rel=1e-12)


def test_more_steps_of_the_same_kind_narrow_the_interval() -> None:
    few = [1.0, 1.25, 1.5, 1.75, 2.0]
    assert width_s(of_one_rank(few * 8)[0]) < width_s(of_one_rank(few)[0])


@pytest.mark.parametrize(
    ("step_s", "reason"), [([0.5], "1 measured steps"), ([0.5, 0.7], "2 measured"), ([0.5] * 9, "the same time")]
)
def test_where_no_interval_can_be_it_is_absent_and_says_why(step_s: list[float], reason: str) -> None:
    metrics, unmeasured = of_one_rank(step_s)
    for name in INTERVAL:
        assert name not in metrics
        assert reason in unmeasured[name]
    assert metrics["step_q1_s"] <= metrics["step_median_s"] <= metrics["step_q3_s"]


def test_a_step_takes_as_long_as_its_slowest_rank() -> None:
    metrics, _ = summarize([[1.0, 5.0, 1.0], [2.0, 2.0, 4.0]], samples_per_step=8, tokens_per_sample=None)
    assert metrics["step_median_s"] == 4.0  # of 2, 5, 4
    assert metrics["samples_per_s"] == 2.0
    assert metrics["step_median_rank_spread_s"] == 1.0  # of the medians 1 and 2


def test_one_rank_has_no_spread_over_ranks() -> None:
    assert of_one_rank([1.0, 5.0, 1.0])[0]["step_median_rank_spread_s"] == 0


def test_tokens_are_counted_where_the_model_says_how_many() -> None:
    metrics, unmeasured = summarize([[0.5, 0.25, 0.5]], samples_per_step=4, tokens_per_sample=128)
    assert metrics["tokens_per_s"] == 1024
    assert "tokens_per_s" not in unmeasured
    metrics, unmeasured = of_one_rank([0.5, 0.25, 0.5])
    assert "tokens_per_s" not in metrics
    assert "tokens_per_sample" in unmeasured["tokens_per_s"]


def test_on_the_cpu_by_the_monotonic_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now_s=7.0)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock.now_s)
    assert time_step(CPU, lambda: setattr(clock, "now_s", 9.5)) == 2.5


def test_on_cuda_by_events_around_the_step_on_an_idle_device(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: Any) -> None:
            seen.append(f"record on {stream}")

        def elapsed_time(self, end: Any) -> float:
            assert end is not self
            seen.append("elapsed")
            return 12.5  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: seen.append(f"wait for {device}"))
    assert time_step(torch.device("cuda", 1), lambda: seen.append("step")) == 0.0125
    wait, record = "wait for cuda:1", "record on stream of cuda:1"
    assert seen == [wait, record, "step", record, wait, "elapsed"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_s_time_is_that_of_the_device_not_of_the_call() -> None:
    """A kernel of known length in cycles: four times the cycles, more than twice the time."""
    device = torch.device("cuda")
    short_s, long_s = (time_step(device, lambda n=n: torch.cuda._sleep(n)) for n in (10_000_000, 40_000_000))
    assert 0 < 2 * short_s < long_s

"""Repeats, intervals, and what is within noise."""

import numpy as np
import pytest

from reports.cells import Trial
from reports.changes import change_of
from reports.compare import EQUAL, REGRESSION
from reports.compare_markdown import as_markdown
from reports.compare_view import as_text
from tests.reports.conftest import PEAK, Compare, in_steps, repeats, scaled, trial, with_metrics, without


def test_repeats_have_medians_and_an_interval_and_times_within_it_do_not_fail(compared: Compare) -> None:
    base = [
        with_metrics(record, step_median_s=s) for record, s in zip(repeats(5), (1.0, 1.3, 0.8, 1.1, 0.9), strict=True)
    ]
    noisy = [scaled(record, step_median_s=1.08) for record in base]
    found = compared(base, noisy, "step_median_s:+5%")
    assert found.exit_code == EQUAL
    (judged,) = found.within_noise
    assert judged.change.repeats == 5
    assert (judged.change.before, judged.change.now) == (1.0, pytest.approx(1.08))
    assert "5 repeats each side on its own" in judged.change.method
    assert "beyond a limit, but within noise" in as_text(found)
    clear = compared(base, [scaled(record, step_median_s=2) for record in base], "step_median_s:+5%")
    assert clear.exit_code == REGRESSION
    assert (clear.regressions[0].change.low or 0) > 0


def test_what_is_deterministic_has_no_noise_to_be_within(compared: Compare) -> None:
    base = [scaled(record, drift_max_rel=f) for record, f in zip(repeats(5), (1, 2, 3, 4, 5), strict=True)]
    worse = [scaled(record, drift_max_rel=f) for record, f in zip(base, (3, 1, 1.2, 0.9, 1), strict=True)]
    found = compared(base, worse, "drift_max_rel:+10%")
    assert found.exit_code == REGRESSION
    change = found.regressions[0].change
    assert change.low is not None
    assert change.high is not None
    assert change.low < 0 < change.high
    assert "5 repeats in pairs by seed" in change.method


def test_the_interval_covers_the_change_as_often_as_it_says() -> None:
    def measured(seed: int, step_s: float) -> Trial:
        return {"metrics": {"step_median_s": step_s}, "spec": {"seed": seed}}

    draw = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        sides = draw.lognormal(sigma=0.05, size=(2, 9)) * np.array([[1.0], [1.25]])
        pairs: list[tuple[Trial, Trial]] = [
            (measured(seed, before), measured(seed, now)) for seed, (before, now) in enumerate(sides.T)
        ]
        change = change_of("here", "step_median_s", pairs)
        assert change.low is not None
        assert change.high is not None
        held += change.low <= 0.25 <= change.high
    assert 0.9 < held / 200 < 1


@pytest.mark.parametrize("metric", ["step_median_s", "samples_per_s"])
@pytest.mark.parametrize(("low_now_s", "code"), [(1.05, EQUAL), (1.15, REGRESSION)])
def test_single_trials_are_told_apart_by_the_intervals_of_their_own_steps(
    compared: Compare, metric: str, low_now_s: float, code: int
) -> None:
    base = [in_steps(trial(1), 0.9, 1.0, 1.1)]
    run = [with_metrics(in_steps(trial(1), low_now_s, 1.2, 1.3), samples_per_s=80.0)]
    found = compared(base, run, f"{metric}:+5%" if metric == "step_median_s" else f"{metric}:-5%")
    assert found.exit_code == code
    assert len(found.within_noise) == (code == EQUAL)
    judged = (*found.within_noise, *found.regressions)[0]
    assert "of the median steps" in judged.change.method
    # Without an interval there is nothing to excuse it.
    bare = [without(run[0], "step_median_low_s", "1 step")]
    assert compared(base, bare, f"{metric}:{judged.limit.text}").exit_code == REGRESSION


def test_one_repeat_that_differs_is_not_called_equal(compared: Compare) -> None:
    base = repeats(3)
    found = compared(base, [scaled(base[0], **{PEAK: 1.01}), *base[1:]], f"{PEAK}:+2%")
    assert "activation_peak_bytes   0 of 1 cell equal" in as_text(found)
    assert "median equal, 1 of 3 repeats not" in as_markdown(found)

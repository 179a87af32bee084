"""Two runs to a verdict: what is planted is found, what is equal passes, what cannot be judged is not called so."""

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.record import Record
from harness.store import RunStore
from reports.compare import EQUAL, INCOMPLETE, NOT_COMPARABLE, REGRESSION, Side, compare_sides, read_side
from reports.compare_view import as_text, verdict
from reports.limits import parse_limit
from tests.reports.conftest import MIB, PEAK, Compare, on, repeats, scaled, trial, with_metrics, without


def test_a_run_and_itself_are_equal(compared: Compare, sweep: list[Record]) -> None:
    found = compared(sweep, sweep, f"{PEAK}:+0", "step_median_s:+0%", "drift_max_rel:+0%")
    assert found.exit_code == EQUAL
    assert (found.cells, found.trials) == (24, 24)
    assert [change for change in found.changes if change.differing] == []
    assert verdict(found) == "nothing worse than allowed in 24 trials"
    assert "no limit given" in verdict(compared(sweep, sweep))


@pytest.mark.parametrize(
    ("metric", "factor", "limit", "allowed"),
    [
        (PEAK, 1.03, "+2%", "+4%"),
        (PEAK, 1.03, "+0.5MiB", "+1GiB"),
        (PEAK, 1.03, "+1024", "+1e12"),
        ("drift_max_rel", 1.2, "+10%", "+25%"),
        ("gradient_angle_deg", 9000, "+0.1", "+0.5deg"),
        ("step_median_s", 1.2, "+10%", "+50%"),
        ("step_median_s", 1.2, "+100ms", "+2s"),
        ("samples_per_s", 0.9, "-5%", "-15%"),
        ("samples_per_s", 0.9, "-5", "-15"),
    ],
)
def test_a_planted_regression_is_found_and_a_wider_limit_lets_it_pass(
    compared: Compare, sweep: list[Record], metric: str, factor: float, limit: str, allowed: str
) -> None:
    worse = [scaled(sweep[2], **{metric: factor}), *sweep[:2], *sweep[3:]]
    found = compared(sweep, worse, f"{metric}:{limit}")
    assert found.exit_code == REGRESSION
    (judged,) = found.regressions
    assert "revnet14 reconstructed batch 16" in judged.change.where
    assert judged.change.now / judged.change.before == pytest.approx(factor, rel=1e-3)
    assert f"limit {limit}" in as_text(found)
    assert compared(sweep, worse, f"{metric}:{allowed}").exit_code == EQUAL
    # The other way round it is better, which is no regression.
    better = compared(worse, sweep, f"{metric}:{limit}")
    assert (better.exit_code, len(better.improvements)) == (EQUAL, 1)


def test_a_change_of_just_the_limit_is_allowed_and_a_byte_more_is_not(compared: Compare) -> None:
    base, exactly, beyond = ([with_metrics(trial(1), **{PEAK: n})] for n in (100 * MIB, 102 * MIB, 102 * MIB + 1))
    assert compared(base, exactly, f"{PEAK}:+2%").exit_code == EQUAL
    assert compared(base, beyond, f"{PEAK}:+2%").exit_code == REGRESSION


def test_from_zero_any_rise_is_beyond_a_limit_in_percent_and_is_said_so(compared: Compare) -> None:
    exact = trial(1, activations="reconstructed", reconstruction="exact")
    rounded = with_metrics(exact, drift_max_rel=1e-12)
    found = compared([exact], [rounded], "drift_max_rel:+50%")
    assert found.exit_code == REGRESSION
    assert "0 -> 1e-12, +1e-12, limit +50%, from 0 any change is beyond" in as_text(found)
    assert compared([exact], [exact], "drift_max_rel:+50%").exit_code == EQUAL
    assert compared([exact], [rounded], "drift_max_rel:+1e-9").exit_code == EQUAL


@pytest.mark.parametrize("limits", [(), (f"{PEAK}:+2%",)])
@pytest.mark.parametrize(
    ("before", "now", "code"),
    [
        ("ok", "oom", REGRESSION),
        ("ok", "diverged", REGRESSION),
        ("oom", "crashed", REGRESSION),
        ("oom", "ok", EQUAL),
        ("failed", "oom", EQUAL),
        ("oom", "diverged", EQUAL),
        ("oom", "oom", EQUAL),
        ("timeout", "timeout", INCOMPLETE),
        ("crashed", "failed", INCOMPLETE),
    ],
)
def test_a_status_that_got_worse_is_a_regression(
    compared: Compare, sweep: list[Record], limits: tuple[str, ...], before: Any, now: Any, code: int
) -> None:
    runs = [[*sweep, trial(99, status=status, reason="because", depth=110)] for status in (before, now)]
    found = compared(*runs, *limits)
    assert found.exit_code == code
    assert len(found.worse) == (code == REGRESSION)
    text = f"revnet110 stored batch 32 reconstruction fp32: {before} -> {now} (because)"
    assert (text in as_text(found)) == (before != now or code == INCOMPLETE)


def test_a_process_that_died_and_left_no_machine_is_a_regression_all_the_same(compared: Compare) -> None:
    base = repeats()
    died = trial(2, seed=2, status="crashed", reason="SIGSEGV").model_copy(update={"machine": {}, "versions": {}})
    found = compared(base, [*base[:2], died])
    assert found.exit_code == REGRESSION
    assert found.not_comparable == []
    assert compared(base, [died]).exit_code == REGRESSION
    # Of a run on another torch it is not known what it is due to.
    other = [on(record, torch="2.14.0") for record in base[:2]]
    assert compared(base, [*other, died]).exit_code == NOT_COMPARABLE


def test_what_is_missing_or_partial_is_incomplete(compared: Compare, sweep: list[Record]) -> None:
    gone = compared(sweep, sweep[1:])
    assert gone.exit_code == INCOMPLETE
    assert gone.missing == ["revnet14 stored batch 16 reconstruction fp32"]
    partial = compared(sweep, sweep, missing=2)
    assert partial.exit_code == INCOMPLETE
    assert "2 planned trials of run without a record" in as_text(partial)
    added = compared(sweep[1:], sweep)
    assert added.exit_code == EQUAL
    assert len(added.added) == 1
    worse = [scaled(sweep[1], **{PEAK: 2}), *sweep[2:]]
    assert compared(sweep, worse, f"{PEAK}:+2%").exit_code == REGRESSION
    elsewhere = [on(record, torch="2.14.0") for record in sweep[1:]]
    assert compared(sweep, elsewhere, f"{PEAK}:+2%").exit_code == NOT_COMPARABLE
    nothing = compared(sweep, [], f"{PEAK}:+2%")
    assert nothing.exit_code == INCOMPLETE
    assert compared([], [], missing=1).exit_code == INCOMPLETE
    assert "no finished trial in common" in verdict(nothing)


def test_a_limit_that_nothing_was_held_against_is_not_kept(compared: Compare) -> None:
    measured, oom = [trial(1)], [trial(1, status="oom", reason="too large")]
    assert compared(oom, measured, f"{PEAK}:+2%").exit_code == INCOMPLETE
    assert compared(oom, oom, f"{PEAK}:+2%").exit_code == INCOMPLETE
    assert compared(oom, oom).exit_code == EQUAL


@pytest.mark.parametrize("side", ["base", "run"])
def test_a_metric_that_only_one_has_is_never_equal(compared: Compare, side: str) -> None:
    whole, lacking = [trial(1)], [without(trial(1), "drift_max_rel", "the audit | was off")]
    runs = (lacking, whole) if side == "base" else (whole, lacking)
    found = compared(*runs, "drift_max_rel:+10%")
    assert found.exit_code == INCOMPLETE
    assert f"drift_max_rel: {side} has none, the audit | was off (revnet38 stored batch 32)" in as_text(found)
    assert "drift_max_rel" not in {change.metric for change in found.changes}
    # The verdict is about what was asked.
    assert compared(*runs, f"{PEAK}:+2%").exit_code == EQUAL
    assert compared(lacking, lacking).exit_code == EQUAL


def in_memory(records: list[Record], name: str) -> Side:
    """For properties, of which each example needs a run of its own."""
    store = RunStore(f"memory://{name}")
    if store.fs.exists(store.root):
        store.fs.rm(store.root, recursive=True)
    for record in records:
        store.write_trial(record)
    return read_side(store)


CELLS = st.lists(
    st.tuples(
        st.integers(1, 2**40),
        st.floats(1e-4, 1e3),
        st.one_of(st.just(0.0), st.floats(1e-16, 1.0)),
        st.sampled_from(["ok", "ok", "ok", "oom", "failed"]),
    ),
    min_size=1,
    max_size=5,
)
LIMITS = [parse_limit(f"{metric}:{sign}0%") for metric in (PEAK, "step_median_s", "drift_max_rel") for sign in "+-"]


def run_of(cells: list[tuple[int, float, float, Any]]) -> list[Record]:
    return [
        trial(n, status=status, batch_size=n // 2 + 1, seed=n % 2)
        if status != "ok"
        else with_metrics(
            trial(n, batch_size=n // 2 + 1, seed=n % 2), **{PEAK: peak}, step_median_s=step_s, drift_max_rel=drift
        )
        for n, (peak, step_s, drift, status) in enumerate(cells)
    ]


@settings(max_examples=60)
@given(CELLS)
def test_nothing_is_worse_than_itself(cells: list[tuple[int, float, float, Any]]) -> None:
    side = in_memory(run_of(cells), "same")
    # What came to no result is not called equal either.
    measured, broken = (any(cell[3] == status for cell in cells) for status in ("ok", "failed"))
    assert compare_sides(side, side, LIMITS).exit_code == (EQUAL if measured and not broken else INCOMPLETE)


@settings(max_examples=60)
@given(
    st.sampled_from([PEAK, "step_median_s", "drift_max_rel"]),
    st.floats(1e-6, 1e12),
    st.integers(0, 200),
    st.floats(1e-3, 10.0),
    st.integers(1, 4),
)
def test_a_change_above_the_limit_is_always_found(
    metric: str, before: float, percent: int, beyond: float, count: int
) -> None:
    before = math.ceil(before) * 10_000 if metric == PEAK else before
    factor = 1 + percent / 100 + beyond
    base = [with_metrics(record, **{metric: before}) for record in repeats(count)]
    side, worse = in_memory(base, "before"), in_memory([scaled(r, **{metric: factor}) for r in base], "after")
    limit = [parse_limit(f"{metric}:+{percent}%")]
    assert compare_sides(side, worse, limit).exit_code == REGRESSION
    assert compare_sides(worse, side, limit).exit_code == EQUAL

"""Sentences on drift and gradient angle: what is no number is counted, never left out of a largest."""

import math
from typing import Any

import pytest

from harness.record import Record, TraceRow, as_metrics
from reports.fidelity import angle_sentences, drift_sentences, error_sentences, guard_sentences
from reports.frames import frame_of, trace_frame, trials_frame
from reports.largest import largest
from reports.summary import summary
from tests.reports.conftest import Make, trial, with_metrics

NAN, INF = math.nan, math.inf
REBUILT: dict[str, Any] = {"activations": "reconstructed"}


def lost(record: Record, **values: float) -> Record:
    """The record as a trial leaves it that measured these values, which are not finite."""
    metrics, reasons = as_metrics(record.metrics | values, record.unmeasured)
    return record.model_copy(update={"metrics": metrics, "unmeasured": reasons})


def rebuilt(*drifts: float, **changes: Any) -> list[Record]:
    made = [trial(seed, seed=seed, **REBUILT | changes) for seed in range(len(drifts))]
    return [lost(record, drift_max_rel=drift) for record, drift in zip(made, drifts, strict=True)]


@pytest.mark.parametrize(
    ("drifts", "said"),
    [
        ((2e-7, 3e-7), "the relative drift is at most 3e-07;"),
        ((0.0, 0.0), "the relative drift is 0: every rebuilt input equals the original bit for bit;"),
        ((2e-7, NAN, NAN), "the relative drift is at most 2e-07 (but not a number in 2 of 3 trials);"),
        ((2e-7, NAN, -INF), "at most 2e-07 (but not a number in 1 of 3 trials and infinite in 1 of 3 trials);"),
        ((0.0, NAN), "0: every rebuilt input equals the original bit for bit (but not a number in 1 of 2 trials);"),
        ((NAN, NAN), "the relative drift is not a number in all 2 trials;"),
        ((INF,), "the relative drift is infinite;"),
    ],
)
def test_a_drift_that_is_no_number_is_said(drifts: tuple[float, ...], said: str) -> None:
    (sentence,) = drift_sentences(frame_of(rebuilt(*drifts)))
    assert said in sentence


def test_the_view_of_errors_says_it_too_and_the_summary_does() -> None:
    frame = frame_of(rebuilt(2e-7, NAN))
    (sentence,) = error_sentences(frame, trace_frame_of_none())
    assert "at most 2e-07 (depth 38; but not a number in 1 of 2 trials)." in sentence
    (row,) = summary(frame)
    assert row.drift == "2e-07 (not a number in 1 of 2 trials)"
    (row,) = summary(frame_of(rebuilt(NAN)))
    assert row.drift == "not a number"


def trace_frame_of_none() -> Any:
    return frame_of([]).reindex(columns=["id", "index", "name", "value"])


def test_what_was_not_measured_is_not_counted_as_lost() -> None:
    record = trial(1, **REBUILT)
    metrics = {name: value for name, value in record.metrics.items() if name != "drift_max_rel"}
    without = record.model_copy(update={"metrics": metrics, "unmeasured": {"drift_max_rel": "no reversible block"}})
    found = largest(frame_of([without, *rebuilt(1e-7)]), "drift_max_rel")
    assert (found.of, found.lost, found.value) == (1, 0, 1e-7)
    assert drift_sentences(frame_of([without])) == []


@pytest.mark.parametrize("metric", ["gradient_angle_deg", "stored_reference_angle_deg"])
def test_an_angle_that_is_no_number_is_said_in_both_views(metric: str) -> None:
    frame = frame_of([trial(0, **REBUILT), lost(trial(1, seed=1, **REBUILT), **{metric: NAN})])
    for (sentence,) in (drift_sentences(frame), angle_sentences(frame)):
        assert "but not a number in 1 of 2 trials)" in sentence
    both = frame_of([lost(trial(0, **REBUILT), **{metric: NAN})])
    for (sentence,) in (drift_sentences(both), angle_sentences(both)):
        assert "not a number" in sentence


def test_each_view_of_drift_has_sentences_of_its_own(make_run: Make) -> None:
    deep = with_metrics(trial(1, depth=38, **REBUILT), drift_max_rel=5e-7, gradient_angle_deg=1e-5)
    flat = with_metrics(trial(2, depth=14, **REBUILT), gradient_angle_deg=4e-3)
    checkpointed = with_metrics(trial(3, depth=14, activations="checkpointed"), gradient_angle_deg=0.0)
    store = make_run([deep, flat, checkpointed])
    errors = enumerate((1e-8, 5e-7, 2e-8))
    store.write_trial(deep, [TraceRow("drift", block, "rel", value) for block, value in errors], b"log")
    frame = trials_frame(store)
    traces = trace_frame(store, frame["id"], "drift")
    assert error_sentences(frame, traces) == [
        "revnet · reconstructed (compute fp32, reconstruction fp32): the relative error of a rebuilt input is at most "
        "5e-07 (depth 38, block 1 of 3, counted from 0)."
    ]
    assert angle_sentences(frame) == [
        "revnet · reconstructed: the gradient's angle to the stored one is at most 0.004 degrees (depth 14), that "
        "one's to float64 at most 5e-05 degrees.",
        "revnet · checkpointed: the gradient's angle to the stored one is 0 degrees, that one's to float64 at most "
        "5e-05 degrees.",
    ]


def test_a_guard_says_both_what_is_finite_and_what_is_not() -> None:
    guard: dict[str, Any] = {
        "activations": "reconstructed",
        "guard_every": 5,
        "guard_tolerance": 1e-3,
        "guard_action": "warn",
    }
    sound = with_metrics(trial(1, **guard), guard_checks=2, guard_rel_max=3e-6)
    spoiled = with_metrics(trial(2, seed=1, **guard), guard_checks=2)
    (sentence,) = guard_sentences(frame_of([sound, spoiled]))
    assert "a relative error of at most 3e-06 and an error that is not finite in 1 of 2 trials" in sentence


def test_of_no_trial_nothing_is_said() -> None:
    frame = frame_of([])
    assert [drift_sentences(frame), angle_sentences(frame), guard_sentences(frame)] == [[], [], []]

"""The section of drift over training: planted angles read back out of the figure and the sentences."""

from typing import Any

from harness.record import TraceRow
from reports.frames import trace_frame, trials_frame
from reports.page import build_report
from reports.training import KINDS, TABLE, angle_over_training, training_sentences
from tests.reports.conftest import Make, trial, with_metrics

STEPS = (0, 100, 200)


def rows(factor: float) -> list[TraceRow]:
    return [
        TraceRow(TABLE, step, f"{kind} {name}", factor * (index + 1) * (1 + step / 100) if name[0] == "g" else 1e-4)
        for step in STEPS
        for index, kind in enumerate(KINDS)
        for name in ("gradient_angle_deg", "stored_reference_angle_deg")
    ]


def test_each_angle_is_in_the_figure_and_zero_has_a_line_of_its_own(make_run: Make) -> None:
    fp32 = trial(1, activations="reconstructed")
    exact = trial(2, activations="reconstructed", reconstruction="exact")
    fp32 = with_metrics(fp32, followed_parted_step=120)
    store = make_run([fp32, exact])
    for record, factor in ((fp32, 1e-3), (exact, 0.0)):
        store.write_trial(record, rows(factor), b"log")
    frame = trials_frame(store)
    followed = trace_frame(store, list(frame["id"]), TABLE)
    figure: Any = angle_over_training(frame, followed)
    assert figure is not None
    drawn = {(trace.name, trace.xaxis or "x"): trace for trace in figure.data if trace.mode == "lines+markers"}
    assert len(drawn) == 2 * len(KINDS)
    for axis, index in zip(("x", "x2", "x3"), range(3), strict=True):
        line = drawn["revnet · reconstructed", axis]
        assert list(line.x) == list(STEPS)
        assert [round(y / 1e-3 / (index + 1), 6) for y in line.y] == [1, 2, 3]
        zero = drawn["revnet · reconstructed · exact", axis]
        assert list(zero.customdata) == [0, 0, 0]
        assert max(zero.y) < min(line.y)
        assert figure.layout["yaxis"]["ticktext"][0] == "0"

    sentences = training_sentences(frame, followed)
    assert "0.003° on training images, 0.006° on held-out images, 0.009° on noise" in sentences[0]
    assert "parts from the stored twin's by more than 1 % in step 120" in sentences[0]
    assert "0° on each kind of data; its loss stays within 1 %" in sentences[1]
    assert "Drift over training" in build_report(store)


def test_an_angle_that_is_no_number_is_counted_and_not_left_out(make_run: Make) -> None:
    record = trial(1, activations="reconstructed")
    store = make_run([record])
    spoiled = [
        row._replace(value=float("nan"))
        if (row.index == 200 and row.name.startswith("train")) or row.name.startswith("random gradient")
        else row
        for row in rows(1e-3)
    ]
    store.write_trial(record, spoiled, b"log")
    frame = trials_frame(store)
    (sentence,) = training_sentences(frame, trace_frame(store, list(frame["id"]), TABLE))
    assert "0.002° (not a number in 1 of 3 measurements) on training images" in sentence
    assert "0.006° on held-out images, not a number on noise" in sentence


def test_without_a_followed_trial_there_is_no_section(make_run: Make) -> None:
    store = make_run([trial(1)])
    frame = trials_frame(store)
    assert angle_over_training(frame, trace_frame(store, list(frame["id"]), TABLE)) is None
    assert "Drift over training" not in build_report(store)

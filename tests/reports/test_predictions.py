"""Predictions against measurements: what is off is named, and what cannot be compared is counted."""

import pytest

from harness.record import Record
from reports.frames import trials_frame
from reports.predictions import compared, is_mentioned, prediction_sentences
from tests.reports.conftest import Make, predicted, trial, with_metrics, with_spec


def test_what_is_right_is_right_to_the_byte(make_run: Make, sweep: list[Record]) -> None:
    frame = trials_frame(make_run([predicted(record) for record in sweep]))
    assert (compared(frame, "activation_peak_bytes")["ratio"] == 1).all()
    (sentence,) = prediction_sentences(frame)
    assert sentence.startswith("24 trials, ")
    assert sentence.count("to the byte in all") == 2


@pytest.mark.parametrize("off", [0.03, -0.03])
def test_a_planted_misprediction_is_named_as_the_worst(make_run: Make, sweep: list[Record], off: float) -> None:
    records = [predicted(record, peak_off=off if record is sweep[9] else off / 10) for record in sweep]
    spec = sweep[9].spec
    (sentence,) = prediction_sentences(trials_frame(make_run(records)))
    assert f"activation peak off by {off * 10:+.2f} % in the median and off by {off * 100:+.2f} % at worst" in sentence
    assert f"(revnet · {spec['activations']}, depth {spec['depth']}, batch {spec['batch_size']}: " in sentence


def test_a_difference_too_small_for_mib_is_said_in_bytes(make_run: Make) -> None:
    record = trial(1)
    off = with_metrics(
        predicted(record), predicted_activation_peak_bytes=int(record.metrics["activation_peak_bytes"]) - 4
    )
    (sentence,) = prediction_sentences(trials_frame(make_run([off])))
    assert "activation peak within 0.01 % in the median and at worst (revnet · stored, depth 38, batch 32: " in sentence
    assert "4 bytes too few" in sentence


def test_what_was_predicted_and_measured_as_nothing_is_right_and_something_for_nothing_is_not(make_run: Make) -> None:
    nothing = with_metrics(predicted(trial(1)), activation_saved_bytes=0, predicted_activation_saved_bytes=0)
    frame = trials_frame(make_run([nothing, with_spec(nothing, seed=1)]))
    assert compared(frame, "activation_saved_bytes")["ratio"].to_list() == [1, 1]
    wrong = with_metrics(nothing, predicted_activation_saved_bytes=1)
    assert "off without bound" in prediction_sentences(trials_frame(make_run([wrong], study=None)))[0]


def test_trials_without_a_prediction_are_counted_with_their_reason(make_run: Make) -> None:
    refused = trial(2, depth=26).model_copy(update={"unmeasured": {"predicted_activation_peak_bytes": "it branches."}})
    sentences = prediction_sentences(
        trials_frame(make_run([predicted(trial(1)), refused, trial(3, depth=14, status="oom")]))
    )
    assert sentences[0].startswith("1 trial, ")
    assert sentences[1] == "No prediction of 1 finished trial: it branches."


def test_a_run_of_before_there_were_predictions_does_not_mention_them(make_run: Make, sweep: list[Record]) -> None:
    assert not is_mentioned(trials_frame(make_run(sweep)))
    assert is_mentioned(trials_frame(make_run([*sweep, predicted(trial(99))], study=None)))

"""Records: what is refused, and that nothing is lost on the way through JSON."""

import json
import math

import pytest
from pydantic import ValidationError

from harness.errors import RecordError
from harness.record import Record, as_metrics


def test_json_loses_nothing(record: Record) -> None:
    assert Record.from_json(record.to_json(), source="here") == record


def test_an_unknown_schema_is_refused_by_name(record: Record) -> None:
    text = record.to_json().replace('"schema": 1', '"schema": 2')
    with pytest.raises(RecordError, match=r"trials/x\.json: schema = 2; this version reads schema 1"):
        Record.from_json(text, source="trials/x.json")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"schema": 1}', '{"schema": 1, "id": "a", "more": 1}'])
def test_damage_is_refused_by_name(text: str) -> None:
    with pytest.raises(RecordError, match=r"trials/x\.json"):
        Record.from_json(text, source="trials/x.json")


@pytest.mark.parametrize("metrics", [{"loss_last": math.nan}, {"step_s": math.inf}, {"peak_bytes": 1.5}])
def test_a_metric_is_finite_and_bytes_are_whole(record: Record, metrics: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        Record.model_validate(json.loads(record.to_json()) | {"metrics": metrics})


def test_what_is_not_measured_has_a_reason_and_no_zero() -> None:
    values = {"a": 1.0, "b": None, "c": math.inf, "d": None}
    metrics, unmeasured = as_metrics(values, {"a": "unused", "d": "no such thing"})
    assert metrics == {"a": 1.0}
    assert unmeasured == {"b": "not measured", "c": "the value is inf", "d": "no such thing"}


def test_half_a_character_is_read_as_a_sign_that_stands_for_it_and_a_whole_one_as_it_is(record: Record) -> None:
    """As an error has it that names a file whose name is no text."""
    odd = record.model_copy(update={"reason": "no \udc80 file \U0001f600", "git": {"commit": "\ud83d", "dirty": False}})
    assert "\\udc80" in odd.to_json()
    read = Record.from_json(odd.to_json(), source="here")
    assert read.reason == "no \ufffd file \U0001f600"
    assert read.git == {"commit": "\ufffd", "dirty": False}
    whole = record.model_copy(update={"reason": "\U0001f600"})
    assert Record.from_json(whole.to_json(), source="here").reason == "\U0001f600"

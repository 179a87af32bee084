"""Records as plain things, before any tracker has them."""

import math
from typing import Any

import pytest

from harness.record import Attempt, Record, TraceRow
from reports.exporters.rows import Row, as_row, printable, shortened
from tests.reports.conftest import trial, with_metrics, with_spec

STARTED = 1767323045.0


def row_of(record: Record, *trace: TraceRow, **study: Any) -> Row:
    return as_row(record, trace, study)


def with_attempt(record: Record, started_at: str, wall_s: float = 12.5) -> Record:
    attempt = Attempt(status=record.status, started_at=started_at, wall_s=wall_s, node="n1")
    return record.model_copy(update={"attempts": [attempt]})


def test_parameters_are_the_flat_specification_and_keep_their_types() -> None:
    record = trial(0, channels=[32, 64, 112], deepspeed={"a": {"b": True}, "c": {}})
    parameters = row_of(record).parameters
    assert parameters["depth"] == 38
    assert parameters["data.name"] == "cifar10"
    assert parameters["data.path"] is None
    assert parameters["channels"] == [32, 64, 112]
    assert parameters["deepspeed.a.b"] is True
    assert not [name for name in parameters if name.startswith("deepspeed.c")]


def test_what_was_not_measured_is_a_tag_and_no_metric() -> None:
    row = row_of(trial(0, status="oom", reason="too large"))
    assert row.metrics == {}
    assert row.tags["unmeasured.parameter_count"] == "nobody counted"
    assert (row.tags["status"], row.tags["reason"], row.tags["attempts"]) == ("oom", "too large", "0")
    assert "reason" not in row_of(trial(0)).tags
    assert row.is_result
    assert not row_of(trial(0, status="crashed")).is_result


def test_series_are_of_tables_over_steps_and_what_is_not_finite_is_told() -> None:
    trace = [
        TraceRow("step", 1, "loss", math.nan),
        TraceRow("step", 0, "loss", 2.5),
        TraceRow("guard", 5, "block 3", math.inf),
        TraceRow("memory", 0, "live_bytes", 1.0),
        TraceRow("drift", 0, "rel", 1.0),
        TraceRow("step", 2, "loss", None),  # pyright: ignore[reportArgumentType] - a file may have it
    ]
    row = row_of(trial(0), *trace)
    assert row.series.keys() == {"step/loss", "guard/block 3"}
    assert str(row.series["step/loss"]) == "[(0, 2.5), (1, nan)]"
    assert row.tags["not_finite.step/loss"] == "1: nan"
    assert row.tags["not_finite.guard/block 3"] == "5: inf"


@pytest.mark.parametrize(
    ("started_at", "wall_s", "times"),
    [
        ("2026-01-02T03:04:05Z", 12.5, (STARTED, STARTED + 12.5)),
        ("2026-01-02T04:04:05+01:00", 12.5, (STARTED, STARTED + 12.5)),
        ("2026-01-02T03:04:05", 12.5, (STARTED, STARTED + 12.5)),
        ("yesterday", 12.5, (None, None)),
        ("0001-01-01T00:00:00", 12.5, (None, None)),
        ("2026-01-02T03:04:05Z", 1e300, (None, None)),
        ("2026-01-02T03:04:05Z", -1.0, (None, None)),
    ],
)
def test_times_are_those_of_the_last_attempt_if_they_are_times(
    started_at: str, wall_s: float, times: tuple[float | None, float | None]
) -> None:
    row = row_of(with_attempt(trial(0), started_at, wall_s))
    assert (row.started_s, row.ended_s) == times
    assert (row_of(trial(0)).started_s, row_of(trial(0)).node) == (None, None)


def test_the_name_says_what_people_would_ask_for() -> None:
    record = trial(0, activations="reconstructed", reconstruction="exact", compute="bf16", seed=2)
    assert row_of(record).name == f"{record.id} revnet 38 reconstructed exact bf16 batch 32 seed 2"
    long = row_of(with_spec(record, model="a.b:" + "x\n" * 500)).name
    assert len(long) == 120
    assert "\n" not in long


def test_the_fingerprint_changes_with_anything_that_would_be_exported() -> None:
    record, point = trial(0), TraceRow("step", 0, "loss", 2.5)
    rows = [
        row_of(record),
        row_of(with_metrics(record, activation_peak_bytes=1)),
        row_of(record.model_copy(update={"reason": "x"})),
        row_of(record.model_copy(update={"versions": {}})),
        row_of(record, point),
        row_of(record, point._replace(value=math.nan)),
        row_of(record, name="depth"),
        row_of(with_attempt(record, "2026-01-02T03:04:05Z")),
    ]
    assert len({row.fingerprint for row in rows}) == len(rows)
    assert row_of(record, point).fingerprint == row_of(record, point).fingerprint


def test_texts_are_made_printable_and_short_and_say_so() -> None:
    assert printable("a\n\x00\ud800日\u202f") == "a\\n\\x00\\ud800日\u202f"
    assert shortened("x" * 100, 100) == "x" * 100
    assert shortened("x" * 101, 100) == "x" * 79 + " ... (101 characters)"

"""Frames hold every record, invent nothing, and find a planted slope."""

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest

from harness.errors import RecordError
from harness.record import Record
from reports.frames import (
    LAW_METRICS,
    depth_law,
    fit_line,
    frame_of,
    laws,
    missing_ids,
    step_bars,
    trace_frame,
    trials_frame,
)
from reports.pairs import pairs
from tests.reports.conftest import MIB, SLOPES_MIB, Make, predicted, trial, with_metrics


def test_every_record_is_a_row_and_what_is_not_measured_is_not_a_number(make_run: Make, sweep: list[Record]) -> None:
    frame = trials_frame(make_run([*sweep, trial(99, status="oom", reason="too large", depth=110)]))
    assert len(frame) == len(sweep) + 1
    row = frame[frame["status"] == "oom"].iloc[0]
    assert math.isnan(row["activation_peak_bytes"])
    assert row["reason"] == "too large"
    assert row["data.name"] == "cifar10"


def test_a_strategy_names_what_varies_and_nothing_else(make_run: Make, sweep: list[Record]) -> None:
    frame = trials_frame(make_run(sweep))
    assert set(frame["strategy"]) == {
        "revnet · stored",
        "revnet · checkpointed",
        "revnet · reconstructed",
        "revnet · reconstructed · exact",
    }


@pytest.mark.parametrize(
    ("channels", "names"),
    [
        ([[32, 64, 112]], {"revnet · stored"}),
        ([None, [8, 8, 8]], {"revnet · stored", "revnet · stored · channels [8, 8, 8]"}),
    ],
)
def test_widths_are_named_where_those_of_one_family_differ(
    make_run: Make, channels: list[list[int] | None], names: set[str]
) -> None:
    revnets = [trial(number, channels=widths) for number, widths in enumerate(channels, start=1)]
    frame = trials_frame(make_run([trial(0, model="resnet"), *revnets]))
    assert set(frame["strategy"]) == {"resnet · stored", *names}


def test_trials_of_different_image_sizes_are_kept_apart(make_run: Make) -> None:
    large = {"name": "synthetic", "path": None, "image_size": 64}
    small, other = [trial(depth, depth=depth) for depth in (14, 38)], [trial(1, depth=26, data=large)]
    frame = trials_frame(make_run([*small, *other]))
    assert set(frame["strategy"]) == {"revnet · stored", "revnet · stored · synthetic · 64 px"}
    # One depth of its own has no line, and adds no point to another's.
    assert list(depth_law(frame, "activation_peak_bytes")["strategy"]) == ["revnet · stored"]


@pytest.mark.parametrize("metric", ["activation_peak_bytes", "activation_saved_bytes"])
def test_a_planted_slope_is_found(make_run: Make, sweep: list[Record], metric: str) -> None:
    law = depth_law(trials_frame(make_run(sweep)), metric).set_index(["strategy", "batch_size"])
    assert len(law) == 8
    for (strategy, _), row in law.iterrows():  # pyright: ignore[reportGeneralTypeIssues]
        planted_mib = SLOPES_MIB[str(strategy).split(" · ")[1]]
        assert row["slope_bytes"] / MIB == pytest.approx(planted_mib, rel=1e-6)
        assert row["slope_low_bytes"] == row["slope_bytes"] == row["slope_high_bytes"]
        assert row["depths"] == 3
        assert row["residual_bytes"] == 0


@pytest.mark.parametrize("slope", [0, 512, 524288 / 3, 8.5 * MIB, -7])
def test_points_in_line_have_an_interval_of_no_width(slope: float) -> None:
    blocks = [3, 6, 9, 27]
    law = fit_line(blocks, [5033612 + slope * b for b in blocks])
    assert law.slope_low_bytes == law.slope_bytes == law.slope_high_bytes == pytest.approx(slope)
    assert law.intercept_bytes == pytest.approx(5033612)
    assert law.residual_bytes == 0


def test_one_byte_off_the_line_gives_the_interval_a_width() -> None:
    law = fit_line([1, 2, 3], [100 * MIB, 200 * MIB, 300 * MIB + 1])
    assert law.slope_low_bytes < law.slope_bytes < law.slope_high_bytes
    assert law.residual_bytes == pytest.approx(1 / 3, rel=1e-3)


def test_the_interval_is_of_students_t_with_two_degrees_less_than_points() -> None:
    # By hand: residuals 0.5, -1, 0.5, so s squared is 1.5 / 1, and the slope's error is the root of 1.5 / 2.
    law = fit_line([1, 2, 3], [0, 1, 5])
    assert law.slope_bytes == pytest.approx(2.5)
    assert law.residual_bytes == pytest.approx(1)
    assert law.slope_high_bytes - law.slope_bytes == pytest.approx(12.706 * 0.75**0.5, rel=1e-4)


@pytest.mark.parametrize("depths", [3, 5, 12])
def test_the_interval_covers_the_slope_as_often_as_it_says(depths: int) -> None:
    draw = np.random.default_rng(0)
    blocks = [3 * (n + 1) for n in range(depths)]
    line = 7 + 4 * np.array(blocks)
    fitted = [fit_line(blocks, list(line + draw.normal(size=depths))) for _ in range(400)]
    covered = sum(law.slope_low_bytes <= 4 <= law.slope_high_bytes for law in fitted) / len(fitted)
    assert 0.91 < covered < 0.99


def test_two_depths_have_a_slope_and_no_spread_and_one_depth_has_neither(make_run: Make) -> None:
    frame = trials_frame(make_run([trial(1, depth=14), trial(2, depth=26), trial(3, depth=26, batch_size=64)]))
    law = depth_law(frame, "activation_peak_bytes")
    assert law["batch_size"].to_list() == [32]
    assert law["depths"].to_list() == [2]
    assert law["slope_bytes"].notna().all()
    assert law[["slope_low_bytes", "slope_high_bytes", "residual_bytes"]].isna().all(axis=None)


def test_repeats_of_a_depth_are_one_point(make_run: Make) -> None:
    records = [trial(10 * depth + seed, depth=depth, seed=seed) for depth in (14, 26) for seed in range(3)]
    assert depth_law(trials_frame(make_run(records)), "activation_peak_bytes")["depths"].to_list() == [2]


@pytest.mark.parametrize("axis", ["channels", "data"])
def test_networks_and_data_sets_that_differ_have_lines_of_their_own(make_run: Make, axis: str) -> None:
    other = {
        "channels": [32, 64, 112],
        "data": {"name": "synthetic", "path": None, "image_size": 32},
    }[axis]
    records = [trial(depth, depth=depth) for depth in (14, 26, 38)]
    records += [
        with_metrics(trial(100 + depth, depth=depth, **{axis: other}), activation_peak_bytes=depth * MIB)
        for depth in (14, 26, 38)
    ]
    law = depth_law(trials_frame(make_run(records)), "activation_peak_bytes")
    assert len(law) == 2
    assert (law["residual_bytes"] == 0).all()


def test_all_laws_are_in_one_table_measured_and_predicted(make_run: Make, sweep: list[Record]) -> None:
    table = laws(trials_frame(make_run([predicted(record) for record in sweep])))
    assert table.columns.to_list()[:4] == ["model", "strategy", "batch_size", "metric"]
    assert table["metric"].value_counts().to_dict() == dict.fromkeys(LAW_METRICS, 8)
    slopes = table.pivot_table(index=["strategy", "batch_size"], columns="metric", values="slope_bytes")
    assert (slopes["predicted_activation_peak_bytes"] == slopes["activation_peak_bytes"]).all()


def test_runs_without_predictions_or_trials_have_a_table_of_laws_too(make_run: Make, sweep: list[Record]) -> None:
    measured = {"activation_peak_bytes", "activation_saved_bytes"}
    assert set(laws(trials_frame(make_run(sweep)))["metric"]) == measured
    empty = laws(trials_frame(make_run([trial(1)], study=None)).iloc[:0])
    assert empty.empty
    assert "slope_low_bytes" in empty


def test_the_bar_of_a_step_is_the_interval_where_there_is_one_and_else_the_quartiles(make_run: Make) -> None:
    new = with_metrics(trial(1, depth=14), step_median_low_s=0.5, step_median_high_s=0.75)
    bars = step_bars(trials_frame(make_run([new, trial(2, depth=26)])))
    assert bars["of_median"].to_list() == [True, False]
    assert bars["low_s"].to_list() == [0.5, pytest.approx(0.2 * 6 * 0.9)]
    assert bars["high_s"].to_list() == [0.75, pytest.approx(0.2 * 6 * 1.1)]


def test_a_run_without_trials_has_empty_frames(make_run: Make) -> None:
    store = make_run([], missing=2)
    frame = trials_frame(store)
    assert frame.empty
    assert depth_law(frame, "activation_peak_bytes").empty
    assert len(missing_ids(store)) == 2
    assert trace_frame(store, [], "drift").empty


def test_traces_keep_their_trial(make_run: Make) -> None:
    records = [trial(1, depth=14), trial(2, depth=26)]
    traces = trace_frame(make_run(records), [record.id for record in records], "drift")
    assert traces.groupby("id").size().to_dict() == {records[0].id: 3, records[1].id: 6}
    assert isinstance(traces, pd.DataFrame)


def test_an_unknown_schema_is_refused(make_run: Make) -> None:
    store = make_run([trial(1)])
    path = f"{store.root}/trials/{trial(1).id}.json"
    store.fs.pipe_file(path, store.fs.cat_file(path).replace(b'"schema": 1', b'"schema": 9'))
    with pytest.raises(RecordError, match="schema = 9"):
        trials_frame(store)


MODES: tuple[dict[str, Any], ...] = ({}, {"compile": True}, {"cuda_graph": True})


def test_how_a_step_is_executed_keeps_trials_apart_and_what_says_nothing_is_as_written(make_run: Make) -> None:
    records = [
        trial(depth, depth=depth, activations=activations, **mode)
        for depth in (14, 26)
        for activations in ("stored", "reconstructed")
        for mode in MODES
    ]
    assert sum("compile" in record.spec for record in records) == 4
    frame = trials_frame(make_run(records))
    assert frame["compile"].value_counts().to_dict() == {False: 8, True: 4}
    assert frame["cuda_graph"].value_counts().to_dict() == {False: 8, True: 4}
    ways = ("", " · compiled", " · graph")
    assert set(frame["strategy"]) == {f"revnet · {kind}{way}" for kind in ("stored", "reconstructed") for way in ways}
    assert set(depth_law(frame, "activation_peak_bytes")["strategy"]) == set(frame["strategy"])
    found = pairs(frame, "step_median_s")
    assert {(pair.name, pair.stored, len(pair.table)) for pair in found} == {
        ("reconstructed", "stored", 2),
        ("reconstructed · compiled", "stored · compiled", 2),
        ("reconstructed · graph", "stored · graph", 2),
    }
    # Where none differs nothing is said of it.
    alike = frame_of([record for record in records if record.spec.get("compile")])
    assert set(alike["strategy"]) == {"revnet · stored", "revnet · reconstructed"}

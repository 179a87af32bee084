"""Frames hold every record, invent nothing, and find a planted slope."""

import math

import pandas as pd
import pytest

from harness.errors import RecordError
from harness.record import Record
from reports.frames import depth_law, fit_line, missing_ids, trace_frame, trials_frame
from tests.reports.conftest import MIB, SLOPES_MIB, Make, trial


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


def test_trials_of_different_image_sizes_are_kept_apart(make_run: Make) -> None:
    large = {"name": "synthetic", "path": None, "image_size": 64}
    small, other = [trial(depth, depth=depth) for depth in (14, 38)], [trial(1, depth=26, data=large)]
    frame = trials_frame(make_run([*small, *other]))
    assert set(frame["strategy"]) == {"revnet · stored", "revnet · stored · 64 px"}
    # One depth of its own has no line, and adds no point to another's.
    assert list(depth_law(frame, "activation_peak_bytes")["strategy"]) == ["revnet · stored"]


@pytest.mark.parametrize("metric", ["activation_peak_bytes", "activation_saved_bytes"])
def test_a_planted_slope_is_found(make_run: Make, sweep: list[Record], metric: str) -> None:
    law = depth_law(trials_frame(make_run(sweep)), metric).set_index(["strategy", "batch_size"])
    assert len(law) == 8
    for (strategy, _), row in law.iterrows():  # pyright: ignore[reportGeneralTypeIssues]
        planted_mib = SLOPES_MIB[str(strategy).split(" · ")[1]]
        assert row["slope_bytes"] / MIB == pytest.approx(planted_mib, rel=1e-6)
        assert row["low_bytes"] == pytest.approx(row["high_bytes"], rel=1e-6)


def test_a_bent_line_shows_in_its_least_and_greatest_slope() -> None:
    slope, _, low, high = fit_line([1, 2, 3], [0, 1, 5])
    assert (low, high) == (1, 4)
    assert low < slope < high


def test_two_depths_have_a_slope_and_no_spread_and_one_depth_has_neither(make_run: Make) -> None:
    frame = trials_frame(make_run([trial(1, depth=14), trial(2, depth=26), trial(3, depth=26, batch_size=64)]))
    law = depth_law(frame, "activation_peak_bytes")
    assert law["batch_size"].to_list() == [32]
    assert law["low_bytes"].isna().all()


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

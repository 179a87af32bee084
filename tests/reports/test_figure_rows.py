"""What a trace says of the trials that it draws is what it draws; a page that filters goes by it."""

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.record import Record
from reports import figures
from reports.columns import columns_of
from reports.frames import frame_of, trials_frame
from reports.memory_figures import PANELS, memory_against
from tests.reports.conftest import MIB, Make, on, predicted, repeats, trial, with_metrics

PEAK, SAVED = "activation_peak_bytes", "activation_saved_bytes"


def frame_with_repeats() -> pd.DataFrame:
    cells = [
        (depth, batch, kind) for depth in (14, 26, 38) for batch in (16, 32) for kind in ("stored", "reconstructed")
    ]
    records = [
        predicted(with_metrics(record, activation_peak_bytes=int(record.metrics[PEAK]) + 1000 * number))
        for depth, batch, kind in cells
        for number, record in enumerate(repeats(depth=depth, batch_size=batch, activations=kind))
    ]
    return frame_of(records)


def middle(frame: pd.DataFrame, rows: list[int], metric: str) -> float:
    return float(frame.loc[rows, metric].median())


@pytest.mark.parametrize("axis", ["depth", "batch_size"])
def test_a_point_of_memory_is_the_median_of_its_rows_and_a_line_is_through_all_of_its(axis: Any) -> None:
    frame = frame_with_repeats()
    figure: Any = memory_against(frame, PEAK, "activation peak", axis)
    measured = [trace for trace in figure.data if trace.mode == "markers"]
    dashed = [trace for trace in figure.data if trace.line.dash == "dash"]
    fitted = [trace for trace in figure.data if "all" in trace.meta]
    assert measured
    assert len(dashed) == len(measured)
    for traces, metric in ((measured, PEAK), (dashed, f"predicted_{PEAK}")):
        for trace in traces:
            for x, y, rows in zip(trace.x, trace.y, trace.meta["points"], strict=True):
                assert set(frame.loc[rows, axis]) == {x}
                assert set(frame.loc[rows, "strategy"]) == {trace.legendgroup}
                assert y == pytest.approx(middle(frame, rows, metric) / MIB, rel=1e-12)
    rows = sorted(row for trace in measured for group in trace.meta["points"] for row in group)
    assert rows == sorted(frame.index)
    assert sorted(row for trace in fitted for row in trace.meta["all"]) == rows


def test_the_slope_by_batch_is_per_sample() -> None:
    records = [trial(n, depth=14, batch_size=batch) for n, batch in enumerate((8, 16, 32))]
    records = [with_metrics(r, activation_peak_bytes=(5 + 3 * int(r.spec["batch_size"])) * MIB) for r in records]
    figure: Any = memory_against(frame_of(records), PEAK, "activation peak", "batch_size")
    [line] = [trace for trace in figure.data if "all" in trace.meta]
    assert line.hovertemplate.startswith("3.000 MiB per sample")
    assert (list(line.x), list(line.y)) == ([8, 32], pytest.approx([29, 101]))
    alone = frame_of([record for record in records if record.spec["batch_size"] == 8])
    assert memory_against(alone, PEAK, "activation peak", "batch_size") is None


def test_of_many_batches_the_least_the_largest_and_some_between_have_a_panel() -> None:
    records = [trial(n, depth=14, batch_size=2**n) for n in range(9)]
    figure: Any = memory_against(frame_of(records), PEAK, "activation peak")
    titles = [note.text for note in figure.layout.annotations]
    assert len(titles) == PANELS
    assert (titles[0], titles[-1]) == ("batch 1", "batch 256")


@pytest.mark.parametrize(("capacity_mib", "is_drawn"), [(40, True), (4000, False)])
def test_where_the_device_s_memory_ends_is_drawn_unless_it_is_far_off(capacity_mib: int, is_drawn: bool) -> None:
    records = [on(trial(n, depth=depth), device_memory_bytes=capacity_mib * MIB) for n, depth in enumerate((14, 26))]
    figure: Any = memory_against(frame_of(records), PEAK, "activation peak")
    assert any("memory: " in note.text for note in figure.layout.annotations) == is_drawn
    gone = trial(9, depth=38, status="oom", reason="planted")
    figure = memory_against(frame_of([*records, on(gone, device_memory_bytes=capacity_mib * MIB)]), PEAK, "peak")
    [cross] = [trace for trace in figure.data if trace.marker.symbol == "x-open"]
    assert list(cross.y) == [capacity_mib]
    assert any(note.text == f"memory: {capacity_mib:,} MiB" for note in figure.layout.annotations)


def test_each_point_of_time_is_its_trial_and_each_arrow_joins_two_of_a_cell(
    make_run: Make, sweep: list[Record]
) -> None:
    frame = trials_frame(make_run(sweep))
    figure: Any = figures.time_against_memory(frame)
    for trace in figure.data:
        for place, (row, *others) in enumerate(trace.meta.get("points", ())):
            assert not others
            assert trace.x[place] == pytest.approx(frame.loc[row, PEAK] / MIB)
            assert trace.y[place] == pytest.approx(frame.loc[row, "step_median_s"] * 1e3)
    rows = frame[["activations", "model", "depth", "batch_size"]].to_numpy().tolist()
    [arrows] = [trace for trace in figure.data if "segments" in trace.meta]
    for number, (start, end) in enumerate(arrows.meta["segments"]):
        (before, *same), (after, *same_after) = rows[start], rows[end]
        assert (before, same) == ("stored", same_after)
        assert after != "stored"
        assert arrows.x[3 * number + 1] == pytest.approx(frame.loc[end, PEAK] / MIB)
        assert arrows.x[3 * number + 2] is None


@given(st.lists(st.tuples(st.sampled_from([14, 26]), st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=14))
def test_nobody_beats_the_pareto_front_and_somebody_everybody_else(cells: list[tuple[int, int, int]]) -> None:
    rows = pd.DataFrame(cells, columns=["depth", PEAK, "step_median_s"]).assign(batch_size=16)
    front = set(figures.pareto_front(rows))

    def beats(a: int, b: int) -> bool:
        (da, pa, sa), (db, pb, sb) = cells[a], cells[b]
        return da == db and pa <= pb and sa <= sb and (pa, sa) != (pb, sb)

    everyone = range(len(cells))
    for row in everyone:
        if row in front:
            assert not any(beats(other, row) for other in everyone)
        else:
            assert any(beats(other, row) or cells[other] == cells[row] for other in front)


def test_an_angle_of_0_stands_at_the_bottom_and_the_floor_is_dotted() -> None:
    angles = {14: 0.0, 26: 2e-3}
    records = [
        with_metrics(
            trial(n, depth=depth, activations="reconstructed"),
            gradient_angle_deg=angle,
            stored_reference_angle_deg=1e-4,
        )
        for n, (depth, angle) in enumerate(angles.items())
    ]
    figure: Any = figures.angle_against_depth(frame_of(records))
    [line, floor] = figure.data
    assert line.y[0] < 1e-4 < line.y[1] == 2e-3
    assert list(line.customdata) == [0.0, 2e-3]
    assert floor.line.dash == "dot"
    assert list(floor.y) == [1e-4, 1e-4]
    assert figures.angle_against_depth(frame_of([trial(1, depth=14)])) is None


def test_the_columns_of_a_page_are_the_frame_s_rows_in_order_and_its_facets_choose_them() -> None:
    frame = frame_with_repeats()
    other = with_metrics(trial(90, depth=50, compute="bf16"), loss_last=math.inf)
    records = [*_records_of(frame), other]
    frame = frame_of(records)
    columns = columns_of(frame, records)
    assert columns["ids"] == list(frame["id"])
    facets = {facet["key"]: facet for facet in columns["facets"]}
    assert list(facets) == ["strategy", "precision", "depth", "batch_size"]
    for key in ("strategy", "depth", "batch_size"):
        found = [facets[key]["words"][code] for code in facets[key]["codes"]]
        assert found == [f"{value:g}" if isinstance(value, float | np.integer | int) else value for value in frame[key]]
    assert facets["precision"]["words"] == ["bf16 / fp32", "fp32 / fp32"]
    losses = next(column["values"] for column in columns["metrics"] if column["name"] == "loss_last")
    assert losses[columns["ids"].index(other.id)] == "Infinity"


def test_trials_without_a_depth_can_be_chosen_too() -> None:
    records = [trial(1, depth=14), trial(2, depth=None), trial(3, depth=26)]
    frame = frame_of(records)
    [facet] = [facet for facet in columns_of(frame, records)["facets"] if facet["key"] == "depth"]
    assert facet["words"] == ["14", "26", "–"]
    assert [facet["words"][code] for code in facet["codes"]] == [
        "–" if math.isnan(depth) else f"{depth:g}" for depth in frame["depth"]
    ]


def test_a_way_to_execute_a_step_is_a_choice_where_trials_differ_in_it() -> None:
    records = [trial(1, depth=14), trial(2, depth=14, compile=True)]
    frame = frame_of(records)
    facets = {facet["key"]: facet for facet in columns_of(frame, records)["facets"]}
    assert "cuda_graph" not in facets
    chosen = [facets["compile"]["words"][code] for code in facets["compile"]["codes"]]
    assert chosen == ["yes" if on else "no" for on in frame["compile"]]
    assert sorted(chosen) == ["no", "yes"]


def _records_of(frame: pd.DataFrame) -> list[Record]:
    rows = frame[["id", "spec", "status", "reason", "metrics"]].to_dict("records")
    return [Record.model_validate({**row, "reason": None}) for row in rows]

"""What a trace says of the trials that it draws is what it draws; a page that filters goes by it."""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.record import Record
from reports import drift_figures, figures
from reports.columns import columns_of
from reports.frames import frame_of, trials_frame
from reports.memory_figures import PANELS, SLOPE_ROOM, SLOPES, memory_against
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


def fitted_in(figure: Any) -> list[Any]:
    return [trace for trace in figure.data if trace.meta and trace.meta.get("kind") == "fitted"]


def middle(frame: pd.DataFrame, rows: list[int], metric: str) -> float:
    return float(frame.loc[rows, metric].median())


@pytest.mark.parametrize("axis", ["depth", "batch_size"])
def test_a_point_of_memory_is_the_median_of_its_rows_and_a_line_is_through_all_of_its(axis: Any) -> None:
    frame = frame_with_repeats()
    figure: Any = memory_against(frame, PEAK, "activation peak", axis)
    measured = [trace for trace in figure.data if trace.mode == "markers"]
    dashed = [trace for trace in figure.data if trace.line.dash == "dash" and trace.meta]
    fitted = fitted_in(figure)
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
    [line] = fitted_in(figure)
    assert line.hovertemplate.startswith("3.00 ± 0 MiB per sample")
    assert (list(line.x), list(line.y)) == ([8, 32], pytest.approx([29, 101]))
    alone = frame_of([record for record in records if record.spec["batch_size"] == 8])
    assert memory_against(alone, PEAK, "activation peak", "batch_size") is None


def slopes_in(figure: Any) -> list[Any]:
    return [trace for trace in figure.data if trace.mode == "text"]


def test_each_slope_stands_at_its_line_s_end_above_those_below_it() -> None:
    frame = frame_with_repeats()
    figure: Any = memory_against(frame, PEAK, "activation peak")
    lines = {(line.legendgroup, line.xaxis): line for line in fitted_in(figure)}
    found = slopes_in(figure)
    assert {(slope.legendgroup, slope.xaxis) for slope in found} == lines.keys()
    for slope in found:
        line = lines[slope.legendgroup, slope.xaxis]
        assert slope.x[0] == line.x[-1]
        assert slope.y[0] >= line.y[-1]
        assert slope.meta["all"] == line.meta["all"]
        assert line.hovertemplate.startswith(f"{slope.text[0].strip()} MiB per block")
    assert any(slope.text[0].strip() == "8.50 ± 0" for slope in found)
    gap = frame[PEAK].max() / MIB * SLOPE_ROOM
    for axis in ("x", "x2"):
        heights = sorted(slope.y[0] for slope in found if slope.xaxis == axis)
        assert all(b - a >= gap * 0.999 for a, b in pairwise(heights))


def test_of_too_many_lines_no_slope_is_written() -> None:
    records = [
        trial(n, depth=depth, channels=[width] * 3)
        for n, (depth, width) in enumerate((depth, width) for depth in (14, 26) for width in range(8, 8 + SLOPES + 1))
    ]
    figure: Any = memory_against(frame_of(records), PEAK, "activation peak")
    assert len(fitted_in(figure)) == SLOPES + 1
    assert slopes_in(figure) == []
    assert not any("at its end" in (trace.name or "") for trace in figure.data)


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
            if "more" in trace.meta:
                more = {head: values[place] for head, values in trace.meta["more"].items()}
                assert (more["depth"], more["batch"]) == (frame.loc[row, "depth"], frame.loc[row, "batch_size"])
                assert more["bar is"] == "quartiles of the steps"
                assert more["bar from (ms)"] == pytest.approx(frame.loc[row, "step_q1_s"] * 1e3)
                assert more["bar to (ms)"] == pytest.approx(frame.loc[row, "step_q3_s"] * 1e3)
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


CELLS = st.lists(st.tuples(st.sampled_from([14, 26]), st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=14)


def beats(one: tuple[int, int, int], other: tuple[int, int, int]) -> bool:
    """Of the same depth, no worse in peak and time, and better in one of them."""
    (depth, peak, time), (other_depth, other_peak, other_time) = one, other
    return depth == other_depth and peak <= other_peak and time <= other_time and (peak, time) != other[1:]


@given(CELLS)
def test_the_pareto_front_is_what_nobody_beats(cells: list[tuple[int, int, int]]) -> None:
    rows = pd.DataFrame(cells, columns=["depth", PEAK, "step_median_s"]).assign(batch_size=16)
    unbeaten = [row for row, cell in enumerate(cells) if not any(beats(other, cell) for other in cells)]
    assert sorted(figures.pareto_front(rows)) == unbeaten


def test_equals_are_all_ringed_and_what_is_only_as_fast_with_more_memory_is_not() -> None:
    made = [trial(n, seed=n, activations=kind) for n, kind in enumerate(("stored", "stored", "reconstructed"))]
    sizes = (4, 4, 5)
    records = [
        with_metrics(record, activation_peak_bytes=size * MIB, step_median_s=0.5)
        for record, size in zip(made, sizes, strict=True)
    ]
    figure: Any = figures.time_against_memory(frame_of(records))
    [rings] = [trace for trace in figure.data if trace.name and trace.name.startswith("Pareto")]
    assert list(rings.x) == [4, 4]
    said = {
        trace.name: trace.meta["more"]["on the Pareto front"] for trace in figure.data if "more" in (trace.meta or {})
    }
    assert said == {"revnet · stored": ["yes", "yes"], "revnet · reconstructed": ["no"]}


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
    figure: Any = drift_figures.angle_against_depth(frame_of(records))
    line, floor = (trace for trace in figure.data if trace.meta)
    assert line.y[0] < 1e-4 < line.y[1] == 2e-3
    assert list(line.customdata) == [0.0, 2e-3]
    assert floor.line.dash == "dot"
    assert list(floor.y) == [1e-4, 1e-4]
    assert drift_figures.angle_against_depth(frame_of([trial(1, depth=14)])) is None


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

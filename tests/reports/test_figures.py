"""Figures: units on the axes, nothing dropped, nothing drawn where there is nothing."""

from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest

from harness.record import Record, TraceRow
from reports import drift_figures, figures
from reports.frames import trace_frame, trials_frame
from reports.memory_figures import memory_against
from tests.reports.conftest import MIB, Make, predicted, trial, with_metrics


def traces(figure: go.Figure | None) -> list[Any]:
    assert figure is not None
    return list(figure.data)


def drawn(store: Any) -> dict[str, go.Figure | None]:
    frame = trials_frame(store)
    return {
        "peak": memory_against(frame, "activation_peak_bytes", "activation peak"),
        "time": figures.time_against_memory(frame),
        "drift": drift_figures.drift_by_block(frame, trace_frame(store, frame["id"], "drift")),
    }


def test_every_axis_has_a_unit_or_says_what_it_counts(make_run: Make, sweep: list[Record]) -> None:
    titles = {
        name: tuple(figure.layout[axis]["title"]["text"] for axis in ("xaxis", "yaxis"))
        for name, figure in drawn(make_run(sweep)).items()
        if figure is not None
    }
    assert titles == {
        "peak": ("depth (layers)", "activation peak (MiB)"),
        "time": ("activation peak (MiB)", "step time, median (ms)"),
        "drift": ("reversible block, from the input", "network · precision"),
    }


def test_every_measured_trial_is_a_point_in_mib(make_run: Make, sweep: list[Record]) -> None:
    points = [t for t in traces(drawn(make_run(sweep))["peak"]) if t.mode == "markers"]
    values = sorted(float(y) for t in points for y in t.y)
    assert values == pytest.approx(sorted(r.metrics["activation_peak_bytes"] / MIB for r in sweep))


def test_strategies_differ_by_more_than_colour(make_run: Make, sweep: list[Record]) -> None:
    points = [t for t in traces(drawn(make_run(sweep))["peak"]) if t.mode == "markers" and t.showlegend is not False]
    assert len({t.marker.color for t in points}) == len({t.marker.symbol for t in points}) == 4


@pytest.mark.parametrize(("limit_mib", "at_mib"), [(64, 64), (None, 20 + 8.5 * 3)])
def test_out_of_memory_is_an_open_cross_at_the_limit(make_run: Make, limit_mib: int | None, at_mib: float) -> None:
    resources = {"gpus_per_worker": None, "cpus_per_worker": 1, "memory_bytes": limit_mib and limit_mib * MIB}
    records = [trial(1, depth=14), trial(2, depth=38, status="oom", reason="too large", resources=resources)]
    crosses = [t for t in traces(drawn(make_run(records))["peak"]) if t.marker.symbol == "x-open"]
    assert [list(t.x) for t in crosses] == [[38]]
    assert [float(y) for t in crosses for y in t.y] == [at_mib]


def test_each_line_runs_from_stored_to_another_of_its_cell(make_run: Make, sweep: list[Record]) -> None:
    lines = next(t for t in traces(drawn(make_run(sweep))["time"]) if t.mode == "lines+markers")
    assert len(lines.x) == 3 * (len(sweep) - sum(r.spec["activations"] == "stored" for r in sweep))
    assert all(start > end for start, end in zip(lines.x[0::3], lines.x[1::3], strict=True))


def test_the_bars_of_step_times_are_the_interval_of_the_median(make_run: Make) -> None:
    record = with_metrics(trial(1), step_median_s=0.5, step_median_low_s=0.375, step_median_high_s=0.75)
    points = next(t for t in traces(drawn(make_run([record]))["time"]) if t.name == "revnet · stored")
    assert [list(points.error_y.arrayminus), list(points.error_y.array)] == [[125], [250]]


def test_predicted_is_drawn_against_measured_in_mib_beside_the_line_where_they_are_equal(make_run: Make) -> None:
    frame = trials_frame(make_run([predicted(trial(1, depth=14), peak_off=0.5), trial(2, depth=26)]))
    figure = figures.predicted_against_measured(frame)
    points = [t for t in traces(figure) if t.mode == "markers"]
    assert [(list(t.x), list(t.y)) for t in points] == [([8.5 * 3], [8.5 * 3]), ([45.5], [1.5 * 45.5])]
    lines = [t for t in traces(figure) if t.mode == "lines"]
    assert all(list(t.x) == list(t.y) for t in lines)
    assert figure is not None
    units = {str(figure.layout[axis]["title"]["text"]) for axis in ("xaxis", "yaxis", "xaxis2", "yaxis2")}
    assert units == {"measured (MiB)", "predicted (MiB)"}
    assert figures.predicted_against_measured(trials_frame(make_run([trial(3)], study=None)).iloc[1:2]) is None


def test_drift_tells_zero_and_not_finite_from_small(make_run: Make) -> None:
    exact = trial(1, activations="reconstructed", reconstruction="exact")
    plain = trial(2, activations="reconstructed")
    store = make_run([exact, plain])
    store.write_trial(plain, [TraceRow("drift", 0, "rel", 1e-6), TraceRow("drift", 1, "rel", float("nan"))])
    found = traces(drawn(store)["drift"])
    named = {t.name for t in found if t.type == "scatter"}
    assert named == {"0, bit for bit", "NaN or infinite"}
    scale = next(t for t in found if t.type == "heatmap" and t.showscale is not False)
    assert np.nanmin(np.array(scale.z, dtype=float)) == pytest.approx(-6)


def heat_map(records: list[Record], make_run: Make) -> Any:
    store = make_run(records, study=None)
    frame = trials_frame(store)
    figure = drift_figures.drift_by_block(frame, trace_frame(store, frame["id"], "drift"))
    return next(t for t in traces(figure) if t.type == "heatmap")


def test_a_network_without_a_depth_or_with_one_precision_is_called_so(make_run: Make) -> None:
    affine = {"activations": "reconstructed", "model": "own", "depth": None, "log_scale_gain": 0.1}
    records = [
        trial(1, depth=14, activations="reconstructed"),
        trial(2, depth=26, activations="reconstructed", reconstruction="exact"),
        trial(3, **affine),
        trial(4, **affine | {"compute": "bf16", "reconstruction": "bf16", "log_scale_gain": 1.0}),
    ]
    assert set(heat_map(records, make_run).y) == {
        "revnet14 · fp32",
        "revnet26 · fp32, reconstruction exact",
        "own · fp32, gain 0.1",
        "own · bf16, gain 1.0",
    }


@pytest.mark.parametrize("reconstruction", ["fp32", "exact"])
def test_the_heat_map_s_table_has_every_digit(make_run: Make, reconstruction: str) -> None:
    record = trial(1, depth=14, activations="reconstructed", reconstruction=reconstruction)
    found = heat_map([record], make_run)
    rel = record.metrics["drift_max_rel"]
    assert [list(line) for line in found.customdata] == [[rel / (block + 1) for block in range(3)]]
    assert found.showscale == (reconstruction == "fp32")


def test_nothing_is_drawn_where_nothing_was_measured(make_run: Make) -> None:
    store = make_run([trial(1, status="failed", reason="planted")], missing=1)
    assert set(drawn(store).values()) == {None}
    without_depth = make_run([trial(2, depth=None)], study=None)
    assert drawn(without_depth)["peak"] is None

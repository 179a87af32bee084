"""Frames to Plotly figures, one function a figure. Units on every axis; 1 MiB = 2**20 bytes."""

import math

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from reports.dress import MIB, dressed, each, marked, points, strategy_styles
from reports.frames import CELL, step_bars
from reports.predictions import COMPARED, compared, prediction_name

# What two trials have in common of which one may be better; networks and precisions are what is chosen between.
_CHOICE = ("depth", "data.name", "data.image_size", "batch_size", "zero_stage", "workers")
# Of more than these, bars, arrows and lines would cover the points.
BARS, ARROWS, LINES = 500, 200, 1000


def time_against_memory(frame: pd.DataFrame) -> go.Figure | None:
    """Median step time in ms against activation peak in MiB; an arrow leads from stored to the others of one cell, and
    a ring marks the Pareto front."""
    needed = ["step_median_s", "activation_peak_bytes"]
    if any(name not in frame for name in needed):
        return None
    usable = frame[frame["status"] == "ok"].dropna(subset=needed)
    if usable.empty:
        return None
    x, y = usable["activation_peak_bytes"] / MIB, usable["step_median_s"] * 1e3
    figure = go.Figure()
    pairs = from_stored(usable)
    if len(pairs) > LINES:
        pairs = []
    figure.add_scatter(
        x=[value for start, end in pairs for value in (x[start], x[end], None)],
        y=[value for start, end in pairs for value in (y[start], y[end], None)],
        mode="lines+markers" if len(pairs) <= ARROWS else "lines",
        marker={"symbol": "arrow", "angleref": "previous", "size": [0, 9, 0] * len(pairs), "standoff": 6}
        if len(pairs) <= ARROWS
        else None,
        line={"color": "#bbb", "width": 1},
        hoverinfo="skip",
        showlegend=False,
        meta={"segments": [list(pair) for pair in pairs]},
    )
    front = pareto_front(usable)
    ringed = set(front)
    figure.add_scatter(
        x=x[front],
        y=y[front],
        mode="markers",
        name="Pareto front of its depth and batch",
        marker={"symbol": "circle-open", "size": 24, "color": "#222", "line": {"width": 1}},
        hoverinfo="skip",
        meta=points([row] for row in front),
    )
    for strategy, (color, marker, _) in strategy_styles(frame).items():
        rows = usable[usable["strategy"] == strategy]
        bars, middle = step_bars(rows), rows["step_median_s"]
        figure.add_scatter(
            x=x[rows.index],
            y=y[rows.index],
            error_y={
                "type": "data",
                "symmetric": False,
                "array": (bars["high_s"] - middle) * 1e3,
                "arrayminus": (middle - bars["low_s"]) * 1e3,
                "thickness": 1,
                "width": 2,
            }
            if len(usable) <= BARS
            else None,
            mode="markers",
            name=strategy,
            marker=marked(color, marker),
            text=[_cell_name(depth, batch) for depth, batch in zip(rows["depth"], rows["batch_size"], strict=True)],
            hovertemplate="%{text}<br>%{x:.1f} MiB, %{y:.0f} ms<extra>%{fullData.name}</extra>",
            meta=each(rows)
            | {
                "more": {
                    "depth": rows["depth"].tolist(),
                    "batch": rows["batch_size"].tolist(),
                    "bar from (ms)": (bars["low_s"] * 1e3).tolist(),
                    "bar to (ms)": (bars["high_s"] * 1e3).tolist(),
                    "bar is": [_bar_name(*bar) for bar in bars[["low_s", "of_median"]].itertuples(index=False)],
                    "on the Pareto front": ["yes" if row in ringed else "no" for row in rows.index],
                }
            },
        )
    figure.update_xaxes(title_text="activation peak (MiB)", rangemode="tozero")
    figure.update_yaxes(title_text="step time, median (ms)", rangemode="tozero")
    return dressed(figure, "Median step time in ms against activation peak in MiB, by strategy")


def _cell_name(depth: float, batch: float) -> str:
    return f"batch {batch:g}" if math.isnan(depth) else f"depth {depth:g}, batch {batch:g}"


def _bar_name(low_s: float, of_median: bool) -> str:
    return "none" if math.isnan(low_s) else "95 % interval of the median" if of_median else "quartiles of the steps"


def pareto_front(rows: pd.DataFrame) -> list[int]:
    """The rows that none of the same depth, data, batch and ranks beats: no other has as little of both activation peak
    and step time, and less of one. Of equals all are in, or none."""
    front: list[int] = []
    for _, group in rows.groupby([field for field in _CHOICE if field in rows], sort=False, dropna=False):
        # By ascending peak; the fastest of each, unless one of a lower peak is as fast.
        best = math.inf
        for _, equals in group.groupby("activation_peak_bytes"):
            least = equals["step_median_s"].min()
            if least < best:
                best = least
                front += equals.index[equals["step_median_s"] == least].tolist()
    return front


def from_stored(rows: pd.DataFrame) -> list[tuple[int, int]]:
    """The first stored row of each cell, with each of the cell's others."""
    pairs: list[tuple[int, int]] = []
    for _, cell in rows.groupby([field for field in CELL if field in rows], sort=False, dropna=False):
        stored = cell.index[cell["activations"] == "stored"].tolist()
        others = cell.index[cell["activations"] != "stored"].tolist()
        pairs += [(stored[0], other) for other in others if stored]
    return pairs


def predicted_against_measured(frame: pd.DataFrame) -> go.Figure | None:
    """Predicted against measured MiB of saved activations and of the peak, one panel each, with the line where they are
    equal. None when no trial has both."""
    tables = {metric: rows for metric in COMPARED if len(rows := compared(frame, metric))}
    if not tables:
        return None
    titles = [COMPARED[metric] for metric in tables]
    named: set[str] = set()
    figure = make_subplots(cols=len(tables), horizontal_spacing=0.08, subplot_titles=titles)
    for column, (metric, rows) in enumerate(tables.items(), start=1):
        measured_mib, predicted_mib = rows[metric] / MIB, rows[prediction_name(metric)] / MIB
        end_mib = 1.05 * max(measured_mib.max(), predicted_mib.max())
        figure.add_scatter(
            x=[0, end_mib], y=[0, end_mib], mode="lines", name="predicted = measured", legendgroup="equal",
            line={"color": "#888", "width": 1}, hoverinfo="skip", showlegend=column == 1, row=1, col=column,
        )  # fmt: skip
        for strategy, (color, marker, _) in strategy_styles(frame).items():
            own = rows["strategy"] == strategy
            if not own.any():
                continue
            figure.add_scatter(
                x=measured_mib[own],
                y=predicted_mib[own],
                mode="markers",
                name=strategy,
                legendgroup=strategy,
                showlegend=strategy not in named,
                marker=marked(color, marker),
                meta=each(rows[own])
                | {"more": {"depth": rows.loc[own, "depth"].tolist(), "batch": rows.loc[own, "batch_size"].tolist()}},
                text=[
                    f"depth {row.depth}, batch {row.batch_size}: predicted / measured = {row.ratio:.4f}"
                    for row in rows[own].itertuples()
                ],
                hovertemplate="%{text}<br>%{x:.2f} MiB measured, %{y:.2f} MiB predicted<extra>%{fullData.name}</extra>",
                row=1,
                col=column,
            )
            named.add(strategy)
        figure.update_xaxes(title_text="measured (MiB)", rangemode="tozero", row=1, col=column)
        figure.update_yaxes(title_text="predicted (MiB)", rangemode="tozero", row=1, col=column)
    description = f"Predicted against measured MiB of {' and '.join(titles)}, by strategy"
    return dressed(figure, description).update_layout(height=400)

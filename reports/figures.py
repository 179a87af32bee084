"""Frames to Plotly figures, one function a figure. Units on every axis; 1 MiB = 2**20 bytes."""

import math
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
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
    a ring marks what no other trial of the same depth and batch beats in both."""
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
    figure.add_scatter(
        x=x[front],
        y=y[front],
        mode="markers",
        name="Pareto front of its depth and batch",
        marker={"symbol": "circle-open", "size": 15, "color": "#222", "line": {"width": 1}},
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
            meta=each(rows),
        )
    figure.update_xaxes(title_text="activation peak (MiB)", rangemode="tozero")
    figure.update_yaxes(title_text="step time, median (ms)", rangemode="tozero")
    return dressed(figure, "Median step time in ms against activation peak in MiB, by strategy")


def _cell_name(depth: float, batch: float) -> str:
    return f"batch {batch:g}" if math.isnan(depth) else f"depth {depth:g}, batch {batch:g}"


def pareto_front(rows: pd.DataFrame) -> list[int]:
    """The rows that no other of the same depth, data, batch and ranks beats in both: activation peak and step time."""
    front: list[int] = []
    for _, group in rows.groupby([field for field in _CHOICE if field in rows], sort=False, dropna=False):
        best = math.inf
        ordered = group.sort_values(["activation_peak_bytes", "step_median_s"])
        for row, step_s in zip(ordered.index.tolist(), ordered["step_median_s"].tolist(), strict=True):
            if step_s < best:
                best = step_s
                front.append(row)
    return front


def from_stored(rows: pd.DataFrame) -> list[tuple[int, int]]:
    """The first stored row of each cell, with each of the cell's others."""
    pairs: list[tuple[int, int]] = []
    for _, cell in rows.groupby([field for field in CELL if field in rows], sort=False, dropna=False):
        stored = cell.index[cell["activations"] == "stored"].tolist()
        others = cell.index[cell["activations"] != "stored"].tolist()
        pairs += [(stored[0], other) for other in others if stored]
    return pairs


def angle_against_depth(frame: pd.DataFrame) -> go.Figure | None:
    """Gradient angle in degrees against depth, by strategy; dotted, how far the stored gradient is from float64.

    An angle of 0, which a logarithmic axis has no place for, stands on a line of its own at the bottom. None when no
    trial that rebuilds its activations has an angle and a depth.
    """
    angle, floor = "gradient_angle_deg", "stored_reference_angle_deg"
    if angle not in frame:
        return None
    rows = frame[(frame["status"] == "ok") & (frame["activations"] != "stored")].dropna(subset=["depth", angle])
    if rows.empty:
        return None
    values = pd.concat([rows[name] for name in (angle, floor) if name in rows])
    positive = values[values > 0]
    zero = 10.0 ** (math.floor(math.log10(positive.min())) - 1) if len(positive) else 1e-16
    figure = go.Figure()
    for strategy, (color, marker, _) in strategy_styles(frame).items():
        own = rows[rows["strategy"] == strategy]
        for name, look in (
            (angle, {"mode": "lines+markers", "line": {"color": color, "width": 1.5}}),
            (floor, {"mode": "lines", "line": {"color": color, "dash": "dot", "width": 1}}),
        ):
            if name not in own or own[name].isna().all():
                continue
            groups = own.dropna(subset=[name]).groupby("depth")
            middle = groups[name].median()
            figure.add_scatter(
                x=middle.index,
                y=middle.where(middle > 0, zero),
                customdata=middle,
                name=strategy if name == angle else f"{strategy}: stored against float64",
                marker=marked(color, marker),
                hovertemplate="%{customdata:.3g} degrees at depth %{x}<extra>%{fullData.name}</extra>",
                meta=points(groups.groups.values()) | ({"kind": "floor"} if name == floor else {}),
                **look,
            )
    powers = range(round(math.log10(zero)) + 1, 3)
    step = max(1, len(powers) // 8)
    ticks = {zero: "0"} | {10.0**power: f"1e{power}" if power else "1" for power in powers if power % step == 0}
    figure.update_yaxes(type="log", tickvals=list(ticks), ticktext=list(ticks.values()))
    figure.update_yaxes(title_text="gradient angle (degrees)")
    figure.update_xaxes(title_text="depth (layers)")
    return dressed(figure, "Gradient angle in degrees against depth, by strategy").update_layout(height=400)


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
                meta=each(rows[own]),
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


def drift_by_block(frame: pd.DataFrame, traces: pd.DataFrame) -> go.Figure | None:
    """Heat map: a row a reconstructed trial, a column a block, log10 of the relative error.

    An error of exactly 0 has its own colour, and NaN and infinity another. None when no trial has drift.
    """
    rel = traces[traces["name"] == "rel"] if len(traces) else traces
    shown = frame[(frame["activations"] == "reconstructed") & frame["id"].isin(set(rel["id"]))] if len(rel) else rel
    if shown.empty:
        return None
    # Drift depends on network and precision, not on the batch that is timed: one row each.
    keys = [f for f in ("model", "depth", "compute", "reconstruction") if f in shown]
    for field in ("channels", "log_scale_gain", "data.name", "data.image_size"):
        if field in shown and shown[field].nunique(dropna=False) > 1:
            keys.append(field)
    same = shown.groupby(keys, dropna=False).groups.values()
    lines = {row: group.tolist() for group in same for row in group}
    shown = shown.sort_values([*keys, "batch_size"]).drop_duplicates(keys)
    meta = {"lines": [lines[row] for row in shown.index]}
    labels = [_network_name(row) for row in shown[keys].to_dict("records")]
    blocks = range(int(rel[rel["id"].isin(set(shown["id"]))]["index"].max()) + 1)
    table = rel.pivot_table(index="id", columns="index", values="value", dropna=False)
    grid = table.reindex(index=shown["id"], columns=blocks).to_numpy(dtype=float)
    measured = rel.assign(there=1).pivot_table(index="id", columns="index", values="there")
    there = measured.reindex(index=shown["id"], columns=blocks).notna().to_numpy()
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log10(grid)
    finite = np.isfinite(logs)
    figure = go.Figure()
    x = [f"{block}" for block in blocks]
    text = [[_drift_text(grid[i, j], there[i, j]) for j in blocks] for i in range(len(labels))]
    if finite.any():
        figure.add_heatmap(
            z=np.where(finite, logs, np.nan),
            x=x,
            y=labels,
            colorscale="Cividis",
            colorbar={"title": {"text": "log10 of the<br>relative error"}, "thickness": 14},
            text=text,
            hovertemplate="%{y}, block %{x}: %{text}<extra></extra>",
            meta=meta,
        )
    _add_flat(figure, np.where(grid == 0, 1.0, np.nan), x, labels, "#44aa99", "0, bit for bit", meta)
    _add_flat(figure, np.where(there & ~np.isfinite(grid), 1.0, np.nan), x, labels, "#cc3311", "NaN or infinite", meta)
    figure.update_xaxes(title_text="reversible block, from the input", type="category")
    figure.update_yaxes(title_text="network, precision", type="category", autorange="reversed")
    figure = dressed(figure, "Relative error of the rebuilt input of each block, log10, by network and precision")
    return figure.update_layout(height=180 + 34 * len(labels))


def _add_flat(
    figure: go.Figure,
    z: np.ndarray,
    x: Sequence[str],
    y: Sequence[str],
    color: str,
    name: str,
    meta: dict[str, list[list[int]]],
) -> None:
    """Cells of one colour that stand apart from the scale, with an entry in the legend."""
    if np.isnan(z).all():
        return
    figure.add_heatmap(
        z=z, x=x, y=y, colorscale=[[0, color], [1, color]], showscale=False, meta=meta,
        hovertemplate=f"%{{y}}, block %{{x}}: {name}<extra></extra>",
    )  # fmt: skip
    figure.add_scatter(
        x=[None], y=[None], mode="markers", name=name, marker={"color": color, "symbol": "square", "size": 12}
    )


def _network_name(fields: dict[Hashable, Any]) -> str:
    given = {key: value for key, value in fields.items() if not pd.isna(value)}
    return " ".join(f"gain {value}" if key == "log_scale_gain" else str(value) for key, value in given.items())


def _drift_text(value: float, there: bool) -> str:
    return f"{value:.2e}" if there else ""

"""Frames to Plotly figures, one function a figure. Units on every axis; 1 MiB = 2**20 bytes."""

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.colors import qualitative
from plotly.subplots import make_subplots

from reports.frames import CELL, depth_law, step_bars
from reports.predictions import COMPARED, compared, prediction_name

MIB = 2**20
# Told apart without colour too: by marker and dash.
_MARKERS = ("circle", "square", "diamond", "triangle-up", "pentagon", "star", "hexagon", "triangle-down", "bowtie")
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
# Where a drift of exactly 0 is drawn on a logarithmic colour scale, and what it is called there.
ZERO_LOG10 = -20.0


def memory_against_depth(frame: pd.DataFrame, metric: str, label: str) -> go.Figure | None:
    """`metric` (bytes) in MiB against depth, one panel a batch size: points, fitted lines, spread of repeats.

    A trial that ran out of memory is an open cross at its limit, or at the top where none is known. None when no
    trial has the metric and a depth.
    """
    if metric not in frame:
        return None
    frame = frame.dropna(subset=["depth"])
    if frame[metric].isna().all():
        return None
    batches = sorted(frame["batch_size"].unique())
    figure = make_subplots(
        cols=len(batches),
        shared_yaxes=True,
        horizontal_spacing=0.03,
        subplot_titles=[f"batch {batch}" for batch in batches],
    )
    styles = strategy_styles(frame)
    law = depth_law(frame, metric)
    top_mib = frame[metric].max() / MIB
    for column, batch in enumerate(batches, start=1):
        for strategy, style in styles.items():
            cell = frame[(frame["strategy"] == strategy) & (frame["batch_size"] == batch)]
            measured = cell[cell["status"] == "ok"].dropna(subset=[metric])
            first = column == 1
            if len(measured):
                _add_points(figure, measured, metric, label, strategy, style, column, legend=first)
            line = law[(law["strategy"] == strategy) & (law["batch_size"] == batch)]
            if len(line):
                _add_line(figure, measured, line.iloc[0], style, column)
            _add_out_of_memory(figure, cell[cell["status"] == "oom"], top_mib, strategy, style, column)
        figure.update_xaxes(title_text="depth (layers)", row=1, col=column)
    figure.update_yaxes(title_text=f"{label} (MiB)", rangemode="tozero", row=1, col=1)
    return dressed(figure, f"{label} in MiB against depth in layers, by strategy")


def time_against_memory(frame: pd.DataFrame) -> go.Figure | None:
    """Median step time in ms against activation peak in MiB; a thin line joins stored to the others of one cell."""
    needed = ["step_median_s", "activation_peak_bytes"]
    if any(name not in frame for name in needed):
        return None
    usable = frame[frame["status"] == "ok"].dropna(subset=needed)
    if usable.empty:
        return None
    figure = go.Figure()
    cell_fields = [field for field in CELL if field in usable]
    xs: list[float | None] = []
    ys: list[float | None] = []
    for _, cell in usable.groupby(cell_fields, sort=False, dropna=False):
        start = cell[cell["activations"] == "stored"]
        for _, end in cell[cell["activations"] != "stored"].iterrows() if len(start) else ():
            xs += [start.iloc[0]["activation_peak_bytes"] / MIB, end["activation_peak_bytes"] / MIB, None]
            ys += [start.iloc[0]["step_median_s"] * 1e3, end["step_median_s"] * 1e3, None]
    figure.add_scatter(x=xs, y=ys, mode="lines", line={"color": "#bbb", "width": 1}, hoverinfo="skip", showlegend=False)
    for strategy, (color, marker, _) in strategy_styles(frame).items():
        rows = usable[usable["strategy"] == strategy]
        bars, middle = step_bars(rows), rows["step_median_s"]
        figure.add_scatter(
            x=rows["activation_peak_bytes"] / MIB,
            y=rows["step_median_s"] * 1e3,
            error_y={
                "type": "data",
                "symmetric": False,
                "array": (bars["high_s"] - middle) * 1e3,
                "arrayminus": (middle - bars["low_s"]) * 1e3,
                "thickness": 1,
                "width": 2,
            },
            mode="markers",
            name=strategy,
            marker={"color": color, "symbol": marker, "size": 9, "line": {"width": 1, "color": "#333"}},
            text=[f"depth {row.depth}, batch {row.batch_size}" for row in rows.itertuples()],
            hovertemplate="%{text}<br>%{x:.1f} MiB, %{y:.0f} ms<extra>%{fullData.name}</extra>",
        )
    figure.update_xaxes(title_text="activation peak (MiB)", rangemode="tozero")
    figure.update_yaxes(title_text="step time, median (ms)", rangemode="tozero")
    return dressed(figure, "Median step time in ms against activation peak in MiB, by strategy")


def predicted_against_measured(frame: pd.DataFrame) -> go.Figure | None:
    """Predicted against measured MiB of saved activations and of the peak, one panel each, with the line where they are
    equal. None when no trial has both."""
    tables = {metric: rows for metric in COMPARED if len(rows := compared(frame, metric))}
    if not tables:
        return None
    titles = [COMPARED[metric] for metric in tables]
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
                showlegend=column == 1,
                marker={"color": color, "symbol": marker, "size": 9, "line": {"width": 1, "color": "#333"}},
                text=[
                    f"depth {row.depth}, batch {row.batch_size}: predicted / measured = {row.ratio:.4f}"
                    for row in rows[own].itertuples()
                ],
                hovertemplate="%{text}<br>%{x:.2f} MiB measured, %{y:.2f} MiB predicted<extra>%{fullData.name}</extra>",
                row=1,
                col=column,
            )
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
    shown = shown.sort_values([*keys, "batch_size"]).drop_duplicates(keys)
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
        )
    _add_flat(figure, np.where(grid == 0, 1.0, np.nan), x, labels, "#44aa99", "0, bit for bit")
    _add_flat(figure, np.where(there & ~np.isfinite(grid), 1.0, np.nan), x, labels, "#cc3311", "NaN or infinite")
    figure.update_xaxes(title_text="reversible block, from the input", type="category")
    figure.update_yaxes(title_text="network, precision", type="category", autorange="reversed")
    figure = dressed(figure, "Relative error of the rebuilt input of each block, log10, by network and precision")
    return figure.update_layout(height=190 + 34 * len(labels), margin={"l": 10, "r": 10, "t": 40, "b": 10})


def _add_points(
    figure: go.Figure,
    rows: pd.DataFrame,
    metric: str,
    label: str,
    strategy: str,
    style: tuple[str, str, str],
    column: int,
    *,
    legend: bool,
) -> None:
    color, marker, _ = style
    by_depth = rows.groupby("depth")[metric]
    middle, low, high = by_depth.median() / MIB, by_depth.min() / MIB, by_depth.max() / MIB
    figure.add_scatter(
        x=middle.index,
        y=middle,
        error_y={
            "type": "data",
            "symmetric": False,
            "array": high - middle,
            "arrayminus": middle - low,
            "visible": bool((high > low).any()),
        },
        mode="markers",
        name=strategy,
        legendgroup=strategy,
        showlegend=legend,
        marker={"color": color, "symbol": marker, "size": 9, "line": {"width": 1, "color": "#333"}},
        hovertemplate=f"depth %{{x}}: %{{y:.2f}} MiB {label}<extra>{strategy}</extra>",
        row=1,
        col=column,
    )


def _add_line(figure: go.Figure, rows: pd.DataFrame, line: pd.Series, style: tuple[str, str, str], column: int) -> None:
    color, _, dash = style
    ends = rows.sort_values("blocks").iloc[[0, -1]]
    figure.add_scatter(
        x=ends["depth"],
        y=(line["intercept_bytes"] + line["slope_bytes"] * ends["blocks"]) / MIB,
        mode="lines",
        line={"color": color, "dash": dash, "width": 1.5},
        legendgroup=line["strategy"],
        showlegend=False,
        hovertemplate=f"{line['slope_bytes'] / MIB:.3f} MiB per block<extra>{line['strategy']}</extra>",
        row=1,
        col=column,
    )


def _add_out_of_memory(
    figure: go.Figure, rows: pd.DataFrame, top_mib: float, strategy: str, style: tuple[str, str, str], column: int
) -> None:
    if rows.empty:
        return
    limits = rows.get("resources.memory_bytes", pd.Series(np.nan, index=rows.index)).astype(float) / MIB
    figure.add_scatter(
        x=rows["depth"],
        y=limits.fillna(top_mib),
        mode="markers",
        name=f"{strategy}: out of memory",
        legendgroup=strategy,
        marker={"color": style[0], "symbol": "x-open", "size": 12, "line": {"width": 2}},
        hovertemplate="depth %{x}: out of memory<extra>%{fullData.name}</extra>",
        row=1,
        col=column,
    )


def _add_flat(figure: go.Figure, z: np.ndarray, x: Sequence[str], y: Sequence[str], color: str, name: str) -> None:
    """Cells of one colour that stand apart from the scale, with an entry in the legend."""
    if np.isnan(z).all():
        return
    figure.add_heatmap(
        z=z, x=x, y=y, colorscale=[[0, color], [1, color]], showscale=False,
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


def strategy_styles(frame: pd.DataFrame) -> dict[str, tuple[str, str, str]]:
    """Colour, marker and dash of each strategy, the same in every figure of a page."""
    names = sorted(frame["strategy"].unique())
    colors = [color for color in qualitative.Safe if color != "rgb(136, 136, 136)"]
    return {
        name: (colors[i % len(colors)], _MARKERS[i % len(_MARKERS)], _DASHES[i % len(_DASHES)])
        for i, name in enumerate(names)
    }


def dressed(figure: go.Figure, description: str) -> go.Figure:
    """Room for the legend below the axes, so that many strategies cover nothing; `description` is read aloud."""
    return figure.update_layout(
        template="plotly_white",
        height=470,
        # Above the panels' titles there is room for the tool bar.
        margin={"l": 10, "r": 10, "t": 70, "b": 10},
        legend={"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0},
        showlegend=True,
        font={"size": 13},
        meta={"description": description},
        hoverlabel={"namelength": -1},
    )

"""Drift by block, and the gradient angle against depth."""

import math
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from reports.dress import FLOOR_LOOK, add_key, darkened, dressed, lined, marked, points, strategy_styles

_SPELLED = {"channels": "channels {}", "log_scale_gain": "gain {}", "data.image_size": "{} px"}


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
            (angle, {"mode": "lines+markers"} | lined(color, marker)),
            (floor, {"mode": "lines", "line": FLOOR_LOOK | {"color": darkened(color)}, "zorder": 3}),
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
                legendgroup=strategy,
                showlegend=name == angle,
                meta=points(groups.groups.values()) | ({"kind": "floor"} if name == floor else {}),
                **look,
            )
    if floor in rows and rows[floor].notna().any():
        add_key(figure, "stored against float64", FLOOR_LOOK)
    powers = range(round(math.log10(zero)) + 1, 3)
    step = max(1, len(powers) // 8)
    ticks = {zero: "0"} | {10.0**power: f"1e{power}" if power else "1" for power in powers if power % step == 0}
    figure.update_yaxes(type="log", tickvals=list(ticks), ticktext=list(ticks.values()))
    figure.update_yaxes(title_text="gradient angle (degrees)")
    figure.update_xaxes(title_text="depth (layers)")
    return dressed(figure, "Gradient angle in degrees against depth, by strategy").update_layout(height=400)


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
    places = range(len(labels))
    # Also where there is no colour to give: the table behind the figure is of these.
    figure.add_heatmap(
        z=np.where(finite, logs, np.nan),
        x=x,
        y=labels,
        colorscale="Cividis",
        colorbar={"title": {"text": "log10 of the<br>relative error"}, "thickness": 14},
        showscale=bool(finite.any()),
        text=[[_drift_text(grid[i, j], there[i, j]) for j in blocks] for i in places],
        customdata=[[_exact(grid[i, j]) if there[i, j] else None for j in blocks] for i in places],
        hovertemplate="%{y}, block %{x}: %{text}<extra></extra>",
        meta=meta,
    )
    _add_flat(figure, np.where(grid == 0, 1.0, np.nan), x, labels, "#44aa99", "0, bit for bit", meta)
    _add_flat(figure, np.where(there & ~np.isfinite(grid), 1.0, np.nan), x, labels, "#cc3311", "NaN or infinite", meta)
    figure.update_xaxes(title_text="reversible block, from the input", type="category")
    figure.update_yaxes(title_text="network · precision", type="category", autorange="reversed")
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
    """`revnet26 · fp32, reconstruction exact, gain 0.1`; one precision where both are the same, no depth where there is
    none."""
    given = {str(key): value for key, value in fields.items() if not pd.isna(value)}
    depth = given.pop("depth", None)
    network = f"{given.pop('model', '')}{'' if depth is None else f'{depth:g}'}"
    compute, reconstruction = given.pop("compute", None), given.pop("reconstruction", None)
    parts = [] if compute is None else [str(compute)]
    if reconstruction not in (None, compute):
        parts.append(f"reconstruction {reconstruction}")
    parts += [_SPELLED.get(key, "{}").format(value) for key, value in given.items()]
    return " · ".join(filter(None, (network, ", ".join(parts))))


def _exact(value: float) -> float | str:
    """To the last digit, also in JSON, which has no NaN and no infinity."""
    return float(value) if math.isfinite(value) else str(value)


def _drift_text(value: float, there: bool) -> str:
    return f"{value:.2e}" if there else ""

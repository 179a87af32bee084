"""Memory against depth and against batch size: points, the lines through them, what was predicted, and the limit."""

import math
from typing import Any, Literal, NamedTuple

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from reports.dress import MIB, add_key, darkened, dressed, lined, marked, points, strategy_styles
from reports.frames import batch_law, depth_law
from reports.predictions import prediction_name
from reports.summary import slope_text

Axis = Literal["depth", "batch_size"]
PANELS = 4
# Of more lines in a panel their slopes would cover it; of each the part of the axis's length that its text needs.
SLOPES, SLOPE_ROOM = 8, 0.055
PREDICTED_LOOK: dict[str, Any] = {"dash": "dash", "width": 1.5}
_COLUMNS = ("model", "strategy", "status", "depth", "blocks", "batch_size", "resources.memory_bytes", "machine")


class _End(NamedTuple):
    """Where a line ends, and what is to be said there; `meta` and `where` are the line's."""

    x: float
    y_mib: float
    text: str
    color: str
    meta: dict[str, Any]
    where: dict[str, Any]


class _Against(NamedTuple):
    axis: Axis
    other: Axis
    title: str
    other_name: str
    per: str


_AXES: dict[Axis, _Against] = {
    "depth": _Against("depth", "batch_size", "depth (layers)", "batch", "block"),
    "batch_size": _Against("batch_size", "depth", "batch size (per rank)", "depth", "sample"),
}


def memory_against(frame: pd.DataFrame, metric: str, label: str, axis: Axis = "depth") -> go.Figure | None:
    """`metric` (bytes) in MiB against depth or batch size, one panel for each value of the other, at most PANELS of
    them from the least to the largest.

    Repeats are one point, with the spread of them; a line is fitted through those of a strategy; its prediction is
    dashed. A trial that ran out of memory is an open cross at its limit or its device's capacity, or at the top where
    neither is known. None when no trial has the metric and a depth, or all have the same batch size.
    """
    if metric not in frame:
        return None
    against = _AXES[axis]
    # Of thousands of trials, many slices are made below.
    needed = {*_COLUMNS, metric, prediction_name(metric)}
    frame = frame.dropna(subset=["depth"])[[column for column in frame if column in needed]]
    if frame[metric].isna().all() or (axis == "batch_size" and frame["batch_size"].nunique() < 2):
        return None
    others = _spread(sorted(frame[against.other].unique()))
    titles = [f"{against.other_name} {value:g}" for value in others]
    figure = make_subplots(cols=len(others), shared_yaxes=True, horizontal_spacing=0.03, subplot_titles=titles)
    top_mib = frame[metric].max() / MIB
    limits = limits_mib(frame)
    named: set[str] = set()
    slopes: list[list[_End]] = []
    for column, value in enumerate(others, start=1):
        ends: list[_End] = []
        for strategy, style in strategy_styles(frame).items():
            cell = frame[(frame["strategy"] == strategy) & (frame[against.other] == value)]
            where: dict[str, Any] = {"row": 1, "col": column, "legendgroup": strategy}
            measured = cell[cell["status"] == "ok"].dropna(subset=[metric])
            if len(measured):
                _add_points(figure, measured, metric, label, axis, style, strategy, strategy not in named, where)
                named.add(strategy)
                end = _add_line(figure, measured, metric, against, style, strategy, where)
                ends += [] if end is None else [end]
            _add_prediction(figure, cell, metric, axis, style, strategy, where)
            _add_out_of_memory(figure, cell[cell["status"] == "oom"], limits, top_mib, axis, style, strategy, where)
        slopes.append(ends)
        # One range for all panels, so that one that a filter empties keeps its scale.
        figure.update_xaxes(title_text=against.title, matches="x" if column > 1 else None, row=1, col=column)
    figure.update_yaxes(title_text=f"{label} (MiB)", rangemode="tozero", row=1, col=1)
    has_slopes = _add_slopes(figure, slopes, frame[axis], top_mib)
    _add_keys(figure, "least squares" + f"; at its end, MiB per {against.per}" * has_slopes)
    _add_capacity(figure, limits, top_mib, any_oom=bool((frame["status"] == "oom").any()))
    return dressed(figure, f"{label} in MiB against {against.title}, by strategy")


def limits_mib(frame: pd.DataFrame) -> pd.Series:
    """What each trial had to fit into: its limit, else the memory of its device; NaN where neither is known."""
    own = frame.get("resources.memory_bytes", pd.Series(float("nan"), index=frame.index)).astype(float)
    device = pd.Series([machine.get("device_memory_bytes") for machine in frame["machine"]], index=frame.index)
    return own.fillna(device.astype(float)) / MIB


def _spread(values: list[Any]) -> list[Any]:
    """At most PANELS of them, the first and the last among them."""
    if len(values) <= PANELS:
        return values
    return [values[round(i * (len(values) - 1) / (PANELS - 1))] for i in range(PANELS)]


def _add_points(
    figure: go.Figure,
    rows: pd.DataFrame,
    metric: str,
    label: str,
    axis: Axis,
    style: tuple[str, str, str],
    strategy: str,
    in_legend: bool,
    where: dict[str, Any],
) -> None:
    groups = rows.groupby(axis)
    middle, low, high = (getattr(groups[metric], how)() / MIB for how in ("median", "min", "max"))
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
        showlegend=in_legend,
        marker=marked(style[0], style[1]),
        hovertemplate=f"{_AXES[axis].title.split(' (')[0]} %{{x}}: %{{y:.2f}} MiB {label}<extra>{strategy}</extra>",
        meta=points(groups.groups.values()) | {"more": {"lowest (MiB)": low.tolist(), "highest (MiB)": high.tolist()}},
        **where,
    )


def _add_line(
    figure: go.Figure,
    rows: pd.DataFrame,
    metric: str,
    against: _Against,
    style: tuple[str, str, str],
    strategy: str,
    where: dict[str, Any],
) -> _End | None:
    if against.axis == "depth":
        # Its law is against blocks; between two depths that is a line too.
        laws = depth_law(rows, metric)
        if laws.empty:
            return None
        law, ends = laws.iloc[0], rows.dropna(subset=["blocks"]).sort_values("blocks").iloc[[0, -1]]
        x, at = ends["depth"].tolist(), ends["blocks"]
    else:
        fitted = batch_law(rows, metric)
        if fitted is None:
            return None
        law = fitted._asdict()
        x = [rows["batch_size"].min(), rows["batch_size"].max()]
        at = pd.Series(x)
    y_mib = ((law["intercept_bytes"] + law["slope_bytes"] * at) / MIB).tolist()
    text = slope_text(law, margin=True)
    meta = {"all": [int(row) for row in rows.index]}
    figure.add_scatter(
        x=x,
        y=y_mib,
        mode="lines",
        showlegend=False,
        hovertemplate=f"{text} MiB per {against.per}<extra>{strategy}</extra>",
        meta=meta | {"kind": "fitted"},
        **lined(style[0], style[1]),
        **where,
    )
    return _End(x[-1], y_mib[-1], text, style[0], meta, where)


def _add_slopes(figure: go.Figure, panels: list[list[_End]], x: pd.Series, top_mib: float) -> bool:
    """The slope of each line at its end, one above the other where ends are close. Returns whether there are any: of
    too many lines there are none."""
    if not 0 < max(map(len, panels)) <= SLOPES:
        return False
    # Each panel has the same width of text, and is the narrower the more there are.
    room = min(0.9, 0.13 * len(panels)) * float(x.max() - x.min())
    for ends in panels:
        at_mib = -math.inf
        for end in sorted(ends, key=lambda end: end.y_mib):
            at_mib = max(end.y_mib, at_mib + top_mib * SLOPE_ROOM)
            figure.add_scatter(
                # The second point has no text and makes room for that of the first; an axis knows of points alone, and
                # of two axes plotly.js finds the range of neither where one is given.
                x=[end.x, end.x + room],
                y=[at_mib, at_mib],
                mode="text",
                text=["\u00a0" * 4 + end.text, ""],
                textposition="middle right",
                textfont={"size": 11, "color": darkened(end.color)},
                cliponaxis=False,
                hoverinfo="skip",
                showlegend=False,
                meta=end.meta,
                **end.where,
            )
    return True


def _add_keys(figure: go.Figure, line: str) -> None:
    kinds = {trace.meta["kind"] for trace in figure.data if trace.meta and "kind" in trace.meta}
    if "fitted" in kinds:
        add_key(figure, line, {"width": 1.5})
    if "predicted" in kinds:
        add_key(figure, "predicted", PREDICTED_LOOK)


def _add_prediction(
    figure: go.Figure,
    rows: pd.DataFrame,
    metric: str,
    axis: Axis,
    style: tuple[str, str, str],
    strategy: str,
    where: dict[str, Any],
) -> None:
    predicted = prediction_name(metric)
    if predicted not in rows or rows[predicted].isna().all():
        return
    groups = rows.dropna(subset=[predicted]).groupby(axis)
    middle = groups[predicted].median() / MIB
    figure.add_scatter(
        x=middle.index,
        y=middle,
        mode="lines",
        line=PREDICTED_LOOK | {"color": darkened(style[0])},
        zorder=3,
        showlegend=False,
        hovertemplate=f"%{{x}}: %{{y:.2f}} MiB predicted<extra>{strategy}</extra>",
        meta=points(groups.groups.values()) | {"kind": "predicted"},
        **where,
    )


def _add_out_of_memory(
    figure: go.Figure,
    rows: pd.DataFrame,
    limits: pd.Series,
    top_mib: float,
    axis: Axis,
    style: tuple[str, str, str],
    strategy: str,
    where: dict[str, Any],
) -> None:
    if rows.empty:
        return
    figure.add_scatter(
        x=rows[axis],
        y=limits[rows.index].fillna(top_mib),
        mode="markers",
        name=f"{strategy}: out of memory",
        marker={"color": style[0], "symbol": "x-open", "size": 12, "line": {"width": 2}},
        zorder=4,
        hovertemplate="%{x}: out of memory at %{y:.0f} MiB<extra>%{fullData.name}</extra>",
        meta=points([row] for row in rows.index),
        **where,
    )


def _add_capacity(figure: go.Figure, limits: pd.Series, top_mib: float, *, any_oom: bool) -> None:
    """A line where the memory ends, unless that would press all points to the floor."""
    for limit_mib in sorted(limits.dropna().unique()):
        if any_oom or limit_mib <= 2 * top_mib:
            figure.add_hline(
                y=limit_mib,
                line={"color": "#555", "width": 1, "dash": "dot"},
                annotation={"text": f"memory: {limit_mib:,.0f} MiB", "font": {"size": 11}},
                annotation_position="top left",
            )

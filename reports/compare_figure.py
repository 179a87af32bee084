"""The changes of a comparison as one Plotly figure: a panel a metric, a line a cell, percent of the value before."""

import html
import textwrap
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import plotly.graph_objects as go
from plotly.colors import qualitative

from reports.compare import Comparison
from reports.compare_rows import SYMBOLS, Row
from reports.compare_view import change_text, counted, interval_text
from reports.dress import dressed
from reports.limits import Limit

# More cannot be read; the table has all.
MOST_CELLS = 40
COLUMNS = {"wide": 3, "paper": 2, "narrow": 1}
_LABEL_CHARACTERS = 34
_NOTE_CHARACTERS = 30
# In pixels: a line of a name; a panel without its lines, and its title in that; the tool bar; the legend.
_LINE, _AROUND, _TITLE, _TOOLS, _LEGEND = 17, 92, 40, 20, 60
# A limit so many times as far out as the changes would press them together; it is named, not drawn.
_FAR = 8
_LIMIT_COLOR, _BEYOND_COLOR, _NOTE_COLOR = "#333", "rgba(204, 102, 119, 0.12)", "#444"
_MARKERS = {
    "worse": (qualitative.Safe[8], "x"),
    "within noise": (qualitative.Safe[2], "square"),
    "better": (qualitative.Safe[6], "star"),
    "changed": (qualitative.Safe[4], "diamond-open"),
    "allowed": (qualitative.Safe[4], "circle"),
    "equal": (qualitative.Safe[10], "circle-open"),
}


class Drawn(NamedTuple):
    """`cells` of `of_cells` have a line: those with what matters most where there are too many."""

    figure: go.Figure
    metrics: list[str]
    rows: list[Row]
    cells: int
    of_cells: int


def figure_of_changes(comparison: Comparison, rows: Sequence[Row]) -> Drawn | None:
    """Of each metric that has a limit, that changed, or that could not be compared. None where there is none.

    A change from 0 has no percentage, and what is not comparable no change: both are words at the right of the panel.
    """
    limited = {limit.metric for limit in comparison.limits}
    said = {row.metric for row in rows if row.metric in limited or row.verdict != "equal"}
    metrics = [name for name in _ordered(comparison, rows) if name in said]
    if not metrics:
        return None
    rows = [row for row in rows if row.metric in metrics]
    by_weight = list(dict.fromkeys(row.where for row in sorted(rows, key=_weight)))
    chosen = set(by_weight[:MOST_CELLS])
    cells = [name for name in dict.fromkeys(comparison.names) if name in chosen]
    rows = [row for row in rows if row.where in chosen]
    figure = go.Figure()
    places = {name: place for place, name in enumerate(cells)}
    in_legend: set[str] = set()
    for number, metric in enumerate(metrics, start=1):
        limits = [limit for limit in comparison.limits if limit.metric == metric]
        _add_panel(figure, number, metric, [row for row in rows if row.metric == metric], limits, places, in_legend)
    labels = ["<br>".join(map(_escaped, _wrapped(name))) for name in cells]
    lines = max(label.count("<br>") for label in labels) + 1
    figure.update_yaxes(
        tickvals=list(places.values()), ticktext=labels, range=[len(cells) - 0.5, -0.5], zeroline=False,
        ticklabelstandoff=4, fixedrange=True, gridcolor="#e8e8e8",
    )  # fmt: skip
    height = max(2, lines) * _LINE * len(cells)
    placed = {name: _placed(len(metrics), columns, height) for name, columns in COLUMNS.items()}
    layout: Any = figure.layout
    titles = [place for place, note in enumerate(layout.annotations) if note.yref.endswith("domain")]
    # Ends at the right of its panel where a long one would not fit into that.
    at_end = {"x": 1, "xanchor": "right", "align": "right"}
    at_start = {"x": 0, "xanchor": "left", "align": "left"}
    moved = {
        name: {
            f"annotations[{place}].{key}": value
            for place in titles
            for key, value in (at_end if name == "narrow" else at_start).items()
        }
        for name in COLUMNS
    }
    description = f"Change in percent, a line a cell, of {', '.join(metrics)}; with intervals and limits"
    figure = dressed(figure, _escaped(description)).update_layout(
        {key.replace(".", "_"): value for key, value in placed["wide"].items()},
        font={"size": 12},
        margin={"l": 10, "r": 20, "t": _TOOLS, "b": _LEGEND},
        meta={"description": description} | {name: placed[name] | moved[name] for name in COLUMNS},
        legend_tracegroupgap=0,
    )
    return Drawn(figure, metrics, rows, len(cells), len(by_weight))


def finding(drawn: Drawn) -> str:
    """How many of the changes that are drawn got which verdict, and which is the largest: one sentence."""
    counts = defaultdict(int)
    for row in drawn.rows:
        counts[row.verdict] += 1
    of_all = f"{counted(len(drawn.rows), 'pair')} of figures in {counted(drawn.cells, 'cell')}"
    words = ", ".join(f"{counts[verdict]} {verdict}" for verdict in SYMBOLS if counts[verdict])
    sizes = [(abs(row.change.fraction), row) for row in drawn.rows if row.change and row.change.fraction]
    if not sizes:
        return f"{of_all}: {words}."
    _, row = max(sizes, key=lambda pair: pair[0])
    assert row.change is not None
    return f"{of_all}: {words}; the largest change is {row.metric} {change_text(row.change)}, {row.where}."


def _ordered(comparison: Comparison, rows: Sequence[Row]) -> list[str]:
    """Metrics with a limit first, as they were given."""
    usual = dict.fromkeys(change.metric for change in comparison.changes)
    return list(dict.fromkeys([*(limit.metric for limit in comparison.limits), *usual, *(row.metric for row in rows)]))


def _weight(row: Row) -> tuple[int, float]:
    fraction = row.change.fraction if row.change is not None else None
    return list(SYMBOLS).index(row.verdict), -abs(fraction or 0)


def _add_panel(
    figure: go.Figure,
    number: int,
    metric: str,
    rows: Sequence[Row],
    limits: Sequence[Limit],
    places: dict[str, int],
    in_legend: set[str],
) -> None:
    suffix = _suffix(number)
    x_name, y_name = f"x{suffix}", f"y{suffix}"
    axes: dict[str, Any] = {"xaxis": x_name, "yaxis": y_name}
    points = [(row, percents) for row in rows if (percents := _percents(row)) is not None]
    ends = [
        (row, 100 * row.change.low, 100 * row.change.high)
        for row in rows
        if row.change and row.change.low is not None and row.change.high is not None
    ]
    extent = max((abs(value) for _, *values in (*points, *ends) for value in values), default=0.0)
    lines, ticks, off_axis = _limit_marks(rows, limits, extent)
    marks = [value for _, *values in (*points, *ends, *ticks) for value in values] + [value for value, _ in lines]
    low, high = _range(marks)
    for value, rise in lines:
        beyond = {"x0": value, "x1": high if rise else low}
        figure.add_shape(
            type="rect", xref=x_name, yref=f"{y_name} domain", y0=0, y1=1, fillcolor=_BEYOND_COLOR, line_width=0,
            layer="below", **beyond,
        )  # fmt: skip
        figure.add_shape(
            type="line", xref=x_name, yref=f"{y_name} domain", x0=value, x1=value, y0=0, y1=1,
            line={"color": _LIMIT_COLOR, "dash": "dash", "width": 1.5},
        )  # fmt: skip
    if lines and "limit" not in in_legend:
        in_legend.add("limit")
        figure.add_scatter(
            x=[None], y=[None], mode="lines", name="limit", line={"color": _LIMIT_COLOR, "dash": "dash", "width": 1.5},
            **axes,
        )  # fmt: skip
    if ticks:
        figure.add_scatter(
            x=[value for _, value in ticks], y=[places[row.where] for row, _ in ticks], mode="markers",
            marker={"symbol": "line-ns", "size": 18, "line": {"width": 2, "color": _LIMIT_COLOR}},
            name="limit of one cell", showlegend="tick" not in in_legend, hoverinfo="skip", **axes,
        )  # fmt: skip
        in_legend.add("tick")
    if ends:
        figure.add_scatter(
            x=[x for _, *pair in ends for x in (*pair, None)],
            y=[y for row, *_ in ends for y in (places[row.where], places[row.where], None)],
            mode="lines", line={"color": "#777", "width": 2}, name="interval, 95 %",
            showlegend="interval" not in in_legend, hoverinfo="skip", **axes,
        )  # fmt: skip
        in_legend.add("interval")
    for verdict, (color, symbol) in _MARKERS.items():
        own = [(row, value) for row, value in points if row.verdict == verdict]
        if not own:
            continue
        figure.add_scatter(
            x=[value for _, value in own],
            y=[places[row.where] for row, _ in own],
            mode="markers",
            name=f"{SYMBOLS[verdict]} {verdict}",
            legendgroup=verdict,
            showlegend=verdict not in in_legend,
            marker={"color": color, "symbol": symbol, "size": 10, "line": {"width": 1, "color": "#333"}},
            text=[_hover(row) for row, _ in own],
            hovertemplate="%{text}<extra></extra>",
            **axes,
        )
        in_legend.add(verdict)
    _add_notes(figure, rows, places, x_name, y_name)
    texts = [f"limit {limit.text}" + " (beyond the axis)" * (limit in off_axis) for limit in limits]
    title = [f"<b>{_escaped(metric)}</b>", _escaped(", ".join(texts) or "no limit")]
    figure.add_annotation(
        text="<br>".join(title), xref=f"{x_name} domain", x=0, xanchor="left", yref=f"{y_name} domain", y=1,
        yanchor="bottom", yshift=4, showarrow=False, align="left",
    )  # fmt: skip
    figure.update_layout(
        {
            f"xaxis{suffix}": {
                "range": [low, high], "anchor": y_name, "title": {"text": "change (%)", "standoff": 4},
                "zerolinecolor": "#888", "zerolinewidth": 1.5, "showticklabels": bool(points), "nticks": 7,
                "tickangle": 0,
            },
            f"yaxis{suffix}": {"anchor": x_name},
        }
    )  # fmt: skip


def _percents(row: Row) -> float | None:
    """None where there is no change to draw; 0 in both is none at all."""
    if row.change is None or row.from_zero:
        return None
    return 100 * (row.change.fraction or 0.0)


def _limit_marks(
    rows: Sequence[Row], limits: Sequence[Limit], extent: float
) -> tuple[list[tuple[float, bool]], list[tuple[Row, float]], list[Limit]]:
    """In percent: limits that are one for all cells, with whether it is of a rise; those that are another in each; and
    what is too far out to be drawn."""
    lines, ticks, off_axis = [], [], []
    for limit in limits:
        found = [
            (row, 100 * fraction)
            for row in rows
            if row.change is not None and (fraction := limit.as_fraction(row.change.before)) is not None
        ]
        if extent and any(abs(value) > _FAR * extent for _, value in found):
            off_axis.append(limit)
        elif limit.relative:
            lines += [(value, limit.rise) for _, value in found[:1]]
        else:
            ticks += found
    return lines, ticks, off_axis


def _range(marks: Sequence[float]) -> tuple[float, float]:
    low, high = min(marks, default=0.0), max(marks, default=0.0)
    low, high = min(low, 0.0), max(high, 0.0)
    # 0 stands apart from the frame too.
    margin = 0.12 * (high - low) or 1.0
    return low - margin, high + margin


def _add_notes(figure: go.Figure, rows: Sequence[Row], places: dict[str, int], x_name: str, y_name: str) -> None:
    notes: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if _percents(row) is None:
            notes[row.where].append(row)
    for where, about in notes.items():
        texts = [_note(row) for row in about]
        figure.add_annotation(
            text=_escaped(textwrap.shorten("; ".join(texts), _NOTE_CHARACTERS, placeholder=" …")),
            hovertext="<br><br>".join(map(_hover, about)),
            xref=f"{x_name} domain", x=1, xanchor="right", yref=y_name, y=places[where], showarrow=False,
            font={"size": 11, "color": _NOTE_COLOR}, bgcolor="rgba(255, 255, 255, 0.85)",
        )  # fmt: skip


def _note(row: Row) -> str:
    said = f"from 0 to {row.value_text(row.now)}" if row.from_zero else row.why
    return f"{row.symbol} {said}"


def _hover(row: Row) -> str:
    lines = [*_wrapped(row.where, 60), f"{row.metric}: {row.value_text(row.before)} → {row.value_text(row.now)}"]
    if row.change is not None:
        lines += [change_text(row.change) + interval_text(row.change)]
    lines += textwrap.wrap(f"{row.symbol} {row.verdict}" + (f": {row.why}" if row.why else ""), 60)
    return "<br>".join(map(_escaped, lines))


def _wrapped(name: str, characters: int = _LABEL_CHARACTERS) -> list[str]:
    return textwrap.wrap(name, characters, max_lines=2 if characters == _LABEL_CHARACTERS else None, placeholder=" …")


def _escaped(text: str) -> str:
    """Plotly reads some tags, and %{...} in a template; in a text it reads tags only."""
    return html.escape("".join(character if character.isprintable() else " " for character in text), quote=False)


def _placed(count: int, columns: int, height: int) -> dict[str, Any]:
    """Where the panels stand, as Plotly's attributes with their new values.

    height  of a panel's lines, in pixels
    """
    columns = min(columns, count)
    in_rows = -(-count // columns)
    panel = height + _AROUND
    whole, gap = in_rows * panel, 0.03
    width = (1 - gap * (columns - 1)) / columns
    placed: dict[str, Any] = {"height": whole + _TOOLS + _LEGEND}
    for number in range(count):
        row, column = divmod(number, columns)
        left, top = column * (width + gap), 1 - (row * panel + _TITLE) / whole
        suffix = _suffix(number + 1)
        placed[f"xaxis{suffix}.domain"] = [left, left + width]
        placed[f"yaxis{suffix}.domain"] = [top - height / whole, top]
        placed[f"yaxis{suffix}.showticklabels"] = column == 0
    return placed


def _suffix(number: int) -> str:
    return "" if number == 1 else str(number)

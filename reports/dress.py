"""How figures of one report look alike, and how they tell which trials they show.

A trace's `meta` says which rows of the trials' frame are behind what it draws, so that a page can filter it:
`points`, a list of rows for each point (of several the middle is drawn); `segments`, two rows for every three
coordinates, the third of which parts them; `all`, rows without each of which the whole makes no sense, as a fitted
line; `lines`, a list of rows for each line of a heat map. Beside `points` there may be `more`: further columns of the
table behind the figure, by heading, with a value for each point.
"""

from collections.abc import Iterable
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.colors import qualitative

MIB = 2**20
KEY_COLOR = "#666"
# Of the stored gradient against float64, on top of all else.
FLOOR_LOOK: dict[str, Any] = {"dash": "dot", "width": 1.5}
# Told apart without colour too. One of three is filled and small; the others are open, the third larger than the
# second, and have bands for lines, the broader below. So strategies that coincide, mostly neighbours, are seen within
# each other.
_FILLED_PX = 8
_OPEN_PX = {"square": 12, "pentagon": 12, "triangle-down": 12}
_LARGE_PX = {"diamond": 15, "hexagon": 16, "hexagram": 16}
_MARKERS = (
    *("circle", "square-open", "diamond-open"),
    *("triangle-up", "pentagon-open", "hexagon-open"),
    *("star", "triangle-down-open", "hexagram-open"),
)
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")


def strategy_styles(frame: pd.DataFrame) -> dict[str, tuple[str, str, str]]:
    """Colour, marker and dash of each strategy, the same in every figure of a page."""
    names = sorted(frame["strategy"].unique())
    colors = [color for color in qualitative.Safe if color != "rgb(136, 136, 136)"]
    return {
        name: (colors[i % len(colors)], _MARKERS[i % len(_MARKERS)], _DASHES[i % len(_DASHES)])
        for i, name in enumerate(names)
    }


def marked(color: str, symbol: str) -> dict[str, Any]:
    if symbol.endswith("-open"):
        size_px = (_OPEN_PX | _LARGE_PX)[symbol.removesuffix("-open")]
        return {"color": color, "symbol": symbol, "size": size_px, "line": {"width": 2}}
    return {"color": color, "symbol": symbol, "size": _FILLED_PX, "line": {"width": 1, "color": "#333"}}


def lined(color: str, symbol: str, dash: str = "solid") -> dict[str, Any]:
    """The line of the strategy with this marker, and its place in the order of drawing."""
    if not symbol.endswith("-open"):
        return {"line": {"color": color, "width": 1.5, "dash": dash}, "zorder": 2}
    # Of dashes a band would look like a row of marks.
    is_large = symbol.removesuffix("-open") in _LARGE_PX
    return {"line": {"color": faded(color), "width": 7 if is_large else 4}, "zorder": 0 if is_large else 1}


def faded(color: str) -> str:
    return f"rgba({', '.join(map(str, _channels(color)))}, 0.5)"


def darkened(color: str) -> str:
    """For text and thin dashes, which a light colour would leave unread."""
    return f"rgb({', '.join(str(round(0.6 * channel)) for channel in _channels(color))})"


def _channels(color: str) -> list[int]:
    return [int(channel) for channel in color.removeprefix("rgb(").removesuffix(")").split(",")]


def add_key(figure: go.Figure, name: str, line: dict[str, Any], **where: Any) -> None:
    """An entry of the legend, in grey, for what all strategies have in common; it draws nothing."""
    figure.add_scatter(
        x=[None], y=[None], mode="lines", name=name, line=line | {"color": KEY_COLOR}, hoverinfo="skip", **where
    )


def points(groups: Iterable[Iterable[int]]) -> dict[str, list[list[int]]]:
    """The `meta` of a trace that has a point for each group of rows."""
    return {"points": [[int(row) for row in group] for group in groups]}


def each(rows: pd.DataFrame) -> dict[str, list[list[int]]]:
    """The `meta` of a trace that has a point for each row."""
    return points([row] for row in rows.index)


def dressed(figure: go.Figure, description: str) -> go.Figure:
    """Room for the legend below the axes, so that many strategies cover nothing; `description` is read aloud."""
    return figure.update_layout(
        template="plotly_white",
        height=430,
        # For the panels' titles, or the tool bar.
        margin={"l": 10, "r": 10, "t": 30, "b": 10},
        legend={"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0},
        showlegend=True,
        font={"size": 13},
        meta={"description": description},
        hoverlabel={"namelength": -1},
    )

"""How figures of one report look alike, and how they tell which trials they show.

A trace's `meta` says which rows of the trials' frame are behind what it draws, so that a page can filter it:
`points`, a list of rows for each point (of several the middle is drawn); `segments`, two rows for every three
coordinates, the third of which parts them; `all`, rows without each of which the whole makes no sense, as a fitted
line; `lines`, a list of rows for each line of a heat map.
"""

from collections.abc import Iterable
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.colors import qualitative

MIB = 2**20
# Told apart without colour too.
_MARKERS = ("circle", "square", "diamond", "triangle-up", "pentagon", "star", "hexagon", "triangle-down", "bowtie")
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
    return {"color": color, "symbol": symbol, "size": 9, "line": {"width": 1, "color": "#333"}}


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

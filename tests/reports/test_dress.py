"""Strategies that coincide are all seen, by size and place and not by colour alone."""

from itertools import pairwise
from typing import Any

import pandas as pd

from reports.dress import darkened, lined, marked, strategy_styles

NAMES = [f"model · strategy {letter}" for letter in "abcdefghi"]


def styles() -> list[tuple[str, str]]:
    return [style[:2] for style in strategy_styles(pd.DataFrame({"strategy": NAMES})).values()]


def hides(over: dict[str, Any], under: dict[str, Any]) -> bool:
    """Whether a marker that is drawn later leaves nothing of one in the same place."""
    return not over["symbol"].endswith("-open") and over["size"] >= under["size"]


def test_neighbours_that_coincide_are_seen_within_each_other() -> None:
    for place in range(len(NAMES) - 2):
        three = [marked(*style) for style in styles()[place : place + 3]]
        assert len({marker["size"] for marker in three}) == 3
        assert not any(hides(over, under) for over in three for under in three if over is not under)
        lines = sorted((lined(*style) for style in styles()[place : place + 3]), key=lambda line: line["zorder"])
        assert all(below["line"]["width"] > above["line"]["width"] for below, above in pairwise(lines))


def test_equal_markers_would_hide_each_other() -> None:
    """Negative control of the test above."""
    filled = marked("rgb(1, 2, 3)", "circle")
    assert hides(filled, filled)


def test_no_two_of_a_page_have_one_marker() -> None:
    assert len({symbol for _, symbol in styles()}) == len(NAMES)


def test_a_dark_colour_is_of_the_same_hue() -> None:
    assert darkened("rgb(200, 100, 0)") == "rgb(120, 60, 0)"

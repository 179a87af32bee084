"""Axes stay where they are while a filter changes what is drawn, so that two pictures can be compared; a zoom too."""

from pathlib import Path
from typing import Any

import pytest

from tests.reports.browser import Opened, needs_browser

pytestmark = needs_browser
FIGURES = ("peak", "time", "predicted", "drift")
OTHERS = ("saved", "peak-batch", "angle")
# Of each axis its range and its place, and of a heat map the ends of its colours.
ENDS = """name => {
    const short = (value) => (typeof value === 'number' ? Number(value.toPrecision(9)) : value);
    const plot = document.getElementById('figure-' + name), layout = plot._fullLayout;
    const axes = Object.keys(layout).filter((key) => /^[xy]axis\\d*$/.test(key));
    const maps = plot._fullData.filter((trace) => trace.z && trace.showscale);
    return [...axes.map((key) => [key, ...layout[key].range, layout[key]._offset, layout[key]._length].map(short)),
        ...maps.map((trace) => ['colors', trace.zmin, trace.zmax])];
}"""
SIDES = "name => document.getElementById('figure-' + name)._fullLayout.xaxis.range"


def ends(opened: Opened, *names: str) -> dict[str, Any]:
    opened.walk()
    return {name: opened.page.evaluate(ENDS, name) for name in names}


def nothing_left(opened: Opened) -> None:
    opened.page.fill("#filter", "nothing has this")
    opened.page.wait_for_function("document.documentElement.dataset.filtered > 0")
    opened.walk()


def chosen(opened: Opened) -> None:
    """The other views of the sections that have some."""
    for anchor in OTHERS:
        opened.page.check(f".views input[value={anchor}]")
        opened.page.wait_for_selector(f"[data-anchor={anchor}] .main-svg", state="attached")


def test_axes_and_colours_are_those_of_all_trials_whatever_is_shown(opened: Opened, report: Path) -> None:
    before = ends(opened, *FIGURES)
    assert {name for name, found in before.items() if any(end[0] == "colors" for end in found)} == {"drift"}
    opened.narrow("batch_size", "16")
    opened.narrow("strategy", "revnet · reconstructed")
    assert ends(opened, *FIGURES) == before
    nothing_left(opened)
    assert not any(opened.drawn(name) for name in ("peak", "time", "predicted"))
    # A scale of colours stands beside colours only.
    axes = {name: [end for end in found if end[0] != "colors"] for name, found in before.items()}
    assert ends(opened, *FIGURES) == axes
    opened.page.goto("about:blank")
    opened.open(report, "#batch_size=16&depth=14")
    assert opened.page.inner_text("#shown") == "4 of 25 trials"
    assert ends(opened, *FIGURES) == before
    opened.page.click("#reset")
    assert ends(opened, *FIGURES) == before
    assert opened.complaints == []


def test_each_view_has_axes_of_its_own_logarithmic_ones_too(opened: Opened) -> None:
    peak = ends(opened, "peak")["peak"]
    before = {}
    for anchor in OTHERS:
        chosen(opened)
        opened.page.check(f".views input[value={anchor}]")
        before |= ends(opened, anchor)
    assert before["saved"] != peak
    assert opened.page.evaluate("document.getElementById('figure-angle')._fullLayout.yaxis.type") == "log"
    opened.narrow("strategy", "revnet · reconstructed · exact")
    for anchor in OTHERS:
        opened.page.check(f".views input[value={anchor}]")
        assert ends(opened, anchor) == {anchor: before[anchor]}, anchor


def test_axes_that_are_not_held_follow_what_is_left(opened: Opened) -> None:
    """Negative control of the tests above."""
    before = ends(opened, "time")
    opened.narrow("strategy", "revnet · reconstructed")
    assert ends(opened, "time") == before
    freed = "{'xaxis.autorangeoptions': null, 'xaxis.autorange': true}"
    opened.page.evaluate(f"Plotly.relayout('figure-time', {freed})")
    assert ends(opened, "time") != before


def test_panels_keep_their_titles_when_nothing_is_left_in_them(opened: Opened) -> None:
    nothing_left(opened)
    notes = "document.getElementById('figure-peak').layout.annotations.map((note) => note.text)"
    assert opened.page.evaluate(notes)[:3] == [
        "The filter hides all trials that this figure draws.",
        "batch 16",
        "batch 32",
    ]
    assert all(opened.page.evaluate("document.getElementById('figure-drift').data[0].z.flat().map((z) => z === null)"))


def test_a_zoom_stays_while_the_filter_changes_until_all_is_shown_again(opened: Opened) -> None:
    page = opened.page
    opened.walk()
    before = page.evaluate(SIDES, "time")
    area = page.locator("#figure-time .nsewdrag")
    area.scroll_into_view_if_needed()
    box = area.bounding_box()
    assert box is not None
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + 0.3 * box["width"], middle)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.6 * box["width"], middle, steps=5)
    page.mouse.up()
    page.wait_for_function(f"Math.abs(({SIDES})('time')[0] - {before[0]}) > 1")
    zoomed = page.evaluate(SIDES, "time")
    opened.narrow("batch_size", "16")
    opened.walk()
    assert page.evaluate(SIDES, "time") == pytest.approx(zoomed)
    done = opened.filtered
    page.click("#reset")
    page.wait_for_function("n => Number(document.documentElement.dataset.filtered) > n", arg=done)
    opened.walk()
    page.wait_for_function(f"Math.abs(({SIDES})('time')[0] - {before[0]}) < 1e-6")
    assert page.evaluate(SIDES, "time") == pytest.approx(before)

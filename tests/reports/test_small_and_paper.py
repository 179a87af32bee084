"""A page on a small screen and on paper: what is wider than the screen says so, and a print has all of it at once."""

from pathlib import Path
from typing import Any

import pytest

from harness.record import Record
from tests.reports.browser import Opened, needs_browser

pytestmark = needs_browser
CUES = """[...document.querySelectorAll('.view:not([hidden])')].map((view) => {
    const figure = view.querySelector('.figure');
    return [figure.scrollWidth > figure.clientWidth, view.querySelector('.sideways').checkVisibility()];
})"""
PRINTED = """kind => {
    if (kind) window.dispatchEvent(new Event(kind));
    const count = (selector) => document.querySelectorAll(selector).length;
    const drawn = [...document.querySelectorAll('.view:not([hidden]) .main-svg')];
    return { views: count('.view .main-svg:first-child'), tables: count('.behind[open] tbody'),
        rows: count('#table tbody tr'), open: count('main details[open]'),
        width: Math.max(...drawn.map((svg) => svg.clientWidth)) };
}"""


@pytest.fixture
def sized(opened: Opened) -> Any:
    yield opened
    opened.page.set_viewport_size({"width": 1280, "height": 900})


@pytest.mark.parametrize("width", [420, 520, 600, 700, 1280])
def test_a_figure_that_is_wider_than_the_screen_says_so_and_no_other(sized: Opened, width: int) -> None:
    sized.page.set_viewport_size({"width": width, "height": 900})
    sized.walk()
    cues = sized.page.evaluate(CUES)
    assert len(cues) == 6
    assert all(is_wide == is_said for is_wide, is_said in cues), cues
    assert any(is_wide for is_wide, _ in cues) == (width < 650)
    sized.page.emulate_media(media="print")
    assert not any(is_said for _, is_said in sized.page.evaluate(CUES))


def test_a_wide_figure_is_scrolled_by_keyboard(sized: Opened) -> None:
    sized.page.set_viewport_size({"width": 420, "height": 900})
    sized.walk()
    sized.page.focus("[data-anchor=peak] .figure")
    sized.page.keyboard.press("ArrowRight")
    sized.page.wait_for_function("document.querySelector('[data-anchor=peak] .figure').scrollLeft > 0")


def test_all_is_there_when_a_browser_that_waits_for_nothing_prints(opened: Opened, records: list[Record]) -> None:
    opened.page.fill("#filter", "batch")
    opened.page.fill("#filter", "")
    opened.page.select_option(".dt-length select", "25")
    before = opened.page.evaluate(PRINTED, "")
    assert before["views"] < 10
    assert before["tables"] == 0
    # One call: between the announcement and the count nothing else runs.
    printed = opened.page.evaluate(PRINTED, "beforeprint")
    assert (printed["views"], printed["tables"], printed["rows"]) == (10, 10, len(records))
    assert printed["width"] == 670
    assert printed["open"] > before["open"]
    assert opened.page.inner_text(".same li:first-child") == "data.name cifar10"
    opened.page.evaluate(PRINTED, "afterprint")
    opened.walk()
    after = opened.page.evaluate(PRINTED, "")
    assert (after["tables"], after["open"]) == (before["tables"], before["open"])
    assert after["width"] != 670
    assert opened.complaints == []


def test_what_is_the_same_in_all_is_folded_to_a_line(opened: Opened) -> None:
    summary = opened.page.inner_text(".same summary")
    assert summary.startswith("The same in all: data.name cifar10; ")
    assert "more" in summary
    assert not opened.page.is_visible(".same li")
    opened.page.click(".same summary")
    assert opened.page.is_visible(".same li")
    opened.page.click(".same summary")


def test_no_figure_begins_with_a_blank_stripe(opened: Opened, report: Path) -> None:
    opened.walk()
    gaps = opened.page.evaluate("""[...document.querySelectorAll('.view:not([hidden]) .plot')].map((plot) => {
        const tops = [...plot.querySelectorAll('.infolayer text, .nsewdrag')].map((e) => e.getBoundingClientRect().top);
        return [plot.id, Math.min(...tops) - plot.getBoundingClientRect().top];
    })""")
    assert len(gaps) == 6
    assert [gap for gap in gaps if gap[1] > 32] == []


def test_nothing_is_wider_than_the_paper(sized: Opened) -> None:
    sized.page.set_viewport_size({"width": 718, "height": 900})
    sized.page.emulate_media(media="print")
    sized.page.wait_for_selector("html[data-whole]", state="attached")
    assert sized.page.evaluate("document.documentElement.scrollWidth") <= 718
    # Negative control: the table in the letters of a screen.
    sized.page.add_style_tag(content="#table { font-size: 14px !important; }")
    assert sized.page.evaluate("document.documentElement.scrollWidth") > 718
    sized.page.emulate_media(media="screen")
    sized.page.wait_for_selector("html:not([data-whole])", state="attached")

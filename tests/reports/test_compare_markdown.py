"""Whatever stands in a record is text in a pull request: as CommonMark reads it, and as GitHub goes on from there."""

import html
import re
from collections.abc import Callable

import pytest
from markdown_it import MarkdownIt

from reports.compare_markdown import as_markdown, escaped
from tests.reports.conftest import PEAK, Compare, scaled, trial, without

TEXTS = [
    "@user",
    "@org/team",
    "me@example.com",
    "#12",
    "owner/repo#12",
    "_GH-12",
    "https://example.com/a?b=1",
    "xHTTPS://example.com",
    "ftp://example.com",
    "_www.example.com",
    "<img src=x onerror=alert(1)>",
    "</details><!-- a comment",
    "a | b",
    "a \\| b \\",
    "`code` ``x``",
    "[x](javascript:alert(1)) ![x](y) [x]: y",
    "**bold** _it_ ~~gone~~",
    "&lt;b&gt; &amp; &#64;user",
    ":rocket: $x^2$",
    "# heading",
    "- a list",
    "+ a list",
    "3) a list",
    "1. a list",
    "---",
    "    code",
    "> quoted",
    "\tafter a tab \x1b[31m and a control",
]
# What GitHub looks for in the text that has been rendered, and what its Markdown does beyond CommonMark.
GITHUB = re.compile(
    r"@\w|#\d|gh-\d|https?://|ftp://|www\.|[\w.+-]+@[\w-]+\.|:[\w+-]+:|\$\S.*\$",
    re.IGNORECASE,
)
RENDER: Callable[[str], str] = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render
# All that the comparison makes itself.
OWN_TAGS = {"h3", "table", "thead", "tbody", "tr", "th", "td", "p", "strong", "ul", "li", "details", "summary", "span"}


def plain(rendered: str) -> str:
    """The text that a reader sees."""
    return html.unescape(re.sub(r"<[^>]*>", "", rendered)).replace("\u2060", "")


def one_line(text: str) -> str:
    return "".join(character if character.isprintable() else " " for character in text)


def rendered_by_github(rendered: str) -> str:
    """The text in which GitHub looks, a dollar that has an element of its own taken out."""
    return html.unescape(re.sub(r"<[^>]*>", "", rendered.replace("<span>$</span>", "")))


@pytest.mark.parametrize("text", TEXTS)
def test_a_cell_of_a_table_shows_the_text(text: str) -> None:
    rendered = RENDER(f"| a | b |\n| --- | --- |\n| {escaped(text)} | next |\n")
    cells = re.findall(r"<td>(.*?)</td>", rendered)
    assert len(cells) == 2
    assert plain(cells[0]) == one_line(text).strip()
    assert not re.findall(r"<(?!/?span>)[a-z!/]", cells[0])
    assert not GITHUB.search(rendered_by_github(cells[0]))


@pytest.mark.parametrize("text", TEXTS)
def test_a_line_of_a_list_shows_the_text(compared: Compare, text: str) -> None:
    base = without(trial(1), "drift_max_rel", text)
    failed = trial(2, status="failed", reason=text, depth=14)
    found = compared([trial(1), trial(2, depth=14)], [scaled(base, **{PEAK: 2}), failed], f"{PEAK}:+2%")
    rendered = RENDER(as_markdown(found))
    shown = [plain(item) for item in re.findall(r"<li>(.*?)</li>", rendered, re.DOTALL)]
    assert sum(" ".join(one_line(text).split()) in " ".join(one_line(item).split()) for item in shown) >= 2, shown
    assert set(re.findall(r"</?([a-z0-9]+)", rendered)) <= OWN_TAGS
    assert rendered.count("<ul>") == as_markdown(found).count("\n\n- ")
    assert not GITHUB.search(rendered_by_github(rendered))


@pytest.mark.parametrize("text", ["- a", "+ a", "1. a", "2) a", "---", "    code", "# a"])
def test_a_line_that_begins_with_text_from_elsewhere_is_a_line(text: str) -> None:
    from reports.compare_markdown import _list

    rendered = RENDER(_list([text, "next"]))
    assert re.findall(r"<(\w+)", rendered) == ["ul", "li", "li"]
    assert plain(rendered).split("\n")[1] == text.strip()


@pytest.mark.parametrize("text", [text for text in TEXTS if GITHUB.search(text)])
def test_what_is_looked_for_is_there_without_the_escape(text: str) -> None:
    assert GITHUB.search(rendered_by_github(RENDER(text)))


def test_markdown_would_show_these_texts_otherwise() -> None:
    """So that the tests above fail where nothing is escaped."""
    active = [text for text in TEXTS if plain(RENDER(f"- {text}")).strip() != one_line(text).strip()]
    assert len(active) >= 10

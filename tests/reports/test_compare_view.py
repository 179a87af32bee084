"""Text, Markdown and data of a comparison: the verdict first, hostile text as it is, no more than is read."""

import json

import pytest

from harness.record import Record
from reports.compare import REGRESSION
from reports.compare_markdown import as_markdown, escaped
from reports.compare_view import MOST_LINES, as_json, as_text
from tests.reports.conftest import PEAK, Compare, on, scaled, trial, without

HOSTILE = "a | b <script>alert(1)</script> `code` [x](http://y) **bold** \x1b[31m\nnext"


def test_hostile_text_is_shown_as_it_is(compared: Compare) -> None:
    # Text in a field that this version does not know; in those that it knows it is refused.
    base = [trial(1, flavour=HOSTILE), without(trial(2, flavour="plain"), "drift_max_rel", HOSTILE)]
    failed = trial(3, status="failed", reason=HOSTILE, depth=14, flavour="plain")
    run = [scaled(base[0], **{PEAK: 2}), trial(2, flavour="plain"), failed]
    found = compared([*base, trial(3, depth=14, flavour="plain")], run, f"{PEAK}:+2%")
    markdown = as_markdown(found)
    assert "<script" not in markdown
    assert "&lt;script&gt;" in markdown
    assert "\x1b" not in markdown + as_text(found)
    cells_of = {
        line.replace("\\|", "").count("|") for line in markdown.splitlines() if "bold" in line and line[0] == "|"
    }
    assert cells_of == {6, 8}  # a row of figures and a row of what was judged
    assert "\\*\\*bold\\*\\*" in markdown
    assert "\\[x\\](http" in markdown
    assert escaped("a_b") == "a\\_b"
    assert json.loads(as_json(found))["status_worse"][0]["reason"] == HOSTILE


def test_markdown_has_what_got_worse_on_top_and_the_unchanged_folded(compared: Compare, sweep: list[Record]) -> None:
    found = compared(sweep, [scaled(sweep[0], **{PEAK: 1.5}), *sweep[1:]], f"{PEAK}:+2%")
    markdown = as_markdown(found)
    assert markdown.startswith("### revnet compare: regression: 1 figure worse than allowed")
    before_details, details = markdown.split("<details>", 1)
    assert (
        "| revnet14 stored batch 16 reconstruction fp32 | activation\\_peak\\_bytes | 45.50 MiB | 68.25 MiB |"
        in before_details
    )
    assert "+22.75 MiB (+50 %) | +2%" in before_details
    assert "<summary>Unchanged: 119 figures</summary>" in details
    assert details.count("<details>") == markdown.count("</details>") - 1


def test_much_that_is_worse_is_cut_short_and_the_data_have_all(compared: Compare) -> None:
    base = [trial(n, batch_size=n + 1) for n in range(MOST_LINES + 5)]
    found = compared(base, [scaled(record, **{PEAK: 2}) for record in base], f"{PEAK}:+2%")
    assert "and 5 more; --json has all" in as_text(found)
    data = json.loads(as_json(found))
    assert len(data["regressions"]) == len(base)
    assert (data["exit_code"], data["limits"]) == (REGRESSION, [f"{PEAK}:+2%"])
    assert data["regressions"][0]["fraction"] == pytest.approx(1)


def test_where_nothing_could_be_compared_it_says_so(compared: Compare) -> None:
    for run, said in (([on(trial(1), torch="2.14.0+cpu")], True), ([trial(1)], False)):
        found = compared([trial(1)], run)
        assert ("\n  no figure could be compared\n" in as_text(found)) is said
        assert ("\n- no figure could be compared\n" in as_markdown(found)) is said

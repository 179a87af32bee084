"""The page of a comparison: its numbers are the comparison's, what is not comparable has its reason and no place among
the changes, and no text of a record is markup."""

import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from harness.record import Record
from reports.compare import EQUAL, INCOMPLETE, NOT_COMPARABLE, REGRESSION, Comparison
from reports.compare_figure import MOST_CELLS, Drawn, figure_of_changes, finding
from reports.compare_page import as_html
from reports.compare_rows import MEANINGS, SYMBOLS, rows_of
from reports.compare_view import verdict
from tests.reports.conftest import MIB, PEAK, Compare, in_steps, on, repeats, scaled, trial, with_metrics, without
from tests.reports.test_hostile_report import EVIL

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
STEP, DRIFT = "step_median_s", "drift_max_rel"


class Cell(NamedTuple):
    text: str
    sort: str | None


class Page(HTMLParser):
    """The tables of a page by their id, without their headings, and all that it shows."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[Cell]]] = {}
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._table = self._cell = self._skipped = ""
        self._sort: str | None = None
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append((tag, given))
        if tag in ("script", "style"):
            self._skipped = tag
        elif tag == "table":
            self._table = given["id"] or ""
            self.tables[self._table] = []
        elif tag == "tr" and self._table:
            self.tables[self._table].append([])
        elif tag in ("td", "th") and self._table:
            self._cell, self._sort = "", given.get("data-sort")

    def handle_data(self, data: str) -> None:
        if not self._skipped:
            self.text += data
            self._cell += data

    def handle_endtag(self, tag: str) -> None:
        if tag == self._skipped:
            self._skipped = ""
        elif tag in ("td", "th") and self._table:
            self.tables[self._table][-1].append(Cell(" ".join(self._cell.split()), self._sort))
        elif tag == "thead":
            self.tables[self._table].clear()
        elif tag == "table":
            self._table = ""

    @property
    def pairs(self) -> dict[tuple[str, str], list[Cell]]:
        """The rows of the table of all pairs by cell and metric."""
        return {(cells[0].text, cells[1].text): cells[2:] for cells in self.tables["table"]}


def drawing(found: Comparison) -> Drawn:
    drawn = figure_of_changes(found, rows_of(found))
    assert drawn is not None
    return drawn


def traces(drawn: Drawn) -> list[Any]:
    return list(drawn.figure.data)


def layout(drawn: Drawn) -> Any:
    return drawn.figure.layout


def points(drawn: Drawn) -> list[float]:
    """The changes that are drawn as marks, in percent."""
    return [x for trace in traces(drawn) if trace.hovertemplate for x in trace.x]


def test_the_numbers_on_the_page_are_those_of_the_comparison(compared: Compare, sweep: list[Record]) -> None:
    run = [scaled(record, **{PEAK: 1 + n / 100, STEP: 1 - n / 200}) for n, record in enumerate(sweep)]
    found = compared(sweep, run, f"{PEAK}:+2%", f"{STEP}:+100ms")
    pairs = Page(as_html(found)).pairs
    assert len(pairs) == len(found.changes) == 5 * 24
    for change in found.changes:
        said, why, before, now, moved, *_ = pairs[change.where, change.metric]
        assert [float(value.sort or "nan") for value in (before, now)] == [change.before, change.now]
        fraction = change.fraction
        assert moved.sort == ("" if fraction is None else str(fraction))
        assert said.text == f"{SYMBOLS[found.verdict_on(change)]} {found.verdict_on(change)}"
        limit = {PEAK: "limit +2%", STEP: "limit +100ms"}.get(change.metric)
        assert why.text == (limit if found.verdict_on(change) in ("worse", "better") else "")
    drawn = drawing(found)
    assert sorted(points(drawn)) == pytest.approx(
        sorted(100 * (change.fraction or 0) for change in found.changes if change.metric in drawn.metrics)
    )
    # Negative control: a page of another run has other numbers.
    other = Page(as_html(compared(sweep, sweep))).pairs
    assert sum(other[key] != cells for key, cells in pairs.items()) >= 23


@pytest.mark.parametrize(
    ("factor", "limit", "word"),
    [
        (1.03, f"{PEAK}:+2%", "worse"),
        (0.9, f"{PEAK}:+2%", "better"),
        (1.01, f"{PEAK}:+2%", "allowed"),
        (1.01, f"{STEP}:+2%", "changed"),
        (1, f"{PEAK}:+2%", "equal"),
    ],
)
def test_each_verdict_is_a_word_a_symbol_and_a_count(compared: Compare, factor: float, limit: str, word: str) -> None:
    found = compared([trial(1)], [scaled(trial(1), **{PEAK: factor})], limit)
    page = Page(as_html(found))
    assert page.pairs["revnet38 stored batch 32", PEAK][0].text == f"{SYMBOLS[word]} {word}"
    (line,) = [cells for cells in page.tables["metrics"] if cells[0].text == PEAK]
    assert [cell.text for cell in line[2 : 2 + len(SYMBOLS)]] == ["1" if name == word else "0" for name in SYMBOLS]


def test_of_two_limits_the_one_that_is_done_worst_by_decides(compared: Compare) -> None:
    found = compared([trial(1)], [scaled(trial(1), **{PEAK: 1.5})], f"{PEAK}:+2%", f"{PEAK}:-2%")
    (change,) = (change for change in found.changes if change.metric == PEAK)
    assert (len(found.regressions), len(found.improvements)) == (1, 1)
    assert found.verdict_on(change) == "worse"


def test_every_word_has_a_meaning_and_a_symbol_of_its_own() -> None:
    assert SYMBOLS.keys() == MEANINGS.keys()
    assert len(set(SYMBOLS.values())) == len(SYMBOLS)


def test_a_time_within_noise_says_so_and_its_interval_is_drawn(compared: Compare) -> None:
    base, run = [in_steps(trial(1), 0.9, 1.0, 1.1)], [in_steps(trial(1), 1.05, 1.2, 1.3)]
    found = compared(base, run, f"{STEP}:+5%")
    (change,) = (change for change in found.changes if change.metric == STEP)
    said, _, _, _, moved, interval, _, method = Page(as_html(found)).pairs[change.where, STEP]
    assert said.text == "≈ within noise"
    assert moved.text == "+200 ms (+20 %)"
    assert interval == Cell("-4.55 % to +44.4 %", str(change.low))
    assert method.text == "from the intervals of the median steps"
    bars = [trace for trace in traces(drawing(found)) if trace.name == "interval, 95 %"]
    assert change.low is not None
    assert change.high is not None
    assert [list(bar.x) for bar in bars] == [[100 * change.low, 100 * change.high, None]]
    bare = compared([trial(1)], [scaled(trial(1), **{STEP: 1.2})], f"{STEP}:+5%")
    assert not [trace for trace in traces(drawing(bare)) if trace.name == "interval, 95 %"]


def test_what_is_not_comparable_is_words_with_its_reason_and_no_mark(compared: Compare) -> None:
    base = [trial(n, depth=depth) for n, depth in enumerate((14, 26))]
    run = [on(base[0], torch="2.14.0+cpu"), scaled(base[1], **{PEAK: 1.01})]
    found = compared(base, run, f"{PEAK}:+2%")
    assert found.exit_code == NOT_COMPARABLE
    page = Page(as_html(found))
    said, why, before, now, *rest = page.pairs["revnet14 stored batch 32", PEAK]
    assert (said.text, why.text) == ("? not comparable", "torch 2.13 / 2.14")
    assert before.text == now.text == "45.50 MiB"
    assert [cell.text for cell in rest] == ["n/a", "n/a", "n/a", ""]
    drawn = drawing(found)
    of_peak = [x for trace in traces(drawn) if trace.hovertemplate and trace.xaxis == "x" for x in trace.x]
    assert of_peak == [pytest.approx(1, rel=1e-3)]
    words = [note.text for note in layout(drawn).annotations if note.xref == "x domain" and note.yref == "y"]
    assert words == ["? torch 2.13 / 2.14"]
    # Negative control: of the same torch it is a mark at 0.
    same = drawing(compared(base, [base[0], run[1]], f"{PEAK}:+2%"))
    assert 0 in points(same)
    assert not [note for note in layout(same).annotations if note.yref == "y"]


def test_what_one_side_has_is_not_compared_and_what_was_0_has_no_percentage(compared: Compare) -> None:
    exact = trial(1, activations="reconstructed", reconstruction="exact")
    lacking = without(with_metrics(exact, drift_max_rel=1e-12), "gradient_angle_deg", "the audit was off")
    found = compared([exact], [lacking], f"{DRIFT}:+50%")
    pairs = Page(as_html(found)).pairs
    (where,) = found.names
    said, why, before, now, *_ = pairs[where, "gradient_angle_deg"]
    assert (said.text, why.text) == ("– not compared", "run has none: the audit was off")
    assert [before.text, now] == ["0°", Cell("none", "")]
    assert pairs[where, DRIFT][1].text == "limit +50%, from 0 any change is beyond a limit in percent"
    drawn = drawing(found)
    assert points(drawn) == []
    words = {note.text for note in layout(drawn).annotations if note.yref in ("y", "y2")}
    assert words == {"✗ from 0 to 1e-12", "– run has none: the audit …"}
    assert "1 worse, 1 not compared" in finding(drawn)


def test_limits_are_drawn_where_they_are_and_named_where_they_are_far_off(compared: Compare) -> None:
    base = [
        with_metrics(trial(n, depth=depth), **{PEAK: size * MIB})
        for n, (depth, size) in enumerate([(14, 50), (26, 100)])
    ]
    run = [scaled(record, **{PEAK: 1.03}) for record in base]
    drawn = drawing(compared(base, run, f"{PEAK}:+2%", f"{PEAK}:-1MiB", f"{PEAK}:+900%"))
    lines = [shape.x0 for shape in layout(drawn).shapes if shape.type == "line"]
    assert lines == [pytest.approx(2)]
    (ticks,) = [trace for trace in traces(drawn) if trace.name == "limit of one cell"]
    assert list(ticks.x) == [-2, -1]
    titles = [note.text for note in layout(drawn).annotations if note.yref == "y domain"]
    assert titles == [f"<b>{PEAK}</b><br>limit +2%, limit -1MiB, limit +900% (beyond the axis)"]
    low, high = layout(drawn).xaxis.range
    assert low < -2
    assert 3 < high < 10


def test_only_metrics_with_a_limit_or_a_change_are_drawn_and_of_many_cells_the_worst(compared: Compare) -> None:
    base = [trial(n, batch_size=n + 1) for n in range(MOST_CELLS + 5)]
    run = [*base[:-1], scaled(base[-1], **{STEP: 1.5})]
    same = compared(base, base)
    assert figure_of_changes(same, rows_of(same)) is None
    assert drawing(compared(base, base, f"{DRIFT}:+1%")).metrics == [DRIFT]
    found = compared(base, run, f"{PEAK}:+1%")
    drawn = drawing(found)
    assert drawn.metrics == [PEAK, STEP]
    assert (drawn.cells, drawn.of_cells) == (MOST_CELLS, len(base))
    assert max(points(drawn)) == pytest.approx(50)
    page = Page(as_html(found))
    assert f"Drawn are {MOST_CELLS} of {len(base)} cells" in page.text
    assert len(page.pairs) == 5 * len(base)


def test_the_figure_has_a_finding_a_label_and_marks_that_differ_by_more_than_colour(
    compared: Compare, sweep: list[Record]
) -> None:
    run = [scaled(record, **{PEAK: (1, 1.1, 0.8, 1.01)[n % 4]}) for n, record in enumerate(sweep)]
    found = compared(sweep, run, f"{PEAK}:+2%")
    drawn = drawing(found)
    marks = [trace.marker for trace in traces(drawn) if trace.hovertemplate]
    assert len({mark.symbol for mark in marks}) == len({mark.color for mark in marks}) == 4
    page = Page(as_html(found))
    assert finding(drawn).startswith(
        "24 pairs of figures in 24 cells: 6 worse, 6 better, 6 allowed, 6 equal; the largest"
    )
    assert finding(drawn) in page.text
    (label,) = [given["aria-label"] for tag, given in page.tags if tag == "div" and given.get("role") == "figure"]
    assert label == f"Change in percent, a line a cell, of {PEAK}; with intervals and limits"
    regions = [given for _, given in page.tags if given.get("class") in ("scroll", "figure")]
    assert len(regions) >= 4
    assert all(given.get("tabindex") == "0" for given in regions)


@pytest.mark.parametrize("code", [EQUAL, REGRESSION, NOT_COMPARABLE, INCOMPLETE])
def test_the_verdict_is_on_top_with_its_exit_code(compared: Compare, code: int) -> None:
    base = repeats(2)
    runs = {
        EQUAL: base,
        REGRESSION: [scaled(record, **{PEAK: 2}) for record in base],
        NOT_COMPARABLE: [on(record, torch="2.14.0") for record in base],
        INCOMPLETE: base[:1],
    }
    found = compared(base, runs[code], f"{PEAK}:+2%")
    page = Page(as_html(found))
    assert found.exit_code == code
    top = page.text[: page.text.index("Limits and metrics")]
    assert verdict(found) in top
    assert f"Exit code {code}," in top
    assert ("worse than allowed: 1" in top) == (code == REGRESSION)
    assert ("not comparable (base / run)" in top) == (code == NOT_COMPARABLE)
    assert ("1 missing in run" in top) == (code == INCOMPLETE)
    assert f"--fail {PEAK}:+2%" in page.text


def test_trials_of_one_run_and_statuses_are_listed(compared: Compare) -> None:
    base = [trial(1), trial(2, depth=14), trial(3, depth=26, status="timeout", reason="900 s")]
    run = [
        trial(1, status="oom", reason="too large"),
        trial(3, depth=26, status="crashed", reason="SIGSEGV"),
        trial(4, depth=62),
    ]
    page = Page(as_html(compared(base, run, missing=2)))
    assert [[cell.text for cell in cells] for cells in page.tables["statuses"]] == [
        ["revnet38 stored batch 32", "worse", "ok", "oom", "too large"],
        ["revnet26 stored batch 32", "no result in both", "timeout", "crashed", "SIGSEGV"],
    ]
    end = page.text[page.text.index("Trials and statuses") :]
    assert "1 trial missing in run\n" in end
    assert "revnet14 stored batch 32" in end
    assert "1 trial missing in base\n" in end
    assert "revnet62 stored batch 32" in end
    assert "2 planned trials of run without a record." in end
    elsewhere = on(trial(1, status="oom", reason="too large"), torch="2.14.0")
    page = Page(as_html(compared([trial(1)], [elsewhere])))
    (line,) = page.tables["statuses"]
    assert [cell.text for cell in line[1:]] == ["not comparable", "ok", "oom", "torch 2.13 / 2.14"]
    assert "No trial is missing in run." in page.text


def test_both_origins_are_there_and_what_differs_is_marked(compared: Compare) -> None:
    other = on(trial(1), torch="2.14.0+cpu", threads=4, environment={"OMP_WAIT_POLICY": "ACTIVE"})
    other = other.model_copy(update={"git": {"commit": "f" * 40, "dirty": False}})
    facts = {
        cells[0].text: [cell.text for cell in cells[1:]]
        for cells in Page(as_html(compared([trial(1)], [other]))).tables["origins"]
    }
    assert facts["commit"] == ["0123456789ab and uncommitted changes", "f" * 12, "≠ differs"]
    assert facts["torch"] == ["2.13.0+cpu", "2.14.0+cpu", "≠ differs"]
    assert facts["threads"] == ["1", "4", "≠ differs"]
    assert facts["OMP_WAIT_POLICY"] == ["PASSIVE", "ACTIVE", "≠ differs"]
    assert facts["deepspeed"] == ["0.19.8", "0.19.8", "= same"]
    assert facts["device"] == ["Test CPU", "Test CPU", "= same"]
    assert facts["trials"] == ["ok 1", "ok 1", ""]
    same = Page(as_html(compared([trial(1)], [trial(1)])))
    assert "≠ differs" not in same.text


@pytest.mark.parametrize("run", [[], [trial(1, status="crashed", reason="x")], [trial(1, depth=None)]])
def test_what_has_little_to_compare_has_a_page_too(compared: Compare, run: list[Record]) -> None:
    page = Page(as_html(compared([trial(1, status="failed", reason="y")], run)))
    assert "There is no pair" in page.text
    assert "Not drawn" in page.text


def evil_comparison(compared: Compare) -> Comparison:
    text = " ".join(EVIL)
    base = [trial(n, depth=depth, flavour=text) for n, depth in enumerate((14, 26, 38, 62))]
    base += [trial(9, depth=110, flavour="plain")]
    evil: dict[str, Any] = {"machine": base[0].machine | {"device_name": text, "environment": {text: text}}}
    evil |= {"versions": {"torch": text, text: text}, "git": {"commit": text, "dirty": text}}
    run = [
        scaled(base[0], **{PEAK: 2}),
        without(base[1], DRIFT, text),
        base[2].model_copy(update=evil),
        trial(3, depth=62, flavour=text, status="failed", reason=text),
        trial(8, depth=74, flavour=text),
    ]
    return compared(base, run, f"{PEAK}:+2%", f"{DRIFT}:+1%")


def test_text_of_a_record_is_only_text(compared: Compare) -> None:
    found = evil_comparison(compared)
    html = as_html(found)
    page = Page(html)
    for evil in EVIL[:5]:
        assert evil not in html
        assert evil in page.text
    assert "{{ 7 * 7 }}" in page.text
    assert {tag for tag, _ in page.tags} & {"img", "svg"} == set()
    assert not [given for _, given in page.tags if {"onload", "onerror"} & given.keys()]
    # What Plotly would read as markup is escaped for it too.
    drawn = json.loads(drawing(found).figure.to_json() or "")
    texts = [*drawn["layout"]["yaxis"]["ticktext"], *(note["text"] for note in drawn["layout"]["annotations"])]
    texts += [note["hovertext"] for note in drawn["layout"]["annotations"] if "hovertext" in note]
    texts += [text for trace in drawn["data"] for text in trace.get("text", [])]
    assert any("&lt;script&gt;" in text for text in texts)
    assert not [text for text in texts if "<" in text.replace("<br>", "").replace("<b>", "").replace("</b>", "")]


@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome on this machine")
def test_a_browser_draws_it_without_an_error_and_runs_nothing_of_a_record(compared: Compare, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(as_html(evil_comparison(compared)))

    def dumped(path: Path) -> "subprocess.CompletedProcess[str]":
        assert BROWSER is not None
        command = [
            *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"),
            *("--disable-background-networking", "--disable-component-update", "--enable-logging=stderr", "--v=0"),
            *(f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=8000", "--dump-dom"),
        ]
        return subprocess.run([*command, path.resolve().as_uri()], capture_output=True, text=True, timeout=120)

    done = dumped(page)
    assert "CONSOLE" not in done.stderr, done.stderr
    assert "<title>pwned" not in done.stdout
    assert "main-svg" in done.stdout[done.stdout.index('id="figure-changes"') :][:3000]
    assert "15 of 15 pairs" in done.stdout
    # Negative control: the same text where it is markup, and an error where there is one.
    raw = tmp_path / "raw.html"
    raw.write_text(f"<title>quiet</title>{EVIL[0]}<script>nowhere()</script>")
    done = dumped(raw)
    assert "<title>pwned" in done.stdout
    assert "CONSOLE" in done.stderr

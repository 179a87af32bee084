"""A comparison as one HTML file that opens from disk, without a network."""

from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import plotly.graph_objects as go
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from reports.compare import Comparison, NotComparable, Side, StatusChange
from reports.compare_figure import figure_of_changes, finding
from reports.compare_rows import MEANINGS, SYMBOLS, Row, rows_of
from reports.compare_view import (
    EXIT_CODES,
    change_text,
    counted,
    ends_text,
    origin,
    sections,
    shortened,
    summed,
    verdict,
)
from reports.origins import facts_of

TEMPLATES = Path(__file__).parent / "templates"
SCRIPTS = ("rows.js", "compare.js")
EXIT_SYMBOLS = {0: "✓", 1: "✗", 3: "?", 4: "…"}
# What the list of trials says, not the verdict.
_OF_TRIALS = ("missing in run", "missing in base", "status different", "no result in both")


class MetricLine(NamedTuple):
    """One metric in all cells: its limits, and how many pairs got which verdict."""

    metric: str
    limits: str
    counts: list[tuple[str, int]]
    rise: str
    fall: str


class StatusLine(NamedTuple):
    where: str
    before: str
    now: str
    verdict: str
    why: str


class Fact(NamedTuple):
    name: str
    base: str
    run: str


def as_html(comparison: Comparison) -> str:
    """The page, whatever the verdict. Texts of records and studies are escaped."""
    rows = rows_of(comparison)
    drawn = figure_of_changes(comparison, rows)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.globals |= {"change_text": change_text, "ends_text": ends_text, "counted": counted}
    return environment.get_template("compare.html.jinja").render(
        base=origin(comparison.base),
        run=origin(comparison.run),
        verdict=verdict(comparison),
        exit_code=comparison.exit_code,
        exit_meaning=EXIT_CODES[comparison.exit_code],
        exit_symbol=EXIT_SYMBOLS[comparison.exit_code],
        found=[
            (title, shortened(lines, "the table below"), len(lines))
            for title, lines in sections(comparison)
            if title not in _OF_TRIALS
        ],
        limits=[f"{limit.metric}:{limit.text}" for limit in comparison.limits],
        judged=comparison.judged,
        metrics=_metric_lines(comparison, rows),
        drawn=drawn,
        finding=finding(drawn) if drawn else None,
        figure=_figure_html(drawn.figure) if drawn else None,
        rows=rows,
        counts=Counter(row.verdict for row in rows),
        symbols=SYMBOLS,
        meanings=MEANINGS,
        statuses=_status_lines(comparison),
        missing=comparison.missing,
        added=comparison.added,
        unfinished=[(name, side.missing) for name, side in (("base", comparison.base), ("run", comparison.run))],
        trials=comparison.trials,
        cells=comparison.cells,
        facts=_facts(comparison.base, comparison.run),
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        harness_version=version("revnet-harness"),
        plotly_js=Markup(get_plotlyjs()),
        style=Markup((TEMPLATES / "report.css").read_text()),
        script=Markup("\n".join((TEMPLATES / name).read_text() for name in SCRIPTS)),
    )


def _metric_lines(comparison: Comparison, rows: Sequence[Row]) -> list[MetricLine]:
    """Metrics with a limit first, as they were given."""
    summaries = {summary.metric: summary for summary in summed(comparison.changes)}
    lines = []
    for metric in dict.fromkeys(
        [*(limit.metric for limit in comparison.limits), *summaries, *(r.metric for r in rows)]
    ):
        counts = Counter(row.verdict for row in rows if row.metric == metric)
        limits = ", ".join(limit.text for limit in comparison.limits if limit.metric == metric) or "none"
        summary = summaries.get(metric)
        ends = (summary.rise, summary.fall) if summary else (None, None)
        rise, fall = (change_text(change) if change else "none" for change in ends)
        lines.append(MetricLine(metric, limits, [(name, counts[name]) for name in SYMBOLS], rise, fall))
    return lines


def _status_lines(comparison: Comparison) -> list[StatusLine]:
    def line(found: StatusChange | NotComparable, word: str, why: str | None) -> StatusLine:
        return StatusLine(found.where, str(found.before), str(found.now), word, why or "")

    by_word = {
        "worse": comparison.worse,
        "better": comparison.better,
        "different": comparison.other,
        "no result in both": comparison.no_result,
    }
    lines = [line(found, word, found.reason) for word, changed in by_word.items() for found in changed]
    unlike = [found for found in comparison.not_comparable if found.what == "status"]
    return lines + [line(found, "not comparable", ", ".join(found.differences)) for found in unlike]


def _facts(base: Side, run: Side) -> list[Fact]:
    """Those that differ first."""
    first, second = facts_of(base.frame), facts_of(run.frame)
    facts = [
        Fact(name, *(" / ".join(side.get(name, ())) or "not recorded" for side in (first, second)))
        for name in dict.fromkeys([*first, *second])
    ]
    return sorted(facts, key=lambda fact: fact.base == fact.run)


def _figure_html(figure: go.Figure) -> Markup:
    config: dict[str, Any] = {
        "responsive": True,
        "displaylogo": False,
        "toImageButtonOptions": {"format": "svg", "filename": "changes"},
    }
    drawn = figure.to_html(full_html=False, include_plotlyjs=False, div_id="figure-changes", config=config)
    label = figure.layout["meta"]["description"]
    return Markup('<div class="figure" role="figure" aria-label="{}" tabindex="0">{}</div>').format(
        label, Markup(drawn)
    )

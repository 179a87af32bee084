"""A comparison as Markdown for a pull request. Whatever comes from a record or a study is escaped."""

import html
import re
from collections.abc import Iterable, Sequence

from reports.changes import Change
from reports.compare import Comparison, Judged
from reports.compare_view import change_text, interval_text, origin, sections, shortened, summaries, verdict
from reports.units import shown

# Of a table; a comment on GitHub has at most 65,536 characters.
MOST_ROWS = 60
_ACTIVE = re.compile(r"([\\`*_\[\]|~])")
# What GitHub makes links, mentions and emoji of when Markdown is done with, so that no backslash helps: @name, #12,
# GH-12, URLs with and without a scheme, :name:. A word joiner behind it, which nobody sees, keeps it text.
_LINKED = re.compile(r"([@#]|GH-(?=\d)|(?:https?|ftp):(?=//)|www(?=\.)|:(?=[\w+-]+:))", re.IGNORECASE)
_JOINER = "\u2060"
# What begins a list within a list, or a line across.
_BEGINNING = re.compile(r"^(?:([-+=])|(\d{1,9})([.)]))")
_FIGURES = ("where", "metric", "before", "now", "change")
# What is in tables of their own, or of no matter to a reviewer.
_IN_TABLES = ("worse than allowed", "beyond a limit, but within noise", "better by more than a limit")


def as_markdown(comparison: Comparison) -> str:
    base, run = origin(comparison.base), origin(comparison.run)
    parts = [
        f"### revnet compare: {escaped(verdict(comparison))}",
        _table(("", "base", "run"), [(name, base[name], run[name]) for name in base]),
    ]
    for title, judged in (
        ("Worse than allowed", comparison.regressions),
        ("Beyond a limit, but within noise", comparison.within_noise),
        ("Better by more than a limit", comparison.improvements),
    ):
        if judged:
            parts += [f"**{title}**", _table((*_FIGURES, "limit", "interval"), map(_judged_row, judged))]
    for title, lines in sections(comparison):
        if title not in _IN_TABLES:
            parts += [f"**{escaped(title.capitalize())}**", _list(shortened(lines))]
    changed = [change for change in comparison.changes if change.differing]
    unchanged = [change for change in comparison.changes if not change.differing]
    parts += ["**In all cells**", _list(" ".join(line.split()) for line in summaries(comparison.changes))]
    for title, changes in (("Changed", changed), ("Unchanged", unchanged)):
        if changes:
            summary = f"<details><summary>{title}: {len(changes)} figures</summary>"
            parts += [summary, _table(_FIGURES, map(_row, changes)), "</details>"]
    return "\n\n".join(parts) + "\n"


def escaped(text: object) -> str:
    """One line that Markdown and HTML show as it is."""
    one_line = "".join(character if character.isprintable() else " " for character in str(text))
    active = _ACTIVE.sub(r"\\\1", html.escape(_LINKED.sub(rf"\1{_JOINER}", one_line), quote=False))
    # As GitHub has it where a dollar is to begin no formula.
    return active.replace("$", "<span>$</span>")


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    texts = [f"| {' | '.join(map(escaped, row))} |" for row in rows]
    left = len(texts) - MOST_ROWS
    more = f"\n\nand {left} more; `--json` has all" if left > 0 else ""
    rule = "|" + " --- |" * len(headings)
    return "\n".join([f"| {' | '.join(headings)} |", rule, *texts[:MOST_ROWS]]) + more


def _list(lines: Iterable[str]) -> str:
    return "\n".join(f"- {_BEGINNING.sub(_shown_as_text, escaped(line).strip())}" for line in lines)


def _shown_as_text(begun: re.Match[str]) -> str:
    mark, number, behind = begun.groups()
    return f"\\{mark}" if mark else f"{number}\\{behind}"


def _row(change: Change) -> tuple[str, ...]:
    metric = change.metric
    return change.where, metric, shown(metric, change.before), shown(metric, change.now), change_text(change)


def _judged_row(found: Judged) -> tuple[str, ...]:
    return *_row(found.change), found.limit.text, interval_text(found.change).removeprefix("; ")

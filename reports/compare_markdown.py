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
_ACTIVE = re.compile(r"([\\`*_\[\]|~#])")
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
    # A word joiner after @, which nobody sees, so that no person of that name is called.
    return _ACTIVE.sub(r"\\\1", html.escape(one_line, quote=False)).replace("@", "@\u2060")


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    texts = [f"| {' | '.join(map(escaped, row))} |" for row in rows]
    left = len(texts) - MOST_ROWS
    more = f"\n\nand {left} more; `--json` has all" if left > 0 else ""
    rule = "|" + " --- |" * len(headings)
    return "\n".join([f"| {' | '.join(headings)} |", rule, *texts[:MOST_ROWS]]) + more


def _list(lines: Iterable[str]) -> str:
    return "\n".join(f"- {escaped(line)}" for line in lines)


def _row(change: Change) -> tuple[str, ...]:
    metric = change.metric
    return change.where, metric, shown(metric, change.before), shown(metric, change.now), change_text(change)


def _judged_row(found: Judged) -> tuple[str, ...]:
    return *_row(found.change), found.limit.text, interval_text(found.change).removeprefix("; ")

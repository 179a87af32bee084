"""Every pair of a comparison as a row: what it was, what it is, the verdict in one word, and why."""

from typing import NamedTuple

from reports.changes import Change
from reports.compare import Comparison, Judged
from reports.compare_view import limit_text
from reports.units import shown

# In the order of what a reader looks for; told apart by symbol and word, in the figure also by colour.
SYMBOLS = {
    "worse": "✗",
    "within noise": "≈",
    "not comparable": "?",
    "not compared": "–",
    "better": "★",
    "changed": "•",
    "allowed": "✓",
    "equal": "=",
}
MEANINGS = {
    "worse": "beyond a limit",
    "within noise": "beyond a limit, but the interval of this time includes no change; not counted",
    "not comparable": "the two ran on different hardware, versions or settings",
    "not compared": "measured in one of the two runs",
    "better": "by more than a limit, the other way",
    "changed": "without a limit on it",
    "allowed": "changed, and within its limits",
    "equal": "to the last digit, in all repeats",
}


class Row(NamedTuple):
    """One metric of one cell; `change` is None where there is none to speak of, and then `why` says the reason.

    before, now  in the metric's own unit; None where it was not measured
    """

    where: str
    metric: str
    before: float | None
    now: float | None
    change: Change | None
    verdict: str
    why: str

    @property
    def symbol(self) -> str:
        return SYMBOLS[self.verdict]

    @property
    def from_zero(self) -> bool:
        """Whether it changed, and by no percentage."""
        return self.change is not None and self.change.fraction is None and self.change.now != self.change.before

    def value_text(self, value: float | None) -> str:
        return "none" if value is None else shown(self.metric, value)


def rows_of(comparison: Comparison) -> list[Row]:
    """By verdict, then in the order of BASE. What is not comparable in several ways has a row for each."""
    judged: dict[Change, list[Judged]] = {}
    for found in (*comparison.regressions, *comparison.within_noise, *comparison.improvements):
        judged.setdefault(found.change, []).append(found)
    rows = []
    for change in comparison.changes:
        why = "; ".join(dict.fromkeys(map(limit_text, judged.get(change, []))))
        verdict = comparison.verdict_on(change)
        rows.append(Row(change.where, change.metric, change.before, change.now, change, verdict, why))
    for found in comparison.not_comparable:
        if not isinstance(found.before, str) and not isinstance(found.now, str):
            why = ", ".join(found.differences)
            rows.append(Row(found.where, found.what, found.before, found.now, None, "not comparable", why))
    for found in comparison.not_compared:
        why = f"{found.missing_in} has none: {found.reason}"
        rows.append(Row(found.where, found.metric, found.before, found.now, None, "not compared", why))
    cells = {name: place for place, name in enumerate(comparison.names)}
    order = {verdict: place for place, verdict in enumerate(SYMBOLS)}
    return sorted(rows, key=lambda row: (order[row.verdict], cells[row.where]))

"""A comparison as text for a terminal, and as data for a program."""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from reports.changes import Change
from reports.compare import (
    EQUAL,
    INCOMPLETE,
    NOT_COMPARABLE,
    REGRESSION,
    Comparison,
    Judged,
    NotComparable,
    NotCompared,
    Side,
)
from reports.origins import MAIN_FACTS, facts_of
from reports.units import percent, shown, shown_change

# Of one kind; whoever wants more asks for the data.
MOST_LINES = 20
EXIT_CODES = {
    EQUAL: "nothing is worse than allowed",
    REGRESSION: "a regression: a figure beyond a limit, or a status that got worse",
    NOT_COMPARABLE: "not comparable: hardware, versions or settings differ",
    INCOMPLETE: "incomplete: a trial, a figure or a result is missing, or nothing was held against a limit",
}


def verdict(comparison: Comparison) -> str:
    """One sentence."""
    code = comparison.exit_code
    if code == REGRESSION:
        found = [
            counted(len(comparison.regressions), "figure") * bool(comparison.regressions),
            counted(len(comparison.worse), "status") * bool(comparison.worse),
        ]
        return f"regression: {' and '.join(filter(None, found))} worse than allowed"
    if code == NOT_COMPARABLE:
        return "not comparable: the two runs are not of the same hardware, versions or settings"
    if not comparison.trials:
        return "incomplete: the runs have no finished trial in common"
    nothing = "nothing worse than allowed" if comparison.limits else "no status worse, and no limit given (--fail)"
    in_all = f"{nothing} in {counted(comparison.trials, 'trial')}"
    return in_all if code == EQUAL else f"incomplete: {in_all}, but some cannot be judged"


def origin(side: Side) -> dict[str, str]:
    """What a reader wants to know of a run; with every value that occurs, since a run may span machines."""
    statuses = ", ".join(f"{status} {count}" for status, count in side.frame["status"].value_counts().items())
    missing = f"; {side.missing} without a record" * bool(side.missing)
    facts = facts_of(side.frame)
    said = {name: " / ".join(facts[name]) or "not recorded" for name in MAIN_FACTS}
    return {"run": side.uri, "study": side.study or "none", "trials": (statuses or "none") + missing} | said


def as_text(comparison: Comparison) -> str:
    lines = [verdict(comparison)]
    for name, side in (("base", comparison.base), ("run", comparison.run)):
        facts = origin(side)
        rest = ", ".join(f"{key} {value}" for key, value in facts.items() if key != "run")
        lines.append(f"  {name:<5}{facts['run']}: {rest}")
    for title, found in sections(comparison):
        lines += ["", f"{title}:", *(f"  {line}" for line in shortened(found))]
    lines += ["", f"{counted(comparison.cells, 'cell')}, {counted(comparison.trials, 'trial')} in both:"]
    lines += [f"  {line}" for line in summaries(comparison.changes)]
    return "".join(f"{_printable(line)}\n" for line in lines)


def sections(comparison: Comparison) -> list[tuple[str, list[str]]]:
    """What matters, a line each, under its title; titles without a line are left out."""
    statuses = [
        (title, [f"{found.where}: {found.before} -> {found.now}{_because(found.reason)}" for found in changed])
        for title, changed in (
            ("status worse", comparison.worse),
            ("status better", comparison.better),
            ("status different", comparison.other),
            ("no result in both", comparison.no_result),
        )
    ]
    found = [
        ("worse than allowed", list(map(judged_line, comparison.regressions))),
        *statuses[:1],
        ("beyond a limit, but within noise", list(map(judged_line, comparison.within_noise))),
        ("not comparable (base / run)", not_comparable_lines(comparison.not_comparable)),
        ("not compared", not_compared_lines(comparison.not_compared)),
        ("missing in run", [*comparison.missing, *_unfinished("run", comparison.run)]),
        ("missing in base", [*comparison.added, *_unfinished("base", comparison.base)]),
        ("better by more than a limit", list(map(judged_line, comparison.improvements))),
        *statuses[1:],
    ]
    return [(title, lines) for title, lines in found if lines]


def judged_line(found: Judged) -> str:
    change = found.change
    words = [f"{change.metric} {shown(change.metric, change.before)} -> {shown(change.metric, change.now)}"]
    words += [shown_change(change.metric, change.before, change.now), limit_text(found)]
    return f"{change.where}: {', '.join(words)}{interval_text(change)}"


def limit_text(found: Judged) -> str:
    from_zero = found.change.before == 0 and found.limit.relative
    return f"limit {found.limit.text}" + ", from 0 any change is beyond a limit in percent" * from_zero


def interval_text(change: Change) -> str:
    """`; -1 % to +4 % (95 %, ...)`; "" where there is none."""
    ends = ends_text(change)
    return f"; {ends} ({change.method})" if ends else ""


def ends_text(change: Change) -> str:
    if change.low is None or change.high is None:
        return ""
    return f"{percent(change.low)} to {percent(change.high)}"


def change_text(change: Change) -> str:
    if change.before == change.now and change.differing:
        return f"median equal, {change.differing} of {change.repeats} repeats not"
    return shown_change(change.metric, change.before, change.now)


def not_compared_lines(found: Iterable[NotCompared]) -> list[str]:
    """One line for each metric, side and reason."""
    return _together(((one.metric, one.missing_in, one.reason), one.where) for one in found)


def not_comparable_lines(found: Iterable[NotComparable]) -> list[str]:
    """One line for each metric and what differs."""
    return _together(((one.what, ", ".join(one.differences)), one.where) for one in found)


def _together(found: Iterable[tuple[tuple[str, ...], str]]) -> list[str]:
    places: dict[tuple[str, ...], dict[str, None]] = defaultdict(dict)
    for about, where in found:
        places[about][where] = None
    lines = []
    for (what, *rest), where in places.items():
        first, *others = where
        in_others = f" and {counted(len(others), 'other cell')}" * bool(others)
        side = f"{rest[0]} has none, " * (len(rest) > 1)
        lines.append(f"{what}: {side}{rest[-1]} ({first}{in_others})")
    return lines


class Summary(NamedTuple):
    """Of one metric in all its cells; None where nothing rose, or fell."""

    metric: str
    cells: int
    equal: int
    rise: Change | None
    fall: Change | None


def summed(changes: Sequence[Change]) -> list[Summary]:
    by_metric: dict[str, list[Change]] = defaultdict(list)
    for change in changes:
        by_metric[change.metric].append(change)
    found = []
    for metric, of_metric in by_metric.items():
        equal = sum(change.differing == 0 for change in of_metric)
        by_size = sorted(of_metric, key=_size)
        rise = by_size[-1] if by_size[-1].now > by_size[-1].before else None
        fall = by_size[0] if by_size[0].now < by_size[0].before else None
        found.append(Summary(metric, len(of_metric), equal, rise, fall))
    return found


def summaries(changes: Sequence[Change]) -> list[str]:
    """One line a metric: how many are equal, and the largest rise and fall; or that there is none."""
    found = summed(changes)
    width = max((len(summary.metric) for summary in found), default=0)
    lines = []
    for metric, cells, equal, rise, fall in found:
        words = [f"{equal} of {counted(cells, 'cell')} equal"]
        words += [f"largest rise {change_text(rise)} ({rise.where})"] if rise else []
        words += [f"largest fall {change_text(fall)} ({fall.where})"] if fall else []
        lines.append(f"{metric:<{width}}  {', '.join(words)}")
    return lines or ["no figure could be compared"]


def shortened(lines: Sequence[str], has_all: str = "--json") -> list[str]:
    left = len(lines) - MOST_LINES
    return list(lines) if left <= 0 else [*lines[:MOST_LINES], f"and {left} more; {has_all} has all"]


def counted(count: int, noun: str) -> str:
    plural = {"status": "statuses"}.get(noun, f"{noun}s")
    return f"{count} {noun if count == 1 else plural}"


def as_json(comparison: Comparison) -> str:
    """Values are in the metrics' own units; `fraction`, `low` and `high` are of the value before."""
    data = {
        "schema": 1,
        "verdict": verdict(comparison),
        "exit_code": comparison.exit_code,
        "base": origin(comparison.base),
        "run": origin(comparison.run),
        "judged": list(comparison.judged),
        "limits": [f"{limit.metric}:{limit.text}" for limit in comparison.limits],
        "regressions": list(map(_judged_data, comparison.regressions)),
        "within_noise": list(map(_judged_data, comparison.within_noise)),
        "improvements": list(map(_judged_data, comparison.improvements)),
        "status_worse": [found._asdict() for found in comparison.worse],
        "status_better": [found._asdict() for found in comparison.better],
        "status_different": [found._asdict() for found in comparison.other],
        "no_result": [found._asdict() for found in comparison.no_result],
        "not_comparable": [found._asdict() for found in comparison.not_comparable],
        "not_compared": [found._asdict() for found in comparison.not_compared],
        "missing_in_run": list(comparison.missing),
        "missing_in_base": list(comparison.added),
        "changes": [change._asdict() | {"fraction": change.fraction} for change in comparison.changes],
    }
    return json.dumps(data, indent=1, allow_nan=False) + "\n"


def _judged_data(found: Judged) -> dict[str, Any]:
    return found.change._asdict() | {"fraction": found.change.fraction, "limit": found.limit.text}


def _size(change: Change) -> float:
    """To sort by: the fraction, with what came from 0 beyond all others."""
    rise = change.now - change.before
    return change.fraction if change.fraction is not None else rise and (float("inf") if rise > 0 else -float("inf"))


def _unfinished(name: str, side: Side) -> list[str]:
    return [f"{counted(side.missing, 'planned trial')} of {name} without a record"] * bool(side.missing)


def _because(reason: str | None) -> str:
    return f" ({reason})" if reason else ""


def _printable(line: str) -> str:
    """Without what could move a terminal's cursor or colour it; reasons and names come from elsewhere."""
    return "".join(character if character.isprintable() else " " for character in line)

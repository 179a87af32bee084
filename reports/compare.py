"""Two runs to a verdict: what changed, what got worse than allowed, and what could not be compared."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from typing import Any, Literal, NamedTuple

import pandas as pd

from harness.record import RESULT_STATUSES
from harness.store import RunStore
from reports.cells import Cell, Trial, pair_trials
from reports.changes import Change, change_of
from reports.comparable import Kind, differences, kind_of
from reports.frames import missing_ids, trials_frame
from reports.limits import Limit, check_metrics

# Compared in any case.
METRICS = ("activation_peak_bytes", "activation_saved_bytes", "step_median_s", "drift_max_rel", "gradient_angle_deg")
EQUAL, REGRESSION, NOT_COMPARABLE, INCOMPLETE = 0, 1, 3, 4
# On one change of one cell; `allowed` differs and is within its limits, `changed` differs and has none.
ChangeVerdict = Literal["worse", "within noise", "better", "changed", "allowed", "equal"]
# Of a status, in the order from good to bad.
NO_RESULT = 2


class Side(NamedTuple):
    """One of the two runs. `missing` trials were planned and have no record."""

    uri: str
    study: str
    frame: pd.DataFrame
    missing: int


class Judged(NamedTuple):
    """A change that is beyond a limit, in the one direction or the other."""

    change: Change
    limit: Limit


class StatusChange(NamedTuple):
    where: str
    before: str
    now: str
    reason: str | None


class NotCompared(NamedTuple):
    """A metric that one of two trials has and the other has not; `missing_in` is `base` or `run`.

    before, now  the median over such repeats of the cell; None on the side that has none
    """

    where: str
    metric: str
    missing_in: str
    reason: str
    before: float | None
    now: float | None


class NotComparable(NamedTuple):
    """Two trials that differ in what they ran on; `what` is a metric, or `status`.

    before, now  of a metric the medians over such repeats of the cell, None where a side has none; of `status` both
    """

    where: str
    what: str
    differences: tuple[str, ...]
    before: float | str | None
    now: float | str | None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What was found. `changes` has every cell and metric that were compared, the lists below what of them matters.

    names           of the cells, in the order of BASE
    judged          the metrics that the verdict is about: those with a limit, without any limit all
    within_noise    beyond a limit and not counted, since the interval includes no change
    other           statuses that differ and are as good as each other
    no_result       trials that crashed, failed or hit their time limit in both
    missing, added  names of trials that only BASE, and only RUN, has
    """

    base: Side
    run: Side
    limits: Sequence[Limit]
    judged: Sequence[str]
    names: Sequence[str]
    trials: int
    changes: Sequence[Change]
    regressions: Sequence[Judged]
    within_noise: Sequence[Judged]
    improvements: Sequence[Judged]
    worse: Sequence[StatusChange]
    better: Sequence[StatusChange]
    other: Sequence[StatusChange]
    no_result: Sequence[StatusChange]
    not_compared: Sequence[NotCompared]
    not_comparable: Sequence[NotComparable]
    missing: Sequence[str]
    added: Sequence[str]

    @property
    def cells(self) -> int:
        return len(self.names)

    @property
    def exit_code(self) -> int:
        """A regression among what is comparable is proven, whatever else is missing; then what cannot be judged."""
        if self.regressions or self.worse:
            return REGRESSION
        if any(found.what in (*self.judged, "status") for found in self.not_comparable):
            return NOT_COMPARABLE
        # A limit that nothing was held against has not been kept.
        held = {change.metric for change in self.changes}
        unjudged = any(limit.metric not in held for limit in self.limits)
        unjudged |= any(found.metric in self.judged for found in self.not_compared)
        unfinished = self.missing or self.no_result or self.base.missing or self.run.missing or not self.trials
        return INCOMPLETE if unjudged or unfinished else EQUAL

    def verdict_on(self, change: Change) -> ChangeVerdict:
        """Of several limits on its metric the one that it does worst by decides."""
        if change in self._beyond:
            return self._beyond[change]
        if not change.differing:
            return "equal"
        return "allowed" if any(limit.metric == change.metric for limit in self.limits) else "changed"

    @cached_property
    def _beyond(self) -> Mapping[Change, ChangeVerdict]:
        found: dict[Change, ChangeVerdict] = {judged.change: "better" for judged in self.improvements}
        found |= {judged.change: "within noise" for judged in self.within_noise}
        found |= {judged.change: "worse" for judged in self.regressions}
        return found


def read_side(store: RunStore) -> Side:
    """Raises RecordError for a record that this version cannot read."""
    plan = store.read_plan()
    return Side(store.uri, plan.name if plan else "", trials_frame(store), len(missing_ids(store)))


def compare_sides(base: Side, run: Side, limits: Sequence[Limit] = ()) -> Comparison:
    """Raises HarnessError for a limit on a metric that no trial of either run has."""
    before, now = _trials(base), _trials(run)
    measured = {name for trial in (*before, *now) if trial["status"] == "ok" for name in trial["metrics"]}
    if measured:
        reasons = {name: why for trial in (*before, *now) for name, why in trial["unmeasured"].items()}
        check_metrics(limits, measured, reasons)
    metrics = list(dict.fromkeys([*METRICS, *(limit.metric for limit in limits)]))
    paired = pair_trials(before, now)
    changes: list[Change] = []
    not_compared: list[NotCompared] = []
    not_comparable: list[NotComparable] = []
    statuses: list[StatusChange] = []
    for cell in paired.cells:
        statuses += _statuses(cell, not_comparable)
        for metric in metrics:
            pairs = _pairs_with(metric, cell, not_compared, not_comparable)
            if pairs:
                changes.append(change_of(cell.name, metric, pairs))
    exceeded = [
        Judged(change, limit)
        for change in changes
        for limit in limits
        if limit.metric == change.metric and limit.exceeded(change.before, change.now)
    ]
    return Comparison(
        base=base,
        run=run,
        limits=limits,
        judged=list(dict.fromkeys(limit.metric for limit in limits)) or METRICS,
        names=[cell.name for cell in paired.cells],
        trials=sum(len(cell.pairs) for cell in paired.cells),
        changes=changes,
        regressions=[found for found in exceeded if not found.change.within_noise],
        within_noise=[found for found in exceeded if found.change.within_noise],
        improvements=_improvements(changes, limits),
        worse=[found for found in statuses if _rank(found.now) > _rank(found.before)],
        better=[found for found in statuses if _rank(found.now) < _rank(found.before)],
        other=[found for found in statuses if _rank(found.now) == _rank(found.before) < NO_RESULT],
        no_result=[found for found in statuses if _rank(found.now) == _rank(found.before) == NO_RESULT],
        not_compared=not_compared,
        not_comparable=list(dict.fromkeys(not_comparable)),
        missing=paired.missing,
        added=paired.added,
    )


def _trials(side: Side) -> list[dict[str, Any]]:
    """The rows of the frame."""
    rows: list[dict[str, Any]] = side.frame.to_dict("records")  # pyright: ignore[reportAssignmentType]
    # A process that died left nothing about its machine; the run's first trial that did stands for it.
    known = next((row for row in rows if row["machine"]), None)
    if known is None:
        return rows
    stand_in = {"machine": known["machine"], "versions": known["versions"]}
    return [row if row["machine"] else row | stand_in for row in rows]


def _statuses(cell: Cell, not_comparable: list[NotComparable]) -> list[StatusChange]:
    found = []
    for before, now in cell.pairs:
        if before["status"] == now["status"] and _rank(now["status"]) < NO_RESULT:
            continue
        # Where a whole run died and left nothing about its machine, that is the finding.
        known = before["machine"] and now["machine"]
        if known and (unlike := differences(before, now, "status")):
            not_comparable.append(NotComparable(cell.name, "status", tuple(unlike), before["status"], now["status"]))
        else:
            # Of the two, the reason of the one that went wrong.
            reason = now["reason"] if now["status"] != "ok" else before["reason"]
            found.append(StatusChange(cell.name, before["status"], now["status"], reason))
    return found


def _pairs_with(
    metric: str, cell: Cell, not_compared: list[NotCompared], not_comparable: list[NotComparable]
) -> list[tuple[Trial, Trial]]:
    """The pairs that have the metric and are comparable; of the others, why not."""
    kind: Kind = kind_of(metric)
    pairs: list[tuple[Trial, Trial]] = []
    unlike: dict[tuple[str, ...], list[tuple[Trial, Trial]]] = defaultdict(list)
    lacking: dict[tuple[str, str], list[tuple[Trial, Trial]]] = defaultdict(list)
    for before, now in cell.pairs:
        if before["status"] != "ok" or now["status"] != "ok":
            continue
        has = [metric in trial["metrics"] for trial in (before, now)]
        if not any(has):
            continue
        if found := differences(before, now, kind):
            unlike[tuple(found)].append((before, now))
        elif not all(has):
            without, side = (now, "run") if has[0] else (before, "base")
            lacking[side, without["unmeasured"].get(metric, "the record does not say")].append((before, now))
        else:
            pairs.append((before, now))
    for what, of_them in unlike.items():
        not_comparable.append(NotComparable(cell.name, metric, what, *_medians(metric, of_them)))
    for (side, reason), of_them in lacking.items():
        not_compared.append(NotCompared(cell.name, metric, side, reason, *_medians(metric, of_them)))
    return pairs


def _medians(metric: str, pairs: Sequence[tuple[Trial, Trial]]) -> tuple[float | None, float | None]:
    values = ([pair[side]["metrics"][metric] for pair in pairs if metric in pair[side]["metrics"]] for side in (0, 1))
    before, now = (median(found) if found else None for found in values)
    return before, now


def _improvements(changes: Sequence[Change], limits: Sequence[Limit]) -> list[Judged]:
    return [
        Judged(change, limit)
        for change in changes
        for limit in limits
        if limit.metric == change.metric and limit.bettered(change.before, change.now) and not change.within_noise
    ]


def _rank(status: str) -> int:
    """0 measured, 1 an answer all the same."""
    return 0 if status == "ok" else 1 if status in RESULT_STATUSES else NO_RESULT

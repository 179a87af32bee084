"""What a comparison may find and still pass: limits such as `activation_peak_bytes:+2%`."""

import difflib
import re
from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import NamedTuple

from harness.errors import HarnessError
from reports.units import unit_of

_NUMBER = r"\d+(?:\.\d+)?(?:[eE][+-]?\d+)?"
_SYNTAX = re.compile(rf"(?P<metric>\w+):(?P<sign>[+-])(?P<number>{_NUMBER})\s*(?P<unit>\S*)")
_ALLOWED = "METRIC:+LIMIT for a rise, METRIC:-LIMIT for a fall, such as activation_peak_bytes:+2% or step_median_s:+5ms"


class Limit(NamedTuple):
    """How far a metric may rise, or fall.

    amount  a fraction of the value before where it is `relative`, else in the metric's own unit
    text    as it was given, without the metric: `+2%`
    """

    metric: str
    rise: bool
    amount: Fraction
    relative: bool
    text: str

    def exceeded(self, before: float, now: float) -> bool:
        """Exactly, so that a change of just the limit is allowed; from 0 any change is beyond a relative limit."""
        return self._worse_by(before, now) > self._allowed(before)

    def bettered(self, before: float, now: float) -> bool:
        """Whether the metric went as far the other way."""
        return -self._worse_by(before, now) > self._allowed(before)

    def as_fraction(self, before: float) -> float | None:
        """The change, as a fraction of the value before, that is just allowed; None where that is 0."""
        if not before:
            return None
        return float(self._allowed(before) / abs(Fraction(before))) * (1 if self.rise else -1)

    def _worse_by(self, before: float, now: float) -> Fraction:
        change = Fraction(now) - Fraction(before)
        return change if self.rise else -change

    def _allowed(self, before: float) -> Fraction:
        return self.amount * abs(Fraction(before)) if self.relative else self.amount


def parse_limit(text: str) -> Limit:
    """Raises HarnessError, which says what is allowed."""
    match = _SYNTAX.fullmatch(text.strip())
    if match is None:
        raise HarnessError(f"--fail {text}: allowed: {_ALLOWED}. Correct it.")
    metric, sign, number, unit = match["metric"], match["sign"], Fraction(match["number"]), match["unit"]
    if unit == "%":
        if sign == "-" and number >= 100:
            raise HarnessError(f"--fail {text}: nothing falls by more than 100 %. Give a smaller limit.")
        return Limit(metric, sign == "+", number / 100, True, f"{sign}{match['number']}%")
    own, spelled = unit_of(metric)
    if unit and unit not in spelled:
        units = ", ".join(["%", *spelled])
        raise HarnessError(
            f"--fail {text}: no unit {unit!r} for {metric}; allowed: {units}, or none for {own}. Correct the unit."
        )
    return Limit(metric, sign == "+", number * spelled.get(unit, 1), False, f"{sign}{match['number']}{unit}")


def check_metrics(limits: Iterable[Limit], measured: Iterable[str], reasons: Mapping[str, str]) -> None:
    """Raises HarnessError for a limit on what no trial has, which could never fail.

    measured  the metrics that a trial of either run has
    reasons   why others were not measured
    """
    known = sorted(measured)
    for limit in limits:
        if limit.metric in known:
            continue
        if limit.metric in reasons:
            raise HarnessError(
                f"--fail {limit.metric}:{limit.text}: no trial of either run has it: {reasons[limit.metric]}. "
                "Leave it out, or run both with it measured."
            )
        near = difflib.get_close_matches(limit.metric, known, n=3, cutoff=0.5)
        hint = f"Did you mean {' or '.join(near)}?" if near else f"There are: {', '.join(known)}."
        raise HarnessError(f"--fail {limit.metric}:{limit.text}: no trial of either run has such a metric. {hint}")

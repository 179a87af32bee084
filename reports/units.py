"""A metric's unit, by the end of its name: how people write an amount of it, and how it is shown."""

from collections.abc import Mapping
from fractions import Fraction
from typing import NamedTuple

MIB = 2**20


class Unit(NamedTuple):
    """`spelled` are the units that an amount may be written in, each with its size in the metric's own unit."""

    own: str
    spelled: Mapping[str, Fraction]


# The first ending that fits; all others have no unit.
_UNITS = {
    "_bytes": Unit("bytes", {name: Fraction(2**n) for name, n in (("KiB", 10), ("MiB", 20), ("GiB", 30), ("TiB", 40))}),
    "_per_s": Unit("per second", {}),
    "_s": Unit("seconds", {"s": Fraction(1), "ms": Fraction(1, 10**3), "us": Fraction(1, 10**6)}),
    "_deg": Unit("degrees", {"deg": Fraction(1)}),
}


def unit_of(metric: str) -> Unit:
    return next((unit for ending, unit in _UNITS.items() if metric.endswith(ending)), Unit("a number", {}))


def shown(metric: str, value: float) -> str:
    """A value with its unit: bytes in MiB, times in milliseconds."""
    own = unit_of(metric).own
    if own == "bytes":
        return f"{value / MIB:,.2f} MiB" if value == 0 or abs(value) >= 0.01 * MIB else f"{value:,.6g} bytes"
    if own == "seconds":
        return f"{value:,.2f} s" if abs(value) >= 10 else f"{value * 1e3:.4g} ms"
    number = f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"
    return number + {"per second": " /s", "degrees": "°"}.get(own, "")


def shown_change(metric: str, before: float, now: float) -> str:
    """`+3.00 MiB (+3 %)`; without percent where it was 0."""
    change = now - before
    if change == 0:
        return "equal"
    signed = f"{'+' if change > 0 else '-'}{shown(metric, abs(change))}"
    return f"{signed} ({percent(change / abs(before))})" if before else signed


def percent(fraction: float) -> str:
    """`+3.25 %`: three digits, so that a small change does not become none."""
    return f"{100 * fraction:+,.0f} %" if abs(fraction) >= 10 else f"{100 * fraction:+.3g} %"

"""The largest of a metric, with the trials counted in which it is no finite number, so that no `at most` hides them."""

import math
from typing import NamedTuple

import pandas as pd

from harness.record import not_finite


class Largest(NamedTuple):
    """`value` is the largest finite one and `row` whose it is, NaN and None where there is none; `of` are the trials
    that measured it, among them those where it is NaN, `nans`, or infinite, `infinities`."""

    value: float
    row: int | None
    nans: int
    infinities: int
    of: int

    @property
    def lost(self) -> int:
        return self.nans + self.infinities


def largest(rows: pd.DataFrame, metric: str) -> Largest:
    """Of these rows of the trials' frame."""
    finite = rows[metric].astype(float).dropna() if metric in rows else pd.Series(dtype=float)
    reasons = rows.get("unmeasured", ())
    lost = [value for each in reasons if (value := not_finite(each.get(metric, ""))) is not None]
    nans = sum(map(math.isnan, lost))
    row = finite.index[int(finite.to_numpy().argmax())] if len(finite) else None
    value = math.nan if row is None else float(finite[row])
    return Largest(value, row, nans, len(lost) - nans, len(finite) + len(lost))


def amount(value: float) -> str:
    return "0" if value == 0 else f"{value:.2g}"


def at_most(found: Largest, unit: str = "", *, zero: str = "0", where: str = "") -> str:
    """`at most 3e-07`, and behind it in how many trials it is not a number; "" where no trial measured it.

    zero   what to say where all that are finite are 0
    where  what stands in the same brackets, such as the trial that has it
    """
    if found.row is None:
        return lost_text(found)
    said = zero + unit * (zero == "0") if found.value == 0 else f"at most {amount(found.value)}{unit}"
    notes = [where] * bool(where and found.value) + [f"but {lost_text(found)}"] * bool(found.lost)
    return said + (f" ({'; '.join(notes)})" if notes else "")


def lost_text(found: Largest) -> str:
    """`in 2 of 5 trials not a number`; "" where it is one in all."""
    parts = []
    for count, name in ((found.nans, "not a number"), (found.infinities, "infinite")):
        if count:
            all_of = count == found.of
            trials = ("" if found.of == 1 else f" in all {found.of} trials") if all_of else ""
            parts.append(f"{name}{trials}" if all_of else f"{name} in {count} of {found.of} trials")
    return " and ".join(parts)

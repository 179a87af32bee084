"""The whole run in a few rows, one for each strategy and batch size."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import pandas as pd

from reports.frames import INTERVAL_DEPTHS, depth_law
from reports.largest import amount, largest, lost_text
from reports.pairs import pairs

MIB = 2**20


class SummaryRow(NamedTuple):
    """One strategy at one batch size, as text; empty where it has no such figure."""

    strategy: str
    batch: str
    peak_per_block: str
    predicted_peak_per_block: str
    saved_per_block: str
    peak: str
    time_ratio: str
    drift: str
    angle: str


HEADINGS = {
    "strategy": "strategy",
    "batch": "batch",
    "peak_per_block": "activation peak (MiB per block)",
    "predicted_peak_per_block": "the same, predicted (MiB per block)",
    "saved_per_block": "saved activations (MiB per block)",
    "peak": "activation peak (MiB)",
    "time_ratio": "step time over stored",
    "drift": "largest relative drift",
    "angle": "gradient angle (°)",
}
_LAWS = {
    "peak_per_block": "activation_peak_bytes",
    "predicted_peak_per_block": "predicted_activation_peak_bytes",
    "saved_per_block": "activation_saved_bytes",
}


def summary(frame: pd.DataFrame) -> list[SummaryRow]:
    """Rows in the order of the frame."""
    measured = frame[frame["status"] == "ok"]
    laws = {column: depth_law(frame, metric) for column, metric in _LAWS.items()}
    ratios: dict[tuple[str, object], float] = {}
    for pair in pairs(frame, "step_median_s"):
        for batch, rows in pair.table.groupby("batch_size"):
            ratios[pair.strategy, batch] = (rows["step_median_s"] / rows["step_median_s_stored"]).median()
    summary_rows = []
    for (strategy, batch), rows in measured.groupby(["strategy", "batch_size"], sort=False):
        slopes = {}
        for column, law in laws.items():
            line = law[(law["strategy"] == strategy) & (law["batch_size"] == batch)]
            slopes[column] = margin_text(line.iloc[0]) if len(line) else ""
        deepest = rows.sort_values("depth").iloc[-1]
        peak = deepest.get("activation_peak_bytes", math.nan)
        ratio = ratios.get((str(strategy), batch))
        summary_rows.append(
            SummaryRow(
                strategy=str(strategy),
                batch=str(batch),
                **slopes,
                peak="" if math.isnan(peak) else f"{peak / MIB:.1f}{at_depth(deepest['depth'])}",
                time_ratio="" if ratio is None else f"{ratio:.2f}",
                drift=_largest(rows, "drift_max_rel"),
                angle=_largest(rows, "gradient_angle_deg"),
            )
        )
    return summary_rows


def headings_of(rows: list[SummaryRow]) -> dict[str, str]:
    """The columns that a row fills, each with its heading."""
    return {column: heading for column, heading in HEADINGS.items() if any(getattr(row, column) for row in rows)}


def slope_text(law: Mapping[Any, Any] | pd.Series, *, margin: bool = False) -> str:
    """A slope in MiB, `3.21`, and with `margin` `3.21 ± 0.04`: half the width of its interval, where it has one.

    Both end where the margin has two digits, so that a wide interval is not hidden behind digits that mean nothing.
    """
    slope = law["slope_bytes"] / MIB
    half = (law["slope_high_bytes"] - law["slope_low_bytes"]) / 2 / MIB if margin else math.nan
    digits = 2 if abs(slope) >= 1 else 3
    if 0 < abs(slope) < 0.5 * 10**-digits:
        # Small and yet not nothing, as which it would be rounded.
        digits = -math.floor(math.log10(abs(slope)))
    if half > 0:
        digits = min(digits, max(0, 1 - math.floor(math.log10(half))))
    text = "0" if slope == 0 else f"{slope:.{digits}f}"
    if math.isnan(half):
        return text
    # A plain 0 is of points that are in line to the byte.
    least = 10**-digits
    return f"{text} ± " + ("0" if half == 0 else f"<{least:.{digits}f}" if half < least / 2 else f"{half:.{digits}f}")


def margin_text(law: pd.Series) -> str:
    """`slope_text` with its margin, and of how few points a margin is that is wide for that reason."""
    text = slope_text(law, margin=True)
    few = law["depths"] == INTERVAL_DEPTHS and law["slope_high_bytes"] > law["slope_low_bytes"]
    return f"{text} ({INTERVAL_DEPTHS} depths)" if few else text


def at_depth(depth: float) -> str:
    return "" if math.isnan(depth) else f" (depth {depth:.0f})"


def _largest(rows: pd.DataFrame, metric: str) -> str:
    """Behind it, in how many trials it is no finite number; alone where it is in none."""
    found = largest(rows, metric)
    if found.row is None:
        return lost_text(found)
    return amount(found.value) + (f" ({lost_text(found)})" if found.lost else "")

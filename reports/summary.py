"""The whole run in a few rows, one for each strategy and batch size."""

import math
from typing import NamedTuple

import pandas as pd

from reports.frames import depth_law
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
            slopes[column] = slope_text(line.iloc[0], margin=True) if len(line) else ""
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


def slope_text(law: pd.Series, *, margin: bool = False) -> str:
    """`3.21 MiB`, and with `margin` `3.21 ± 0.04`: half the width of the slope's interval, where it has one."""
    slope = law["slope_bytes"] / MIB
    digits = 2 if abs(slope) >= 1 else 3
    if 0 < abs(slope) < 0.5 * 10**-digits:
        # Small and yet not nothing, as which it would be rounded.
        digits = -math.floor(math.log10(abs(slope)))
    text = "0" if slope == 0 else f"{slope:.{digits}f}"
    if not margin:
        return f"{text} MiB"
    half = (law["slope_high_bytes"] - law["slope_low_bytes"]) / 2 / MIB
    if math.isnan(half):
        return text
    # A plain 0 is of points that are in line to the byte.
    least = 10**-digits
    return f"{text} ± " + ("0" if half == 0 else f"<{least:.{digits}f}" if half < least / 2 else f"{half:.{digits}f}")


def at_depth(depth: float) -> str:
    return "" if math.isnan(depth) else f" (depth {depth:.0f})"


def _largest(rows: pd.DataFrame, metric: str) -> str:
    value = rows[metric].max() if metric in rows else math.nan
    return "" if math.isnan(value) else "0" if value == 0 else f"{value:.2g}"

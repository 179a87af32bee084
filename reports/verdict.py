"""What the figures say, in generated sentences with numbers."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import pandas as pd

from harness.record import RESULT_STATUSES, STATUSES
from reports.frames import CELL, depth_law

MIB = 2**20


def status_sentence(frame: pd.DataFrame, missing: int) -> str:
    """How many trials there are, by status; a partial run says so."""
    counts = frame["status"].value_counts()
    named = ", ".join(f"{status} {counts[status]}" for status in STATUSES if status in counts)
    planned = len(frame) + missing
    if missing:
        have = f"{len(frame)} of {planned} trials have a record ({named or 'none'})"
        return f"Partial run: {have}; {missing} are missing."
    return f"All {planned} trials have a record: {named}." if planned else "There is no trial."


def growth_sentences(frame: pd.DataFrame, metric: str, label: str) -> list[str]:
    """How much more `metric` each block costs at the largest batch size: one sentence a model."""
    law = depth_law(frame, metric)
    sentences = []
    for model, group in law[law["batch_size"] == law["batch_size"].max()].groupby("model", sort=False):
        rows = group.sort_values("slope_bytes", ascending=False)
        first, last = rows.iloc[0], rows.iloc[-1]
        parts = ", ".join(f"{slope_text(row)} with {without_model(row['strategy'])}" for _, row in rows.iterrows())
        sentence = f"{model}, batch {first['batch_size']}: the {label} per block: {parts}."
        if len(rows) > 1 and first["slope_bytes"] > 0 and last["slope_bytes"] > 0:
            percent = 100 * last["slope_bytes"] / first["slope_bytes"]
            sentence += f" The last is {f'{percent:.2g}' if percent >= 0.1 else 'less than 0.1'} % of the first."
        sentences.append(sentence)
    return sentences


def slope_text(row: pd.Series, *, spread: bool = False) -> str:
    """`3.21 MiB`, and with `spread` ` (3.18 to 3.24)` between neighbouring depths."""
    slope, low, high = (row[name] / MIB for name in ("slope_bytes", "low_bytes", "high_bytes"))
    digits = 3 if abs(slope) < 1 else 2
    between = "" if math.isnan(low) or not spread else f" ({low:.{digits}f} to {high:.{digits}f})"
    return f"{slope:.{digits}f}{between}" if spread else f"{slope:.{digits}f} MiB"


def saving_sentences(frame: pd.DataFrame) -> list[str]:
    """At the greatest depth and batch size of each model: the peak when reconstructed beside that when stored."""
    sentences = []
    for pair in _pairs(frame, "activation_peak_bytes"):
        if "reconstructed" not in pair.name:
            continue
        row = pair.table.sort_values(["depth", "batch_size"]).iloc[-1]
        stored, other = row["activation_peak_bytes_stored"] / MIB, row["activation_peak_bytes"] / MIB
        sentences.append(
            f"{pair.model}{_at(row['depth'])}, batch {row['batch_size']:.0f}: the peak is {other:.1f} MiB {pair.name} "
            f"and {stored:.1f} MiB stored, {stored / other:.1f} times as much."
        )
    return sentences


def time_sentences(frame: pd.DataFrame) -> list[str]:
    """The step time of each choice over that of stored activations in the same cell."""
    sentences = []
    for pair in _pairs(frame, "step_median_s"):
        ratios = pair.table["step_median_s"] / pair.table["step_median_s_stored"]
        spread = f", {ratios.min():.2f} to {ratios.max():.2f}" if len(ratios) > 1 else ""
        cells = "1 cell" if len(ratios) == 1 else f"{len(ratios)} cells"
        sentences.append(
            f"{pair.model}: a step takes {ratios.median():.2f} times as long {pair.name} as stored (median of {cells}"
            f"{spread})."
        )
    return sentences


def drift_sentences(frame: pd.DataFrame) -> list[str]:
    """The largest drift and gradient angle of reconstructed activations, by precision, beside the floor."""
    sentences = []
    rebuilt = frame[(frame["status"] == "ok") & (frame["activations"] == "reconstructed")]
    if "drift_max_rel" not in rebuilt:
        return []
    for (compute, reconstruction), rows in rebuilt.groupby(["compute", "reconstruction"], sort=False):
        drift = rows["drift_max_rel"].max()
        if math.isnan(drift):
            continue
        name = f"compute {compute}, reconstruction {reconstruction}"
        exact = "0: every rebuilt input equals the original bit for bit" if drift == 0 else f"at most {drift:.1e}"
        sentence = f"{name}: the relative drift is {exact}"
        angle = rows.get("gradient_angle_deg", pd.Series(dtype=float)).max()
        floor = rows.get("stored_reference_angle_deg", pd.Series(dtype=float)).max()
        if not math.isnan(angle):
            sentence += f"; gradients are {'0' if angle == 0 else f'at most {angle:.1e}'} degrees from the stored ones"
        if not math.isnan(floor):
            grid = ", rounding to the grid included" if reconstruction == "exact" else ""
            sentence += f", which are themselves up to {floor:.1e} degrees from float64{grid}"
        sentences.append(sentence + ".")
    return sentences


def trouble_sentence(frame: pd.DataFrame) -> str | None:
    """How many trials came to no result; None when all did."""
    broken = frame[~frame["status"].isin(RESULT_STATUSES)]
    if broken.empty:
        return None
    trials = "1 trial" if len(broken) == 1 else f"{len(broken)} trials"
    return f"{trials} came to no result; the table gives the reasons and the logs."


class SummaryRow(NamedTuple):
    """One strategy at one batch size, as text; empty where it has no such figure."""

    strategy: str
    batch: str
    peak_per_block: str
    saved_per_block: str
    peak: str
    time_ratio: str
    drift: str
    angle: str


def summary(frame: pd.DataFrame) -> list[SummaryRow]:
    """The whole run in a few rows."""
    measured = frame[frame["status"] == "ok"]
    laws = {name: depth_law(frame, f"activation_{name}_bytes") for name in ("peak", "saved")}
    ratios: dict[tuple[str, object], float] = {
        (pair.strategy, batch): ratio for pair in _pairs(frame, "step_median_s") for batch, ratio in _by_batch(pair)
    }
    summary_rows = []
    for (strategy, batch), rows in measured.groupby(["strategy", "batch_size"], sort=False):
        slopes = {}
        for name, law in laws.items():
            line = law[(law["strategy"] == strategy) & (law["batch_size"] == batch)]
            slopes[name] = slope_text(line.iloc[0], spread=True) if len(line) else ""
        deepest = rows.sort_values("depth").iloc[-1]
        peak = deepest.get("activation_peak_bytes", math.nan)
        ratio = ratios.get((str(strategy), batch))
        summary_rows.append(
            SummaryRow(
                strategy=str(strategy),
                batch=str(batch),
                peak_per_block=slopes["peak"],
                saved_per_block=slopes["saved"],
                peak="" if math.isnan(peak) else f"{peak / MIB:.1f}{_at(deepest['depth'])}",
                time_ratio="" if ratio is None else f"{ratio:.2f}",
                drift=_largest(rows, "drift_max_rel"),
                angle=_largest(rows, "gradient_angle_deg"),
            )
        )
    return summary_rows


def _at(depth: float) -> str:
    return "" if math.isnan(depth) else f" (depth {depth:.0f})"


def _largest(rows: pd.DataFrame, metric: str) -> str:
    value = rows[metric].max() if metric in rows else math.nan
    return "" if math.isnan(value) else "0" if value == 0 else f"{value:.1e}"


def _by_batch(pair: "_Pair") -> Iterator[tuple[int, float]]:
    for batch, rows in pair.table.groupby("batch_size"):
        yield batch, (rows["step_median_s"] / rows["step_median_s_stored"]).median()  # pyright: ignore[reportReturnType]


class _Pair(NamedTuple):
    """The trials of one strategy beside the stored ones of the same cells (columns with the suffix _stored)."""

    model: str
    strategy: str
    table: pd.DataFrame

    @property
    def name(self) -> str:
        return without_model(self.strategy)


def _pairs(frame: pd.DataFrame, metric: str) -> list[_Pair]:
    if metric not in frame:
        return []
    usable = frame[frame["status"] == "ok"].dropna(subset=[metric])
    cell = [field for field in CELL if field in usable]
    stored = usable[usable["activations"] == "stored"]
    pairs = []
    for (model, strategy), rows in usable[usable["activations"] != "stored"].groupby(["model", "strategy"], sort=False):
        base = stored.drop_duplicates(cell)[[*cell, metric]]
        table = rows.merge(base, on=cell, suffixes=("", "_stored"))
        if len(table):
            pairs.append(_Pair(str(model), str(strategy), table))
    return pairs


def without_model(strategy: str) -> str:
    return strategy.split(" · ", 1)[-1]

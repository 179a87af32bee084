"""What the figures say, in generated sentences with numbers."""

import math

import pandas as pd

from harness.record import RESULT_STATUSES, STATUSES
from reports.frames import depth_law

MIB = 2**20
# What makes two trials the same but for what becomes of the activations.
_CELL = ("model", "depth", "batch_size", "compute", "zero_stage", "workers", "seed")


def status_sentence(frame: pd.DataFrame, missing: int) -> str:
    """How many trials there are, by status; a partial run says so."""
    counts = frame["status"].value_counts()
    named = ", ".join(f"{status} {counts[status]}" for status in STATUSES if status in counts)
    planned = len(frame) + missing
    if missing:
        return f"Partial run: {len(frame)} of {planned} trials have a record ({named or 'none'}); {missing} are missing."
    return f"All {planned} trials have a record: {named}." if planned else "There is no trial."


def growth_sentences(frame: pd.DataFrame, metric: str, label: str) -> list[str]:
    """How `metric` grows with depth: one sentence a model and batch size, each strategy with its interval."""
    law = depth_law(frame, metric)
    law["model"] = law["strategy"].str.split(" · ").str[0]
    sentences = []
    for (model, batch), group in law.groupby(["model", "batch_size"], sort=False):
        rows = group.sort_values("slope_bytes", ascending=False)
        parts = [f"{slope_text(row)} with {_without_model(row['strategy'])}" for _, row in rows.iterrows()]
        sentence = f"{model}, batch {batch}: the {label} grows per block by {', '.join(parts)}."
        first, last = rows.iloc[0], rows.iloc[-1]
        if len(rows) > 1 and first["slope_bytes"] > 0 and last["slope_bytes"] > 0:
            share = 100 * last["slope_bytes"] / first["slope_bytes"]
            sentence += f" The last is {share:.2g} % of the first."
        sentences.append(sentence)
    return sentences


def slope_text(row: pd.Series) -> str:
    """`3.21 MiB (95 % 3.18 to 3.24)`; no interval where two depths leave none."""
    slope, half = row["slope_bytes"] / MIB, row["half_width_bytes"] / MIB
    digits = 3 if abs(slope) < 1 else 2
    interval = "" if math.isnan(half) else f" (95 % {slope - half:.{digits}f} to {slope + half:.{digits}f})"
    return f"{slope:.{digits}f} MiB{interval}"


def saving_sentences(frame: pd.DataFrame) -> list[str]:
    """At the greatest depth of each model: the peak with stored activations against each other choice."""
    sentences = []
    for pair in _pairs(frame, "activation_peak_bytes"):
        deepest = pair.table[pair.table["depth"] == pair.table["depth"].max()]
        row = deepest.sort_values("batch_size").iloc[-1]
        stored, other = row["activation_peak_bytes_stored"] / MIB, row["activation_peak_bytes"] / MIB
        sentences.append(
            f"{pair.model}{row['depth']:.0f}, batch {row['batch_size']:.0f}: {pair.name} needs {other:.1f} MiB at the peak, "
            f"stored {stored:.1f} MiB ({stored / other:.1f} times as much)."
        )
    return sentences


def time_sentences(frame: pd.DataFrame) -> list[str]:
    """The step time of each choice over that of stored activations in the same cell."""
    sentences = []
    for pair in _pairs(frame, "step_median_s"):
        ratios = pair.table["step_median_s"] / pair.table["step_median_s_stored"]
        spread = f", {ratios.min():.2f} to {ratios.max():.2f}" if len(ratios) > 1 else ""
        cells = "cell" if len(ratios) == 1 else "cells"
        sentences.append(
            f"{pair.model}: a step with {pair.name} takes {ratios.median():.2f} times as long as with stored activations "
            f"(median of {len(ratios)} {cells}{spread})."
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
            sentence += f", which are themselves up to {floor:.1e} degrees from float64"
        sentences.append(sentence + ".")
    return sentences


def trouble_sentence(frame: pd.DataFrame) -> str | None:
    """How many trials came to no result; None when all did."""
    broken = frame[~frame["status"].isin(RESULT_STATUSES)]
    if broken.empty:
        return None
    trials = "1 trial" if len(broken) == 1 else f"{len(broken)} trials"
    return f"{trials} came to no result; the table gives the reasons and the logs."


class _Pair:
    """The trials of one strategy beside the stored ones of the same cells (columns with the suffix _stored)."""

    def __init__(self, model: str, name: str, table: pd.DataFrame) -> None:
        self.model, self.name, self.table = model, name, table


def _pairs(frame: pd.DataFrame, metric: str) -> list[_Pair]:
    if metric not in frame:
        return []
    usable = frame[frame["status"] == "ok"].dropna(subset=[metric])
    cell = [field for field in _CELL if field in usable]
    stored = usable[usable["activations"] == "stored"]
    pairs = []
    for (model, strategy), rows in usable[usable["activations"] != "stored"].groupby(["model", "strategy"], sort=False):
        base = stored.drop_duplicates(cell)[[*cell, metric]]
        table = rows.merge(base, on=cell, suffixes=("", "_stored"))
        if len(table):
            pairs.append(_Pair(str(model), _without_model(str(strategy)), table))
    return pairs


def _without_model(strategy: str) -> str:
    return strategy.split(" · ", 1)[-1]

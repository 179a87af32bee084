"""What the figures say, in generated sentences with numbers."""

import math

import pandas as pd

from harness.record import RESULT_STATUSES, STATUSES
from reports.frames import INTERVAL_DEPTHS, batch_law, depth_law, step_bars
from reports.pairs import pairs, without_model
from reports.summary import at_depth, slope_text

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
        from_stored = "stored" in without_model(str(first["strategy"])).split(" · ")
        if len(rows) > 1 and from_stored and first["slope_bytes"] > 0 and last["slope_bytes"] > 0:
            percent = 100 * last["slope_bytes"] / first["slope_bytes"]
            sentence += f" The last is {_share(percent)} % of the first."
        sentences.append(sentence)
    return sentences


def _share(percent: float) -> str:
    return "less than 0.1" if percent < 0.1 else f"{percent:.2g}" if percent < 10 else f"{percent:.0f}"


def batch_sentences(frame: pd.DataFrame, metric: str, label: str) -> list[str]:
    """How much more `metric` each sample costs at the largest depth: one sentence a model."""
    usable = frame[frame["status"] == "ok"].dropna(subset=[metric, "depth"])
    sentences = []
    for model, rows in usable.groupby("model", sort=False):
        deepest = rows[rows["depth"] == rows["depth"].max()]
        slopes = []
        for strategy, own in deepest.groupby("strategy", sort=False):
            if (law := batch_law(own, metric)) is not None:
                slope = law.slope_bytes
                slopes.append((slope, f"{slope / MIB:.3g} MiB with {without_model(str(strategy))}"))
        if slopes:
            parts = ", ".join(text for _, text in sorted(slopes, reverse=True))
            sentences.append(f"{model}, depth {rows['depth'].max():.0f}: the {label} per sample: {parts}.")
    return sentences


def line_sentences(frame: pd.DataFrame, metric: str) -> list[str]:
    """How far the points are off their lines: one sentence, none where there is no line."""
    law = depth_law(frame, metric)
    if law.empty:
        return []
    tested = law.dropna(subset=["residual_bytes"])
    if tested.empty:
        return [f"Two depths are always in line; {INTERVAL_DEPTHS} would show whether it is one."]
    worst = tested.sort_values("residual_bytes").iloc[-1]
    if worst["residual_bytes"] == 0:
        return ["Every point is on its line to the byte."]
    bytes_off = worst["residual_bytes"]
    off = f"{bytes_off / MIB:.2f} MiB" if bytes_off >= 0.005 * MIB else f"{bytes_off:.0f} bytes"
    return [
        f"The point farthest off its line: {off} ({worst['strategy']}, batch {worst['batch_size']}, "
        f"{worst['depths']} depths)."
    ]


def saving_sentences(frame: pd.DataFrame) -> list[str]:
    """At the greatest depth and batch size of each model: the peak when reconstructed beside that when stored."""
    sentences = []
    for pair in pairs(frame, "activation_peak_bytes"):
        if "reconstructed" not in pair.name:
            continue
        row = pair.table.sort_values(["depth", "batch_size"]).iloc[-1]
        stored, other = row["activation_peak_bytes_stored"] / MIB, row["activation_peak_bytes"] / MIB
        sentences.append(
            f"{pair.model}{at_depth(row['depth'])}, batch {row['batch_size']:.0f}: the peak is {other:.1f} MiB "
            f"{pair.name} and {stored:.1f} MiB {pair.stored}, {stored / other:.1f} times as much."
        )
    return sentences


def time_sentences(frame: pd.DataFrame) -> list[str]:
    """The step time of each choice over that of stored activations in the same cell."""
    sentences = []
    for pair in pairs(frame, "step_median_s"):
        ratios = pair.table["step_median_s"] / pair.table["step_median_s_stored"]
        spread = f", {ratios.min():.2f} to {ratios.max():.2f}" if len(ratios) > 1 else ""
        cells = "1 cell" if len(ratios) == 1 else f"{len(ratios)} cells"
        sentences.append(
            f"{pair.model}: a step takes {ratios.median():.2f} times as long {pair.name} as {pair.stored} "
            f"(median of {cells}{spread})."
        )
    return sentences


def bars_sentence(frame: pd.DataFrame) -> str:
    """What the bar around a median step time is; "" where there is none."""
    bars = step_bars(frame[frame["status"] == "ok"]).dropna() if len(frame) else pd.DataFrame({"of_median": []})
    count = int(bars["of_median"].sum())
    interval = (
        "the 95 % interval of the median (percentile bootstrap over the steps of the process; what differs from one "
        "process to the next is not in it)"
    )
    if not count:
        return "from the first to the third quartile of the steps" if len(bars) else ""
    others = len(bars) - count
    return interval + (f"; of {others} trials with fewer steps or older records, the quartiles" if others else "")


def drift_sentences(frame: pd.DataFrame) -> list[str]:
    """The largest drift and gradient angle of reconstructed activations, by strategy, beside the floor."""
    sentences = []
    rebuilt = frame[(frame["status"] == "ok") & (frame["activations"] == "reconstructed")]
    if "drift_max_rel" not in rebuilt:
        return []
    for (strategy, compute, reconstruction), rows in rebuilt.groupby(
        ["strategy", "compute", "reconstruction"], sort=False
    ):
        drift = rows["drift_max_rel"].max()
        if math.isnan(drift):
            continue
        name = f"{strategy} (compute {compute}, reconstruction {reconstruction})"
        exact = "0: every rebuilt input equals the original bit for bit" if drift == 0 else f"at most {drift:.2g}"
        sentence = f"{name}: the relative drift is {exact}"
        angle = rows.get("gradient_angle_deg", pd.Series(dtype=float)).max()
        floor = rows.get("stored_reference_angle_deg", pd.Series(dtype=float)).max()
        if not math.isnan(angle):
            sentence += f"; gradients are {'0' if angle == 0 else f'at most {angle:.2g}'} degrees from the stored ones"
        if not math.isnan(floor):
            grid = ", rounding to the grid included" if reconstruction == "exact" else ""
            sentence += f", which are themselves up to {floor:.2g} degrees from float64{grid}"
        sentences.append(sentence + ".")
    return sentences


def guard_sentences(frame: pd.DataFrame) -> list[str]:
    """What guards compared in training, by strategy, and what followed; none where no guard compared anything."""
    if "guard_checks" not in frame:
        return []
    sentences = []
    for strategy, rows in frame[frame["guard_checks"] > 0].groupby("strategy", sort=False):
        checks = int(rows["guard_checks"].sum())
        compared = "1 rebuilt input" if checks == 1 else f"{checks} rebuilt inputs"
        largest = rows["guard_rel_max"].max() if rows["guard_rel_max"].notna().all() else math.nan
        error = "an error that is not finite" if math.isnan(largest) else f"a relative error of at most {largest:.2g}"
        sentence = f"{strategy}: in training a guard compared {compared} and found {error}"
        if stopped := int((rows["status"] == "diverged").sum()):
            sentence += f"; {stopped} of {len(rows)} trials diverged"
        stored = rows.get("guard_stored_step", pd.Series(dtype=float)).dropna()
        if len(stored):
            sentence += f"; {len(stored)} of {len(rows)} trials stored activations after step {stored.min():.0f}"
        sentences.append(sentence + ".")
    return sentences


def trouble_sentence(frame: pd.DataFrame) -> str | None:
    """How many trials came to no result; None when all did."""
    broken = frame[~frame["status"].isin(RESULT_STATUSES)]
    if broken.empty:
        return None
    trials = "1 trial" if len(broken) == 1 else f"{len(broken)} trials"
    return f"{trials} came to no result; the table gives the reasons and the logs."

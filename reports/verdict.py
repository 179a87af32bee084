"""What the figures say of memory, time and statuses, in generated sentences with numbers."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from harness.record import RESULT_STATUSES, STATUSES
from reports.frames import INTERVAL_DEPTHS, MODES, Law, batch_law, depth_law, step_bars
from reports.pairs import answer_first, mode_pairs, pairs, without_model
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
    """How much more `metric` each block costs at the largest batch size of each model: one sentence a model, those that
    rebuild activations first."""
    sentences = []
    for model, laws in depth_law(_answers_first(frame), metric).groupby("model", sort=False):
        group = laws[laws["batch_size"] == laws["batch_size"].max()]
        rows = group.sort_values("slope_bytes", ascending=False)
        first, last = rows.iloc[0], rows.iloc[-1]
        parts = ", ".join(
            f"{slope_text(row, margin=True)} MiB with {without_model(row['strategy'])}" for _, row in rows.iterrows()
        )
        of = _of_points(rows.to_dict("records"), "depths")
        sentence = f"{model}, batch {first['batch_size']}: the {label} per block{of}: {parts}."
        from_stored = "stored" in without_model(str(first["strategy"])).split(" · ")
        if len(rows) > 1 and from_stored and first["slope_bytes"] > 0 and last["slope_bytes"] > 0:
            share = _share(100 * last["slope_bytes"] / first["slope_bytes"])
            sentence += f" The last is {share} % of the first{_at_most_share(last, first, share)}."
        sentences.append(sentence)
    return sentences


def _answers_first(frame: pd.DataFrame) -> pd.DataFrame:
    return answer_first(frame) if len(frame) else frame


def _of_points(laws: Sequence[Mapping[Any, Any]], points: str) -> str:
    """How many points these slopes were fitted to, and what their ± is."""
    counts = [law["depths"] for law in laws]
    least, most = min(counts), max(counts)
    of = f"{least} {points}" if least == most else f"{least} to {most} {points}"
    if most < INTERVAL_DEPTHS:
        return f" (from {of}, which give no interval)"
    # Student's t of one degree of freedom is 12.7.
    wide = any(law["depths"] == INTERVAL_DEPTHS and law["slope_high_bytes"] > law["slope_low_bytes"] for law in laws)
    return f" (from {of}, ± half the 95 % interval{f', wide with {INTERVAL_DEPTHS}' if wide else ''})"


def _at_most_share(part: pd.Series, whole: pd.Series, share: str) -> str:
    """How much the share may be by both intervals, where that says more than the share."""
    high, low = part["slope_high_bytes"], whole["slope_low_bytes"]
    if pd.isna(high) or pd.isna(low):
        return ""
    if low <= 0:
        return ", whose interval has 0 in it"
    most = _share(100 * high / low)
    return "" if most == share else f" (by their intervals at most {most} %)"


def _share(percent: float) -> str:
    return "less than 0.1" if percent < 0.1 else f"{percent:.2g}" if percent < 10 else f"{percent:.0f}"


def batch_sentences(frame: pd.DataFrame, metric: str, label: str) -> list[str]:
    """How much more `metric` each sample costs at the largest depth: one sentence a model."""
    usable = _answers_first(frame[frame["status"] == "ok"].dropna(subset=[metric, "depth"]))
    sentences = []
    for model, rows in usable.groupby("model", sort=False):
        deepest = rows[rows["depth"] == rows["depth"].max()]
        laws: list[tuple[str, Law]] = []
        for strategy, own in deepest.groupby("strategy", sort=False):
            if (law := batch_law(own, metric)) is not None:
                laws.append((without_model(str(strategy)), law))
        if laws:
            laws.sort(key=lambda each: -each[1].slope_bytes)
            parts = ", ".join(f"{slope_text(law._asdict(), margin=True)} MiB with {name}" for name, law in laws)
            of = _of_points([law._asdict() for _, law in laws], "batch sizes")
            sentences.append(f"{model}, depth {rows['depth'].max():.0f}: the {label} per sample{of}: {parts}.")
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
        times, median = _median_ratio(ratios)
        sentences.append(f"{pair.model}: a step takes {times} as long {pair.name} as {pair.stored} ({median}).")
    return sentences


def mode_sentences(frame: pd.DataFrame) -> list[str]:
    """What a compiled or replayed step takes over the same step as it is written."""
    sentences = []
    for mode in MODES:
        for model, name, plain, table in mode_pairs(frame, mode, "step_median_s"):
            ratios = table["step_median_s"] / table["step_median_s_plain"]
            times, median = _median_ratio(ratios)
            sentences.append(f"{model}: a step takes {times} as long {name} as {plain} ({median}).")
    # The memory of a replayed step is that of an eager one.
    for model, name, plain, table in mode_pairs(frame, "compile", "activation_peak_bytes"):
        ratios = table["activation_peak_bytes"] / table["activation_peak_bytes_plain"]
        times, median = _median_ratio(ratios)
        sentences.append(f"{model}: the activation peak is {times} as high {name} as {plain} ({median}).")
    return sentences


def _median_ratio(ratios: pd.Series) -> tuple[str, str]:
    """How many times, and of how many."""
    spread = f", {ratios.min():.2f} to {ratios.max():.2f}" if len(ratios) > 1 else ""
    cells = "1 cell" if len(ratios) == 1 else f"{len(ratios)} cells"
    return f"{ratios.median():.2f} times", f"median of {cells}{spread}"


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


def trouble_sentence(frame: pd.DataFrame) -> str | None:
    """How many trials came to no result; None when all did."""
    broken = frame[~frame["status"].isin(RESULT_STATUSES)]
    if broken.empty:
        return None
    trials = "1 trial" if len(broken) == 1 else f"{len(broken)} trials"
    return f"{trials} came to no result; the table gives the reasons and the logs."

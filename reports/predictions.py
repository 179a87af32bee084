"""What the plan said of each trial against what was measured of it, as ratios and sentences."""

import math
from collections import Counter

import pandas as pd

MIB = 2**20
COMPARED = {"activation_saved_bytes": "saved activations", "activation_peak_bytes": "activation peak"}


def prediction_name(metric: str) -> str:
    """The metric that predicts `metric`."""
    return f"predicted_{metric}"


def compared(frame: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The rows that have `metric` and its prediction, with `ratio`: predicted over measured, 1 where both are 0."""
    columns = [metric, prediction_name(metric)]
    if any(column not in frame for column in columns):
        return frame.iloc[:0].assign(ratio=pd.Series(dtype=float))
    rows = frame[frame["status"] == "ok"].dropna(subset=columns)
    measured, predicted = (rows[column].astype(float) for column in columns)
    return rows.assign(ratio=(predicted / measured).where(predicted != measured, 1.0))


def is_mentioned(frame: pd.DataFrame) -> bool:
    """Whether a trial has a prediction or says why not; older runs do neither."""
    names = {prediction_name(metric) for metric in COMPARED}
    return bool(names & set(frame)) or any(names & reasons.keys() for reasons in frame["unmeasured"])


def prediction_sentences(frame: pd.DataFrame) -> list[str]:
    """How many trials are compared and how far off the predictions are, and what has none."""
    sentences, parts, counts = [], [], []
    for metric, label in COMPARED.items():
        rows = compared(frame, metric)
        if len(rows):
            counts.append(len(rows))
            parts.append(f"{label} {_how_far(rows, metric)}")
    if parts:
        most = max(counts)
        sentences.append(f"{most} trial{'s' * (most > 1)}, predicted against measured: {'; '.join(parts)}.")
    without = _without(frame)
    if without:
        reason = next(iter(without))
        also = f" (and {len(without) - 1} other reasons)" if len(without) > 1 else ""
        count = without.total()
        sentences.append(f"No prediction of {count} finished trial{'s' * (count > 1)}: {reason}{also}.")
    return sentences


def _how_far(rows: pd.DataFrame, metric: str) -> str:
    off = rows["ratio"] - 1
    if (off == 0).all():
        return "to the byte in all"
    worst = rows.loc[off.abs().sort_values().index[-1]]
    predicted, measured = worst[prediction_name(metric)], worst[metric]
    apart = abs(predicted - measured)
    figures = (
        f"{predicted / MIB:.2f} MiB predicted, {measured / MIB:.2f} MiB measured"
        if apart >= 0.01 * MIB
        else f"{apart:.0f} bytes too {'many' if predicted > measured else 'few'}"
    )
    depth = "" if math.isnan(worst["depth"]) else f", depth {worst['depth']:.0f}"
    middle, most = _percent(off.median()), _percent(worst["ratio"] - 1)
    span = f"{middle} in the median and {most} at worst" if middle != most else f"{most} in the median and at worst"
    return f"{span} ({worst['strategy']}{depth}, batch {worst['batch_size']:.0f}: {figures})"


def _percent(off: float) -> str:
    if off == 0:
        return "to the byte"
    if math.isinf(off):
        return "off without bound"
    return "within 0.01 %" if abs(off) < 1e-4 else f"off by {100 * off:+.2f} %"


def _without(frame: pd.DataFrame) -> Counter[str]:
    """Of the finished trials without a prediction: how many there are for each reason."""
    name = prediction_name("activation_peak_bytes")
    finished = frame[frame["status"] == "ok"]
    lacking = finished[finished[name].isna()] if name in finished else finished
    return Counter(reasons.get(name, "recorded without one").rstrip(".") for reasons in lacking["unmeasured"])

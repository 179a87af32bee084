"""Records as tidy frames: one row a trial, one row a fitted line, one row a number of a trace."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from harness.store import RunStore

# What makes two trials the same but for what becomes of the activations.
CELL = ("model", "depth", "data.name", "data.image_size", "batch_size", "compute", "zero_stage", "workers", "seed")

# Strategy: what a reader compares. Model and activations always, the others where they differ within the run.
_USUAL = {"compute": "fp32", "reconstruction": "fp32", "zero_stage": 0, "workers": 1, "data.image_size": 32}
_SPELLED = {"zero_stage": "ZeRO-{}", "workers": "ranks {}", "data.image_size": "{} px"}


def trials_frame(store: RunStore) -> pd.DataFrame:
    """One row per finished trial: id, status, reason, the spec's fields, the metrics, and `strategy`.

    Nested fields have dotted names (`data.name`). What was not measured is NaN, never 0. Raises RecordError for a
    record of an unknown schema version.
    """
    rows = []
    for record in store.read_records():
        spec = _flat(record.spec)
        rows.append(
            {"id": record.id, "status": record.status, "reason": record.reason, "attempts": len(record.attempts)}
            | spec
            | record.metrics
            | {"unmeasured": record.unmeasured, "device_name": record.machine.get("device_name")}
        )
    frame = pd.DataFrame(rows, columns=None if rows else ["id", "status", "reason", "attempts", "unmeasured"])
    frame["strategy"] = _strategies(frame)
    if "depth" in frame:
        frame["depth"] = pd.to_numeric(frame["depth"])
        order = [c for c in ("model", "strategy", "depth", "batch_size", "seed") if c in frame]
        frame = frame.sort_values(order, ignore_index=True)
    return frame


def trace_frame(store: RunStore, trial_ids: Iterable[str], table: str) -> pd.DataFrame:
    """The rows of one trace table of several trials: columns id, index, name, value."""
    parts = []
    for trial_id in trial_ids:
        trace = store.read_trace(trial_id)
        if trace is not None:
            part = trace.to_pandas()
            parts.append(part[part["table"] == table].drop(columns="table").assign(id=trial_id))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["index", "name", "value", "id"])


def missing_ids(store: RunStore) -> list[str]:
    """The trials that the study has and the run directory has no record of."""
    plan = store.read_plan()
    finished = store.finished_ids()
    return [trial_id for trial_id in plan["trials"] if trial_id not in finished] if plan else []


def depth_law(frame: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Least-squares line of `metric` (bytes) against `blocks`, for each strategy and batch size.

    Columns: model, strategy, batch_size, slope_bytes (per block), intercept_bytes, and low_bytes and high_bytes: the
    least and the greatest slope between neighbouring depths, which show how straight the line is (NaN with two
    depths, which are always in line). No row where there is one depth only.
    """
    columns = ["model", "strategy", "batch_size", "slope_bytes", "intercept_bytes", "low_bytes", "high_bytes"]
    if metric not in frame or "blocks" not in frame:
        return pd.DataFrame(columns=columns)
    rows = []
    usable = frame[frame["status"] == "ok"].dropna(subset=[metric, "blocks"])
    for (model, strategy, batch_size), cell in usable.groupby(["model", "strategy", "batch_size"], sort=False):
        middle = cell.groupby("blocks")[metric].median()
        if len(middle) > 1:
            rows.append((model, strategy, batch_size, *fit_line(middle.index.to_list(), middle.to_list())))
    return pd.DataFrame(rows, columns=columns)


def fit_line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float, float]:
    """Slope and intercept of the least-squares line, and the least and greatest slope between neighbours in x
    (NaN with two points). x ascending, at least two values."""
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - mean_x) ** 2 for a in x)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread
    steps = [(y[i + 1] - y[i]) / (x[i + 1] - x[i]) for i in range(len(x) - 1)]
    low, high = (min(steps), max(steps)) if len(steps) > 1 else (math.nan, math.nan)
    return slope, mean_y - slope * mean_x, low, high


def _flat(spec: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in spec.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _strategies(frame: pd.DataFrame) -> pd.Series:
    if frame.empty or "model" not in frame:
        return pd.Series(dtype=str)
    names = frame["model"].astype(str) + " · " + frame["activations"].astype(str)
    if "budget_bytes" in frame and frame["budget_bytes"].nunique() > 1:
        budget = (pd.to_numeric(frame["budget_bytes"]) / 2**20).map("{:g} MiB".format)
        names = names.where(frame["budget_bytes"].isna(), names + " · " + budget)
    for field, usual in _USUAL.items():
        if field in frame and frame[field].nunique() > 1:
            spelled = frame[field].map(_SPELLED.get(field, "{}").format)
            names = names.where(frame[field] == usual, names + " · " + spelled)
    return names

"""Records as tidy frames: one row a trial, one row a fitted line, one row a number of a trace."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from harness.store import RunStore

# Strategy: what a reader compares. Model and activations always, the others where they differ within the run.
_STRATEGY_EXTRAS = ("compute", "reconstruction", "zero_stage", "workers")
_USUAL = {"compute": "fp32", "reconstruction": "fp32", "zero_stage": 0, "workers": 1}
# 97.5 % points of Student's t for 1 to 10 degrees of freedom; beyond, the normal's with Cornish and Fisher's term.
_T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


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

    Columns: strategy, batch_size, n (trials), slope_bytes (per block), half_width_bytes (of the 95 % interval of
    the slope; NaN with fewer than three points), intercept_bytes. No row where there is one depth only.
    """
    rows = []
    usable = frame[frame["status"] == "ok"] if metric in frame and "blocks" in frame else frame.iloc[:0]
    usable = usable.dropna(subset=[metric, "blocks"]) if len(usable) else usable
    if len(usable):
        for (strategy, batch_size), cell in usable.groupby(["strategy", "batch_size"], sort=False):
            if cell["blocks"].nunique() > 1:
                fit = fit_line(cell["blocks"].tolist(), cell[metric].tolist())
                rows.append((strategy, batch_size, len(cell), *fit))
    columns = ["strategy", "batch_size", "n", "slope_bytes", "half_width_bytes", "intercept_bytes"]
    return pd.DataFrame(rows, columns=columns)


def fit_line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """Slope, half width of its 95 % interval (NaN with fewer than three points), and intercept."""
    n = len(x)
    mean_x, mean_y = sum(x) / n, sum(y) / n
    spread = sum((a - mean_x) ** 2 for a in x)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread
    intercept = mean_y - slope * mean_x
    if n < 3:
        return slope, math.nan, intercept
    residual = sum((b - intercept - slope * a) ** 2 for a, b in zip(x, y, strict=True))
    freedom = n - 2
    t = _T_975[freedom - 1] if freedom <= len(_T_975) else 1.960 + 2.4 / freedom
    return slope, t * math.sqrt(residual / freedom / spread), intercept


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
    for field in _STRATEGY_EXTRAS:
        if field in frame and frame[field].nunique() > 1:
            prefix = {"zero_stage": "ZeRO-", "workers": "ranks "}.get(field, "")
            unusual = frame[field] != _USUAL[field]
            names = names.where(~unusual, names + " · " + prefix + frame[field].astype(str))
    return names

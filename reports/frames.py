"""Records as tidy frames: one row a trial, one row a fitted line, one row a number of a trace."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import pandas as pd
import pyarrow as pa
from pyarrow import compute
from scipy.stats import linregress, t

from harness.record import Record
from harness.store import RunStore

# What makes two trials the same but for what becomes of the activations.
CELL = (
    *("model", "channels", "log_scale_gain", "depth", "data.name", "data.image_size", "batch_size"),
    *("compute", "compile", "cuda_graph", "zero_stage", "workers", "seed"),
)
# How a step is executed, each with its word in a strategy; a record that says nothing is of a step as it is written.
MODES = {"compile": "compiled", "cuda_graph": "graph"}

# Strategy: what a reader compares. Model and activations always, the others where they differ within the run.
_USUAL = {
    "channels": None,
    "log_scale_gain": None,
    "compute": "fp32",
    "reconstruction": "fp32",
    "compile": False,
    "cuda_graph": False,
    "zero_stage": 0,
    "workers": 1,
    "data.name": "cifar10",
    "data.image_size": 32,
    "guard_every": 0,
    "guard_tolerance": 1e-3,
    "guard_action": "stop",
}
_SPELLED = {
    "channels": "channels {}",
    "log_scale_gain": "gain {}",
    **MODES,
    "zero_stage": "ZeRO-{}",
    "workers": "ranks {}",
    "data.image_size": "{} px",
    "guard_every": "guard every {:g}",
    "guard_tolerance": "guard tolerance {:g}",
    "guard_action": "guard {}s",
}

# The metrics that have a law of depth, each with what was predicted of it.
LAW_METRICS = (
    *("activation_peak_bytes", "predicted_activation_peak_bytes"),
    *("activation_saved_bytes", "predicted_activation_saved_bytes"),
)
CONFIDENCE = 0.95
_TRACE = pa.schema([("table", pa.string()), ("index", pa.int64()), ("name", pa.string()), ("value", pa.float64())])
# Of fewer depths all points are on the line, whatever memory does between them.
INTERVAL_DEPTHS = 3


def trials_frame(store: RunStore) -> pd.DataFrame:
    """The frame of a run's records. Raises RecordError for a record of an unknown schema version."""
    return frame_of(store.read_records())


def frame_of(records: Iterable[Record]) -> pd.DataFrame:
    """One row per finished trial: id, status, reason, the spec's fields, the metrics, and `strategy`.

    Nested fields have dotted names (`data.name`). What was not measured is NaN, never 0. `spec`, `metrics`,
    `unmeasured`, `machine`, `versions` and `git` are the record's own.
    """
    rows = []
    for record in records:
        spec = dict.fromkeys(MODES, False) | _flat(record.spec)
        rows.append(
            {"id": record.id, "status": record.status, "reason": record.reason, "attempts": len(record.attempts)}
            | spec
            | record.metrics
            | {"unmeasured": record.unmeasured, "device_name": record.machine.get("device_name")}
            | {"spec": record.spec, "metrics": record.metrics, "machine": record.machine}
            | {"versions": record.versions, "git": record.git}
        )
    frame = pd.DataFrame(rows, columns=None if rows else ["id", "status", "reason", "attempts", "unmeasured"])
    frame["strategy"] = _strategies(frame)
    if "depth" in frame:
        frame["depth"] = pd.to_numeric(frame["depth"])
        order = [c for c in ("model", "strategy", "depth", "batch_size", "seed") if c in frame]
        frame = frame.sort_values(order, ignore_index=True)
    return frame


def modes_of(frame: pd.DataFrame) -> list[str]:
    """Those of MODES that any trial has."""
    return [mode for mode in MODES if mode in frame and bool(frame[mode].any())]


def has_guard(frame: pd.DataFrame) -> bool:
    """Whether any trial was to have its rebuilt blocks compared while it trained."""
    return "guard_every" in frame and bool((frame["guard_every"] > 0).any())


def trace_frame(store: RunStore, trial_ids: Iterable[str], table: str) -> pd.DataFrame:
    """The rows of one trace table of several trials: columns id, index, name, value."""
    return trace_frames(store, trial_ids, [table])[table]


def trace_frames(store: RunStore, trial_ids: Iterable[str], tables: Sequence[str]) -> dict[str, pd.DataFrame]:
    """The same of several tables, for which each trial's trace is read once."""
    parts = []
    for trial_id in trial_ids:
        trace = store.read_trace(trial_id)
        if trace is not None:
            wanted: Any = compute.is_in(trace["table"].cast(pa.string()), pa.array(tables, pa.string()))  # pyright: ignore
            own = trace.filter(wanted)
            part = own.select(["table", "index", "name", "value"]).cast(_TRACE)
            parts.append(part.append_column("id", pa.array([trial_id] * len(part), pa.string())))
    if not parts:
        empty = pd.DataFrame(columns=["index", "name", "value", "id"])
        return dict.fromkeys(tables, empty)
    rows = pa.concat_tables(parts).to_pandas()
    return {table: rows[rows["table"] == table].drop(columns="table").reset_index(drop=True) for table in tables}


def missing_ids(store: RunStore) -> list[str]:
    """The trials that the study has and the run directory has no record of."""
    plan = store.read_plan()
    finished = store.finished_ids()
    return [trial_id for trial_id in plan.trials if trial_id not in finished] if plan else []


def step_bars(frame: pd.DataFrame) -> pd.DataFrame:
    """The ends of the bar around each trial's median step, `low_s` and `high_s`, and whether they are `of_median`: the
    interval of the median where the record has one, else the quartiles of the steps. NaN where it has neither."""
    ends = frame.reindex(columns=["step_median_low_s", "step_median_high_s", "step_q1_s", "step_q3_s"]).astype(float)
    of_median = ends["step_median_low_s"].notna() & ends["step_median_high_s"].notna()
    return pd.DataFrame(
        {
            "low_s": ends["step_median_low_s"].where(of_median, ends["step_q1_s"]),
            "high_s": ends["step_median_high_s"].where(of_median, ends["step_q3_s"]),
            "of_median": of_median,
        }
    )


class Law(NamedTuple):
    """A least-squares line; the names are the columns of `depth_law`. `slope` is per block.

    slope_low_bytes, slope_high_bytes  its 95 % confidence interval by Student's t with depths - 2 degrees of freedom
    depths                             the number of points
    residual_bytes                     how far the farthest point is off the line; not r squared, which is 0 for the
                                       straightest of flat lines
    """

    slope_bytes: float
    slope_low_bytes: float
    slope_high_bytes: float
    intercept_bytes: float
    depths: int
    residual_bytes: float


def depth_law(frame: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Least-squares line of `metric` (bytes) against `blocks`: columns model, strategy, batch_size and those of Law.

    A row for each strategy, which names all that differs within the run, and batch size; none where there is one depth
    only. Repeats of one depth are one point, their median. Memory is deterministic: what a point is off the line is
    structure (a stage that begins, a kernel's scratch) and not noise. The interval treats it as noise all the same, and
    so says how far the slope hangs on which depths were measured; `residual_bytes` says whether it is a line at all.
    Both are NaN with two depths, which are always in line.
    """
    columns = ["model", "strategy", "batch_size", *Law._fields]
    if metric not in frame or "blocks" not in frame:
        return pd.DataFrame(columns=columns)
    rows = []
    usable = frame[frame["status"] == "ok"].dropna(subset=[metric, "blocks"])
    for (model, strategy, batch_size), cell in usable.groupby(["model", "strategy", "batch_size"], sort=False):
        middle = cell.groupby("blocks")[metric].median()
        if len(middle) > 1:
            rows.append((model, strategy, batch_size, *fit_line(middle.index.to_list(), middle.to_list())))
    return pd.DataFrame(rows, columns=columns)


def laws(frame: pd.DataFrame) -> pd.DataFrame:
    """The lines of all of LAW_METRICS in one table: columns model, strategy, batch_size, metric and those of Law."""
    parts = [depth_law(frame, metric).assign(metric=metric) for metric in LAW_METRICS]
    filled = [part for part in parts if len(part)]
    table = pd.concat(filled or parts[:1], ignore_index=True)
    return table[["model", "strategy", "batch_size", "metric", *Law._fields]]


def batch_law(rows: pd.DataFrame, metric: str) -> Law | None:
    """The line of `metric` (bytes) against the batch size of these rows, per sample; None where there is one size only.
    Repeats of one size are one point, their median."""
    middle = rows.groupby("batch_size")[metric].median()
    return fit_line(middle.index.to_list(), middle.to_list()) if len(middle) > 1 else None


def fit_line(x: Sequence[float], y: Sequence[float]) -> Law:
    """The line through at least two points; x ascending, y bytes."""
    steps = [(y[i + 1] - y[i], x[i + 1] - x[i]) for i in range(len(x) - 1)]
    rise, run = steps[0]
    if all(other_rise * run == rise * other_run for other_rise, other_run in steps):
        # Exactly in line; a fit would leave what it rounds as residuals.
        slope, intercept, margin, residual = rise / run, y[0] - x[0] * rise / run, 0.0, 0.0
    else:
        fitted: Any = linregress(x, y)
        slope, intercept = float(fitted.slope), float(fitted.intercept)
        off = [b - intercept - slope * a for a, b in zip(x, y, strict=True)]
        residual = max(map(abs, off))
        # Not fitted.stderr: it is taken from 1 - r squared, which rounds to 0 for points a few bytes off a steep line.
        middle = sum(x) / len(x)
        stderr = math.sqrt(sum(o * o for o in off) / (len(x) - 2) / sum((a - middle) ** 2 for a in x))
        margin = stderr * float(t.ppf((1 + CONFIDENCE) / 2, len(x) - 2))
    if len(x) < INTERVAL_DEPTHS:
        margin = residual = math.nan
    return Law(slope, slope - margin, slope + margin, intercept, len(x), residual)


def _flat(spec: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in spec.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            # A list is no key to group by.
            flat[prefix + key] = str(value) if isinstance(value, list) else value
    return flat


def _strategies(frame: pd.DataFrame) -> pd.Series:
    if frame.empty or "model" not in frame:
        return pd.Series(dtype=str)
    names = frame["model"].astype(str) + " · " + frame["activations"].astype(str)
    if "budget_bytes" in frame and frame["budget_bytes"].nunique() > 1:
        budget = (pd.to_numeric(frame["budget_bytes"]) / 2**20).map("{:g} MiB".format)
        names = names.where(frame["budget_bytes"].isna(), names + " · " + budget)
    for field, usual in _USUAL.items():
        if field not in frame:
            continue
        values = frame[field].where(frame[field].notna(), usual)
        # Widths and log-scales differ from family to family anyhow.
        of_a_model = field in ("channels", "log_scale_gain")
        among = values.groupby(frame["model"]) if of_a_model else values.groupby(lambda _: 0)
        if among.nunique(dropna=False).max() > 1:
            spelled = values.map(_SPELLED.get(field, "{}").format)
            names = names.where(values.isna() | (values == usual), names + " · " + spelled)
    return names

"""What one trial found out: a Record of scalars, and a Trace of long tables.

Keys carry their unit; bytes are integers. What was not measured is absent from `metrics` and has its
reason in `unmeasured`.
"""

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from harness.errors import RecordError
from harness.plain_json import read_json

SCHEMA = 1
_VALUE_IS = "the value is {}"
_NOT_FINITE = {_VALUE_IS.format(value): value for value in (math.nan, math.inf, -math.inf)}

Status = Literal["ok", "oom", "diverged", "unsupported", "timeout", "crashed", "failed"]
STATUSES: tuple[Status, ...] = get_args(Status)

# A trial that ran out of memory, diverged or is not supported answers the study's question;
# one that crashed, failed or hit its time limit does not.
RESULT_STATUSES: frozenset[Status] = frozenset({"ok", "oom", "diverged", "unsupported"})


class Attempt(BaseModel):
    """One start of a trial's process and how it ended."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    status: Status
    reason: str | None = None
    started_at: str = Field(description="ISO 8601, UTC")
    wall_s: float = Field(description="from the start of the process to its end")
    node: str
    exit_code: int | None = Field(default=None, description="negative: the signal that ended the process")
    lost: bool = Field(default=False, description="ended from outside, by no fault of the trial: it is tried again")


class Record(BaseModel):
    """One finished trial. `metrics` holds finite numbers only; `unmeasured` says why one is absent."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    schema_version: Literal[1] = Field(default=SCHEMA, alias="schema")
    id: str
    spec: dict[str, Any]
    status: Status
    reason: str | None = None
    attempts: list[Attempt] = []
    metrics: dict[str, int | float] = {}
    unmeasured: dict[str, str] = {}
    machine: dict[str, Any] = {}
    versions: dict[str, str] = {}
    git: dict[str, Any] = {}

    @field_validator("metrics")
    @classmethod
    def _finite_and_whole(cls, metrics: dict[str, int | float]) -> dict[str, int | float]:
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise ValueError(f"metrics.{name} is {value}; put a number that is not finite into `unmeasured`")
            if name.endswith("_bytes") and not isinstance(value, int):
                raise ValueError(f"metrics.{name} is {value!r}; bytes are integers")
        return metrics

    def to_json(self) -> str:
        return json.dumps(self.model_dump(mode="json", by_alias=True), indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, *, source: str) -> "Record":
        """Read a record; `source` is named in the error. Raises RecordError."""
        try:
            raw = read_json(text)
        except ValueError as error:
            raise RecordError(f"{source}: not JSON ({error}). Remove the file; the trial then runs again.") from None
        schema = raw.get("schema") if isinstance(raw, dict) else None
        if schema != SCHEMA:
            raise RecordError(
                f"{source}: schema = {schema!r}; this version reads schema {SCHEMA}. "
                "Read it with the version of revnet-harness that wrote it, or use another run directory."
            )
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise RecordError(
                f"{source}: {where}: {first['msg']}. Remove the file; the trial then runs again."
            ) from None


class TraceRow(NamedTuple):
    """One number of a long table.

    table   index            name                       value
    step    measured step    step_s, loss               seconds, loss
    memory  order in time    time_s, live_bytes         seconds and bytes above the level at step start; few
                                                        points, the peak and the forward's end among them
                             parameter_bytes, ...       bytes of each category, those at step start included; absent
                                                        where the step could not be attributed
    phases  order in time    backward_s, end_s          when the backward begins, and is over, in the step of `memory`;
                                                        absent where that has no categories, and from older traces
    communication  step      communication_s            seconds that collectives were under way
                             all_reduce_bytes, ...      handed to each collective in one step; index 0
                             all_reduce_calls, ...      how often it was called in it; index 0
    owners  rank, 0 first    "category: owner"          bytes above step start at the peak of that step; the last may be
                                                        "others"
    drift   block            rel, max_abs, max_ulp      see `revnet_core.BlockDrift`
    amplification  block     largest, smallest,         see `revnet_core.BlockAmplification`; blocks as in `drift`
                             noise_gain,
                             predicted_rel, bound_rel
                             chain                      which chain of blocks, rebuilt from one stored output, from 0
    guard   step, from 1     block's name               relative error of its rebuilt input; warm-up steps count
    followed  steps trained  loss, stored_loss          of the next step, and of that of the stored twin
                             "kind metric",             of an audit, on that kind of data
                             "kind rel block"
                             "guard block's name"       of the next step, as in `guard`
    """

    table: str
    index: int  # pyright: ignore[reportIncompatibleMethodOverride] - a tuple has a method of this name
    name: str
    value: float


def as_metrics(
    values: Mapping[str, int | float | None], unmeasured: Mapping[str, str]
) -> tuple[dict[str, int | float], dict[str, str]]:
    """Part `values` into finite metrics and reasons; a non-finite value becomes a reason, None needs one already."""
    metrics = {name: value for name, value in values.items() if value is not None and math.isfinite(value)}
    reasons = {name: reason for name, reason in unmeasured.items() if name not in metrics}
    for name, value in values.items():
        if value is None:
            reasons.setdefault(name, "not measured")
        elif name not in metrics:
            reasons[name] = _VALUE_IS.format(value)
    return metrics, reasons


def not_finite(reason: str) -> float | None:
    """The value, NaN or infinite, that a reason of `as_metrics` names; None of every other reason."""
    return _NOT_FINITE.get(reason)


def trace_columns(rows: Iterable[TraceRow]) -> dict[str, list[Any]]:
    """The rows as columns, for a columnar file."""
    columns: dict[str, list[Any]] = {name: [] for name in TraceRow._fields}
    for row in rows:
        for name, value in zip(TraceRow._fields, row, strict=True):
            columns[name].append(value)
    return columns

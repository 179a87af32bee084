"""Records as what every tracker takes: flat parameters, numbers, texts, and series over steps."""

import hashlib
import json
import math
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from harness.record import RESULT_STATUSES, Attempt, Record, TraceRow
from harness.store import RunStore

# The tables of a trace whose index is a step.
STEP_TABLES = ("step", "communication", "guard", "followed")

NAME_CHARACTERS = 120


@dataclass(frozen=True, kw_only=True)
class Row:
    """One trial. What was not measured is in `tags` alone, as `unmeasured.NAME` with its reason.

    name        its id, and what people call it
    is_result   whether the trial answers the study's question, as one that ran out of memory does
    parameters  the specification; nested fields have dotted names
    tags        all else that the record says, as text; null is left out
    series      by "table/name" of the trace: step and value, ascending; NaN and infinities as they are
    node, started_s, ended_s    of the last attempt, in seconds since 1970; None where no attempt says
    """

    id: str
    name: str
    status: str
    is_result: bool
    parameters: Mapping[str, Any]
    metrics: Mapping[str, int | float]
    tags: Mapping[str, str]
    series: Mapping[str, Sequence[tuple[int, float]]]
    node: str | None
    started_s: float | None
    ended_s: float | None

    @property
    def fingerprint(self) -> str:
        """Differs where the content does: tells whether an earlier export of the trial is still right."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def read_rows(store: RunStore) -> Iterator[Row]:
    """Every finished trial, by id. Raises HarnessError for a study, record or trace that cannot be read."""
    study = store.read_study() or {}
    about = {key: study[key] for key in ("name", "question", "predict") if study.get(key) is not None}
    for record in store.read_records():
        yield as_row(record, store.read_trace_rows(record.id), about)


def as_row(record: Record, trace: Sequence[TraceRow], study: Mapping[str, Any]) -> Row:
    series = _series(trace)
    started_s, ended_s = _times(record.attempts[-1]) if record.attempts else (None, None)
    said = {
        "trial": record.id,
        "status": record.status,
        "reason": record.reason,
        "study": study,
        "attempts": len(record.attempts),
        "attempt": {str(number): attempt.model_dump() for number, attempt in enumerate(record.attempts, start=1)},
        "machine": record.machine,
        "versions": record.versions,
        "git": record.git,
        "unmeasured": record.unmeasured,
        "not_finite": _not_finite(series),
    }
    return Row(
        id=record.id,
        name=_name(record),
        status=record.status,
        is_result=record.status in RESULT_STATUSES,
        parameters=_flat(record.spec),
        metrics={printable(name): value for name, value in record.metrics.items()},
        tags={name: spelled(value) for name, value in _flat(said).items() if value is not None},
        series=series,
        node=printable(record.attempts[-1].node) if record.attempts else None,
        started_s=started_s,
        ended_s=ended_s,
    )


def spelled(value: Any) -> str:
    """As text: true, null and lists as JSON has them."""
    return value if isinstance(value, str) else json.dumps(value)


def printable(text: str) -> str:
    """The text with each control and each half of a character written out, since trackers refuse or lose them."""
    return "".join(char if unicodedata.category(char) not in ("Cc", "Cs") else _written(char) for char in text)


def shortened(text: str, most: int) -> str:
    """At most so many characters, the last of them saying how many there were."""
    end = f" ... ({len(text)} characters)"
    return text if len(text) <= most else text[: most - len(end)] + end


def _written(char: str) -> str:
    return char.encode("unicode_escape", errors="surrogatepass").decode()


def _flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        name = prefix + printable(key)
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{name}.")
        else:
            flat[name] = printable(value) if isinstance(value, str) else value
    return flat


def _name(record: Record) -> str:
    spec = record.spec
    parts = [record.id, *(spec.get(field) for field in ("model", "depth", "activations"))]
    parts += [spec[field] for field in ("reconstruction", "compute") if spec.get(field) not in (None, "fp32")]
    parts += [f"{field} {spec[key]}" for field, key in (("batch", "batch_size"), ("seed", "seed")) if key in spec]
    return shortened(printable(" ".join(str(part) for part in parts if part is not None)), NAME_CHARACTERS)


def _series(trace: Sequence[TraceRow]) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, dict[int, float]] = {}
    for row in trace:
        # A trace's file may have empty values.
        if row.table in STEP_TABLES and row.value is not None:
            found.setdefault(f"{row.table}/{printable(row.name)}", {})[row.index] = float(row.value)
    return {name: sorted(points.items()) for name, points in found.items()}


def _not_finite(series: Mapping[str, Sequence[tuple[int, float]]]) -> dict[str, str]:
    """Trackers draw or drop these points as they like, so each series that has some says which they are."""
    found = {}
    for name, points in series.items():
        strange = [f"{step}: {value}" for step, value in points if not math.isfinite(value)]
        if strange:
            found[name] = ", ".join(strange)
    return found


def _times(attempt: Attempt) -> tuple[float | None, float | None]:
    """Start and end in seconds since 1970; None for what is no time that a tracker can hold."""
    try:
        started = datetime.fromisoformat(attempt.started_at)
        started = started if started.tzinfo else started.replace(tzinfo=UTC)
        ended = datetime.fromtimestamp(started.timestamp() + attempt.wall_s, UTC)
    except (ValueError, OverflowError, OSError):
        return None, None
    times = started.timestamp(), ended.timestamp()
    return times if 0 <= times[0] <= times[1] else (None, None)

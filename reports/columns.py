"""The trials as columns, once for all figures and the table of a page, which filters and shows them.

Numbers are as they stand in the records, to the last digit, beside the text that shows them. Words are kept once each.
"""

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from harness.record import Record
from reports.table import Table, trials_table

# What a reader narrows a report down by; one that is the same in all trials is no choice.
NONE = "–"
FACETS = {
    "strategy": "strategy",
    "precision": "precision",
    "status": "status",
    "depth": "depth",
    "batch_size": "batch",
    "compile": "compile",
    "cuda_graph": "CUDA graph",
}


def columns_of(frame: pd.DataFrame, records: Sequence[Record]) -> dict[str, Any]:
    """What a page knows of each trial, in the order of the frame's rows: `ids`, `status`, `reasons`, `attempts`; `spec`
    and `metrics`, the columns of the table; `same` and `shared`, what all have in common, to read and as columns of the
    CSV; `facets`, by which it is filtered."""
    table = trials_table(frame, list(records))
    reasons = {record.id: record.reason or "" for record in records}
    return {
        "ids": [row.id for row in table.rows],
        "status": words(f"{row.symbol} {row.status}" for row in table.rows),
        "reasons": words(reasons[row.id] for row in table.rows),
        "attempts": [row.attempts for row in table.rows],
        "spec": [
            {"heading": heading, **words(row.spec[place] for row in table.rows)}
            for place, heading in enumerate(table.spec)
        ],
        "metrics": _metrics(table),
        "same": table.same,
        "shared": {
            "spec": [{"heading": heading, "text": text} for heading, text in table.shared_spec.items()],
            "metrics": [{"name": name, "value": _finite(cell.value)} for name, cell in table.shared_metrics.items()],
        },
        "facets": _facets(frame),
    }


def words(texts: Iterable[str]) -> dict[str, list[Any]]:
    """Each different text once, and which of them each trial has."""
    known: dict[str, int] = {}
    codes = [known.setdefault(text, len(known)) for text in texts]
    return {"words": list(known), "codes": codes}


def _metrics(table: Table) -> list[dict[str, Any]]:
    found = []
    for place, column in enumerate(table.metrics):
        cells = [row.metrics[place] for row in table.rows]
        found.append(
            {
                "name": column.name,
                "heading": column.heading,
                "more": column.more,
                "values": [_finite(cell.value) for cell in cells],
                "texts": words(cell.text for cell in cells),
                "whys": words(cell.why for cell in cells),
            }
        )
    return found


def _finite(value: float | None) -> float | str | None:
    """For JSON, which has no NaN and no infinity; None of what was not measured."""
    return value if value is None or math.isfinite(value) else json.dumps(value)


def _named(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.10g}" if isinstance(value, int | float) else str(value)


def _facets(frame: pd.DataFrame) -> list[dict[str, Any]]:
    found = []
    for key, label in FACETS.items():
        if key == "precision":
            if not {"compute", "reconstruction"} <= set(frame):
                continue
            values = frame["compute"] + " / " + frame["reconstruction"]
        elif key in frame:
            values = frame[key]
        else:
            continue
        options = sorted(values.dropna().unique().tolist())
        names = list(map(_named, options))
        if values.isna().any():
            names.append(NONE)
        if len(names) < 2:
            continue
        places = {value: place for place, value in enumerate(options)}
        codes = [places.get(value, len(options)) for value in values.tolist()]
        found.append({"key": key, "label": label, "words": names, "codes": codes})
    return found

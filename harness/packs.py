"""Finished trials of a run in one Parquet file, rather than three small files each.

packs/<name>.parquet has one row a trial: `id`, `record` (its JSON), `trace` (a list of the rows of its long tables) and
`log`; and, for whoever opens it with pandas or DuckDB, `status` and a column for each scalar of spec and metrics.

A pack is never changed: a new one takes in all that are there (harness/pack.py). Whoever reads looks for a trial's own
file first, so that one that was run again is the newer one.
"""

import contextlib
import io
import json
import uuid
from collections.abc import Mapping
from typing import Any, NamedTuple

from harness.errors import StoreError
from harness.run_folder import RunFolder
from harness.traces import TYPES

FOLDER = "packs"


class Packed(NamedTuple):
    """What a pack holds of a trial, as its small files would."""

    record: bytes
    trace: list[dict[str, Any]] | None
    log: bytes | None


class Packs:
    """Those of one run directory, each read once."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._known: dict[str, dict[str, Packed]] = {}

    def names(self) -> list[str]:
        return sorted(name for name in self._folder.names_in(FOLDER) if name.endswith(".parquet"))

    def ids(self) -> set[str]:
        self._look()
        return {trial_id for pack in self._known.values() for trial_id in pack}

    def find(self, trial_id: str, *, known: bool = False) -> Packed | None:
        """Of several packs that hold the trial, the one that knows of the most attempts.

        known  False looks for new packs first; True only where none that is known holds it
        """
        for looked in (known, False):
            if not looked:
                self._look()
            found = [pack[trial_id] for pack in self._known.values() if trial_id in pack]
            if found or not looked:
                return max(found, key=lambda packed: packed.record.count(b'"started_at"'), default=None)
        return None

    def _look(self) -> None:
        names = self.names()
        for name in names:
            if name not in self._known and (data := self._folder.read(f"{FOLDER}/{name}")) is not None:
                try:
                    self._known[name] = decode_pack(data)
                except ValueError as error:
                    where = f"{self._folder.uri}/{FOLDER}/{name}"
                    raise StoreError(f"{where}: is no pack of trials: {error}. Remove the file.") from None
        self._known = {name: pack for name, pack in self._known.items() if name in names}


def encode_pack(trials: Mapping[str, Packed]) -> bytes:
    """Needs pyarrow."""
    import pyarrow
    import pyarrow.parquet

    kinds = {"string": pyarrow.string(), "int64": pyarrow.int64(), "double": pyarrow.float64()}
    rows = pyarrow.struct([(name, kinds[kind]) for name, kind in TYPES.items()])
    columns: dict[str, Any] = {
        "id": pyarrow.array(trials.keys(), pyarrow.string()),
        "record": pyarrow.array([packed.record.decode() for packed in trials.values()], pyarrow.string()),
        "trace": pyarrow.array([packed.trace for packed in trials.values()], pyarrow.list_(rows)),
        "log": pyarrow.array([packed.log for packed in trials.values()], pyarrow.binary()),
    }
    buffer = io.BytesIO()
    table = pyarrow.table(columns | _for_people([json.loads(packed.record) for packed in trials.values()]))
    pyarrow.parquet.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def decode_pack(data: bytes) -> dict[str, Packed]:
    """By id. Raises ValueError for what is none."""
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(io.BytesIO(data))
        types = {field.name: str(field.type) for field in file.schema_arrow}
        if (types.get("id"), types.get("record"), types.get("log")) != ("string", "string", "binary"):
            raise ValueError("it has no columns id, record and log of text and bytes")
        rows = file.read(columns=["id", "record", "trace", "log"]).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(str(error).splitlines()[0]) from None
    for row in rows:
        cells = [cell for trace_row in row["trace"] or () for cell in trace_row.items()]
        if row["id"] is None or row["record"] is None or any(name not in TYPES or cell is None for name, cell in cells):
            raise ValueError("it has empty cells, or a trace of other columns")
    return {row["id"]: Packed(row["record"].encode(), row["trace"], row["log"]) for row in rows}


def new_name() -> str:
    return f"{uuid.uuid4().hex}.parquet"


def _for_people(records: list[dict[str, Any]]) -> dict[str, Any]:
    import pyarrow

    flat = [
        {"status": record["status"], "reason": record["reason"], "attempts": len(record["attempts"])}
        | _flat(record["spec"], "spec")
        | _flat(record["metrics"], "metrics")
        for record in records
    ]
    columns: dict[str, Any] = {}
    for name in dict.fromkeys(name for row in flat for name in row):
        values = [row.get(name) for row in flat]
        with contextlib.suppress(pyarrow.ArrowException, OverflowError):
            columns[name] = pyarrow.array(values)
            continue
        # Of several kinds, or too large: as they stand in the record.
        columns[name] = pyarrow.array([None if value is None else json.dumps(value) for value in values])
    return columns


def _flat(mapping: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in mapping.items():
        name = f"{prefix}.{key}"
        if isinstance(value, dict) and value:
            found |= _flat(value, name)
        else:
            found[name] = json.dumps(value) if isinstance(value, (dict, list)) else value
    return found

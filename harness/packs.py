"""Finished trials of a run in one Parquet file, rather than three small files each.

packs/<name>.parquet has one row a trial: `id`, `record` (its JSON), `trace` (a list of the rows of its long tables) and
`log`; and, for whoever opens it with pandas or DuckDB, `status` and a column for each scalar of spec and metrics.

A pack is never changed: a new one takes in all that are there (harness/pack.py). Whoever reads looks for a trial's own
file first, so that one that was run again is the newer one.
"""

import contextlib
import io
import itertools
import json
import uuid
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from harness.errors import StoreError
from harness.run_folder import RunFolder
from harness.traces import row_type

if TYPE_CHECKING:
    import pyarrow

FOLDER = "packs"


class Packed(NamedTuple):
    """What a pack holds of a trial, as its small files would; the trace is a pyarrow.StructArray."""

    record: bytes
    trace: "pyarrow.StructArray | None"
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

    traces = [packed.trace for packed in trials.values()]
    ends = list(itertools.accumulate((0 if trace is None else len(trace) for trace in traces), initial=0))
    # Where a list would begin stands None for one that is not there.
    begins = [None if trace is None else begin for trace, begin in zip(traces, ends, strict=False)]
    rows = pyarrow.concat_arrays([pyarrow.array([], row_type()), *(trace for trace in traces if trace is not None)])
    columns: dict[str, Any] = {
        "id": pyarrow.array(trials.keys(), pyarrow.string()),
        "record": pyarrow.array([packed.record.decode() for packed in trials.values()], pyarrow.string()),
        "trace": pyarrow.ListArray.from_arrays(pyarrow.array([*begins, ends[-1]], pyarrow.int32()), rows),
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

    wanted = {"id": pyarrow.string(), "record": pyarrow.string(), "log": pyarrow.binary()}
    try:
        file = pyarrow.parquet.ParquetFile(io.BytesIO(data))
        types = {field.name: field.type for field in file.schema_arrow}
        lists = types.get("trace")
        # What a list's items are called differs between writers.
        if lists is None or not pyarrow.types.is_list(lists) or lists.value_type != row_type():
            raise ValueError("it has no column of traces")
        if {name: types.get(name) for name in wanted} != wanted:
            raise ValueError("it has no columns id, record and log of text and bytes")
        table = file.read(columns=["id", "record", "trace", "log"]).combine_chunks()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(str(error).splitlines()[0]) from None
    cells = [column for chunk in table["trace"].chunks for column in chunk.flatten().flatten()]
    if table["id"].null_count or table["record"].null_count or any(column.null_count for column in cells):
        raise ValueError("it has empty cells")
    ids, records, logs = (table[name].to_pylist() for name in ("id", "record", "log"))
    traces = (scalar.values if scalar.is_valid else None for scalar in table["trace"])
    return {
        trial_id: Packed(record.encode(), trace, log)
        for trial_id, record, trace, log in zip(ids, records, traces, logs, strict=True)
    }


def as_rows(table: "pyarrow.Table | None") -> "pyarrow.StructArray | None":
    """A trial's trace as a pack holds it."""
    import pyarrow

    if table is None:
        return None
    [batch] = table.cast(pyarrow.schema(row_type())).combine_chunks().to_batches() or [None]
    return None if batch is None else batch.to_struct_array()


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

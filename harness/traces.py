"""A trial's long tables as a file: Parquet, or JSON where pyarrow is not installed."""

import io
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from harness.plain_json import read_json
from harness.record import TraceRow, trace_columns

if TYPE_CHECKING:
    import pyarrow

MOST_ROWS = 10**7
TYPES = {"table": "string", "index": "int64", "name": "string", "value": "double"}


def encode_trace(rows: Sequence[TraceRow]) -> tuple[str, bytes]:
    """How its file ends, and what it holds."""
    columns = trace_columns(rows)
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        return "json", json.dumps(columns).encode()
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), buffer)
    return "parquet", buffer.getvalue()


def decode_parquet(data: bytes) -> "pyarrow.Table":
    """Raises ValueError where it does not hold a trace's columns, in a trace's types, and nothing else."""
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(io.BytesIO(data))
        found = {field.name: str(field.type) for field in file.schema_arrow}
        # A whole-number column of values is written by a trace that holds nothing else.
        if found | {"value": "double"} != TYPES or found.get("value") not in ("double", "int64"):
            raise ValueError(f"its columns are {found}, not {TYPES}")
        if file.metadata.num_rows > MOST_ROWS:
            raise ValueError(f"it has more than {MOST_ROWS} rows")
        table = file.read()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(str(error).splitlines()[0]) from None
    if table.column("table").null_count or table.column("index").null_count or table.column("name").null_count:
        raise ValueError("it has empty cells")
    return table


def row_type() -> "pyarrow.StructType":
    """Of a row of a trace."""
    import pyarrow

    kinds = {"string": pyarrow.string(), "int64": pyarrow.int64(), "double": pyarrow.float64()}
    return pyarrow.struct([(name, kinds[kind]) for name, kind in TYPES.items()])


def decode_json(data: bytes) -> dict[str, list[Any]]:
    """The columns. Raises ValueError as `decode_parquet`."""
    columns = read_json(data, finite=False)
    kinds = {"table": str, "index": int, "name": str, "value": (int, float)}
    if not isinstance(columns, dict) or columns.keys() != kinds.keys():
        raise ValueError(f"its columns are not {', '.join(kinds)}")
    if not all(isinstance(column, list) for column in columns.values()) or len(set(map(len, columns.values()))) > 1:
        raise ValueError("its columns are no lists of equal length")
    for name, kind in kinds.items():
        if any(not isinstance(cell, kind) or isinstance(cell, bool) for cell in columns[name]):
            raise ValueError(f"a cell of {name!r} is of another type")
    return columns

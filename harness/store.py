"""The only reader and writer of a run directory, on a local path or any fsspec URI.

study.yaml            the resolved study; can be run again as it is
plan.json             the ids of the study's trials and the hash of them; of a search, what it asks and those it came to
trials/<id>.json      one finished trial
claims/<id>.<n>.json  who is at work on attempt n of a trial that has no record of it yet (see harness.claims)
stop                  asks whoever runs the trials to stop
traces/<id>.parquet   its long tables (.json where pyarrow is not installed)
exports/<id>.*        one step's memory for other people's viewers, where it was asked for (see harness.exports)
logs/<id>.log         what its process printed
report.html
laws.csv              the lines that the report fits, one row a line
"""

import contextlib
import hashlib
import io
import json
import os
import posixpath
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from harness.errors import StoreError
from harness.exports import EXPORTS, export_path
from harness.record import Record, TraceRow, trace_columns

if TYPE_CHECKING:
    import pyarrow

REPORT = "report.html"
LAWS = "laws.csv"


class RunStore:
    """A run directory. Every write is whole or absent; a record is written last, so that a trial with a
    record has its trace, log and exports too."""

    def __init__(self, uri: str | Path) -> None:
        """Raises StoreError for a URI of an unknown kind."""
        text = str(uri)
        try:
            self.fs, self.root = fsspec.core.url_to_fs(os.path.expanduser(text))
        except (ValueError, ImportError) as error:
            raise StoreError(f"{text}: {error}. Give a path, or a URI that fsspec can open.") from None
        self.uri = text.rstrip("/")

    @property
    def absolute_uri(self) -> str:
        """The same directory for a process that runs elsewhere on this file system."""
        return self.fs.unstrip_protocol(self.root)

    def refuse_private(self) -> None:
        """Raises StoreError for a place that only this process sees, where no trial could leave its record."""
        if "memory" in (self.fs.protocol, *self.fs.protocol):
            raise StoreError(
                f"{self.uri}: lies in the memory of this process, and each trial has a process of its own. Give a "
                "path, or a URI that all nodes can reach, with --out."
            )

    # What the run is about

    def open_for(self, study: dict[str, Any], trial_ids: Sequence[str], *, search: str | None = None) -> None:
        """Prepare the directory for a study, or check that it is this study's. Raises StoreError, having
        written nothing, when it holds another study or something that is no run.

        search  says what a search asks that comes to more and more trials: those may change from call to call
        """
        if search is None:
            self._check_empty_or(study["name"], trial_ids)
        else:
            self.check_search(search)
        self._write("study.yaml", _to_yaml(study).encode())
        if search is not None or self.read_plan() is None:
            plan = {"schema": 1, "name": study["name"], "hash": plan_hash(trial_ids), "trials": list(trial_ids)}
            plan |= {} if search is None else {"search": search}
            self._write("plan.json", (json.dumps(plan, indent=1) + "\n").encode())

    def check_search(self, search: str) -> None:
        """Raises StoreError when the directory holds something else than this search."""
        plan = self._plan_unless_empty()
        if plan is not None and plan.get("search") != search:
            what = "a run that is no search" if plan.get("search") is None else "a search that asks something else"
            raise StoreError(
                f"{self.uri}: holds {what}: {plan['name']!r} with {len(plan['trials'])} trials. Its cells, axis, "
                "memory or headroom are others. Give another directory with --out."
            )

    def _check_empty_or(self, name: str, trial_ids: Sequence[str]) -> None:
        plan = self._plan_unless_empty()
        if plan is not None and plan["hash"] != plan_hash(trial_ids):
            raise StoreError(
                f"{self.uri}: holds a run of another study: {plan['name']!r} with {len(plan['trials'])} trials, "
                f"hash {plan['hash'][:12]}; this one is {name!r} with {len(trial_ids)} trials, "
                f"hash {plan_hash(trial_ids)[:12]}. Give another directory with --out."
            )

    def _plan_unless_empty(self) -> dict[str, Any] | None:
        plan = self.read_plan()
        if plan is None and self.fs.exists(self.root) and self.fs.ls(self.root):
            raise StoreError(
                f"{self.uri}: the directory is not empty and holds no plan.json, so it is not a run. "
                "Give an empty or a new directory with --out."
            )
        return plan

    def read_plan(self) -> dict[str, Any] | None:
        """{"schema", "name", "hash", "trials": [id, ...]}, of a search also "search"; None when nothing was planned."""
        data = self._read("plan.json")
        if data is None:
            return None
        try:
            plan = json.loads(data)
            if not plan.keys() >= {"hash", "name", "trials"}:
                raise ValueError("keys are missing")
        except (ValueError, AttributeError):
            raise StoreError(f"{self.uri}/plan.json: damaged. Give another directory with --out.") from None
        return plan

    def read_study(self) -> dict[str, Any] | None:
        """The resolved study as plain data, or None when the trials were run one by one."""
        from ruamel.yaml import YAML

        data = self._read("study.yaml")
        return None if data is None else YAML(typ="safe").load(io.BytesIO(data))

    # Trials

    def finished_ids(self) -> set[str]:
        return {posixpath.basename(path)[: -len(".json")] for path in self._list("trials") if path.endswith(".json")}

    def find_record(self, trial_id: str) -> Record | None:
        """The trial's record, or None while it has none. Raises RecordError for one that cannot be read."""
        name = f"trials/{trial_id}.json"
        data = self._read(name)
        return None if data is None else Record.from_json(data, source=f"{self.uri}/{name}")

    def read_record(self, trial_id: str) -> Record:
        """Raises StoreError when the trial has no record."""
        record = self.find_record(trial_id)
        if record is None:
            raise StoreError(f"{self.uri}/trials/{trial_id}.json: no such record.")
        return record

    def read_records(self) -> list[Record]:
        """Every finished trial, by id. Raises RecordError for a record of an unknown schema version."""
        return [self.read_record(trial_id) for trial_id in sorted(self.finished_ids())]

    def write_trial(
        self,
        record: Record,
        trace: Sequence[TraceRow] = (),
        log: bytes | None = None,
        exports: Mapping[str, bytes] | None = None,
    ) -> None:
        """Write a finished trial: trace, log and exports (by name) first, the record last."""
        if log is not None:
            self.write_log(record.id, log)
        if trace:
            name, data = _encode_trace(trace)
            self._write(f"traces/{record.id}.{name}", data)
        for export, data in (exports or {}).items():
            self._write(export_path(record.id, export), data)
        self._write(f"trials/{record.id}.json", record.to_json().encode())

    def read_trace(self, trial_id: str) -> "pyarrow.Table | None":
        """The trial's long tables with the columns of TraceRow, or None when it has none."""
        import pyarrow
        import pyarrow.parquet

        data = self._read(f"traces/{trial_id}.parquet")
        if data is not None:
            return pyarrow.parquet.read_table(io.BytesIO(data))
        data = self._read(f"traces/{trial_id}.json")
        return None if data is None else pyarrow.table(json.loads(data))

    def read_trace_rows(self, trial_id: str) -> list[TraceRow]:
        """The trial's long tables as rows; none when it has none. Needs pyarrow only where it was written with it."""
        data = self._read(f"traces/{trial_id}.json")
        if data is not None:
            columns = json.loads(data)
        elif (table := self.read_trace(trial_id)) is not None:
            columns = table.to_pydict()
        else:
            return []
        return [TraceRow(*row) for row in zip(*(columns[name] for name in TraceRow._fields), strict=True)]

    def read_exports(self, trial_id: str) -> dict[str, bytes]:
        """The trial's exports by name, as bytes for others; nothing here looks into them."""
        found = {name: self._read(export_path(trial_id, name)) for name in EXPORTS}
        return {name: data for name, data in found.items() if data is not None}

    def read_log(self, trial_id: str) -> str | None:
        data = self._read(f"logs/{trial_id}.log")
        return None if data is None else data.decode(errors="replace")

    # Claims

    def claim_numbers(self) -> dict[str, list[int]]:
        """Of each trial that is claimed, the numbers of its attempts, ascending."""
        found: dict[str, list[int]] = {}
        for path in self._list("claims"):
            if match := re.fullmatch(r"([0-9a-f]{12})\.(\d{1,9})\.json", posixpath.basename(path)):
                found.setdefault(match[1], []).append(int(match[2]))
        return {trial_id: sorted(numbers) for trial_id, numbers in found.items()}

    def create_claim(self, trial_id: str, number: int, text: str) -> bool:
        """False where somebody has this attempt."""
        return self._create(_claim_path(trial_id, number), text.encode())

    def read_claim(self, trial_id: str, number: int) -> bytes | None:
        return self._read(_claim_path(trial_id, number))

    def write_claim(self, trial_id: str, number: int, text: str) -> None:
        self._write(_claim_path(trial_id, number), text.encode())

    def remove_claim(self, trial_id: str, number: int) -> None:
        self._remove(_claim_path(trial_id, number))

    def write_log(self, trial_id: str, log: bytes) -> None:
        self._write(f"logs/{trial_id}.log", log)

    # A request to stop

    def ask_to_stop(self) -> None:
        self._write("stop", b"")

    def is_asked_to_stop(self) -> bool:
        return self._read("stop") is not None

    def clear_stop(self) -> None:
        self._remove("stop")

    def write_report(self, html: str) -> str:
        """Write report.html and return where it lies."""
        self._write(REPORT, html.encode())
        return f"{self.uri}/{REPORT}"

    def write_laws(self, csv: str) -> str:
        """Write laws.csv and return where it lies."""
        self._write(LAWS, csv.encode())
        return f"{self.uri}/{LAWS}"

    # Files

    def _path(self, name: str) -> str:
        return posixpath.join(self.root, name)

    def _list(self, folder: str) -> list[str]:
        # Others write here too: what an object store was found to hold a moment ago is of no use.
        self.fs.invalidate_cache()
        try:
            return self.fs.ls(self._path(folder), detail=False)
        except FileNotFoundError:
            return []

    def _read(self, name: str) -> bytes | None:
        try:
            return self.fs.cat_file(self._path(name))
        except FileNotFoundError:
            return None

    def _write(self, name: str, data: bytes) -> None:
        path = self._path(name)
        if not isinstance(self.fs, LocalFileSystem):
            self.fs.pipe_file(path, data)  # object stores show a file only once it is whole
            return
        with _whole_file(path, data) as part:
            os.replace(part, path)

    def _create(self, name: str, data: bytes) -> bool:
        """Write a file that must not be there yet; False, and nothing is written, where it is. Of two who create the
        same file one succeeds."""
        path = self._path(name)
        try:
            if not isinstance(self.fs, LocalFileSystem):
                self.fs.pipe_file(path, data, mode="create")
                return True
            with _whole_file(path, data) as part:
                os.link(part, path)
        except FileExistsError:
            return False
        return True

    def _remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(self._path(name))


@contextlib.contextmanager
def _whole_file(path: str, data: bytes) -> Iterator[str]:
    """The data in a file beside `path`, which is gone afterwards."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    # A leading dot and no .json ending: a reader never takes it for a record.
    part = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.{uuid.uuid4().hex}")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield part
    finally:
        if os.path.exists(part):
            os.unlink(part)


def _claim_path(trial_id: str, number: int) -> str:
    return f"claims/{trial_id}.{number}.json"


def plan_hash(trial_ids: Iterable[str]) -> str:
    """Two studies are the same run when they ask for the same trials, whatever their wording."""
    return hashlib.sha256("\n".join(sorted(trial_ids)).encode()).hexdigest()


def _to_yaml(data: dict[str, Any]) -> str:
    from ruamel.yaml import YAML

    yaml = YAML(typ="safe")
    yaml.default_flow_style = None
    yaml.width = 120
    # Keys stay in the order of the schema, which is the order a reader looks for them.
    yaml.sort_base_mapping_type_on_output = False  # pyright: ignore[reportAttributeAccessIssue]
    text = io.StringIO()
    yaml.dump(data, text)
    return text.getvalue()


def _encode_trace(rows: Sequence[TraceRow]) -> tuple[str, bytes]:
    columns = trace_columns(rows)
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        return "json", json.dumps(columns).encode()
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), buffer)
    return "parquet", buffer.getvalue()

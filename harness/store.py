"""The only reader and writer of a run directory, on a local path or any fsspec URI.

study.yaml            the resolved study; can be run again as it is
plan.json             the ids of the study's trials and the hash of them; of a search, what it asks and those it came to
trials/<id>.json      one finished trial
claims/<id>.<n>.json  who is at work on attempt n of a trial that has no record of it yet (see harness.claims)
stop                  asks whoever runs the trials to stop
traces/<id>.parquet   its long tables (.json where pyarrow is not installed)
exports/<id>.*        one step's memory for other people's viewers, where it was asked for (see harness.exports)
logs/<id>.log         what its process printed
packs/<name>.parquet  finished trials that were put together, in place of their files in trials, traces and logs
report.html
laws.csv              the lines that the report fits, one row a line
"""

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import RecordError, StoreError
from harness.exports import EXPORTS, export_path
from harness.ids import ID_FORM, id_of, is_id
from harness.packs import Packed, Packs
from harness.plan_file import Plan, plan_hash
from harness.record import Record, TraceRow
from harness.run_folder import RunFolder
from harness.spec_check import problem_of
from harness.traces import decode_json, decode_parquet, encode_trace

if TYPE_CHECKING:
    import pyarrow

REPORT = "report.html"
LAWS = "laws.csv"


class RunStore:
    """A run directory. Every write is whole or absent; a record is written last, so that a trial with a
    record has its trace, log and exports too."""

    def __init__(self, uri: str | Path) -> None:
        """Raises StoreError for a URI of an unknown kind."""
        self._folder = RunFolder(uri)
        self.packs = Packs(self._folder)
        self.fs, self.root, self.uri = self._folder.fs, self._folder.root, self._folder.uri

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
        from harness.study_file import to_yaml

        # The plan first: it is what tells another driver, which may begin now too, that this is a run.
        if search is not None or self.read_plan() is None:
            self._folder.write("plan.json", Plan.of(study["name"], trial_ids, search).to_json())
        self._folder.write("study.yaml", to_yaml(study).encode())

    def check_search(self, search: str) -> None:
        """Raises StoreError when the directory holds something else than this search."""
        plan = self._plan_unless_empty()
        if plan is not None and plan.search != search:
            what = "a run that is no search" if plan.search is None else "a search that asks something else"
            raise StoreError(
                f"{self.uri}: holds {what}: {plan.name!r} with {len(plan.trials)} trials. Its cells, axis, "
                "memory or headroom are others. Give another directory with --out."
            )

    def _check_empty_or(self, name: str, trial_ids: Sequence[str]) -> None:
        plan = self._plan_unless_empty()
        if plan is not None and plan.hash != plan_hash(trial_ids):
            raise StoreError(
                f"{self.uri}: holds a run of another study: {plan.name!r} with {len(plan.trials)} trials, "
                f"hash {plan.hash[:12]}; this one is {name!r} with {len(trial_ids)} trials, "
                f"hash {plan_hash(trial_ids)[:12]}. Give another directory with --out."
            )

    def _plan_unless_empty(self) -> Plan | None:
        plan = self.read_plan()
        if plan is None and not self._folder.is_empty:
            plan = self.read_plan()  # it may have come meanwhile
            if plan is not None:
                return plan
            raise StoreError(
                f"{self.uri}: the directory is not empty and holds no plan.json, so it is not a run. "
                "Give an empty or a new directory with --out."
            )
        return plan

    def read_plan(self) -> Plan | None:
        """None when nothing was planned."""
        data = self._folder.read("plan.json")
        try:
            return None if data is None else Plan.from_json(data)
        except ValueError as error:
            raise StoreError(f"{self.uri}/plan.json: damaged ({error}). Give another directory with --out.") from None

    def read_study(self) -> dict[str, Any] | None:
        """The resolved study as plain data, or None when the trials were run one by one. Raises StudyError for what is
        no YAML of plain data."""
        from harness.yaml_lines import read_yaml

        data = self._folder.read("study.yaml")
        if data is None:
            return None
        study, _ = read_yaml(data.decode(errors="replace"), f"{self.uri}/study.yaml")
        if not isinstance(study, dict):
            raise StoreError(f"{self.uri}/study.yaml: is no mapping. Remove it.")
        return study

    # Trials

    def finished_ids(self) -> set[str]:
        """Trials that have a record; of a run that has a plan those that are in it."""
        plan = self.read_plan()
        return self._ids_on_record() & set(plan.trials) if plan is not None else self._ids_on_record()

    def unplanned_ids(self) -> set[str]:
        """Of records that the plan knows nothing of, and that are therefore no part of the run."""
        return self._ids_on_record() - self.finished_ids()

    def _ids_on_record(self) -> set[str]:
        return self.loose_ids() | {trial_id for trial_id in self.packs.ids() if is_id(trial_id)}

    def loose_ids(self) -> set[str]:
        """Trials that have a record of their own, rather than one in a pack."""
        stems = (name.removesuffix(".json") for name in self._folder.names_in("trials") if name.endswith(".json"))
        return {stem for stem in stems if is_id(stem)}

    def find_record(self, trial_id: str) -> Record | None:
        """The trial's record, or None while it has none. Raises RecordError for one that cannot be read, or that is of
        another trial than its name says."""
        return self._find_record(trial_id, packs_known=False)

    def _find_record(self, trial_id: str, *, packs_known: bool) -> Record | None:
        name = f"trials/{trial_id}.json"
        data = self._folder.read(name)
        if data is None:
            packed = self.packs.find(trial_id, known=packs_known)
            if packed is None:
                return None
            name, data = f"packs: {trial_id}", packed.record
        record = Record.from_json(data, source=f"{self.uri}/{name}")
        if problem := problem_of(record.spec):
            raise RecordError(f"{self.uri}/{name}: spec.{problem}. Remove the file; the trial then runs again.")
        if not record.id == trial_id == id_of(record.spec):
            raise RecordError(
                f"{self.uri}/{name}: is of trial {record.id} by its id and of {id_of(record.spec)} by its spec; it was "
                "changed or renamed. Remove the file; the trial then runs again."
            )
        return record

    def read_record(self, trial_id: str) -> Record:
        """Raises StoreError when the trial has no record."""
        return self._required(trial_id, self.find_record(trial_id))

    def _required(self, trial_id: str, record: Record | None) -> Record:
        if record is None:
            raise StoreError(f"{self.uri}/trials/{trial_id}.json: no such record.")
        return record

    def read_records(self) -> list[Record]:
        """Every finished trial, by id. Raises RecordError for a record of an unknown schema version."""
        return [
            self._required(trial_id, self._find_record(trial_id, packs_known=True))
            for trial_id in sorted(self.finished_ids())
        ]

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
            name, data = encode_trace(trace)
            self._folder.write(f"traces/{record.id}.{name}", data)
        for export, data in (exports or {}).items():
            self._folder.write(export_path(record.id, export), data)
        self._folder.write(f"trials/{record.id}.json", record.to_json().encode())

    def read_trace(self, trial_id: str) -> "pyarrow.Table | None":
        """The trial's long tables with the columns of TraceRow, or None when it has none. Raises StoreError for a file
        that holds anything else."""
        import pyarrow

        data = self._folder.read(f"traces/{trial_id}.parquet")
        if data is not None:
            with self._naming(f"traces/{trial_id}.parquet"):
                return decode_parquet(data)
        columns = self._read_json_trace(trial_id)
        if columns is not None:
            return pyarrow.table(columns)
        packed = self._packed(trial_id)
        if packed is None or packed.trace is None:
            return None
        return pyarrow.Table.from_batches([pyarrow.RecordBatch.from_struct_array(packed.trace)])

    def read_trace_rows(self, trial_id: str) -> list[TraceRow]:
        """The trial's long tables as rows; none when it has none. Needs pyarrow only where it was written with it."""
        columns = self._read_json_trace(trial_id)
        if columns is None:
            table = self.read_trace(trial_id)
            columns = {} if table is None else table.to_pydict()
        return [TraceRow(*row) for row in zip(*(columns.get(name, ()) for name in TraceRow._fields), strict=True)]

    def _packed(self, trial_id: str) -> Packed | None:
        """Of a trial whose record is in a pack, and that has not been run again since."""
        found = self.packs.find(trial_id, known=True)
        return None if found is None or self._folder.read(f"trials/{trial_id}.json") is not None else found

    def _read_json_trace(self, trial_id: str) -> dict[str, list[Any]] | None:
        data = self._folder.read(f"traces/{trial_id}.json")
        if data is None:
            return None
        with self._naming(f"traces/{trial_id}.json"):
            return decode_json(data)

    @contextlib.contextmanager
    def _naming(self, name: str) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            raise StoreError(f"{self.uri}/{name}: is no trace: {error}. Remove the file.") from None

    def read_exports(self, trial_id: str) -> dict[str, bytes]:
        """The trial's exports by name, as bytes for others; nothing here looks into them."""
        found = {name: self._folder.read(export_path(trial_id, name)) for name in EXPORTS}
        return {name: data for name, data in found.items() if data is not None}

    def read_log(self, trial_id: str) -> str | None:
        data = self._folder.read(f"logs/{trial_id}.log")
        if data is None and (packed := self._packed(trial_id)) is not None:
            data = packed.log
        return None if data is None else data.decode(errors="replace")

    # Claims

    def claim_numbers(self) -> dict[str, list[int]]:
        """Of each trial that is claimed, the numbers of its attempts, ascending."""
        found: dict[str, list[int]] = {}
        for name in self._folder.names_in("claims"):
            if match := re.fullmatch(rf"({ID_FORM})\.(\d{{1,5}})\.json", name):
                found.setdefault(match[1], []).append(int(match[2]))
        return {trial_id: sorted(numbers) for trial_id, numbers in found.items()}

    def create_claim(self, trial_id: str, number: int, text: str) -> bool:
        """False where somebody has this attempt."""
        return self._folder.create(_claim_path(trial_id, number), text.encode())

    def read_claim(self, trial_id: str, number: int) -> bytes | None:
        return self._folder.read(_claim_path(trial_id, number))

    def write_claim(self, trial_id: str, number: int, text: str) -> None:
        self._folder.write(_claim_path(trial_id, number), text.encode())

    def remove_claim(self, trial_id: str, number: int) -> None:
        self._folder.remove(_claim_path(trial_id, number))

    def write_log(self, trial_id: str, log: bytes) -> None:
        self._folder.write(f"logs/{trial_id}.log", log)

    # A request to stop

    def ask_to_stop(self) -> None:
        self._folder.write("stop", b"")

    def is_asked_to_stop(self) -> bool:
        return self._folder.read("stop") is not None

    def clear_stop(self) -> None:
        self._folder.remove("stop")

    def write_report(self, html: str) -> str:
        """Write report.html and return where it lies."""
        self._folder.write(REPORT, html.encode())
        return f"{self.uri}/{REPORT}"

    def write_laws(self, csv: str) -> str:
        """Write laws.csv and return where it lies."""
        self._folder.write(LAWS, csv.encode())
        return f"{self.uri}/{LAWS}"


def existing_run(uri: str | Path) -> RunStore:
    """Raises StoreError where no run was begun."""
    store = RunStore(uri)
    if store.read_plan() is None and not store.finished_ids():
        raise StoreError(f"{uri}: no run here (neither plan.json nor trials/). Give the directory of `revnet run`.")
    return store


def _claim_path(trial_id: str, number: int) -> str:
    return f"claims/{trial_id}.{number}.json"

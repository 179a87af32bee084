"""A run directory that is made to harm: what is forged is refused by its file, what leads outside is not followed, and
what an honest one holds is read."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from harness.errors import HarnessError, RecordError, StoreError, StudyError
from harness.ids import id_of
from harness.record import Record, TraceRow
from harness.store import RunStore
from harness.trials import TrialSpec
from tests.harness.conftest import Command

TRACE = [TraceRow("step", 0, "step_s", 0.25)]
FORGED = "0123456789ab"


@pytest.fixture
def run(tmp_path: Path, record: Record) -> RunStore:
    """One honest trial of two that are planned."""
    store = RunStore(tmp_path / "run")
    store.open_for({"name": "honest", "question": "Is it?"}, [record.id, TrialSpec(model="revnet", seed=99).id])
    store.write_trial(record, TRACE, b"a log\n")
    return store


def record_file(run: RunStore, record: Record) -> Path:
    return Path(run.root, "trials", f"{record.id}.json")


def change(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))


def test_an_honest_run_is_read(run: RunStore, record: Record) -> None:
    assert run.read_records() == [record]
    assert run.read_trace_rows(record.id) == TRACE
    assert run.unplanned_ids() == set()


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[" * 100_000,
        '{"schema": 1, "id": NaN}',
        '{"schema": 1, "schema": 1}',
        '{"schema": ' + "1" * 5000 + "}",
        "\x00\xff",
        "null",
        '{"__reduce__": ["os.system", "true"], "schema": 1}',
    ],
    ids=lambda text: text[:12],
)
def test_what_is_no_record_is_refused_by_its_file(run: RunStore, record: Record, text: str) -> None:
    record_file(run, record).write_text(text)
    with pytest.raises(RecordError, match=rf"trials/{record.id}\.json: "):
        run.read_records()


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda data: data["spec"].update(depth=26), "is of trial .* by its id and of .* by its spec"),
        (lambda data: data.update(id="../../etc/cron"), "is of trial ../../etc/cron by its id"),
        (lambda data: data["spec"].update(depth=["x"]), "spec.depth: "),
        (lambda data: data["spec"].update(model="<b>revnet</b>"), "spec.model: a name is letters"),
        (lambda data: data["spec"].update(data={"name": "=cmd()", "path": None}), "spec.data.name: a name is"),
        (lambda data: data["metrics"].update(activation_peak_bytes=0.5), "bytes are integers"),
        (lambda data: data["metrics"].update(step_median_s="fast"), "metrics"),
        (lambda data: data.update(status="excellent"), "status"),
        (lambda data: data.update(more=1), "more"),
    ],
)
def test_a_forged_record_is_refused_by_its_file(run: RunStore, record: Record, edit: Any, says: str) -> None:
    change(record_file(run, record), edit)
    with pytest.raises(RecordError, match=rf"trials/{record.id}\.json: .*{says}"):
        run.read_records()


def test_a_record_under_the_name_of_another_is_refused(run: RunStore, record: Record) -> None:
    other = TrialSpec(model="revnet", seed=99).id
    record_file(run, record).rename(Path(run.root, "trials", f"{other}.json"))
    with pytest.raises(RecordError, match=f"{other}.json: is of trial {record.id}"):
        run.read_records()


def test_a_record_that_nobody_planned_is_left_out(run: RunStore, record: Record, revnet_here: Command) -> None:
    spec = record.spec | {"seed": 12345}
    forged = record.model_copy(update={"id": id_of(spec), "spec": spec})
    run.write_trial(forged)
    assert run.read_records() == [record]
    assert run.unplanned_ids() == {forged.id}
    assert f"left out, since the study does not plan them: {forged.id}" in revnet_here("status", "run").stdout
    # Without a plan, as `python -m harness.worker` leaves it, there is none that it could be outside of.
    Path(run.root, "plan.json").unlink()
    assert len(run.read_records()) == 2


def test_names_that_are_no_ids_are_no_records(run: RunStore, record: Record) -> None:
    for name in ("..json", "x.json", f"{record.id}.json.bak", "A" * 12 + ".json"):
        Path(run.root, "trials", name).write_text("{}")
    assert run.finished_ids() == {record.id}
    claims = Path(run.root, "claims")
    claims.mkdir()
    for name in (f"{record.id}.999999999.json", f"{record.id}.-1.json", "../x.0.json".replace("/", "_")):
        (claims / name).write_text("{}")
    assert run.claim_numbers() == {}


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        '{"schema": 1, "name": "x", "hash": "0", "trials": []}',
        '{"schema": 1, "name": "x", "hash": "' + "0" * 64 + '", "trials": ["../../x"]}',
        '{"schema": 2, "name": "x", "hash": "' + "0" * 64 + '", "trials": []}',
        '{"schema": 1, "name": 7, "hash": "' + "0" * 64 + '", "trials": []}',
    ],
)
def test_a_forged_plan_is_refused(run: RunStore, text: str, revnet_here: Command) -> None:
    Path(run.root, "plan.json").write_text(text)
    done = revnet_here("status", "run")
    assert done.returncode == 2
    assert "run/plan.json: damaged (" in done.stderr


@pytest.mark.parametrize(
    "text", ["a: !!python/object/apply:os.system ['touch pwned']\n", "a: *b\n", "- a\n", "a: " + "[" * 5000 + "\n"]
)
def test_a_forged_study_is_refused(run: RunStore, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path(run.root, "study.yaml").write_text(text)
    with pytest.raises((StoreError, StudyError), match=r"study\.yaml"):
        run.read_study()
    assert not (tmp_path / "pwned").exists()


class Trap:
    def __reduce__(self) -> Any:
        return os.mkdir, ("pwned",)


@pytest.mark.parametrize("data", [b"PAR1 no parquet PAR1", pickle.dumps(Trap()), b""])
def test_what_is_no_trace_is_refused_and_not_unpickled(
    run: RunStore, record: Record, data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for ending in ("parquet", "json"):
        for old in Path(run.root, "traces").iterdir():
            old.unlink()
        Path(run.root, "traces", f"{record.id}.{ending}").write_bytes(data)
        with pytest.raises(StoreError, match=rf"traces/{record.id}\.{ending}: is no trace"):
            run.read_trace(record.id)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    "columns",
    [
        {"table": ["step"], "index": [0], "name": ["step_s"]},
        {"table": ["step"], "index": [0], "name": ["step_s"], "value": ["fast"]},
        {"table": ["step"], "index": [0], "name": ["step_s"], "value": [1.0], "more": [1]},
        {"table": ["step"], "index": [0.5], "name": ["step_s"], "value": [1.0]},
        {"table": [None], "index": [0], "name": ["step_s"], "value": [1.0]},
        {"table": [["step"]], "index": [0], "name": ["step_s"], "value": [1.0]},
    ],
)
def test_a_trace_of_other_columns_is_refused(run: RunStore, record: Record, columns: dict[str, list[Any]]) -> None:
    path = Path(run.root, "traces", f"{record.id}.parquet")
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    with pytest.raises(StoreError, match="is no trace"):
        run.read_trace(record.id)
    path.unlink()
    path.with_suffix(".json").write_text(json.dumps(columns))
    with pytest.raises(StoreError, match="is no trace"):
        run.read_trace_rows(record.id)


@pytest.mark.parametrize("folder", ["trials", "logs", "traces", "claims", "exports"])
def test_a_folder_that_leads_outside_is_neither_read_nor_written(
    run: RunStore, record: Record, folder: str, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / f"{record.id}.log").write_text("secret")
    inside = Path(run.root, folder)
    if inside.exists():
        inside.rename(tmp_path / "moved")
    inside.symlink_to(outside)
    attempts: dict[str, Callable[[], object]] = {
        "trials": lambda: run.write_trial(record),
        "logs": lambda: run.read_log(record.id),
        "traces": lambda: run.write_trial(record, TRACE),
        "claims": lambda: run.create_claim(record.id, 0, "{}"),
        "exports": lambda: run.write_trial(record, exports={"snapshot": b""}),
    }
    with pytest.raises(StoreError, match="is a link that leads out of the run directory"):
        attempts[folder]()
    assert [path.name for path in outside.iterdir()] == [f"{record.id}.log"]


def test_a_file_that_leads_outside_or_never_ends_is_not_read(run: RunStore, record: Record, tmp_path: Path) -> None:
    log = Path(run.root, "logs", f"{record.id}.log")
    (tmp_path / "secret").write_text("secret")
    for target in (tmp_path / "secret", Path("/dev/zero"), Path("/etc/hostname")):
        log.unlink()
        log.symlink_to(target)
        with pytest.raises(StoreError, match="leads out of the run directory"):
            run.read_log(record.id)
    log.unlink()
    os.mkfifo(log)
    with pytest.raises(StoreError, match="is no file"):
        run.read_log(record.id)


def test_a_run_directory_may_itself_be_a_link(run: RunStore, record: Record, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(run.root)
    assert RunStore(tmp_path / "link").read_records() == [record]
    # And so may what stays within it.
    Path(run.root, "logs", f"{FORGED}.log").symlink_to(Path(run.root, "logs", f"{record.id}.log"))
    assert run.read_log(FORGED) == "a log\n"


def test_what_a_trial_printed_cannot_drive_the_terminal(run: RunStore, record: Record, revnet_here: Command) -> None:
    run.write_log(record.id, b"plain\ttext\n\x1b[2J\x1b]0;title\x07\rover \xe2\x80\xae \xff\n")
    done = revnet_here("logs", "run", record.id)
    assert done.stdout == "plain\ttext\n\\x1b[2J\\x1b]0;title\\x07\\rover \\u202e �\n"


def test_a_claim_of_nobody_is_told_apart_and_drives_no_terminal(
    run: RunStore, record: Record, revnet_here: Command
) -> None:
    other = TrialSpec(model="revnet", seed=99).id
    claim = {"schema": 1, "owner": "x", "node": "\x1b[2J", "boot": "", "pid": 1}
    claim |= {"started_at": "2026-01-01T00:00:00+00:00"}
    run.create_claim(other, 0, json.dumps(claim))
    assert f"{other}  on \\x1b[2J, at work for 0 s" in revnet_here("status", "run").stdout
    for forged in ({"started_at": "yesterday"}, {"started_at": "2026-01-01"}, {"wall_s": -1}, {"pid": "1; rm"}):
        run.write_claim(other, 0, json.dumps(claim | forged))
        assert f"{other}  on unknown" in revnet_here("status", "run").stdout


def test_every_refusal_is_an_error_with_a_remedy_and_no_traceback(
    run: RunStore, record: Record, revnet_here: Command
) -> None:
    change(record_file(run, record), lambda data: data["spec"].update(depth=26))
    for command in (("status", "run"), ("report", "run"), ("compare", "run", "run")):
        done = revnet_here(*command)
        assert done.returncode == 2
        assert "Remove the file; the trial then runs again." in done.stderr
    assert issubclass(RecordError, HarnessError)

"""The run directory: whole or absent, refused when it is somebody else's, the same on any file system."""

import uuid
from pathlib import Path

import pytest

from harness.errors import RecordError, StoreError
from harness.record import Record, TraceRow
from harness.run_folder import RunFolder
from harness.store import RunStore

STUDY = {"name": "s", "question": "what: is it?", "grid": {"depth": [14, 26]}}
A, B, C = ("a" * 12, "b" * 12, "c" * 12)
TRACE = [TraceRow("step", 0, "step_s", 0.25), TraceRow("drift", 3, "rel", 1e-7)]


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> RunStore:
    return RunStore(tmp_path / "run" if request.param == "local" else f"memory://{uuid.uuid4().hex}/run")


def test_what_is_written_is_read(store: RunStore, record: Record) -> None:
    store.open_for(STUDY, [record.id])
    store.write_trial(record, TRACE, b"a log")
    assert store.finished_ids() == {record.id}
    assert store.read_records() == [record]
    assert store.read_trace_rows(record.id) == TRACE
    assert store.read_log(record.id) == "a log"
    assert store.read_study() == STUDY
    assert RunStore(store.absolute_uri).read_records() == [record]


def test_report_and_laws_lie_beside_each_other(store: RunStore) -> None:
    assert store.write_report("<p>") == f"{store.uri}/report.html"
    assert store.write_laws("a,b\n") == f"{store.uri}/laws.csv"
    assert store.fs.cat_file(f"{store.root}/laws.csv") == b"a,b\n"
    assert store.finished_ids() == set()


def test_nothing_is_there_before_it_is_written(store: RunStore) -> None:
    assert store.finished_ids() == set()
    assert store.read_plan() is store.read_study() is store.read_log("x") is store.find_record("x") is None
    assert store.read_trace_rows("x") == []
    with pytest.raises(StoreError, match="no such record"):
        store.read_record("x")


def test_a_run_of_another_study_is_refused_and_left_alone(store: RunStore) -> None:
    store.open_for(STUDY, [A, B])
    with pytest.raises(StoreError, match=r"another study: 's' with 2 trials.*this one is 't' with 1"):
        store.open_for(STUDY | {"name": "t"}, [C])
    assert store.read_study() == STUDY


def test_the_same_trials_are_the_same_run_whatever_the_wording(store: RunStore) -> None:
    store.open_for(STUDY, [A, B])
    store.open_for(STUDY | {"question": "put differently"}, [B, A])
    study = store.read_study()
    assert study is not None
    assert study["question"] == "put differently"


def test_the_trials_of_a_search_may_grow_and_those_of_a_study_may_not(store: RunStore) -> None:
    store.open_for(STUDY, [A], search="s")
    store.open_for(STUDY, [A, B], search="s")
    plan = store.read_plan()
    assert plan is not None
    assert plan.trials == [A, B]
    store.open_for(STUDY, [B, A])
    assert store.read_plan() == plan
    for trial_ids, search in (([A], None), ([A, B], "t")):
        with pytest.raises(StoreError, match="Give another directory with --out"):
            store.open_for(STUDY | {"name": "other"}, trial_ids, search=search)
    assert store.read_study() == STUDY


def test_a_directory_that_is_no_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(StoreError, match=r"holds no plan\.json"):
        RunStore(tmp_path).open_for(STUDY, [A])
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_of_two_that_open_a_directory_at_once_neither_takes_it_for_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other is at each moment of its own opening when this one looks."""
    store, write = RunStore(tmp_path / "run"), RunFolder.write
    looked: list[str] = []

    def write_and_look(folder: RunFolder, name: str, data: bytes) -> None:
        part = Path(folder.root, f".{name}.{'0' * 32}")
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(b"")
        RunStore(tmp_path / "run")._check_empty_or("s", [A])
        part.unlink()
        write(folder, name, data)
        RunStore(tmp_path / "run")._check_empty_or("s", [A])
        looked.append(name)

    monkeypatch.setattr(RunFolder, "write", write_and_look)
    store.open_for(STUDY, [A])
    assert looked == ["plan.json", "study.yaml"]


def test_a_failed_write_leaves_the_old_file_and_no_other(
    tmp_path: Path, record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = RunStore(tmp_path)
    store.write_trial(record)

    def full(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("harness.run_folder.os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        store.write_trial(record.model_copy(update={"status": "failed"}))
    monkeypatch.undo()
    assert store.read_record(record.id).status == "ok"
    assert [path.name for path in (tmp_path / "trials").iterdir()] == [f"{record.id}.json"]


def test_a_record_of_an_unknown_schema_is_refused_with_its_file(tmp_path: Path, record: Record) -> None:
    store = RunStore(tmp_path)
    store.write_trial(record)
    path = tmp_path / "trials" / f"{record.id}.json"
    path.write_text(path.read_text().replace('"schema": 1', '"schema": 7'))
    with pytest.raises(RecordError, match=rf"{record.id}\.json: schema = 7"):
        store.read_records()


def test_a_trace_written_without_pyarrow_reads_the_same(
    tmp_path: Path, record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    RunStore(tmp_path).write_trial(record, TRACE)
    assert RunStore(tmp_path).read_trace_rows(record.id) == TRACE
    monkeypatch.undo()
    table = RunStore(tmp_path).read_trace(record.id)
    assert table is not None
    assert table.to_pylist() == [row._asdict() for row in TRACE]

"""Runs exported to trackers, and read back with the trackers' own libraries."""

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.errors import HarnessError
from harness.record import Attempt, Record, TraceRow
from harness.store import RunStore
from reports.exporters import export_run
from reports.exporters.folders import MARK
from reports.exporters.rows import as_row, printable, shortened, spelled
from tests.reports.conftest import STUDY, Make, trial, with_metrics, with_spec
from tests.reports.tracker_readers import MLFLOW, TENSORBOARD, WANDB, Seen, mlflow_client, needs, seen

LOSSES = {"ok": [2.5, math.nan, math.inf, -math.inf, 0.1], "oom": [], "failed": [2.5]}
EVIL = "a\nb\r\x1b[31m\x00 ``` </script> | \ud800 日本 {{ 7 }}"
HARMFUL_STUDY = "a\nb\tc ``` </script> | 日本 {{ 7 }}"
ODD_NAMES = {"we ird\n/../na.me:*": 1.5, "": 2.5, "a" * 300: 3.5, "%s{}": 4.5, "../../escape": 5.5}

Export = Callable[[RunStore], list[str]]
Look = Callable[[], dict[str, Seen]]


@pytest.fixture(params=[MLFLOW, WANDB, TENSORBOARD])
def tracker(request: pytest.FixtureRequest) -> str:
    needs(request.param)
    return request.param


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow takes seconds to make its tables."""
    return tmp_path_factory.mktemp("mlflow")


@pytest.fixture
def target(tracker: str, database: Path, tmp_path: Path) -> Path:
    return database if tracker == MLFLOW else tmp_path / tracker


@pytest.fixture
def name(tracker: str, tmp_path: Path) -> str:
    """Of the run in the tracker, no other test's."""
    return f"{tracker}-{tmp_path.name}"


@pytest.fixture
def export(tracker: str, target: Path, name: str) -> Export:
    def run(store: RunStore) -> list[str]:
        return list(export_run(store, **{tracker: str(target)}, name=name))

    return run


@pytest.fixture
def look(tracker: str, target: Path, name: str) -> Look:
    return lambda: seen(tracker, target, name)


def attempted(record: Record) -> Record:
    lost = Attempt(status="crashed", reason="lost", started_at="2026-01-02T03:00:00Z", wall_s=9, node="n1", lost=True)
    last = Attempt(status=record.status, started_at="2026-01-02T03:04:05Z", wall_s=12.5, node="n2")
    return record.model_copy(update={"attempts": [lost, last]})


def records() -> list[Record]:
    made = [
        trial(0, depth=14),
        trial(1, depth=26, activations="reconstructed", channels=[32, 64, 112], deepspeed={"a": {"b": True}}),
        trial(2, status="oom", reason="too large", depth=38),
        trial(3, status="failed", reason="no such thing", depth=50),
    ]
    return [attempted(record) for record in made]


def steps(record: Record) -> Iterator[TraceRow]:
    for index, loss in enumerate(LOSSES[record.status]):
        yield TraceRow("step", index, "step_s", 0.25 * (index + 1))
        yield TraceRow("step", index, "loss", loss)
        yield TraceRow("memory", index, "live_bytes", 1e6)
        yield TraceRow("guard", 10 * index + 1, "block 3", 1e-7)


def write(store: RunStore, found: list[Record]) -> RunStore:
    for record in found:
        store.write_trial(record, list(steps(record)))
    return store


def as_told(tracker: str, record: Record) -> tuple[Any, ...]:
    """What the tracker should have of it: parameters, metrics, and series as text, since NaN equals nothing."""
    row = as_row(record, list(steps(record)), STUDY)
    parameters, metrics, series = dict(row.parameters), dict(row.metrics), dict(row.series)
    if tracker == MLFLOW:
        parameters = {key: spelled(value) for key, value in parameters.items()}
        series = {key: [point for point in points if not math.isinf(point[1])] for key, points in series.items()}
    elif tracker == TENSORBOARD:
        parameters = {k: json.dumps(v) if isinstance(v, list) else v for k, v in parameters.items() if v is not None}
        metrics = {key: float(np.float32(value)) for key, value in metrics.items()}
        series = {key: [(step, float(np.float32(value))) for step, value in points] for key, points in series.items()}
    return parameters, metrics, str(sorted((key, points) for key, points in series.items() if points))


def as_seen(run: Seen) -> tuple[Any, ...]:
    return run.parameters, run.metrics, str(sorted(run.series.items()))


def test_a_tracker_has_what_the_records_say(tracker: str, make_run: Make, export: Export, look: Look) -> None:
    written = records()
    store = write(make_run(written, missing=2), written)
    lines = export(store)
    assert lines[0].startswith("4 written, 0 unchanged: ")
    assert lines[1] == "4 of 6 trials have a record; export again when the others have one."
    found = look()
    assert found.keys() == {record.id for record in written}
    for record in written:
        run = found[record.id]
        assert as_seen(run) == as_told(tracker, record)
        assert run.name.startswith(record.id)
        said = {"status": record.status, "attempts": "2", "attempt.1.status": "crashed", "attempt.2.node": "n2"}
        said |= {"machine.device_name": "Test CPU", "machine.environment.OMP_WAIT_POLICY": "PASSIVE"}
        said |= {"versions.torch": "2.13.0+cpu", "git.commit": "0123456789abcdef", "git.dirty": "true"}
        said |= {"unmeasured.parameter_count": "nobody counted", "study.name": "planted"}
        assert said.items() <= run.tags.items()
        assert run.tags.get("reason") == record.reason
        assert "parameter_count" not in run.metrics
        # Negative controls: the comparison sees one byte more, one parameter less, one step gone.
        if record.status == "ok":
            changed = with_metrics(record, activation_peak_bytes=int(record.metrics["activation_peak_bytes"]) + 1024)
            assert as_seen(run) != as_told(tracker, changed)
            assert as_seen(run) != as_told(tracker, record.model_copy(update={"spec": record.spec | {"seed": 7}}))
            assert as_seen(run) != as_told(tracker, record.model_copy(update={"status": "failed"}))
    assert found[written[0].id].tags["not_finite.step/loss"] == "1: nan, 2: inf, 3: -inf"
    assert found[written[2].id].metrics == {}


def test_the_second_export_doubles_nothing_and_a_changed_record_takes_its_place(
    make_run: Make, export: Export, look: Look
) -> None:
    written = records()
    store = write(make_run(written[:3], missing=0), written[:3])
    export(store)
    first = look()
    assert export(store)[0].startswith("0 written, 3 unchanged: ")
    assert {run.place for run in look().values()} == {run.place for run in first.values()}
    write(store, [with_metrics(written[0], activation_peak_bytes=1024)])
    assert export(store)[0].startswith("1 written, 2 unchanged: ")
    again = look()
    assert again.keys() == first.keys()
    assert again[written[0].id].metrics["activation_peak_bytes"] == 1024
    kept = [written[1].id, written[2].id]
    assert [again[key].place for key in kept] == [first[key].place for key in kept]


def test_an_export_that_was_cut_off_is_made_good(
    tracker: str, make_run: Make, export: Export, look: Look, target: Path
) -> None:
    written = records()[:2]
    store = write(make_run(written), written)
    export(store)
    cut_off = look()[written[0].id].place
    if tracker == MLFLOW:
        mlflow_client(target).delete_tag(cut_off, "fingerprint")
    else:
        (Path(cut_off) / MARK).unlink()
    assert export(store)[0].startswith("1 written, 1 unchanged: ")
    assert as_seen(look()[written[0].id]) == as_told(tracker, written[0])


def test_what_others_keep_beside_it_stays(
    tracker: str, make_run: Make, export: Export, look: Look, target: Path, name: str
) -> None:
    record = records()[0]
    store = write(make_run([record]), [record])
    export(store)
    if tracker == MLFLOW:
        client = mlflow_client(target)
        theirs = client.create_run(client.get_experiment_by_name(name).experiment_id).info.run_id
    else:
        theirs = Path(look()[record.id].place).with_name("offline-run-1-theirs")
        theirs.mkdir()
    write(store, [with_metrics(record, blocks=4)])
    assert export(store)[0].startswith("1 written, ")
    if isinstance(theirs, Path):
        assert theirs.is_dir()
    else:
        assert mlflow_client(target).get_run(theirs).info.lifecycle_stage == "active"


def test_runs_of_two_directories_stay_apart(tracker: str, make_run: Make, target: Path, tmp_path: Path) -> None:
    written = records()[:1]
    names = [f"{tracker}-{tmp_path.name}-{which}" for which in ("base", "new")]
    for number, each in enumerate(names):
        changed = [with_metrics(written[0], blocks=number)]
        list(export_run(write(make_run(changed, name=each), changed), **{tracker: str(target)}))
    for number, each in enumerate(names):
        assert seen(tracker, target, each)[written[0].id].metrics["blocks"] == number


@pytest.mark.parametrize(("most", "trackers"), [(2**53 - 1, (MLFLOW, WANDB)), (2**60 + 1, (WANDB,))])
def test_bytes_are_exact_where_the_tracker_has_room(
    tracker: str, make_run: Make, export: Export, look: Look, most: int, trackers: tuple[str, ...]
) -> None:
    record = with_metrics(trial(0), activation_peak_bytes=most)
    export(write(make_run([record]), []))
    run = look()[record.id]
    assert (run.metrics["activation_peak_bytes"] == most) == (tracker in trackers)
    if tracker == TENSORBOARD:
        assert f'"activation_peak_bytes": {most}' in run.tags["record"]


def test_tensorboard_leaves_out_what_would_become_0_or_infinite(make_run: Make, tmp_path: Path) -> None:
    needs(TENSORBOARD)
    record = with_metrics(trial(0), drift_max_rel=1e-60, model_flops=1e60, loss_last=0.0)
    list(export_run(make_run([record]), tensorboard=str(tmp_path), name="run-tb"))
    run = seen(TENSORBOARD, tmp_path, "run-tb")[record.id]
    assert run.metrics["loss_last"] == 0
    assert run.metrics.keys() == record.metrics.keys() - {"drift_max_rel", "model_flops"}
    assert '"drift_max_rel": 1e-60' in run.tags["record"]


def test_texts_and_names_made_to_harm_are_exported_as_text(
    tracker: str, make_run: Make, export: Export, look: Look, target: Path
) -> None:
    odd = trial(1, status="failed", reason=EVIL + "x" * 10_000)
    data = {"name": "cifar10", "path": "/" + "y" * 9_000, "image_size": 32}
    odd = with_spec(odd, data=data, **{"z\n": ["\x00", None]})
    changed: dict[str, Any] = {
        "metrics": {**odd.metrics, **ODD_NAMES, "fine_bytes": 7},
        "machine": {EVIL: EVIL, "device_name": EVIL, "": {"": EVIL}},
        "versions": {EVIL: EVIL},
        "git": {EVIL: EVIL},
        "unmeasured": {EVIL: EVIL},
        "attempts": [Attempt(status="failed", started_at=EVIL, wall_s=1e300, node=EVIL)],
    }
    odd = odd.model_copy(update=changed)
    beside = trial(2)
    store = make_run([odd, beside], study={"name": HARMFUL_STUDY, "question": HARMFUL_STUDY})
    store.write_trial(odd, [TraceRow("step", 0, EVIL.replace("\ud800", ""), 1.5), TraceRow("guard", -5, "..", 2.5)])
    export(store)
    found = look()
    assert found.keys() == {odd.id, beside.id}
    run = found[odd.id]
    assert run.metrics["fine_bytes"] == 7
    # Half a character is read as the sign that stands for it.
    assert run.tags["machine.device_name"] == printable(EVIL.replace("\ud800", "\ufffd"))
    reason = printable((odd.reason or "").replace("\ud800", "\ufffd"))
    if tracker == MLFLOW:
        assert run.tags["reason"] == shortened(reason, 5000)
        assert run.tags["reason"].endswith(f"({len(reason)} characters)")
        assert run.metrics.keys() == {"fine_bytes"}
        assert all(json.dumps(printable(key)) in run.tags["refused_names"] for key in ODD_NAMES)
    else:
        assert run.tags["reason"] == reason
        assert {printable(key): value for key, value in ODD_NAMES.items() if key}.items() <= {
            **run.metrics,
            **{key: points[0][1] for key, points in run.series.items()},
        }.items()
    # Nothing outside the place that was given.
    assert not list(target.parent.glob("escape*"))


# Also where it is missing indeed.
@pytest.mark.parametrize("tracker", [MLFLOW, WANDB, TENSORBOARD])
def test_a_missing_package_is_named_with_what_to_install(
    tracker: str, make_run: Make, target: Path, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gone = {MLFLOW: "mlflow", WANDB: "wandb", TENSORBOARD: "tensorboard.summary.writer.event_file_writer"}[tracker]
    monkeypatch.setitem(sys.modules, gone, None)
    if tracker == MLFLOW:
        monkeypatch.setitem(sys.modules, "mlflow.entities", None)
    store = make_run([trial(0)])
    with pytest.raises(HarnessError, match=rf"--{tracker}: .*pip install 'revnet-harness\[{tracker}\]'"):
        list(export_run(store, **{tracker: str(target)}, name=name))
    assert not (target / name).exists()


def test_a_place_that_cannot_be_written_is_named(tracker: str, make_run: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HarnessError, match=rf"--{tracker} .*cannot be written"):
        list(export_run(make_run([trial(0)]), **{tracker: str(tmp_path / "file" / "below")}))


@pytest.mark.parametrize("target", ["foo://me:secret@host", "sqlite:///{}/file"])
def test_what_mlflow_cannot_open_is_named_without_its_password(make_run: Make, tmp_path: Path, target: str) -> None:
    needs(MLFLOW)
    (tmp_path / "file").write_text("no database " * 100)
    with pytest.raises(HarnessError, match=r"--mlflow (foo://host|sqlite)") as refused:
        list(export_run(make_run([trial(0)]), mlflow=target.format(tmp_path)))
    assert "secret" not in str(refused.value)


def test_nothing_heavy_is_imported_without_need(make_run: Make, tmp_path: Path) -> None:
    needs(TENSORBOARD)
    make_run([trial(0)])
    code = """
import sys
import harness.cli
from harness.store import RunStore
from reports.exporters import export_run
assert not {"mlflow", "wandb", "tensorboard"} & sys.modules.keys()
list(export_run(RunStore("run"), tensorboard="tb"))
assert "tensorboard" in sys.modules
assert not {"torch", "tensorflow", "ray", "deepspeed", "mlflow", "wandb"} & sys.modules.keys()
"""
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {root!r})\n{code}"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr

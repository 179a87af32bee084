"""Trials in a pack are read as before, whatever else happens at the directory; and others can open it."""

import io
import math
import uuid
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pyarrow
import pyarrow.parquet
import pytest

from harness.claims import Holder
from harness.errors import StoreError
from harness.pack import Done, pack
from harness.record import Attempt, Record, TraceRow
from harness.store import RunStore
from harness.trials import TrialSpec
from tests.harness.conftest import Command
from tests.reports.packed import packed_in

TRIALS = [TrialSpec(model="revnet", depth=14, seed=seed) for seed in range(4)]
ATTEMPT = Attempt(status="ok", started_at="2026-01-01T00:00:00+00:00", wall_s=1, node="here")


def record_of(trial: TrialSpec, attempts: int = 1, **metrics: int | float) -> Record:
    spec = trial.model_dump(mode="json")
    return Record(id=trial.id, spec=spec, status="ok", attempts=[ATTEMPT] * attempts, metrics=metrics)


def trace_of(trial: TrialSpec) -> list[TraceRow]:
    return [TraceRow("step", 0, "step_s", 0.25 + trial.seed), TraceRow("drift", 3, "rel", math.inf)]


def write(store: RunStore, trial: TrialSpec, attempts: int = 1) -> None:
    store.write_trial(record_of(trial, attempts, activation_peak_bytes=2**40 + 1), trace_of(trial), b"log \xff")


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> RunStore:
    """Three of four trials are done."""
    store = RunStore(tmp_path / "run" if request.param == "local" else f"memory://{uuid.uuid4().hex}/run")
    store.open_for({"name": "packed"}, [trial.id for trial in TRIALS])
    for trial in TRIALS[:3]:
        write(store, trial)
    return store


def contents(store: RunStore) -> object:
    ids = sorted(store.finished_ids())
    return store.read_records(), [(store.read_trace_rows(one), store.read_log(one)) for one in ids]


def files(store: RunStore) -> list[str]:
    return sorted(path.removeprefix(store.root).lstrip("/") for path in store.fs.find(store.root))


def anew(store: RunStore) -> RunStore:
    """As another process sees it."""
    return RunStore(store.uri)


def test_what_is_packed_is_read_as_before_from_one_file(store: RunStore) -> None:
    before = contents(store)
    done = pack(store)
    assert (done.trials, done.removed) == (3, 9)
    assert contents(store) == contents(anew(store)) == before
    assert files(store) == [f"packs/{done.name}", "plan.json", "study.yaml"]
    table = anew(store).read_trace(TRIALS[0].id)
    assert table is not None
    assert table.to_pylist() == [row._asdict() for row in trace_of(TRIALS[0])]
    assert pack(anew(store)) == Done(3, 0, done.name)


def test_later_trials_join_the_pack_and_one_that_is_run_again_replaces_what_it_held(store: RunStore) -> None:
    pack(store)
    write(store, TRIALS[3])
    store.write_trial(record_of(TRIALS[0], attempts=2), (), b"again")
    assert len(store.read_records()) == 4
    assert len(store.read_record(TRIALS[0].id).attempts) == 2
    # Its first attempt had a trace; the one that counts has none.
    assert store.read_trace(TRIALS[0].id) is None
    assert store.read_log(TRIALS[0].id) == "again"
    before, done = contents(store), pack(store)
    assert done.trials == 4
    assert contents(anew(store)) == before
    assert files(store) == [f"packs/{done.name}", "plan.json", "study.yaml"]


def test_of_two_packs_at_once_none_loses_what_the_other_has(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second begins when the first has read the run, and is done before the first writes."""
    from harness import pack as module

    encode, second = module.encode_pack, []

    def meanwhile(trials: object) -> bytes:
        if not second:
            second.append(True)
            write(store, TRIALS[3])
            pack(anew(store))
        return encode(trials)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(module, "encode_pack", meanwhile)
    pack(store)
    assert {record.id for record in anew(store).read_records()} == {trial.id for trial in TRIALS}
    monkeypatch.undo()
    assert pack(anew(store)).trials == 4
    assert len(files(store)) == 3


def test_a_trial_that_is_run_again_meanwhile_is_not_removed(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    from harness import pack as module

    encode = module.encode_pack

    def meanwhile(trials: object) -> bytes:
        store.write_trial(record_of(TRIALS[1], attempts=2), (), b"again")
        return encode(trials)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(module, "encode_pack", meanwhile)
    assert pack(store).removed == 6
    assert len(anew(store).read_record(TRIALS[1].id).attempts) == 2
    assert anew(store).read_log(TRIALS[1].id) == "again"


def test_nothing_is_packed_while_trials_are_at_work(store: RunStore) -> None:
    before = files(store)
    holder = Holder.take(store, TRIALS[3].id, 0)
    assert holder is not None
    with pytest.raises(StoreError, match=f"trials are at work, .*: {TRIALS[3].id}"):
        pack(store)
    holder.release()
    assert files(store) == before
    assert pack(store).trials == 3


def test_a_sweep_finds_what_is_packed_done_and_a_report_is_built_of_it(tmp_path: Path, revnet_here: Command) -> None:
    (tmp_path / "small.yaml").write_text("name: small\nmodel: revnet\nfixed: {depth: 14}\ngrid: {seed: [0, 1]}\n")
    store = RunStore(tmp_path / "runs" / "small")
    for seed in range(2):
        write(store, TrialSpec(model="revnet", depth=14, seed=seed))
    ids = sorted(store.finished_ids())
    assert revnet_here("pack", "runs/small").stdout.startswith("2 trials in runs/small/packs/")
    assert "2 trials, 2 done, 0 to run" in revnet_here("plan", "small.yaml").stdout
    assert revnet_here("logs", "runs/small", ids[0]).stdout == "log �"
    assert revnet_here("report", "runs/small").returncode == 0
    html = (tmp_path / "runs" / "small" / "report.html").read_text()
    assert sorted(packed_in(html)["columns"]["ids"]) == ids


def test_pandas_opens_it_with_a_column_for_each_figure(store: RunStore) -> None:
    name = pack(store).name
    frame = pd.read_parquet(io.BytesIO(store.fs.cat_file(f"{store.root}/packs/{name}")))
    assert list(frame["metrics.activation_peak_bytes"]) == [2**40 + 1] * 3
    assert sorted(frame["spec.seed"]) == [0, 1, 2]
    assert set(frame["status"]) == {"ok"}


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"PAR1",
        lambda data: _parquet({"id": ["x"]}),
        lambda data: _parquet({"id": [None], "record": ["{}"], "trace": [None], "log": [b""]}),
        lambda data: _parquet({"id": ["x"], "record": [7], "trace": [None], "log": [b""]}),
    ],
)
def test_what_is_no_pack_is_refused_by_its_file(store: RunStore, damage: Callable[[bytes], bytes]) -> None:
    name = pack(store).name
    path = f"{store.root}/packs/{name}"
    store.fs.pipe_file(path, damage(store.fs.cat_file(path)))
    with pytest.raises(StoreError, match=f"packs/{name}: is no pack of trials"):
        anew(store).read_records()


def test_a_forged_record_in_a_pack_is_refused(store: RunStore) -> None:
    name = pack(store).name
    path = f"{store.root}/packs/{name}"
    table = pyarrow.parquet.read_table(io.BytesIO(store.fs.cat_file(path)))
    forged = [text.as_py().replace('"depth": 14', '"depth": 26') for text in table["record"]]
    store.fs.pipe_file(path, _parquet(table.to_pydict() | {"record": forged}))
    with pytest.raises(StoreError, match=r"is of trial .* by its id and of .* by its spec"):
        anew(store).read_records()


def _parquet(columns: dict[str, list[object]]) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), buffer)
    return buffer.getvalue()

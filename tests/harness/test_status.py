"""What `revnet status`, `logs` and `stop` say of a run, with nobody running it."""

from datetime import datetime, timedelta
from pathlib import Path

import pytest

from harness.claims import Holder, read_claim
from harness.record import Attempt, Record
from harness.status import describe
from harness.store import RunStore
from harness.trials import TrialSpec
from tests.harness.conftest import Command

TRIALS = [TrialSpec(model="revnet", depth=14, seed=seed) for seed in range(5)]
IDS = [trial.id for trial in TRIALS]
LOST = Attempt(status="crashed", reason="planted", started_at="2026-01-01", wall_s=1, node="w1", lost=True)


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    """One trial is done, one at work, one was lost and is to be tried again, and two are left."""
    store = RunStore(tmp_path / "run")
    store.open_for({"name": "five"}, IDS)
    spec = TRIALS[0].model_dump(mode="json")
    store.write_trial(Record(id=IDS[0], spec=spec, status="ok", attempts=[LOST]), log=b"printed\n")
    assert Holder.take(store, IDS[1], 0)
    lost = Holder.take(store, IDS[2], 0)
    assert lost is not None
    lost.end(LOST)
    return store


def test_each_trial_is_counted_once(store: RunStore, revnet_here: Command) -> None:
    lines = revnet_here("status", "run").stdout.splitlines()
    assert lines[:2] == [
        "five: 1 of 5 trials done",
        "ok 1  running 1  lost, to be tried again 1  pending 2",
    ]
    assert [line.split()[0] for line in lines[2:]] == [IDS[1]]


def test_one_that_is_silent_is_said_to_be(store: RunStore) -> None:
    claim = read_claim(store, IDS[1], 0)
    assert claim is not None
    started = datetime.fromisoformat(claim.started_at)
    assert "not heard of" not in list(describe(store, started))[2]
    assert "not heard of for 600 s" in list(describe(store, started + timedelta(seconds=600)))[2]


def test_a_claim_left_over_beside_its_record_counts_for_nothing(store: RunStore) -> None:
    assert Holder.take(store, IDS[0], 0)
    assert list(describe(store))[1] == "ok 1  running 1  lost, to be tried again 1  pending 2"


def test_a_log_by_the_beginning_of_an_id(store: RunStore, revnet_here: Command) -> None:
    assert revnet_here("logs", "run", IDS[0][:6]).stdout == "printed\n"
    none_yet = revnet_here("logs", "run", IDS[3])
    assert (none_yet.returncode, f"{IDS[3]}: has no log yet" in none_yet.stderr) == (2, True)
    unknown = revnet_here("logs", "run", "zz")
    assert (unknown.returncode, "no trial of this run has such an id" in unknown.stderr) == (2, True)
    many = revnet_here("logs", "run", "")
    assert (many.returncode, "these begin so: " in many.stderr) == (2, True)


def test_stop_is_a_request_that_lies_in_the_run(store: RunStore, revnet_here: Command) -> None:
    assert not store.is_asked_to_stop()
    assert revnet_here("stop", "run").returncode == 0
    assert store.is_asked_to_stop()
    assert "asked to stop" in revnet_here("status", "run").stdout
    store.clear_stop()
    assert "asked to stop" not in revnet_here("status", "run").stdout


@pytest.mark.parametrize("command", [["status"], ["logs", "a"], ["stop"]])
def test_what_is_no_run_is_refused(tmp_path: Path, revnet_here: Command, command: list[str]) -> None:
    done = revnet_here(command[0], "nowhere", *command[1:])
    assert (done.returncode, "no run here" in done.stderr) == (2, True)
    assert list(tmp_path.iterdir()) == []


def test_a_run_in_the_memory_of_one_process_is_refused(tmp_path: Path, revnet_here: Command) -> None:
    (tmp_path / "s.yaml").write_text("name: s\nmodel: revnet\nfixed: {depth: 14}\n")
    done = revnet_here("run", "s.yaml", "--out", "memory://run")
    assert (done.returncode, "lies in the memory of this process" in done.stderr) == (2, True)

"""Claims: one holder for each attempt, told apart from a lost one by its own beats and the reader's own clock."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from harness import claims
from harness.claims import LEASE_S, Claim, Holder, Watch, read_claim
from harness.record import Attempt
from harness.store import RunStore

ID = "0123456789ab"


@pytest.fixture(params=["file", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> RunStore:
    """On a local path, and on a file system that only this process sees."""
    return RunStore(tmp_path / "run" if request.param == "file" else f"memory:/{tmp_path}/run")


def claim_of(store: RunStore, number: int = 0) -> Claim:
    found = read_claim(store, ID, number)
    assert found is not None
    return found


def test_of_many_who_want_an_attempt_one_has_it(store: RunStore) -> None:
    barrier, held = threading.Barrier(16), []

    def want() -> None:
        barrier.wait()
        if holder := Holder.take(store, ID, 0):
            held.append(holder)

    threads = [threading.Thread(target=want) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(held) == 1
    assert held[0].is_latest()
    assert store.claim_numbers() == {ID: [0]}
    held[0].release()
    assert store.claim_numbers() == {}
    assert Holder.take(store, ID, 0) is not None


def test_who_was_taken_for_lost_knows_and_gives_back_nothing_of_others(store: RunStore) -> None:
    first = Holder.take(store, ID, 0)
    assert first is not None
    second = Holder.take(store, ID, 1)
    assert second is not None
    assert not first.is_latest()
    assert second.is_latest()
    store.remove_claim(ID, 0)
    third = Holder.take(store, ID, 0)
    first.release()
    assert third is not None
    assert store.claim_numbers() == {ID: [0, 1]}


def test_a_claim_is_lost_when_it_stays_as_it_is_for_a_lease(
    store: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "BEAT_S", 0.0)
    holder = Holder.take(store, ID, 0)
    assert holder is not None
    now, log = 1000.0, tmp_path / "log"
    watch = Watch(lambda: now)
    log.write_bytes(b"as far as it came")
    assert not watch.is_lost(ID, 0, claim_of(store))
    now += LEASE_S - 1
    holder.watch(log)
    assert store.read_log(ID) == "as far as it came"
    # It was heard of in between.
    assert not watch.is_lost(ID, 0, claim_of(store))
    now += LEASE_S - 1
    assert not watch.is_lost(ID, 0, claim_of(store))
    now += 2
    assert watch.is_lost(ID, 0, claim_of(store))
    attempt = claim_of(store).as_attempt()
    assert (attempt.status, attempt.lost) == ("crashed", True)
    # Somebody who begins to look waits for a lease of his own.
    assert not Watch(lambda: now).is_lost(ID, 0, claim_of(store))


def test_a_holder_on_this_machine_that_is_no_more_is_lost_at_once(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    program = "import sys; from harness.claims import *; Holder.take(RunStore(sys.argv[1]), sys.argv[2], 0)"
    subprocess.run([sys.executable, "-c", program, str(tmp_path), ID], check=True)
    dead = claim_of(store)
    assert dead.pid != os.getpid()
    assert Watch().is_lost(ID, 0, dead)
    # Another machine's processes are not to be seen from here; nor is our own a dead one.
    assert not Watch().is_lost(ID, 0, dead.model_copy(update={"boot": "another"}))
    assert not Watch().is_lost(ID, 0, dead.model_copy(update={"pid": os.getpid()}))


def test_what_ended_is_not_lost_and_says_how(store: RunStore) -> None:
    holder = Holder.take(store, ID, 0)
    assert holder is not None
    attempt = Attempt(status="crashed", reason="planted", started_at="2026-01-01", wall_s=1, node="here", lost=True)
    holder.end(attempt)
    assert not Watch().is_lost(ID, 0, claim_of(store))
    assert claim_of(store).as_attempt() == attempt


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 2}', '{"schema": 1, "owner": 1}'])
def test_a_claim_that_cannot_be_read_counts_as_held_until_the_lease_is_over(tmp_path: Path, text: str) -> None:
    store, now = RunStore(tmp_path), 0.0
    store.write_claim(ID, 0, text)
    watch = Watch(lambda: now)
    assert not watch.is_lost(ID, 0, claim_of(store))
    now = LEASE_S
    assert watch.is_lost(ID, 0, claim_of(store))


def test_only_claims_are_taken_for_claims(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    for name in (f"{ID}.0.json", f"{ID}.10.json", f"{ID}.2.json", f".{ID}.3.json.ab", "../x.0.json", f"{ID}.-1.json"):
        (tmp_path / "claims" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "claims" / name).write_text("{}")
    assert store.claim_numbers() == {ID: [0, 2, 10]}

"""Whatever happens to whoever runs it, a trial ends with one record that tells of all its attempts."""

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.attempts import Ended, Job, attempt
from harness.claims import BEAT_S, LEASE_S, Holder, read_claim
from harness.jobs import Jobs, Outcome
from harness.record import Attempt, Record, Status
from harness.store import RunStore
from harness.supervise import Supervised, Watcher
from harness.trials import TrialSpec

Run = Callable[[Watcher], Supervised]
TRIALS = [TrialSpec(model="revnet", depth=14, batch_size=size) for size in (2, 8, 4)]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return RunStore(tmp_path)


def came_to(trial: TrialSpec, status: Status = "ok", *, lost: bool = False) -> Run:
    """A supervised trial that ended so."""
    reason = None if status == "ok" else "planted"
    last = Attempt(status=status, reason=reason, started_at="2026-01-01", wall_s=1, node="here", lost=lost)
    record = Record(id=trial.id, spec=trial.model_dump(mode="json"), status=status, reason=reason, attempts=[last])
    return lambda watch: Supervised(record, [], b"printed", {})


def make(jobs: Jobs, store: RunStore, status: Status = "ok", *, lost: bool = False) -> list[Outcome]:
    job = jobs.take()
    assert job is not None
    return jobs.ended(job, attempt(job, store, came_to(job.trial, status, lost=lost)))


def statuses(store: RunStore, trial: TrialSpec) -> list[tuple[Status, bool]]:
    return [(one.status, one.lost) for one in store.read_record(trial.id).attempts]


def test_the_largest_comes_first_and_each_is_done_once(store: RunStore) -> None:
    jobs = Jobs(TRIALS, store, 3)
    done = [outcome for _ in TRIALS for outcome in make(jobs, store)]
    assert [outcome.trial.batch_size for outcome in done] == [8, 4, 2]
    assert jobs.is_over
    assert jobs.take() is None
    assert store.claim_numbers() == {}
    assert [statuses(store, trial) for trial in TRIALS] == [[("ok", False)]] * 3


def test_a_lost_attempt_is_made_again_and_stays_in_the_record(store: RunStore) -> None:
    jobs = Jobs(TRIALS[:1], store, 3)
    assert make(jobs, store, "crashed", lost=True) == []
    assert store.finished_ids() == set()
    assert make(jobs, store)[0].status == "ok"
    assert statuses(store, TRIALS[0]) == [("crashed", True), ("ok", False)]
    assert store.read_record(TRIALS[0].id).reason is None


def test_a_fault_of_its_own_is_not_tried_again(store: RunStore) -> None:
    jobs = Jobs(TRIALS[:1], store, 3)
    assert make(jobs, store, "failed")[0].status == "failed"
    assert statuses(store, TRIALS[0]) == [("failed", False)]


def test_one_that_is_lost_each_time_is_given_up(store: RunStore) -> None:
    jobs = Jobs(TRIALS[:1], store, 2)
    assert make(jobs, store, "crashed", lost=True) == []
    (outcome,) = make(jobs, store, "crashed", lost=True)
    assert (outcome.status, outcome.reason) == ("crashed", "planted; given up after 2 attempts")
    assert statuses(store, TRIALS[0]) == [("crashed", True)] * 2
    assert jobs.is_over


def test_what_another_driver_has_is_left_to_it_and_taken_over_when_it_is_lost(store: RunStore) -> None:
    trial, clock = TRIALS[0], Clock()
    other = Holder.take(store, trial.id, 0)
    assert other is not None
    jobs = Jobs([trial], store, 3, clock=clock)
    assert (jobs.take(), jobs.elsewhere) == (None, 1)
    assert jobs.look() == []
    clock.now += LEASE_S - 1
    assert jobs.look() == []
    assert jobs.take() is None
    clock.now += LEASE_S
    jobs.look()
    assert make(jobs, store)[0].status == "ok"
    assert statuses(store, trial) == [("crashed", True), ("ok", False)]
    assert "lost" in (store.read_record(trial.id).attempts[0].reason or "")


def test_what_another_driver_finishes_is_an_outcome_here_too(store: RunStore) -> None:
    trial, clock = TRIALS[0], Clock()
    (theirs,) = (job for job in [Jobs([trial], store, 3).take()] if job)
    taken: list[Jobs] = []

    def run(watch: Watcher) -> Supervised:
        taken.append(Jobs([trial], store, 3, clock=clock))
        return came_to(trial)(watch)

    assert attempt(theirs, store, run).what == "done"
    (jobs,) = taken
    (outcome,) = jobs.look()
    assert (outcome.trial, outcome.status) == (trial, "ok")
    assert jobs.is_over


def test_two_who_start_the_same_attempt_do_not_both_make_it(store: RunStore) -> None:
    first, second = Jobs(TRIALS[:1], store, 3), Jobs(TRIALS[:1], store, 3)
    (mine,), (theirs,) = ([job] for job in (first.take(), second.take()))
    assert mine is not None
    assert theirs is not None
    assert attempt(mine, store, came_to(mine.trial)).what == "done"

    def must_not_run(watch: Watcher) -> Supervised:
        raise AssertionError("it was run twice")

    # The first has finished and given its claim back, so that the second gets one.
    assert second.ended(theirs, attempt(theirs, store, must_not_run)) == []
    assert second.look()[0].status == "ok"
    assert statuses(store, TRIALS[0]) == [("ok", False)]


def test_who_was_taken_for_lost_leaves_no_record(store: RunStore) -> None:
    trial = TRIALS[0]
    job = Job(trial, seen=0, number=0, max_attempts=3)

    def slow(watch: Watcher) -> Supervised:
        assert attempt(job._replace(number=1), store, came_to(trial)).what == "done"
        return came_to(trial, "failed")(watch)

    assert attempt(job, store, slow).what == "held"
    assert store.read_record(trial.id).status == "ok"


def test_an_interrupted_attempt_counts_for_nothing(store: RunStore) -> None:
    job = Job(TRIALS[0], seen=0, number=0, max_attempts=3)

    def interrupted(watch: Watcher) -> Supervised:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attempt(job, store, interrupted)
    assert store.claim_numbers() == {}
    make(Jobs(TRIALS[:1], store, 3), store)
    assert statuses(store, TRIALS[0]) == [("ok", False)]


def test_asked_for_again_it_keeps_its_attempts_and_has_as_many_more(store: RunStore) -> None:
    trial = TRIALS[0]
    make(Jobs([trial], store, 1), store, "failed")
    again = Jobs([trial], store, 2)
    assert make(again, store, "crashed", lost=True) == []
    # As of an attempt whose record was written, while its holder was lost before it gave the claim back.
    store.create_claim(trial.id, 0, "left over")
    assert make(again, store)[0].status == "ok"
    assert statuses(store, trial) == [("failed", False), ("crashed", True), ("ok", False)]
    assert store.claim_numbers() == {}


def test_attempts_that_other_drivers_lost_count_too(store: RunStore) -> None:
    trial, clock = TRIALS[0], Clock()
    for number in range(2):
        assert Holder.take(store, trial.id, number)
    jobs = Jobs([trial], store, 2, clock=clock)
    jobs.look()
    clock.now += LEASE_S
    (outcome,) = jobs.look()
    assert outcome.status == "crashed"
    assert statuses(store, trial) == [("crashed", True)] * 2
    assert (outcome.reason or "").endswith("given up after 2 attempts")
    assert jobs.is_over


def test_a_task_that_is_lost_before_it_claims_is_tried_again_and_not_for_ever(store: RunStore) -> None:
    clock = Clock()
    jobs = Jobs(TRIALS[:1], store, 2, clock=clock)
    job = jobs.take()
    assert job is not None
    assert jobs.lost(job, "the node went away") == []
    jobs.look()
    job = jobs.take()
    assert job is not None
    (outcome,) = jobs.lost(job, "the node went away")
    assert (outcome.status, outcome.reason) == ("crashed", "the node went away")
    assert statuses(store, TRIALS[0]) == [("crashed", True)]
    assert jobs.is_over


def test_a_holder_that_ends_in_the_store_only_is_followed(store: RunStore) -> None:
    trial = TRIALS[0]
    job = Job(trial, seen=0, number=0, max_attempts=3)
    assert attempt(job, store, came_to(trial, "crashed", lost=True)) == Ended("again", "crashed", "planted", 1)
    claim = read_claim(store, trial.id, 0)
    assert claim is not None
    assert claim.ended is not None
    # Its driver is lost before it makes another: somebody else does, at once.
    jobs = Jobs([trial], store, 3)
    jobs.look()
    make(jobs, store)
    assert statuses(store, trial) == [("crashed", True), ("ok", False)]


def test_a_request_to_stop_is_seen_but_not_looked_for_all_the_time(store: RunStore) -> None:
    clock = Clock()
    jobs = Jobs(TRIALS, store, 3, clock=clock)
    assert not jobs.are_to_stop()
    store.ask_to_stop()
    assert not jobs.are_to_stop()
    clock.now += BEAT_S
    assert jobs.are_to_stop()


def interrupting(method: Callable[..., object]) -> Callable[..., object]:
    """Ctrl-C, or a task that is cancelled, as soon as the store has done it."""

    def call(*arguments: object) -> object:
        answer = method(*arguments)
        signal.raise_signal(signal.SIGINT)
        return answer

    return call


def test_a_trial_that_is_ended_while_it_is_claimed_was_never_begun(
    store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "create_claim", interrupting(store.create_claim))
    jobs, begun = Jobs(TRIALS[:1], store, 3), []

    def run(watch: Watcher) -> Supervised:
        begun.append(job)
        watch(Path("log"))
        raise AssertionError("should have been ended")

    job = jobs.take()
    assert job is not None
    with pytest.raises(KeyboardInterrupt):
        attempt(job, store, run)
    assert begun
    assert store.claim_numbers() == {}
    assert store.finished_ids() == set()


@pytest.mark.parametrize("when", ["write_trial", "remove_claim"])
def test_a_trial_that_is_ended_while_it_is_recorded_is_recorded(
    store: RunStore, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    monkeypatch.setattr(store, when, interrupting(getattr(store, when)))
    job = Jobs(TRIALS[:1], store, 3).take()
    assert job is not None
    with pytest.raises(KeyboardInterrupt):
        attempt(job, store, came_to(job.trial))
    assert statuses(store, job.trial) == [("ok", False)]
    assert store.claim_numbers() == {}
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)

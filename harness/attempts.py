"""One attempt of a trial: claimed, supervised, and recorded unless another one is to follow. Knows no Ray."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

from harness.claims import Holder, read_claim
from harness.interrupts import kept_interrupts
from harness.record import Attempt, Record, Status
from harness.store import RunStore
from harness.supervise import Supervised, Verdict, Watcher
from harness.trials import TrialSpec


class Job(NamedTuple):
    """A trial to run.

    seen          attempts that its record held when it was chosen; 0 without a record
    number        of the attempt to make, among all of the trial's, from 0
    max_attempts  from when it was chosen, of a trial that is lost again and again
    """

    trial: TrialSpec
    seen: int
    number: int
    max_attempts: int

    @property
    def is_last(self) -> bool:
        return self.number + 1 >= self.seen + self.max_attempts


class Ended(NamedTuple):
    """How an attempt ended.

    "done": the trial has its record. "again": it was lost, and another attempt is to follow. "held": somebody else has
    it, or has finished it.
    """

    what: Literal["done", "again", "held"]
    status: Status = "crashed"
    reason: str | None = None
    wall_s: float = 0.0


def attempt(job: Job, store: RunStore, run: Callable[[Watcher], Supervised]) -> Ended:
    """Claim the attempt, make it by `run`, which has to let the watcher watch it, and write what came of it.

    A KeyboardInterrupt comes while the trial is watched, and gives the claim back; before, it would leave a claim
    without a holder, and after, a trial that has ended without its record.
    """
    with kept_interrupts() as interrupt:
        holder = Holder.take(store, job.trial.id, job.number)
        if holder is None:
            return Ended("held")

        def watch(log: Path) -> Verdict | None:
            interrupt()
            return holder.watch(log)

        try:
            if recorded(store, job.trial.id) != job.seen:
                holder.release()
                return Ended("held")
            done = run(watch)
        except BaseException:
            holder.release()
            raise
        last = done.record.attempts[-1]
        if last.lost and not job.is_last:
            store.write_log(job.trial.id, done.log or b"")
            holder.end(last)
            return Ended("again", last.status, last.reason, last.wall_s)
        return _conclude(job, store, holder, done)


def give_up(job: Job, store: RunStore) -> Ended:
    """Record a trial whose attempts before `job.number` were all lost."""
    holder = Holder.take(store, job.trial.id, job.number)
    if holder is None:
        return Ended("held")
    last = _claimed(job, store)[-1]
    spec = job.trial.model_dump(mode="json")
    record = Record(id=job.trial.id, spec=spec, status=last.status, reason=last.reason)
    return _conclude(job, store, holder, Supervised(record, [], None, {}))


def _conclude(job: Job, store: RunStore, holder: Holder, done: Supervised) -> Ended:
    claimed = _claimed(job, store)
    # Whoever took us for lost has the trial, or has finished it.
    if not holder.is_latest() or recorded(store, job.trial.id) != job.seen:
        return Ended("held")
    earlier = store.find_record(job.trial.id)
    attempts = [*(earlier.attempts if earlier else ()), *claimed, *done.record.attempts]
    reason = done.record.reason
    if attempts[-1].lost and len(attempts) > job.seen + 1:
        reason = f"{reason}; given up after {len(attempts) - job.seen} attempts"
    record = done.record.model_copy(update={"attempts": attempts, "reason": reason})
    store.write_trial(record, done.trace, done.log, done.exports)
    for number in store.claim_numbers().get(job.trial.id, []):
        if number < len(attempts) or number == job.number:
            store.remove_claim(job.trial.id, number)
    return Ended("done", record.status, record.reason, attempts[-1].wall_s)


def recorded(store: RunStore, trial_id: str) -> int:
    """How many attempts the trial's record has; 0 without a record."""
    record = store.find_record(trial_id)
    return len(record.attempts) if record else 0


def _claimed(job: Job, store: RunStore) -> list[Attempt]:
    """The attempts since the trial was chosen, this one left out."""
    claims = (read_claim(store, job.trial.id, number) for number in range(job.seen, job.number))
    return [claim.as_attempt() for claim in claims if claim is not None]

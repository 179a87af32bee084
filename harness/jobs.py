"""What is left of a sweep: trials to start, and trials that somebody else has. Knows no Ray.

The store knows what is done. A trial whose attempt was lost here, or that another driver has, is left alone until the
store shows its record, or that its attempt is over.
"""

import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import NamedTuple

from harness.attempts import Ended, Job, give_up, recorded
from harness.claims import BEAT_S, Watch, read_claim
from harness.record import Attempt, Record, Status
from harness.store import RunStore
from harness.trials import TrialSpec


class Outcome(NamedTuple):
    """A trial that has its record."""

    trial: TrialSpec
    status: Status
    reason: str | None
    wall_s: float


class Jobs:
    """The trials, largest first."""

    def __init__(
        self,
        trials: Sequence[TrialSpec],
        store: RunStore,
        max_attempts: int,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._clock, self._watch = store, clock, Watch(clock)
        finished, claimed = store.finished_ids(), store.claim_numbers()
        self._todo: deque[Job] = deque()
        self._elsewhere: dict[str, Job] = {}
        for trial in largest_first(trials):
            seen = recorded(store, trial.id) if trial.id in finished else 0
            job = Job(trial, seen, seen, max_attempts)
            if any(number >= seen for number in claimed.get(trial.id, ())):
                self._elsewhere[trial.id] = job
            else:
                self._todo.append(job)
        self._failures: Counter[str] = Counter()
        self._looked_s = self._asked_s = -float("inf")

    @property
    def elsewhere(self) -> int:
        """Trials that are left to others for the moment."""
        return len(self._elsewhere)

    @property
    def is_over(self) -> bool:
        return not (self._todo or self._elsewhere)

    def are_to_stop(self) -> bool:
        """Whether somebody has asked for it, as of some seconds ago."""
        now = self._clock()
        if now - self._asked_s < BEAT_S / 2:
            return False
        self._asked_s = now
        return self._store.is_asked_to_stop()

    def take(self) -> Job | None:
        """The next to start; None when there is none for the moment."""
        return self._todo.popleft() if self._todo else None

    def ended(self, job: Job, ended: Ended) -> list[Outcome]:
        """What became of one that was started."""
        if ended.what == "again":
            self._todo.appendleft(job._replace(number=job.number + 1))
        elif ended.what == "held":
            self._elsewhere[job.trial.id] = job
        else:
            return [Outcome(job.trial, ended.status, ended.reason, ended.wall_s)]
        return []

    def lost(self, job: Job, reason: str) -> list[Outcome]:
        """Nobody says what became of one that was started."""
        self._failures[job.trial.id] += 1
        if self._failures[job.trial.id] < job.max_attempts:
            self._elsewhere[job.trial.id] = job
            return []
        earlier = self._store.find_record(job.trial.id)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        last = Attempt(status="crashed", reason=reason, started_at=now, wall_s=0, node=socket.gethostname(), lost=True)
        attempts = [*(earlier.attempts if earlier else ()), last]
        spec = job.trial.model_dump(mode="json")
        self._store.write_trial(Record(id=job.trial.id, spec=spec, status="crashed", reason=reason, attempts=attempts))
        return [Outcome(job.trial, "crashed", reason, 0.0)]

    def look(self) -> list[Outcome]:
        """Look after the trials that others have, but not all the time."""
        now = self._clock()
        if not self._elsewhere or now - self._looked_s < BEAT_S / 2:
            return []
        self._looked_s = now
        finished, claimed = self._store.finished_ids(), self._store.claim_numbers()
        return [
            outcome
            for trial_id, job in list(self._elsewhere.items())
            for outcome in self._look_at(job, trial_id in finished, claimed.get(trial_id, []))
        ]

    def _look_at(self, job: Job, has_record: bool, numbers: list[int]) -> list[Outcome]:
        trial_id = job.trial.id
        record = self._store.find_record(trial_id) if has_record else None
        if record is not None and len(record.attempts) > job.seen:
            del self._elsewhere[trial_id]
            return [Outcome(job.trial, record.status, record.reason, record.attempts[-1].wall_s)]
        claims = [number for number in numbers if number >= job.seen]
        if claims:
            claim = read_claim(self._store, trial_id, claims[-1])
            if claim is None or not (claim.ended or self._watch.is_lost(trial_id, claims[-1], claim)):
                return []
        following = job._replace(number=claims[-1] + 1 if claims else job.seen)
        del self._elsewhere[trial_id]
        if following.number < job.seen + job.max_attempts:
            self._todo.append(following)
            return []
        return self.ended(following, give_up(following, self._store))


def largest_first(trials: Sequence[TrialSpec]) -> list[TrialSpec]:
    """By what a trial's time grows with, for trials of one study; so that no long one is left for the end."""

    def size(trial: TrialSpec) -> int:
        return (trial.depth or 1) * trial.batch_size * trial.data.image_size**2 * (trial.steps + 1)

    return sorted(trials, key=size, reverse=True)

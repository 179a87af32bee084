"""Who is at work on a trial: one small file for each attempt, which its holder keeps current while the trial runs.

A claim is created exclusively: of two who want an attempt one has it. Its holder writes it anew every BEAT_S seconds.
Who sees one unchanged for LEASE_S seconds of his own clock takes that attempt for lost and may claim the next; no two
machines' clocks are compared. A holder who was taken for lost finds the next attempt claimed, and leaves no record.

Attempts are numbered as they will stand in the record, so a claim whose number is among the record's attempts is a
leftover. Knows no Ray and no torch.
"""

import contextlib
import os
import socket
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from harness.record import Attempt
from harness.store import RunStore
from harness.supervise import tail_of

BEAT_S = float(os.environ.get("REVNET_BEAT_S", "5"))
LEASE_S = 4 * BEAT_S


class Claim(BaseModel):
    """One attempt of a trial that has no record of it yet."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    schema_version: Literal[1] = Field(default=1, alias="schema")
    owner: str = Field(description="drawn for this attempt")
    node: str
    boot: str = Field(description="of the node's system; with it, a pid tells whether the holder lives")
    pid: int
    started_at: str = Field(description="ISO 8601, UTC")
    beats: int = 0
    wall_s: float = Field(default=0.0, ge=0, allow_inf_nan=False, description="from its start to the last beat")
    ended: Attempt | None = Field(default=None, description="how it ended where another attempt is to follow")

    @field_validator("started_at")
    @classmethod
    def _is_a_time(cls, text: str) -> str:
        if datetime.fromisoformat(text).tzinfo is None:
            raise ValueError("without a time zone")
        return text

    def to_json(self) -> str:
        return self.model_dump_json(by_alias=True) + "\n"

    def as_attempt(self) -> Attempt:
        """What the record says of it; of one that runs, that its holder was lost."""
        if self.ended is not None:
            return self.ended
        return Attempt(
            status="crashed",
            reason=f"its node or its supervising process was lost; last heard of after {self.wall_s:.0f} s",
            started_at=self.started_at,
            wall_s=self.wall_s,
            node=self.node,
            lost=True,
        )

    @property
    def is_dead(self) -> bool:
        """Whether it was held on this machine by a process that is no more; False says nothing."""
        return self.ended is None and self.boot == _boot_id() and not Path("/proc", str(self.pid)).exists()


def read_claim(store: RunStore, trial_id: str, number: int) -> Claim | None:
    """None where there is none, or one that is not whole: it then counts as held until it stays so for a lease."""
    data = store.read_claim(trial_id, number)
    if data is None:
        return None
    try:
        return Claim.model_validate_json(data)
    except ValidationError:
        return Claim(owner="unreadable", node="unknown", boot="", pid=0, started_at="1970-01-01T00:00:00+00:00")


class Watch:
    """Tells which claims are lost, by how long they stay as they are."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: dict[tuple[str, int], tuple[tuple[str, int], float]] = {}

    def is_lost(self, trial_id: str, number: int, claim: Claim) -> bool:
        if claim.ended is not None:
            return False
        now, state = self._clock(), (claim.owner, claim.beats)
        before, since = self._seen.get((trial_id, number), (None, now))
        if before != state:
            since = now
        self._seen[trial_id, number] = state, since
        return claim.is_dead or now - since >= LEASE_S


class Holder:
    """An attempt that is ours. Make it by `take`."""

    def __init__(self, store: RunStore, trial_id: str, number: int, claim: Claim) -> None:
        self._store, self._trial_id, self._number, self._claim = store, trial_id, number, claim
        self._start = self._beaten = time.monotonic()
        self._logged_bytes = 0

    @classmethod
    def take(cls, store: RunStore, trial_id: str, number: int) -> "Holder | None":
        """None where somebody else has this attempt."""
        claim = Claim(
            owner=uuid.uuid4().hex,
            node=socket.gethostname(),
            boot=_boot_id(),
            pid=os.getpid(),
            started_at=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        if not store.create_claim(trial_id, number, claim.to_json()):
            return None
        return cls(store, trial_id, number, claim)

    def watch(self, log: Path) -> None:
        """Keep the claim current, and the log in the store; to be called often."""
        now = time.monotonic()
        if now - self._beaten < BEAT_S:
            return
        self._beaten = now
        # A store that does not answer for a while ends nothing: either it answers before the lease is over, or somebody
        # else takes the trial and this one leaves no record.
        with contextlib.suppress(OSError):
            self._write(beats=self._claim.beats + 1, wall_s=round(now - self._start, 3))
            if (size := log.stat().st_size) != self._logged_bytes:
                self._store.write_log(self._trial_id, tail_of(log))
                self._logged_bytes = size

    def is_latest(self) -> bool:
        """False when we were taken for lost, and another attempt was begun."""
        numbers = self._store.claim_numbers().get(self._trial_id, [])
        return bool(numbers) and numbers[-1] == self._number and self._is_ours()

    def end(self, attempt: Attempt) -> None:
        """Say how it ended, for the attempt that is to follow."""
        self._write(ended=attempt)

    def release(self) -> None:
        """As if it had never been claimed."""
        if self._is_ours():
            self._store.remove_claim(self._trial_id, self._number)

    def _is_ours(self) -> bool:
        found = read_claim(self._store, self._trial_id, self._number)
        return found is not None and found.owner == self._claim.owner

    def _write(self, **changes: object) -> None:
        self._claim = self._claim.model_copy(update=changes)
        self._store.write_claim(self._trial_id, self._number, self._claim.to_json())


def _boot_id() -> str:
    """Equal where pids mean the same processes: not between two containers on one machine."""
    with contextlib.suppress(OSError):
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    return uuid.uuid4().hex

"""Where a run stands, from its directory alone: whoever runs the trials need not be asked, or be there."""

from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime

from harness.claims import LEASE_S, Claim, read_claim
from harness.errors import HarnessError
from harness.record import STATUSES
from harness.store import RunStore


def describe(store: RunStore, now: datetime | None = None) -> Iterator[str]:
    """Lines: what is planned, how many trials stand how, and each that is at work.

    now  to tell how long ago a trial was heard of; off by as much as this machine's clock is from that of the node
    """
    plan, finished = store.read_plan(), store.finished_ids()
    planned = set(plan.trials) if plan else finished
    counts = Counter(store.read_record(trial_id).status for trial_id in sorted(finished))
    running: dict[str, tuple[int, Claim]] = {}
    again = 0
    for trial_id, numbers in sorted(store.claim_numbers().items()):
        claim = read_claim(store, trial_id, numbers[-1])
        if claim is None or (trial_id in finished and len(store.read_record(trial_id).attempts) > numbers[-1]):
            continue
        if claim.ended or claim.is_dead:
            again += 1
        else:
            running[trial_id] = numbers[-1], claim
    pending = len(planned - finished - running.keys()) - again
    name = f"{plan.name}: " if plan else ""
    yield f"{name}{len(finished & planned)} of {len(planned)} trials done"
    states = [(status, counts[status]) for status in STATUSES]
    states += [("running", len(running)), ("lost, to be tried again", again), ("pending", pending)]
    yield "  ".join(f"{state} {count}" for state, count in states if count > 0) or "nothing to do"
    for trial_id, (number, claim) in running.items():
        yield _line(trial_id, number, claim, now or datetime.now(UTC))
    if unplanned := store.unplanned_ids():
        yield f"left out, since the study does not plan them: {', '.join(sorted(unplanned))}"
    if store.is_asked_to_stop():
        yield "asked to stop; `revnet run` goes on with it"


def trial_with(store: RunStore, beginning: str) -> str:
    """The one trial whose id begins so. Raises HarnessError when there is none, or more than one."""
    plan = store.read_plan()
    known = {*store.finished_ids(), *store.claim_numbers(), *(plan.trials if plan else ())}
    found = sorted(trial_id for trial_id in known if trial_id.startswith(beginning))
    if len(found) == 1:
        return found[0]
    what = f"these begin so: {', '.join(found[:5])}" if found else "no trial of this run has such an id"
    raise HarnessError(f"{beginning}: {what}. The report and `revnet status` have the ids.")


def _line(trial_id: str, number: int, claim: Claim, now: datetime) -> str:
    silent_s = (now - datetime.fromisoformat(claim.started_at)).total_seconds() - claim.wall_s
    which = f", attempt {number + 1}" if number else ""
    line = f"{trial_id}  on {claim.node}{which}, at work for {claim.wall_s:.0f} s"
    return line + (f"; not heard of for {silent_s:.0f} s" if silent_s > LEASE_S else "")

"""The end of what trials printed that came to no result, so that whoever gets a report alone can see why."""

from collections.abc import Iterable

from harness.record import Record
from harness.store import RunStore

NO_RESULT = ("failed", "crashed", "timeout")
# Of more trials, the reason alone; and of a log what a reader takes in.
TRIALS, LINES, LETTERS = 20, 15, 2000


def tails(store: RunStore, records: Iterable[Record]) -> dict[str, str]:
    """By id, the last lines of the first of these; without those whose log is not there or is empty."""
    found = [record.id for record in records if record.status in NO_RESULT][:TRIALS]
    ends = {trial_id: _end(store.read_log(trial_id) or "") for trial_id in found}
    return {trial_id: end for trial_id, end in ends.items() if end}


def _end(log: str) -> str:
    return "\n".join(log.rstrip().splitlines()[-LINES:])[-LETTERS:]

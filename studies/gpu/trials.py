"""A study's trials one after another on this machine, each in a process of its own, without Ray."""

import time
from pathlib import Path

from harness.expansion import expand
from harness.planning import select_trials
from harness.store import RunStore
from harness.study import check_trials, load_study
from harness.supervise import supervise


def run_study(name: str, out: Path, *, seconds: float, limit: int | None = None) -> tuple[int, int, list[str]]:
    """Run what has no record yet; returns how many trials have one, of how many, and what became of those that failed.

    A trial that is still running when the time ends is ended without a record: its own limit was not reached.
    """
    study = load_study(name)
    trials = expand(study)
    check_trials(study, trials)
    store = RunStore(str(out))
    store.open_for(study.resolved(), [trial.id for trial in trials])
    end_s, failed = time.monotonic() + seconds, []
    for trial in select_trials(trials, store, only=None, retry=None, limit=limit):
        left_s = end_s - time.monotonic()
        if left_s <= 0:
            break
        done = supervise(trial, min(left_s, study.resources.timeout_s))
        if done.record.status == "timeout" and left_s < study.resources.timeout_s:
            break
        store.write_trial(done.record, done.trace, done.log, done.exports)
        if done.record.status in ("failed", "crashed", "timeout"):
            failed.append(f"{trial.id}: {done.record.status}: {done.record.reason}")
    return len(store.finished_ids()), len(trials), failed

"""What a search found, tried out: the trial of each value under the limit itself, and less where it runs out of memory.

The records decide how to go on, so the same search after a stop, or a second time, repeats nothing.
"""

import json
from collections.abc import Callable, Collection, Sequence

from harness.find import Axis, Limit, Search
from harness.sizes import in_words
from harness.store import RunStore
from harness.study import Study
from harness.trials import AXES, DATA_AXES, TrialSpec

NAME_LENGTH = 64
# Runs trials, so that each has a record in the store; returns whether it was stopped before.
Run = Callable[[list[TrialSpec]], bool]


def confirm(
    searches: Sequence[Search],
    store: RunStore,
    run: Run,
    *,
    write_plan: Callable[[list[TrialSpec]], None],
    retry: Collection[str] = (),
) -> bool:
    """Advance each search until its trial has a record that is not `oom`, or no value is left.

    write_plan  is given, before trials run, all of the directory's trials
    retry       statuses of earlier records, whose trials run again once
    Returns whether it was stopped before the end.
    """
    ran: set[str] = set()

    def to_run(search: Search) -> TrialSpec | None:
        while search.value is not None or search.advance():
            trial = search.trial
            assert trial is not None
            record = store.find_record(trial.id)
            if record is None or (record.status in retry and trial.id not in ran):
                return trial
            if record.status != "oom" or not search.advance():
                return None
        return None

    while pending := [trial for search in searches if (trial := to_run(search)) is not None]:
        write_plan(planned_trials(searches, store))
        if run(pending):
            return True
        ran |= {trial.id for trial in pending}
        for trial in pending:
            store.read_record(trial.id)
    return False


def planned_trials(searches: Sequence[Search], store: RunStore) -> list[TrialSpec]:
    """Those that the directory has records of, in the order of its plan, and those tried since."""
    plan = store.read_plan()
    records = [store.find_record(trial_id) for trial_id in plan.trials] if plan else []
    earlier = [TrialSpec.from_json(json.dumps(record.spec)) for record in records if record is not None]
    tried = [search.cell.at(value) for search in searches for value in search.tried]
    return list({trial.id: trial for trial in [*earlier, *tried]}.values())


def search_name(study: Study, axis: Axis) -> str:
    """Of the study that a search writes, and of its run directory."""
    suffix = f"-find-{axis}"
    return study.name[: NAME_LENGTH - len(suffix)] + suffix


def as_study(study: Study, trials: Sequence[TrialSpec], axis: Axis, limit: Limit) -> Study:
    """A study of exactly these trials, with the header of the one that was searched."""
    values = {name: [trial.value(name) for trial in trials] for name in AXES}
    varying = {name: given for name, given in values.items() if len(set(given)) > 1}
    same = {name: given[0] for name, given in values.items() if name not in varying}
    amount = f"{in_words(limit.memory_bytes)} ({float(100 * limit.headroom):g} % headroom)"
    return Study.model_validate(
        {
            "name": search_name(study, axis),
            "question": f"What is the largest {axis} that fits {amount}?",
            "predict": study.predict,
            "model": same.get("model"),
            "data": {name.removeprefix("data."): same[name] for name in DATA_AXES if name in same},
            "zip": [varying] if varying else [],
            "fixed": {name: value for name, value in same.items() if name not in (*DATA_AXES, "model")},
            "resources": study.resources.model_dump() | {"memory": limit.memory_bytes},
            "deepspeed": study.deepspeed,
        }
    )

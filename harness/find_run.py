"""`revnet run --find`: search each cell of a study, run the trials that confirm, and say what was found."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

from harness.confirm import as_study, confirm, search_name
from harness.expansion import expand
from harness.find import (
    Axis,
    Limit,
    Predictions,
    Search,
    at_smallest,
    cells_of,
    differing,
    memory_of,
    parse_headroom,
    process_bytes,
    search_id,
)
from harness.find_view import CONFIRMED, outcome, print_found, searched
from harness.plain_text import say
from harness.planning import statuses_of
from harness.store import RunStore
from harness.study import StudyResources, check_trials, load_study
from harness.trials import TrialSpec


class Question(NamedTuple):
    """What is asked: a study's largest `axis` in each cell that fits; `retry` names statuses that run again."""

    study: str
    axis: Axis
    headroom: str
    memory_bytes: int | None
    at_most: int | None
    retry: str | None
    out: str | None


def find_largest(
    asked: Question,
    run_pending: Callable[[list[TrialSpec], RunStore, StudyResources], bool],
    write_report: Callable[[RunStore], str],
) -> Literal["answered", "open", "interrupted"]:
    """Print each cell's answer as it comes.

    run_pending  runs trials into a store; True when somebody stopped it
    """
    share, again = parse_headroom(asked.headroom), statuses_of(asked.retry)
    loaded = load_study(asked.study)
    trials = [at_smallest(trial, asked.axis) for trial in expand(loaded)]
    check_trials(loaded, trials)
    limit = Limit(asked.memory_bytes or memory_of(trials[0]), share, process_bytes(trials[0]))
    cells = cells_of(trials, asked.axis, limit.memory_bytes, asked.at_most)
    store = RunStore(asked.out or str(Path("runs", search_name(loaded, asked.axis))))
    store.refuse_private()
    search = search_id(cells, share)
    store.check_search(search)
    predictions = Predictions()
    searches = [Search(cell, limit, predictions) for cell in cells]
    for one in searches:
        one.advance()
        say(searched(one, differing(cells)))

    def write_plan(planned: list[TrialSpec]) -> None:
        written = as_study(loaded, planned, asked.axis, limit)
        store.open_for(written.resolved(), [trial.id for trial in planned], search=search)

    def run(pending: list[TrialSpec]) -> bool:
        return run_pending(pending, store, loaded.resources)

    interrupted = confirm(searches, store, run, write_plan=write_plan, retry=again)
    say()
    print_found(searches, store, limit)
    outcomes = [outcome(one, store) for one in searches]
    open_ones = sum(found not in (CONFIRMED, "none", "unsupported") for found in outcomes)
    if interrupted:
        say("stopped; what is finished is kept. Give the same command to go on.")
    elif open_ones:
        say(f"{open_ones} not confirmed; the logs lie in {store.uri}/logs.")
        say("Run those that came to no result again with the same command and --retry failed,crashed,timeout")
    if store.read_plan() is not None:
        say(f"report: {write_report(store)}")
    return "interrupted" if interrupted else "open" if open_ones else "answered"

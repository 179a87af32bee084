"""Which trials of a study to run now."""

from collections import defaultdict
from collections.abc import Sequence

from harness.errors import HarnessError
from harness.record import STATUSES
from harness.store import RunStore
from harness.trials import MODES, TrialSpec


def select_trials(
    trials: Sequence[TrialSpec], store: RunStore, *, only: str | None, retry: str | None, limit: int | None
) -> list[TrialSpec]:
    """The trials without a record, and those asked for again, in the study's order.

    only   an id or its beginning: these trials, whether done or not
    retry  statuses, separated by commas, that run again
    limit  at most so many, taken in turn from each strategy
    Raises HarnessError for an id or a status that does not exist.
    """
    finished = store.finished_ids()
    if only is not None:
        chosen = [trial for trial in trials if trial.id.startswith(only)]
        if not chosen:
            raise HarnessError(f"--only {only}: no trial of this study has such an id. `revnet plan` lists them.")
    else:
        again = statuses_of(retry)
        chosen = [
            trial
            for trial in trials
            if trial.id not in finished or (again and store.read_record(trial.id).status in again)
        ]
    return chosen if limit is None else _spread(chosen, limit)


def statuses_of(retry: str | None) -> set[str]:
    """What a --retry names, separated by commas. Raises HarnessError for a status that does not exist."""
    asked = {part.strip() for part in retry.split(",")} if retry else set()
    if unknown := sorted(asked - set(STATUSES)):
        raise HarnessError(f"--retry {retry}: no status {unknown[0]!r}; allowed: {', '.join(STATUSES)}.")
    return asked


def _spread(trials: Sequence[TrialSpec], limit: int) -> list[TrialSpec]:
    by_strategy: dict[tuple[str, ...], list[TrialSpec]] = defaultdict(list)
    for trial in trials:
        modes = (str(trial.value(name)) for name in MODES)
        by_strategy[trial.model, trial.activations, trial.compute, trial.reconstruction, *modes].append(trial)
    depth = max(map(len, by_strategy.values()), default=0)
    in_turn = [group[i] for i in range(depth) for group in by_strategy.values() if i < len(group)]
    taken = {trial.id for trial in in_turn[:limit]}
    return [trial for trial in trials if trial.id in taken]

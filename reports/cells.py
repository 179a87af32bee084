"""Which trials of two runs are the same, and what to call them.

A cell is what a trial is but for its seed, so its trials are repeats. Cells are the same when all fields are, null and
absent alike, which is so whenever the ids are equal. Those left over are the same when the fields are that both runs
know, without `resources` and with `data.path` given or not; and where that fits one cell of each run only.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from reports.frames import MODES
from reports.units import shown

# A row of `trials_frame`.
Trial = Mapping[str, Any]
Key = frozenset[tuple[str, str]]
# Always in a cell's name.
_NAMED = ("model", "depth", "activations", "batch_size")


class Cell(NamedTuple):
    """The trials of BASE beside those of RUN: by seed, in order where they have no seed in common."""

    name: str
    pairs: list[tuple[Trial, Trial]]


class Paired(NamedTuple):
    """`missing` are names of BASE's trials that RUN has not, `added` of RUN's that BASE has not."""

    cells: list[Cell]
    missing: list[str]
    added: list[str]


def pair_trials(base: Sequence[Trial], run: Sequence[Trial]) -> Paired:
    """In the order of BASE."""
    name = _namer([*base, *run])
    cells: list[Cell] = []
    missing: list[Trial] = []
    added: list[Trial] = []
    for before, now in _same_cells(base, run):
        pairs, without, besides = _by_seed(before, now)
        if pairs:
            cells.append(Cell(name(pairs[0][0]), pairs))
        missing += without
        added += besides
    with_seed = len({trial["spec"].get("seed") for trial in (*base, *run)}) > 1

    def trial_name(trial: Trial) -> str:
        return name(trial) + f" seed {trial['spec'].get('seed')}" * with_seed

    return Paired(cells, list(map(trial_name, missing)), list(map(trial_name, added)))


def _same_cells(base: Sequence[Trial], run: Sequence[Trial]) -> list[tuple[list[Trial], list[Trial]]]:
    """Each cell of either run: its trials in BASE, those in RUN."""
    before, now = _grouped(base, _whole), _grouped(run, _whole)
    same = [(trials, now.pop(key, [])) for key, trials in before.items()]
    alone = [trials for trials, partners in same if not partners]
    shared = _fields_of(base) & _fields_of(run)

    def loosely(trial: Trial) -> Key:
        return _loose(trial, shared)

    # One trial stands for its cell: all of a cell have the same fields.
    by_loose = _grouped([trials[0] for trials in alone], loosely)
    counts = Counter(loosely(trials[0]) for trials in now.values())
    partners = {loosely(trials[0]): key for key, trials in now.items()}
    for index, (trials, found) in enumerate(same):
        key = loosely(trials[0])
        if not found and len(by_loose[key]) == counts[key] == 1:
            same[index] = (trials, now.pop(partners[key]))
    return same + [([], trials) for trials in now.values()]


def _grouped(trials: Iterable[Trial], key_of: Callable[[Trial], Key]) -> dict[Key, list[Trial]]:
    groups: dict[Key, list[Trial]] = defaultdict(list)
    for trial in trials:
        groups[key_of(trial)].append(trial)
    return groups


def _by_seed(before: list[Trial], now: list[Trial]) -> tuple[list[tuple[Trial, Trial]], list[Trial], list[Trial]]:
    """Pairs, trials of BASE without a partner, and of RUN."""
    first, second = ({_text(trial["spec"].get("seed")): trial for trial in trials} for trials in (before, now))
    if not first.keys() & second.keys():
        count = min(len(before), len(now))
        return list(zip(before, now, strict=False)), before[count:], now[count:]
    pairs = [(trial, second[seed]) for seed, trial in first.items() if seed in second]
    without = [trial for seed, trial in first.items() if seed not in second]
    return pairs, without, [trial for seed, trial in second.items() if seed not in first]


def _fields(trial: Trial) -> dict[str, Any]:
    """The specification, one level deep, without the seed."""
    fields = {name: value for name, value in trial["spec"].items() if name not in ("seed", "data")}
    # Without a word of these a step is as it is written, also in runs that know nothing of them.
    modes = {name: fields.get(name, False) for name in MODES}
    return fields | modes | {f"data.{name}": value for name, value in trial["spec"].get("data", {}).items()}


def _fields_of(trials: Iterable[Trial]) -> set[str]:
    return {name for trial in trials for name in _fields(trial)}


def _whole(trial: Trial) -> Key:
    return frozenset((name, _text(value)) for name, value in _fields(trial).items() if value is not None)


def _loose(trial: Trial, shared: set[str]) -> Key:
    fields = {name: value for name, value in _fields(trial).items() if name in shared and name != "resources"}
    if fields.get("data.path") is not None:
        fields["data.path"] = "given"
    return frozenset((name, _text(value)) for name, value in fields.items() if value is not None)


def _namer(trials: Sequence[Trial]) -> Callable[[Trial], str]:
    """Names a cell by its main fields, and by what else differs among the trials of its model."""
    values: dict[tuple[str, str], set[str]] = defaultdict(set)
    fields = _fields_of(trials) - {*_NAMED, "resources"}
    for trial in trials:
        own = _fields(trial)
        for field in fields:
            values[str(own.get("model")), field].add(_text(own.get(field)))
    # In the order of the specification.
    ordered = [field for field in dict.fromkeys(name for trial in trials for name in _fields(trial)) if field in fields]

    def name(trial: Trial) -> str:
        own = _fields(trial)
        depth = "" if own.get("depth") is None else str(own["depth"])
        words = [f"{own.get('model')}{depth}", str(own.get("activations")), f"batch {own.get('batch_size')}"]
        differing = [field for field in ordered if len(values[str(own.get("model")), field]) > 1]
        return " ".join(words + [f"{field} {_spelled(field, own.get(field))}" for field in differing])

    return name


def _spelled(field: str, value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, str):
        return value
    return shown(field, value) if isinstance(value, int) and field.endswith("_bytes") else _text(value)


def _text(value: object) -> str:
    return json.dumps(value, sort_keys=True)

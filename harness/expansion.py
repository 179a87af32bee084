"""How a study expands into trials."""

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from harness.errors import StudyError
from harness.places import Loc
from harness.study_faults import shown
from harness.trials import AXES, DATA_AXES, MOST_COMBINATIONS, WARM_UP_FOR_COMPILING, TrialResources, TrialSpec

if TYPE_CHECKING:
    from harness.study import Study

# A trial before it is checked as a whole: a value for each of AXES, and the sections that are no axes.
Row = dict[str, Any]


def expand(study: "Study") -> list[TrialSpec]:
    """The trials of a study in the order written: grid axes outermost, then zip groups, `when`, seeds.

    A trial that comes up twice is kept once, where it came first. Raises StudyError when a `when` or an
    `exclude` matches nothing, when two `when` set the same key of one combination, or when no trial is left.
    """
    groups: list[list[Row]] = [[{key: value} for value in values] for key, values in study.grid.items()]
    groups += [_together(group) for group in study.zip]
    _check_count(math.prod(map(len, groups)), study.place("grid"))
    rows = _apply_when(study, [_base(study) | row for row in _product(groups)])
    _check_count(len(rows) * study.repeats, study.place("repeats"))
    if study.repeats > 1:
        rows = [row | {"seed": seed} for row in rows for seed in range(study.repeats)]
    rows = _apply_exclude(study, rows)
    _check_budgets(study, rows)
    _check_warm_up(study, rows)
    trials: dict[str, TrialSpec] = {}
    for trial in map(_trial, rows):
        trials.setdefault(trial.id, trial)
    if not trials:
        raise StudyError(
            f"{study.place('exclude')}; it drops every combination, so that no trial is left. Remove an entry of it."
        )
    return list(trials.values())


def _check_budgets(study: "Study", rows: list[Row]) -> None:
    """Raises StudyError for a combination that has a budget and no use for it, or the other way round."""
    for row in rows:
        budgeted, given = row["activations"] == "budgeted", row["budget_bytes"] is not None
        if budgeted and not given:
            raise StudyError(
                f"{study.where('activations', 'budgeted')} = 'budgeted'; it needs budget_bytes, such as 64MiB. Give it "
                "in `fixed`, or as an axis in a `when` for these activations."
            )
        if given and not budgeted:
            raise StudyError(
                f"{study.where('budget_bytes', row['budget_bytes'])} = {row['budget_bytes']}; a combination has "
                f"activations {row['activations']!r}, which have no budget. Move it to a `when` with "
                "`if: {activations: budgeted}`."
            )


def _check_warm_up(study: "Study", rows: list[Row]) -> None:
    """Raises StudyError for a combination whose measured steps would hold what compiling takes."""
    if any(row["compile"] and row["warmup_steps"] == 0 for row in rows):
        raise StudyError(f"{study.where('warmup_steps', 0)} = 0; {WARM_UP_FOR_COMPILING}")


def _check_count(count: int, place: str) -> None:
    """To be called before they are made."""
    if count > MOST_COMBINATIONS:
        raise StudyError(f"{place}; {count} combinations, and at most {MOST_COMBINATIONS} are allowed. Leave some out.")


def _base(study: "Study") -> Row:
    """What holds for every trial unless an axis says otherwise."""
    resources = TrialResources(
        gpus_per_worker=study.resources.gpus_per_worker,
        cpus_per_worker=study.resources.cpus_per_worker,
        memory_bytes=study.resources.memory,
        trials_per_device=study.resources.trials_per_device,
    )
    data = {f"data.{name}": value for name, value in study.data}
    sections = {"resources": resources, "deepspeed": study.deepspeed}
    row = {name: TrialSpec.model_fields[name].default for name in AXES if name not in (*DATA_AXES, "model")}
    return row | data | ({} if study.model is None else {"model": study.model}) | study.fixed | sections


def _trial(row: Row) -> TrialSpec:
    data = {name.removeprefix("data."): row[name] for name in DATA_AXES}
    return TrialSpec.model_validate({key: row[key] for key in row if key not in DATA_AXES} | {"data": data})


def _together(axes: Mapping[str, list[Any]]) -> list[Row]:
    """One row per position of axes that move together."""
    return [dict(zip(axes, values, strict=True)) for values in zip(*axes.values(), strict=True)]


def _product(groups: list[list[Row]]) -> Iterator[Row]:
    for parts in itertools.product(*groups):
        yield {key: value for part in parts for key, value in part.items()}


def _matches(row: Row, condition: Mapping[str, Any]) -> bool:
    return all(row[key] == value for key, value in condition.items())


def _apply_when(study: "Study", rows: list[Row]) -> list[Row]:
    # Beside each row: which `when` set which of its keys.
    sourced: list[tuple[Row, dict[str, int]]] = [(row, {}) for row in rows]
    for index, when in enumerate(study.when):
        matching = sum(_matches(row, when.if_) for row, _ in sourced)
        times = math.prod(map(len, when.grid.values()))
        _check_count(len(sourced) + max(1, matching) * times - matching, study.place("when", index, "grid"))
        extras = list(_product([[{key: value} for value in values] for key, values in when.grid.items()]))
        if not matching:
            raise _nothing_matches(study, ("when", index, "if"), when.if_, [row for row, _ in sourced])
        extended: list[tuple[Row, dict[str, int]]] = []
        for row, sources in sourced:
            if not _matches(row, when.if_):
                extended.append((row, sources))
                continue
            for key in when.grid:
                if key in sources:
                    raise StudyError(
                        f"{study.place('when', index, 'grid', key)}; when[{sources[key]}] sets {key} for some of the "
                        "same combinations. Make the two conditions exclude each other, or keep one."
                    )
            extended += [(row | extra, sources | dict.fromkeys(extra, index)) for extra in extras]
        sourced = extended
    return [row for row, _ in sourced]


def _apply_exclude(study: "Study", rows: list[Row]) -> list[Row]:
    # Each entry is held against all combinations, so that entries may overlap and their order is of no matter.
    for index, condition in enumerate(study.exclude):
        if not any(_matches(row, condition) for row in rows):
            raise _nothing_matches(study, ("exclude", index), condition, rows)
    return [row for row in rows if not any(_matches(row, condition) for condition in study.exclude)]


def _nothing_matches(study: "Study", loc: Loc, condition: Mapping[str, Any], rows: list[Row]) -> StudyError:
    for key, value in condition.items():
        present = list(dict.fromkeys(row[key] for row in rows))
        if value not in present:
            return StudyError(
                f"{study.place(*loc, key)} = {shown(value)}; no combination has it: {key} is "
                f"{', '.join(map(shown, present))}. Correct the value or remove the entry."
            )
    return StudyError(
        f"{study.place(*loc)}; no combination has all of these at once. Correct a value or remove the entry."
    )

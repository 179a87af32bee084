"""The memory of many trials before they run: equal shapes share the work, and depth and batch size are interpolated.

harness/surface.py has the argument.
"""

import multiprocessing
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple, TypeVar

from harness.errors import HarnessError
from harness.measure.live import Phase
from harness.modes import check_predictable
from harness.predict import Device, PlacePeak, Prediction, StepMemory, step_memory, with_engine
from harness.surface import Figures, Point, Surface
from harness.trials import TrialSpec
from harness.zero import ModelSize, gradients_pile_up, persistence_threshold
from revnet_core import UnsupportedError
from revnet_core.networks import FAMILIES
from revnet_core.precision import AUTOCAST_DTYPES

Solved = TypeVar("Solved")
FOR_A_RECTANGLE = 5
# Starting a process costs about as much as this many predictions.
WORTH_A_PROCESS = 12


class Unpredicted(NamedTuple):
    """Why there is no prediction: `unsupported`, which the trial will be too, or `unknown`."""

    kind: str
    reason: str


class Shape(NamedTuple):
    """What a step's memory depends on, but for depth and batch size."""

    model: str
    channels: tuple[int, ...] | None
    log_scale_gain: float | None
    data: str
    image_size: int
    activations: str
    budget_bytes: int | None
    autocast: str
    reconstruction: str
    gradients_pile_up: bool
    persistence_threshold: int
    device: Device


Steps = dict[Point, StepMemory]
# In place of the depth of a model that has none.
NO_DEPTH = 0


class Group(NamedTuple):
    """Trials of one shape; `example` is any of them, `points` are their depths and batch sizes."""

    shape: Shape
    example: TrialSpec
    points: tuple[Point, ...]

    @property
    def straight(self) -> bool:
        """Whether what is between two points may follow from them; what a budget holds comes in whole blocks."""
        return self.shape.activations != "budgeted"

    @property
    def alike(self) -> list[list[int]]:
        """The depths in parts of which each adds, from one to the next, units that are all the same."""
        depths = sorted({depth for depth, _ in self.points})
        family = FAMILIES.get(self.shape.model)
        if family is None or family.size.units:
            return [[depth] for depth in depths]
        # A stage of one unit, its first, has none of the others.
        alone = [depth for depth in depths if family.units(depth) == (1,) * family.stages]
        return [part for part in (alone, depths[len(alone) :]) if part]


def forecast(
    trials: Sequence[TrialSpec], device_of: Callable[[TrialSpec], Device], *, processes: int | None = None
) -> dict[str, Prediction | Unpredicted]:
    """A prediction for each trial, by id. `processes`: by default one a core, where there is enough to do."""
    # These are no part of a shape: they change nothing about a step that is predicted.
    without = {trial.id: why for trial in trials if (why := _without(trial, device_of(trial))) is not None}
    groups = groups_of([trial for trial in trials if trial.id not in without], device_of)
    results = dict(zip((group.shape for group in groups), solve_all(groups, _solve, processes), strict=True))
    predictions: dict[str, Prediction | Unpredicted] = {}
    for trial in trials:
        if trial.id in without:
            predictions[trial.id] = without[trial.id]
            continue
        result = results[shape_of(trial, device_of(trial))]
        if isinstance(result, Unpredicted):
            predictions[trial.id] = result
        else:
            predictions[trial.id] = with_engine(trial, result[point_of(trial)])
    return predictions


def _without(trial: TrialSpec, device: Device) -> Unpredicted | None:
    """What has no prediction because of how its step is executed."""
    try:
        check_predictable(trial, device.kind)
    except UnsupportedError as error:
        return Unpredicted("unsupported", str(error))
    except HarnessError as error:
        return Unpredicted("unknown", str(error))
    return None


def groups_of(trials: Sequence[TrialSpec], device_of: Callable[[TrialSpec], Device]) -> list[Group]:
    members: dict[Shape, list[TrialSpec]] = defaultdict(list)
    for trial in trials:
        members[shape_of(trial, device_of(trial))].append(trial)
    return [Group(shape, same[0], tuple(sorted({point_of(t) for t in same}))) for shape, same in members.items()]


def point_of(trial: TrialSpec) -> Point:
    return NO_DEPTH if trial.depth is None else trial.depth, trial.batch_size


def shape_of(trial: TrialSpec, device: Device) -> Shape:
    channels = trial.channels
    family = FAMILIES.get(trial.model)
    if channels is None and family is not None and trial.depth is not None:
        # The published widths are not the same for all depths.
        units = family.units(trial.depth)
        channels = family.channels(units) if units else None
    return Shape(
        trial.model,
        channels,
        # Weights of a family, and who knows what of a factory.
        trial.log_scale_gain if family is None else None,
        trial.data.name,
        trial.data.image_size,
        trial.activations,
        trial.budget_bytes,
        # Each name that a device may refuse, and what it means for memory.
        trial.compute if device.kind == "cpu" else str(AUTOCAST_DTYPES[trial.compute]),
        trial.reconstruction,
        gradients_pile_up(trial.zero_stage),
        persistence_threshold(trial),
        device,
    )


def solve_all(
    groups: Sequence[Group], solve: Callable[[Group], Solved], processes: int | None = None
) -> Iterator[Solved]:
    """What `solve`, a function of a module, finds of each group; in processes of their own where that is worth it."""
    processes = min(processes or len(os.sched_getaffinity(0)), len(groups))
    if processes < 2 or sum(min(FOR_A_RECTANGLE, len(group.points)) for group in groups) < WORTH_A_PROCESS:
        yield from map(solve, groups)
        return
    # The deepest first, so that none is left over at the end. Not by fork, which torch's threads do not survive.
    order = sorted(range(len(groups)), key=lambda i: -_cost(groups[i]))
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        solved = dict(zip(order, pool.map(solve, [groups[i] for i in order]), strict=True))
    for index in range(len(groups)):
        yield solved[index]


def _cost(group: Group) -> int:
    return group.points[-1][0] * min(FOR_A_RECTANGLE, len(group.points))


def _solve(group: Group) -> Steps | Unpredicted:
    operations: dict[Point, list[str]] = {}

    def at(trial: TrialSpec) -> Figures:
        step = step_memory(trial, group.shape.device)
        operations[point_of(trial)] = [peak.operation for peak in step.peaks]
        return _figures(step)

    try:
        known = figures_of(group, at)
    except UnsupportedError as error:
        return Unpredicted("unsupported", str(error))
    except HarnessError as error:
        return Unpredicted("unknown", str(error))
    steps: Steps = {}
    for point in group.points:
        figures = known[point]
        # Of a point in between: the operations of one that was predicted.
        named = next(ops for p, ops in operations.items() if p == point or known[p].form == figures.form)
        steps[point] = _step(figures, operations.get(point, named))
    return steps


def figures_of(group: Group, at: Callable[[TrialSpec], Figures]) -> dict[Point, Figures]:
    """At all points of a group, from a few trials of its shape."""

    def at_point(point: Point) -> Figures:
        depth, batch_size = point
        changed = {"depth": None if depth == NO_DEPTH else depth, "batch_size": batch_size}
        return at(group.example.model_copy(update=changed))

    surface = Surface(at_point)
    if not group.straight:
        for point in group.points:
            surface.value(point)
    for depths in group.alike if group.straight else ():
        surface.fill(depths, sorted({size for _, size in group.points}))
    return surface.known


def _figures(step: StepMemory) -> Figures:
    form: list[tuple[Phase, str]] = [(peak.phase, peak.place) for peak in step.peaks]
    levels = (peak.level_bytes for peak in step.peaks)
    return Figures(tuple(form), (step.saved_bytes, step.batch_bytes, _or(step.blocks, -1), *step.model, *levels))


def _step(figures: Figures, operations: Sequence[str]) -> StepMemory:
    saved_bytes, batch_bytes, blocks, *rest = figures.numbers
    size = len(ModelSize._fields)
    peaks = [
        PlacePeak(phase, place, level_bytes, operation)
        for (phase, place), level_bytes, operation in zip(figures.form, rest[size:], operations, strict=True)
    ]
    return StepMemory(saved_bytes, tuple(peaks), ModelSize(*rest[:size]), batch_bytes, None if blocks < 0 else blocks)


def _or(value: int | None, otherwise: int) -> int:
    return otherwise if value is None else value

"""The memory of many trials before they run: equal shapes share the work, and depth and batch size are interpolated.

Every allocation of a step is an affine function of the batch size, and each unit more in every stage adds the same
ones. So saved bytes are affine in either, and a peak, the highest of many moments, is convex in either. Such a function
lies nowhere above the surface that its values at a rectangle's corners span; and if it meets that surface at one point
within, it meets it everywhere: a convex function that meets its chord between the ends meets it all along, first on the
line through the point, then at that line's ends, then on the lines through these. Hence five predictions tell all of a
rectangle of depths and batch sizes, or else that it has to be divided. Of a peak this is asked in each part of the
model by itself, where it has fewer moments to be at, and only of the parts that are the highest somewhere.
"""

import multiprocessing
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from typing import NamedTuple

from harness.errors import HarnessError
from harness.measure.live import Phase
from harness.predict import Device, PlacePeak, Prediction, StepMemory, step_memory, with_engine
from harness.trials import TrialSpec
from harness.zero import ModelSize, gradients_pile_up, persistence_threshold
from revnet_core import UnsupportedError
from revnet_core.networks import FAMILIES
from revnet_core.precision import AUTOCAST_DTYPES

# Where a CPU's kernels change with the batch size, so that a rectangle that does not fit is best divided.
KERNELS_CHANGE = 16
# How far, in relation, a figure may lie from the surface that it is taken to lie on.
TOLERANCE = 1e-3
FOR_A_RECTANGLE = 5
# Starting a process costs about as much as this many predictions.
WORTH_A_PROCESS = 12


class Figures(NamedTuple):
    """`form` says what the numbers are of; only those of one form can be compared."""

    form: tuple[tuple[Phase, str], ...]
    numbers: tuple[int, ...]


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


Point = tuple[int, int]
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
    groups = _groups(trials, device_of)
    results = dict(zip((group.shape for group in groups), _solve_all(groups, processes), strict=True))
    predictions: dict[str, Prediction | Unpredicted] = {}
    for trial in trials:
        result = results[_shape(trial, device_of(trial))]
        if isinstance(result, Unpredicted):
            predictions[trial.id] = result
        else:
            predictions[trial.id] = with_engine(trial, result[_point(trial)])
    return predictions


def _groups(trials: Sequence[TrialSpec], device_of: Callable[[TrialSpec], Device]) -> list[Group]:
    members: dict[Shape, list[TrialSpec]] = defaultdict(list)
    for trial in trials:
        members[_shape(trial, device_of(trial))].append(trial)
    return [Group(shape, same[0], tuple(sorted({_point(t) for t in same}))) for shape, same in members.items()]


def _point(trial: TrialSpec) -> Point:
    return NO_DEPTH if trial.depth is None else trial.depth, trial.batch_size


def _shape(trial: TrialSpec, device: Device) -> Shape:
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


def _solve_all(groups: Sequence[Group], processes: int | None) -> Iterator[Steps | Unpredicted]:
    processes = min(processes or len(os.sched_getaffinity(0)), len(groups))
    if processes < 2 or sum(min(FOR_A_RECTANGLE, len(group.points)) for group in groups) < WORTH_A_PROCESS:
        yield from map(_solve, groups)
        return
    # The deepest first, so that none is left over at the end. Not by fork, which torch's threads do not survive.
    order = sorted(range(len(groups)), key=lambda i: -_cost(groups[i]))
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        solved = dict(zip(order, pool.map(_solve, [groups[i] for i in order]), strict=True))
    for index in range(len(groups)):
        yield solved[index]


def _cost(group: Group) -> int:
    return group.points[-1][0] * min(FOR_A_RECTANGLE, len(group.points))


def _solve(group: Group) -> Steps | Unpredicted:
    operations: dict[Point, list[str]] = {}

    def at(point: Point) -> Figures:
        depth, batch_size = point
        changed = {"depth": None if depth == NO_DEPTH else depth, "batch_size": batch_size}
        step = step_memory(group.example.model_copy(update=changed), group.shape.device)
        operations[point] = [peak.operation for peak in step.peaks]
        return _figures(step)

    surface = Surface(at)
    sizes = sorted({size for _, size in group.points})
    try:
        if not group.straight:
            for point in group.points:
                surface.value(point)
        for depths in group.alike if group.straight else ():
            surface.fill(depths, sizes)
    except UnsupportedError as error:
        return Unpredicted("unsupported", str(error))
    except HarnessError as error:
        return Unpredicted("unknown", str(error))
    steps: Steps = {}
    for point in group.points:
        figures = surface.known[point]
        # Of a point in between: the operations of one that was predicted.
        named = next(ops for p, ops in operations.items() if p == point or surface.known[p].form == figures.form)
        steps[point] = _step(figures, operations.get(point, named))
    return steps


class Surface:
    """Figures over depth and batch size, as many of them predicted as it takes."""

    def __init__(self, at: Callable[[Point], Figures]) -> None:
        self.known: dict[Point, Figures] = {}
        self._at = at

    def value(self, point: Point) -> Figures:
        if point not in self.known:
            self.known[point] = self._at(point)
        return self.known[point]

    def fill(self, depths: Sequence[int], sizes: Sequence[int]) -> None:
        """Find the figures of all points of a rectangle; both axes ascending."""
        if len(depths) == 2 or len(sizes) == 2:  # such an axis has no point within
            for part_of_depths, part_of_sizes in _divided(depths, sizes, lines=True):
                self.fill(part_of_depths, part_of_sizes)
            return
        # The cheapest first: what cannot be predicted at all fails there.
        corners = [[self.value((depth, size)) for size in (sizes[0], sizes[-1])] for depth in (depths[0], depths[-1])]
        inside = depths[len(depths) > 2], sizes[len(sizes) > 2]
        if len({self.value(inside).form, *(corner.form for row in corners for corner in row)}) == 1:
            spanned = Spanned(depths, sizes, corners)
            surface = {(depth, size): spanned((depth, size)) for depth in depths for size in sizes}
            if _near(self.value(inside), surface[inside], _that_matter(list(surface.values()))):
                self.known = surface | self.known
                return
        for part_of_depths, part_of_sizes in _divided(depths, sizes, lines=False):
            self.fill(part_of_depths, part_of_sizes)


class Spanned:
    """The surface that four corners span: affine in either coordinate."""

    def __init__(self, depths: Sequence[int], sizes: Sequence[int], corners: list[list[Figures]]) -> None:
        self._axes = depths, sizes
        self._corners = corners

    def __call__(self, point: Point) -> Figures:
        rows = [_between(row[0].numbers, row[1].numbers, self._share(point, 1)) for row in self._corners]
        numbers = _between(rows[0], rows[1], self._share(point, 0))
        return Figures(self._corners[0][0].form, tuple(map(round, numbers)))

    def _share(self, point: Point, axis: int) -> Fraction:
        low, high = self._axes[axis][0], self._axes[axis][-1]
        return Fraction(0) if low == high else Fraction(point[axis] - low, high - low)


def _between(first: Sequence[Fraction | int], second: Sequence[Fraction | int], share: Fraction) -> list[Fraction]:
    return [a + (b - a) * share for a, b in zip(first, second, strict=True)]


def _near(figures: Figures, others: Figures, positions: Iterable[int]) -> bool:
    pairs = ((figures.numbers[i], others.numbers[i]) for i in positions)
    return all(abs(a - b) <= TOLERANCE * abs(a) for a, b in pairs)


def _that_matter(surface: Sequence[Figures]) -> set[int]:
    """Positions of all figures but the peaks that are highest nowhere, be it with or without the buffers that an engine
    adds in the backward."""
    form = surface[0].form
    first_peak = len(surface[0].numbers) - len(form)
    peaks = range(first_peak, len(surface[0].numbers))
    backward = [i for i in peaks if form[i - first_peak][0] == "backward"]
    matter = set(range(first_peak))
    for figures in surface:
        matter |= {max(kind, key=lambda i: figures.numbers[i]) for kind in (peaks, backward) if kind}
    return matter


def _divided(
    depths: Sequence[int], sizes: Sequence[int], *, lines: bool
) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
    """The rectangle in parts: an axis of two points into single ones; else where kernels change, or in the middle."""
    if lines:
        for depth_part in [[d] for d in depths] if len(depths) == 2 else [depths]:
            for size_part in [[s] for s in sizes] if len(sizes) == 2 else [sizes]:
                yield depth_part, size_part
    elif sizes[0] < KERNELS_CHANGE <= sizes[-1]:
        yield depths, [size for size in sizes if size < KERNELS_CHANGE]
        yield depths, [size for size in sizes if size >= KERNELS_CHANGE]
    else:
        for depth_part in _halves(depths):
            for size_part in _halves(sizes):
                yield depth_part, size_part


def _halves(axis: Sequence[int]) -> list[Sequence[int]]:
    middle = len(axis) // 2
    return [axis] if len(axis) == 1 else [axis[: middle + 1], axis[middle:]]


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

"""The largest depth or batch size whose step fits into a limit: what is searched, and the search on predictions.

Bytes are nearly affine in either axis and convex, so secants lead to the limit in a few predictions. Where a CPU's
kernels change with the batch size they may fall; so what is found is a value that fits, and whose successor does not.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Literal, NamedTuple

import torch

from harness.errors import HarnessError
from harness.predict import Device, device_of, predict
from harness.trials import AXES, MODES, TrialSpec, no_guard
from revnet_core import UnsupportedError
from revnet_core.networks import FAMILIES

Axis = Literal["depth", "batch_size"]

AT_MOST: dict[Axis, int] = {"depth": 100_000, "batch_size": 65_536}
# A trial that finds out whether a step fits does nothing else.
CONFIRMING = {"warmup_steps": 0, "measured_steps": 1, "audit_batch_size": 0} | no_guard()
# After a trial that ran out of memory: how often less is tried, and what share of the memory is left each time.
STEPS_DOWN = 4
STEP_DOWN = Fraction(95, 100)


# What a process on the CPU takes under its limit besides tensors: stacks of gloo's and DeepSpeed's threads (51 MiB),
# buffers of the kernels' libraries (24 MiB) and of the profiler (20 MiB).
CPU_PROCESS_BYTES = 96 * 2**20


class Limit(NamedTuple):
    """What a step has to fit into, and how much of it predictions leave free.

    headroom       a share of it, for the gaps that allocators leave
    process_bytes  what counts against it and is no tensor
    """

    memory_bytes: int
    headroom: Fraction
    process_bytes: int = 0

    @property
    def budget_bytes(self) -> int:
        return int(self.memory_bytes * (1 - self.headroom)) - self.process_bytes


class Cell(NamedTuple):
    """What trials have in common that differ in the axis alone; `values` are those that it can have, ascending."""

    axis: Axis
    base: TrialSpec
    values: Sequence[int]

    def at(self, value: int) -> TrialSpec:
        """The trial that confirms a value."""
        return self.base.model_copy(update={self.axis: value})

    @property
    def has_no_more(self) -> bool:
        """Whether no value lies beyond the last one, whatever the bound of the search."""
        family = FAMILIES.get(self.base.model)
        named = family.size.units if family is not None and self.axis == "depth" else None
        return named is not None and self.values[-1] == max(named)


class Search:
    """One cell: the values that fit by prediction, from the largest on, as many of them as were asked for.

    tried        those asked for so far, with the bytes that each was predicted to need
    unsupported  why the model has no prediction, where it does not support what the trial asks for
    """

    def __init__(self, cell: Cell, limit: Limit, needed_bytes: Callable[[TrialSpec], int]) -> None:
        self.cell = cell
        self.tried: dict[int, int] = {}
        self.unsupported = ""
        self._needed_bytes: Callable[[int], int] = lambda value: needed_bytes(cell.at(value))
        self._candidates = step_down(cell.values, self._needed_bytes, limit.budget_bytes)

    def advance(self) -> bool:
        """Go to the next value; False where none is left. Raises HarnessError for a model that has no prediction."""
        try:
            value = next(self._candidates, None)
        except UnsupportedError as error:
            self.unsupported = str(error)
            return False
        if value is None:
            return False
        self.tried[value] = self._needed_bytes(value)
        return True

    @property
    def smallest_bytes(self) -> int:
        """What the cell's smallest value is predicted to need."""
        return self._needed_bytes(self.cell.values[0])

    @property
    def value(self) -> int | None:
        """The one to confirm."""
        return next(reversed(self.tried), None)

    @property
    def trial(self) -> TrialSpec | None:
        return None if self.value is None else self.cell.at(self.value)

    @property
    def at_the_end(self) -> bool:
        """Whether the values ended before the memory did."""
        return self.value == self.cell.values[-1]


class Predictions:
    """What a trial's step is predicted to need, once for all trials that differ in nothing that memory depends on."""

    def __init__(self, device_of: Callable[[TrialSpec], Device] = device_of) -> None:
        self._device_of = device_of
        self._known: dict[str, int] = {}

    def __call__(self, trial: TrialSpec) -> int:
        alike = trial.model_copy(update={"seed": 0, "learning_rate": 0.0})
        if alike.id not in self._known:
            self._known[alike.id] = predict(alike, self._device_of(trial)).allocated_peak_bytes
        return self._known[alike.id]


def parse_headroom(text: str) -> Fraction:
    """The share that `5%` or `0.05` is. Raises HarnessError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(%?)", text.strip())
    share = Fraction(match[1]) / (100 if match[2] else 1) if match else None
    if share is None or share >= 1:
        raise HarnessError(
            f"--headroom {text}: allowed: a percentage from 0% to below 100%, or the share that it is, from 0 to "
            "below 1. Write 5% or 0.05."
        )
    return share


def memory_of(trial: TrialSpec) -> int:
    """The limit that the study gives, or else the memory of the GPU that the trial would run on here.

    Raises HarnessError where neither is known: a CPU has no limit of its own.
    """
    if trial.resources.memory_bytes is not None:
        return trial.resources.memory_bytes
    if device_of(trial).kind != "cuda" or not torch.cuda.is_available():
        raise HarnessError(
            "--find: there is no memory to fit into: none is given, and no GPU is here that has its own. Give --memory "
            "2GiB, say, or resources.memory in the study."
        )
    return torch.cuda.get_device_properties(0).total_memory


def process_bytes(trial: TrialSpec) -> int:
    """What the trial's process needs of its limit besides tensors. On CUDA, where the limit is the allocator's: 0."""
    return CPU_PROCESS_BYTES if device_of(trial).kind == "cpu" else 0


def at_smallest(trial: TrialSpec, axis: Axis) -> TrialSpec:
    """The trial with the axis at the smallest value that its model has; with its own where the model is unknown."""
    return trial if _unknown(trial) else trial.model_copy(update={axis: _values(trial, axis, AT_MOST[axis])[0]})


def cells_of(trials: Sequence[TrialSpec], axis: Axis, memory_bytes: int, at_most: int | None = None) -> list[Cell]:
    """The trials without the axis, each once, in the study's order, to be confirmed under a limit of `memory_bytes`.

    at_most  the bound of the search; by default AT_MOST
    Raises HarnessError for a model that has no such axis, for a bound below the smallest value, and for steps that are
    compiled or replayed.
    """
    if modes := [name for name in MODES if any(trial.value(name) for trial in trials)]:
        raise HarnessError(
            f"--find: some trials have {' and '.join(modes)} true, which no prediction is of. Leave it out."
        )
    cells: dict[str, Cell] = {}
    for trial in trials:
        resources = trial.resources.model_copy(update={"memory_bytes": memory_bytes})
        base = at_smallest(trial.model_copy(update=CONFIRMING | {"resources": resources}), axis)
        cells.setdefault(base.id, Cell(axis, base, _values(base, axis, at_most or AT_MOST[axis])))
    for cell in cells.values():
        if not cell.values:
            smallest = cell.base.value(axis)
            raise HarnessError(
                f"--at-most {at_most}: the smallest {axis} of {cell.base.model} is {smallest}. Give at least that."
            )
    return list(cells.values())


def differing(cells: Sequence[Cell]) -> list[str]:
    """The fields in which cells differ; the axis of the search is none of them."""
    return [name for name in AXES if name != cells[0].axis and len({cell.base.value(name) for cell in cells}) > 1]


def search_id(cells: Sequence[Cell], headroom: Fraction) -> str:
    """The same for searches that ask the same, whatever they find."""
    asked = sorted(cell.base.canonical_json() for cell in cells)
    return hashlib.sha256("\n".join([cells[0].axis, str(headroom), *asked]).encode()).hexdigest()


def step_down(values: Sequence[int], needed_bytes: Callable[[int], int], limit_bytes: int) -> Iterator[int]:
    """The largest value that fits, then, for as long as that proves to be too much, the largest that fits into 5 % less
    each time, and at least one less than the one before."""
    for step in range(STEPS_DOWN + 1):
        value = largest_fitting(values, needed_bytes, int(limit_bytes * STEP_DOWN**step))
        if value is None:
            return
        yield value
        values = values[: values.index(value)]


def largest_fitting(values: Sequence[int], needed_bytes: Callable[[int], int], limit_bytes: int) -> int | None:
    """A value that needs at most `limit_bytes` while the next one needs more, or else the last one; None if the first
    does not fit. Where bytes rise with the values it is the largest that fits.

    values  ascending, as evenly spaced as secants are to be of use
    """
    if not values or needed_bytes(values[0]) > limit_bytes:
        return None
    low, low_bytes = 0, needed_bytes(values[0])
    slope_bytes = Fraction(0)  # at `low`, from what fitted before
    high, high_bytes = len(values), None  # the first known not to fit: beyond the end, for a start
    slow = 0
    while high - low > 1:
        gap, bracketed = high - low, high_bytes is not None
        if high_bytes is not None:
            slope_bytes = Fraction(high_bytes - low_bytes, gap)
        ahead = int((limit_bytes - low_bytes) / slope_bytes) if slope_bytes > 0 else gap
        if not bracketed:
            # Extrapolated from the smallest, a line may lead far beyond the limit, where predictions cost most.
            ahead = min(ahead, low + 1)
        elif slow == 2:
            ahead = gap // 2
        probe = low + min(max(ahead, 1), gap - 1)
        probe_bytes = needed_bytes(values[probe])
        if probe_bytes <= limit_bytes:
            slope_bytes = Fraction(probe_bytes - low_bytes, probe - low)
            low, low_bytes = probe, probe_bytes
        else:
            high, high_bytes = probe, probe_bytes
        # Secants of a curve may creep up on the limit from one side.
        slow = 0 if not bracketed or slow == 2 or 2 * (high - low) <= gap else slow + 1
    return values[low]


def _values(trial: TrialSpec, axis: Axis, at_most: int) -> Sequence[int]:
    if axis == "batch_size":
        return range(1, at_most + 1)
    family = FAMILIES.get(trial.model)
    if family is None:
        if trial.depth is None:
            raise HarnessError(
                f"--find depth: the factory {trial.model} (activations {trial.activations}, batch_size "
                f"{trial.batch_size}) has depth null, so it takes none. Give it a depth, or search for batch_size."
            )
        return range(1, at_most + 1)
    if family.size.units:
        return sorted(depth for depth in family.size.units if depth <= at_most)
    return range(family.depth_step + 2, at_most + 1, family.depth_step)


def _unknown(trial: TrialSpec) -> bool:
    return ":" not in trial.model and trial.model not in FAMILIES

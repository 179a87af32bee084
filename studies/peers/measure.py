"""Time, memory and gradient error of all contenders in one process, interleaved.

A step is forward, loss, backward and setting the gradients to zero. Every round runs one step of each contender, so
that what else happens on the machine falls on all of them; only ratios within a round are compared.
"""

import copy
import importlib.metadata
import resource
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import quantiles

import torch
from torch import Tensor

from harness.measure.memory import MemoryUse, measure_memory
from harness.measure.timing import time_step
from studies.peers.contenders import CONTENDERS, STORED, Contender
from studies.peers.workload import (
    Model,
    Parts,
    Workload,
    block_gradient_bytes,
    gradients_of,
    loss_of,
    relative_error,
)

CPU = torch.device("cpu")
Batch = tuple[Tensor, Tensor]
Gradients = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Figures:
    """step_s                   one for each round
    page_faults              of the process during that step; each is a page that the allocator had given back
    activation_peak_bytes    highest rise during forward and backward, gradients allocated before
    activation_saved_bytes   alive between forward and backward
    slope_bytes_per_block    of the activation peak, from half of the blocks to all of them
    gradient_rel             relative L2 of all parameters' gradients against stored of the same arithmetic
    float64_rel              the same against stored in float64; of `stored` itself: the floor
    """

    step_s: list[float]
    page_faults: list[int]
    activation_peak_bytes: int
    activation_saved_bytes: int
    slope_bytes_per_block: float
    gradient_rel: float
    float64_rel: float


@dataclass(frozen=True)
class Row:
    """What was measured of one contender, or the reason why nothing was."""

    name: str
    version: str | None
    figures: Figures | None
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    workload: Workload
    rounds: int
    threads: int
    block_gradient_bytes: int
    rows: list[Row]

    @property
    def base(self) -> str:
        """What the others are divided by."""
        return self.rows[0].name

    def step_s(self, name: str) -> list[float] | None:
        return next((row.figures.step_s for row in self.rows if row.name == name and row.figures), None)

    def ratios(self, name: str, base: str) -> list[float] | None:
        """Step time of `name` over that of `base`, round by round; None when one of them was not measured."""
        ours, theirs = self.step_s(name), self.step_s(base)
        return [a / b for a, b in zip(ours, theirs, strict=True)] if ours and theirs else None


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile. At least one value."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    q1, q2, q3 = quantiles(values, n=4, method="inclusive")
    return q1, q2, q3


def compare(workload: Workload, *, rounds: int, contenders: Sequence[Contender] = CONTENDERS) -> Comparison:
    """Measure all contenders; the first is what the others are divided by. At least two blocks and one round.

    A contender that is not installed, or fails in its first step, gets a row with the reason; the first may not.
    """
    parts, batch = workload.parts(), workload.batch()
    models: dict[str, Model] = {}
    reasons: dict[str, str] = {}
    for contender in contenders:
        try:
            models[contender.name] = _warm(parts, contender, batch)
        except (ImportError, AttributeError, RuntimeError) as error:
            if contender is contenders[0]:
                raise
            reasons[contender.name] = f"{type(error).__name__}: {error}"
    able = [contender for contender in contenders if contender.name in models]
    timed = _time(models, batch, rounds)
    memory = {name: _memory(model, batch) for name, model in models.items()}
    half = Workload(**vars(workload) | {"blocks": workload.blocks // 2})
    half_peak_bytes = {c.name: _memory(_warm(half.parts(), c, batch), batch).activation_peak_bytes for c in able}
    errors = _errors(parts, batch, able)
    figures = {
        name: Figures(
            step_s=timed[name].step_s,
            page_faults=timed[name].page_faults,
            activation_peak_bytes=memory[name].activation_peak_bytes,
            activation_saved_bytes=memory[name].activation_saved_bytes,
            slope_bytes_per_block=(memory[name].activation_peak_bytes - half_peak_bytes[name])
            / (workload.blocks - half.blocks),
            gradient_rel=errors[name][0],
            float64_rel=errors[name][1],
        )
        for name in models
    }
    return Comparison(
        workload=workload,
        rounds=rounds,
        threads=torch.get_num_threads(),
        block_gradient_bytes=block_gradient_bytes(parts),
        rows=[Row(c.name, _version(c), figures.get(c.name), reasons.get(c.name)) for c in contenders],
    )


def interleaved(names: Sequence[str], round_: int) -> list[str]:
    """The order of one round: it starts one further every second round, and each order is run forwards and backwards,
    so that nobody has a place of its own or always runs after the same one."""
    start = round_ // 2 % len(names)
    order = [*names[start:], *names[:start]]
    return order[::-1] if round_ % 2 else order


def _warm(parts: Parts, contender: Contender, batch: Batch) -> Model:
    """A model that has run two steps: its gradients are allocated, and what is decided in the first calls is."""
    model = Model(parts, contender.build)
    _step(model, batch)
    _step(model, batch)
    return model


def _step(model: Model, batch: Batch) -> None:
    loss_of(model, batch).backward()
    model.zero_grad(set_to_none=False)


@dataclass(frozen=True)
class _Timed:
    step_s: list[float]
    page_faults: list[int]


def _time(models: dict[str, Model], batch: Batch, rounds: int) -> dict[str, _Timed]:
    steps: dict[str, Callable[[], None]] = {name: partial(_step, model, batch) for name, model in models.items()}
    # Once more now that all models and gradients are there: the heap that the rounds will find.
    for step in steps.values():
        step()
    timed = {name: _Timed([], []) for name in models}
    for round_ in range(rounds):
        for name in interleaved(list(models), round_):
            before = _page_faults()
            timed[name].step_s.append(time_step(CPU, steps[name]))
            timed[name].page_faults.append(_page_faults() - before)
    return timed


def _page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _memory(model: Model, batch: Batch) -> MemoryUse:
    return measure_memory(CPU, partial(loss_of, model, batch), lambda loss: loss.backward())


def _errors(parts: Parts, batch: Batch, contenders: Sequence[Contender]) -> dict[str, tuple[float, float]]:
    """Of each contender: against its reference, and against stored in float64."""
    images, labels = batch
    wide = gradients_of(Model(copy.deepcopy(parts).double(), STORED.build), (images.double(), labels))
    references = {c.reference: gradients_of(Model(parts, c.reference), batch) for c in contenders}
    errors: dict[str, tuple[float, float]] = {}
    for contender in contenders:
        gradients = gradients_of(Model(parts, contender.build), batch)
        errors[contender.name] = (
            relative_error(gradients, references[contender.reference]),
            relative_error(gradients, wide),
        )
    return errors


def _version(contender: Contender) -> str | None:
    try:
        return importlib.metadata.version(contender.package) if contender.package else None
    except importlib.metadata.PackageNotFoundError:
        return None

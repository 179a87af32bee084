"""What a step that is captured as a CUDA graph needs of the core: its draws, and the verdicts on what it rebuilt.

One capture is under way at a time in a process, also for autograd's own threads, so that it is a global.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from revnet_core.draws import Draws, Generators, HostDraws, Rehearsal, Script
from revnet_core.errors import CaptureError
from revnet_core.exactness import StandingVerdict, Verdict
from revnet_core.pending import is_stream_captured


class Phase(Protocol):
    """Of a step on its way into a graph."""

    def draws(self, device: torch.device) -> Draws:
        """Of the next evaluation."""
        ...

    def judge(self, verdict: Verdict) -> bool:
        """Whether the verdict is taken care of, and nobody else may read it."""
        ...


_phase: Phase | None = None


def draws_of_evaluation(device: torch.device) -> Draws:
    """For one evaluation that will be repeated.

    Raises CaptureError within a capture that nobody prepared, where draws could be neither seen nor repeated.
    """
    if _phase is not None:
        return _phase.draws(device)
    if is_capturing(device):
        raise CaptureError(
            "reconstructed activations were captured by hand, where random draws could not be repeated. Capture the "
            "step with revnet_core.TrainingStep, or the model with revnet_core.graph_model."
        )
    return HostDraws(device)


def judged(verdict: Verdict) -> bool:
    return _phase is not None and _phase.judge(verdict)


def is_capturing(device: torch.device) -> bool:
    """Whether what runs is only written down: nothing may wait for the device, or ask it."""
    if isinstance(_phase, Performance):
        return True
    return device.type == "cuda" and is_stream_captured()


def is_under_way() -> bool:
    """Whether a step is on its way into a graph, as its rehearsal or its capture."""
    return _phase is not None


@contextlib.contextmanager
def _during(phase: Phase) -> Iterator[None]:
    global _phase
    if _phase is not None:
        raise CaptureError("a capture is under way already. Capture one step after the other.")
    _phase = phase
    try:
        yield
    finally:
        _phase = None


class StepRehearsal:
    """A step taken as always, to find out what its capture needs."""

    def __init__(self) -> None:
        self._draws = Rehearsal()
        self._verdicts: list[Verdict] = []

    def draws(self, device: torch.device) -> Draws:
        return self._draws.draws(device)

    def judge(self, verdict: Verdict) -> bool:
        self._verdicts.append(verdict)
        return False

    def under_way(self) -> contextlib.AbstractContextManager[None]:
        return _during(self)

    @property
    def drew(self) -> bool:
        """Whether an evaluation drew that has to be repeated."""
        return self._draws.drew

    def standing(self) -> list[StandingVerdict]:
        """One for each exact reconstruction."""
        return [verdict.standing() for verdict in self._verdicts]

    def performance(self, generators: Generators) -> "Performance":
        """Raises CaptureError for draws that could not be repeated."""
        if self._draws.nested:
            raise CaptureError(
                "F or G draws at random inside an inner sequence whose activations are not stored; within a graph the "
                "two would not draw alike. Set activations='stored' for the inner sequence."
            )
        return Performance(self._draws.script(generators), self.standing())


class Performance:
    """The same step while it is captured."""

    def __init__(self, script: Script, standing: Sequence[StandingVerdict]) -> None:
        self._script = script
        self.standing = tuple(standing)
        self._awaited = list(standing)

    def draws(self, device: torch.device) -> Draws:
        return self._script.draws(device)

    def judge(self, verdict: Verdict) -> bool:
        if not self._awaited:
            raise CaptureError("the step rebuilt more sequences than the step before it. Set cuda_graph=False.")
        self._awaited.pop(0).add(verdict)
        return True

    @contextlib.contextmanager
    def under_way(self) -> Iterator[None]:
        with _during(self):
            yield
        self._script.finish()

    def flag(self) -> Tensor | None:
        """On the device, whether any reconstruction failed since that was last raised; None where none can."""
        if not self.standing:
            return None
        return torch.stack([standing.failed for standing in self.standing]).any()


class Pieces:
    """A model's forward and backward while torch warms them up and captures each on its own, without draws that have to
    be repeated."""

    def __init__(self, standing: Sequence[StandingVerdict]) -> None:
        self.standing = tuple(standing)
        self._awaited = list(standing)

    def draws(self, device: torch.device) -> Draws:
        return Script.without_draws() if is_capturing(device) else HostDraws(device)

    def judge(self, verdict: Verdict) -> bool:
        if not verdict.is_captured:
            return False
        self._awaited.pop(0).add(verdict)
        return True

    def under_way(self) -> contextlib.AbstractContextManager[None]:
        return _during(self)

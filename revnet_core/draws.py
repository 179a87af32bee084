"""Random draws of one evaluation that are to be repeated: through the host, or within a step that is captured.

Outside a capture the host keeps the generators' state and sets it again. Within one it can do neither. There each
evaluation that draws gets generators of its own, equal at the outset, one for the recording and one for each
repetition; every replay moves all of them on alike, so that it draws anew and its repetitions draw the same.
"""

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from revnet_core.errors import CaptureError


class Draws(Protocol):
    """Those of one evaluation."""

    def recording(self) -> AbstractContextManager[None]: ...

    def repeating(self) -> AbstractContextManager[None]: ...


class HostDraws:
    """From torch's global generators, of the CPU and the current device; their sequence is not moved by repeating."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cpu_state: Tensor | None = None
        self._cuda_state: Tensor | None = None

    @property
    def drew(self) -> bool:
        return self._cpu_state is not None or self._cuda_state is not None

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        cpu_state = torch.get_rng_state()
        cuda_state = torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else None
        yield
        if not _same(cpu_state, torch.get_rng_state()):
            self._cpu_state = cpu_state
        if cuda_state is not None and not _same(cuda_state, torch.cuda.get_rng_state(self._device)):
            self._cuda_state = cuda_state

    @contextlib.contextmanager
    def repeating(self) -> Iterator[None]:
        with contextlib.ExitStack() as undo:
            if self._cpu_state is not None:
                undo.callback(torch.set_rng_state, torch.get_rng_state())
                torch.set_rng_state(self._cpu_state)
            if self._cuda_state is not None:
                undo.callback(torch.cuda.set_rng_state, torch.cuda.get_rng_state(self._device), self._device)
                torch.cuda.set_rng_state(self._cuda_state, self._device)
            yield


class Generators(Protocol):
    """What a device offers for a capture."""

    def equal_states(self, count: int) -> list[Any]:
        """So many states of generators, equal to each other and unlike all others given out."""
        ...

    def drawing_from(self, state: Any) -> AbstractContextManager[None]:
        """Within, the device's global generator draws from that state, and moves it on."""
        ...


class _Part:
    """What the rehearsal of a step found out of one of its evaluations."""

    def __init__(self) -> None:
        self.drew = False
        self.repetitions = 0


class Rehearsal:
    """The evaluations of a step, counted in the order of their recordings, while the step runs as always."""

    def __init__(self) -> None:
        self._parts: list[_Part] = []
        self._within: list[_Part] = []
        self.nested = False

    def draws(self, device: torch.device) -> Draws:
        return _RehearsedDraws(self, HostDraws(device))

    @contextlib.contextmanager
    def under_way(self, part: _Part, own: HostDraws) -> Iterator[None]:
        self._within.append(part)
        yield
        self._within.pop()
        part.drew |= own.drew
        # The outer evaluation's forward makes the same draws without the inner one, out of its own generator.
        self.nested |= own.drew and bool(self._within)

    def new_part(self) -> _Part:
        self._parts.append(_Part())
        return self._parts[-1]

    @property
    def drew(self) -> bool:
        return any(part.drew for part in self._parts)

    def script(self, generators: Generators) -> "Script":
        """For the capture of the same step."""
        return Script(generators, [generators.equal_states(1 + p.repetitions) if p.drew else None for p in self._parts])


class _RehearsedDraws:
    def __init__(self, rehearsal: Rehearsal, own: HostDraws) -> None:
        self._rehearsal = rehearsal
        self._own = own
        self._part = rehearsal.new_part()

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        with self._rehearsal.under_way(self._part, self._own), self._own.recording():
            yield

    @contextlib.contextmanager
    def repeating(self) -> Iterator[None]:
        self._part.repetitions += 1
        with self._rehearsal.under_way(self._part, self._own), self._own.repeating():
            yield


class Script:
    """The evaluations of a step in the rehearsed order, each with the states that it draws from."""

    def __init__(self, generators: Generators, states: list[list[Any] | None]) -> None:
        self._generators = generators
        self._left = list(states)
        self._unused: list[list[Any]] = []

    def draws(self, device: torch.device) -> Draws:
        if not self._left:
            raise CaptureError(_UNLIKE)
        states = self._left.pop(0)
        if states is not None:
            self._unused.append(states)
        return _CapturedDraws(self._generators, states)

    @staticmethod
    def without_draws() -> Draws:
        """Of an evaluation that is known to draw nothing."""
        return _CapturedDraws(None, None)

    def finish(self) -> None:
        """Raises CaptureError where the step was not the rehearsed one: what it draws would not be repeated."""
        if self._left or any(self._unused):
            raise CaptureError(_UNLIKE)


_UNLIKE = (
    "the step evaluated its nets in another order, or another number of times, than in the step before it. A captured "
    "step is the same each time: take out what makes it choose (layer drop, a counter), or set cuda_graph=False."
)


class _CapturedDraws:
    def __init__(self, generators: Generators | None, states: list[Any] | None) -> None:
        self._generators = generators
        self._states = states

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        with self._next():
            yield

    @contextlib.contextmanager
    def repeating(self) -> Iterator[None]:
        with self._next():
            yield

    def _next(self) -> AbstractContextManager[None]:
        if self._generators is None or self._states is None:
            return contextlib.nullcontext()
        if not self._states:
            raise CaptureError(_UNLIKE)
        return self._generators.drawing_from(self._states.pop(0))


def _same(state: Tensor, other: Tensor) -> bool:
    # Not for a dispatch mode around the step: one whose tensors are fake could not tell.
    with _disable_current_modes():
        return torch.equal(state, other)

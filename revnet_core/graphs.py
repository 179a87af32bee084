"""A whole training step - forward, backward with reconstruction, update - captured once as a CUDA graph and replayed.

A step of a deep network on small batches is thousands of launches, and a reversible one has more of them; a replay is
one.
"""

import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from revnet_core.capture import Performance, StepRehearsal
from revnet_core.cuda_graphs import CudaGraphs
from revnet_core.draws import Generators
from revnet_core.errors import CaptureError, ReversibleError, ShapeError, UnsupportedError
from revnet_core.obstacles import ObstacleWatch, raise_for
from revnet_core.replay import AutocastState
from revnet_core.sequence import ReversibleSequence
from revnet_core.walk import modules_of

Loss = Callable[..., Tensor]
# So many captures, each after fewer replays than this, are one too many.
FEW_REPLAYS, CAPTURES_IN_VAIN = 20, 3


class Graph(Protocol):
    """What was captured."""

    def replay(self) -> None: ...


class Graphs(Generators, Protocol):
    """What a device offers for capturing a step."""

    def eagerly(self, step: Callable[[], Tensor]) -> Tensor:
        """Take a step where it will be captured, but for real."""
        ...

    def capture(self, step: Callable[[], None]) -> Graph:
        """Write down what the step does on the device; it is not done."""
        ...

    def host_flag(self) -> Tensor:
        """A scalar of bool on the host, False, that a graph may copy to and the host may read at any time."""
        ...


GRAPHS: dict[str, Callable[[torch.device], Graphs]] = {"cuda": CudaGraphs}


class TrainingStep:
    """Forward, loss, backward and update in one call, replayed as one CUDA graph from the call after the warm-up on.

    model, optimizer  on one CUDA device. An optimizer that has `capturable` needs it (Adam); a learning rate that
                      changes often is given as a tensor on the device (SGD and Adam with fused=True take one)
    loss              called with the model's output and the batch's other tensors; a scalar
    example_batch     (x, *others): each batch has as many tensors of these shapes and dtypes
    cuda_graph        False: every step runs eagerly, on any device
    warmup_steps      eager steps before the capture, training steps like all others; at least 2, since the first
                      makes what the others find (an optimizer's state, a budget's bytes)
    max_grad_norm     the gradients are scaled down to this norm, if they are above

    Call it with a batch, on any device; returns the loss (scalar, detached, a tensor of its own). Nothing waits for the
    device. What a step depends on may change between two calls - a parameter group's settings, training mode, the
    activations, precision or overlap of a sequence, which parameters learn, where they lie -: the next calls then warm
    up and capture anew. `.grad` is what the last step left; setting it to None is harmless.

    Each replay draws its random numbers anew, and its reconstruction repeats them; they are other numbers than those of
    an eager step. Python's side of the model (counters, prints, hooks) runs in the warm-up and in the capture only.

    Calls raise ShapeError for another batch; CaptureError where the step cannot be captured, with what forbids it;
    ReconstructionError for an earlier replay whose exact reconstruction was not exact. Raises UnsupportedError for
    a device that has no graphs.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        optimizer: torch.optim.Optimizer,
        example_batch: Sequence[Tensor],
        *,
        cuda_graph: bool = True,
        warmup_steps: int = 3,
        max_grad_norm: float | None = None,
    ) -> None:
        if warmup_steps < 2:
            raise UnsupportedError(f"warmup_steps = {warmup_steps}; a step is warm after 2 at least.")
        self._model, self._loss, self._optimizer = model, loss, optimizer
        self._max_grad_norm = max_grad_norm
        self._device = _device_of(model)
        self._graphs = _graphs_for(self._device) if cuda_graph else None
        self._batch = tuple(torch.empty_like(t, device=self._device) for t in example_batch)
        self._modules = modules_of(model)
        self._sequences = [m for m in self._modules if isinstance(m, ReversibleSequence)]
        self._parameters = list(model.parameters())
        self._warmup_steps = warmup_steps
        self._in_vain = 0
        self._start_over()

    @property
    def captured(self) -> bool:
        """Whether the next call replays, if nothing changes."""
        return self._captured is not None

    def __call__(self, batch: Sequence[Tensor]) -> Tensor:
        self._take_in(batch)
        if self._graphs is None:
            return self._step()
        settings = self._settings()
        if settings != self._settings_seen:
            self._notice_change()
            self._settings_seen = settings
        if self._warm < self._warmup_steps:
            is_last = self._warm == self._warmup_steps - 1
            loss = self._rehearse(self._graphs) if is_last else self._graphs.eagerly(self._step)
            # Not before: who goes on after a refused step is refused again.
            self._warm += 1
            return loss
        if self._captured is None:
            self._captured = self._capture(self._graphs)
        self._replays += 1
        return self._captured.replay()

    def raise_if_inexact(self) -> None:
        """Wait for the device and raise ReconstructionError if an exact reconstruction since the last call was not
        exact. Where the loss is read anyway, this costs nothing more."""
        if self._captured is not None:
            self._captured.raise_if_inexact()
        for sequence in self._sequences:
            sequence.raise_if_inexact()

    def _step(self) -> Tensor:
        self._optimizer.zero_grad(set_to_none=True)
        return self._forward_backward_update()

    def _forward_backward_update(self, watch: ObstacleWatch | None = None) -> Tensor:
        x, *others = self._batch
        loss = self._loss(self._model(x), *others)
        if watch:
            watch.phase = "backward"
        loss.backward()
        if watch:
            watch.phase = "optimizer"
        if self._max_grad_norm is not None:
            nn.utils.clip_grad_norm_(self._parameters, self._max_grad_norm)
        self._optimizer.step()
        return loss.detach()

    def _rehearse(self, graphs: Graphs) -> Tensor:
        self._rehearsal = StepRehearsal()
        self._optimizer.zero_grad(set_to_none=True)
        with self._rehearsal.under_way(), ObstacleWatch(self._model, self._device, self._optimizer) as watch:
            loss = graphs.eagerly(partial(self._forward_backward_update, watch))
        raise_for(watch.obstacles)
        return loss

    def _capture(self, graphs: Graphs) -> "_Captured":
        performance = self._rehearsal.performance(graphs)
        losses: list[Tensor] = []
        flag = graphs.host_flag()

        def step() -> None:
            losses.append(self._forward_backward_update())
            failed = performance.flag()
            if failed is not None:
                flag.copy_(failed, non_blocking=True)

        # The captured backward makes the gradients anew, where they stay.
        self._optimizer.zero_grad(set_to_none=True)
        try:
            with performance.under_way():
                graph = graphs.capture(step)
        except ReversibleError:
            raise
        except Exception as error:
            raise CaptureError(capture_failure(error)) from error
        return _Captured(graph, losses[0], performance, flag)

    def _take_in(self, batch: Sequence[Tensor]) -> None:
        if len(batch) != len(self._batch):
            raise ShapeError(f"the batch has {len(batch)} tensors; the example batch has {len(self._batch)}.")
        for index, (own, given) in enumerate(zip(self._batch, batch, strict=True)):
            if own.shape != given.shape or own.dtype != given.dtype:
                raise ShapeError(
                    f"batch[{index}] is {tuple(given.shape)} of {given.dtype}; the example batch has "
                    f"{tuple(own.shape)} of {own.dtype}. Leave out a last batch that is smaller (drop_last=True)."
                )
        for own, given in zip(self._batch, batch, strict=True):
            own.copy_(given, non_blocking=True)

    def _settings(self) -> tuple[Any, ...]:
        """What a graph has taken down once and for all."""
        parameters = [(p.data_ptr(), p.requires_grad) for p in self._parameters]
        groups = [
            [_constant(value) for key, value in group.items() if key != "params"]
            for group in self._optimizer.param_groups
        ]
        modes = [m.training for m in self._modules]
        sequences = [(s.activations, s.precision, s.overlapped, s._guard) for s in self._sequences]
        return parameters, groups, modes, sequences, AutocastState.of(self._device)

    def _start_over(self) -> None:
        self._settings_seen = self._settings()
        self._captured: _Captured | None = None
        self._warm = self._replays = 0

    def _notice_change(self) -> None:
        if self._warm < self._warmup_steps:
            return
        self._in_vain = self._in_vain + 1 if self._replays < FEW_REPLAYS else 0
        if self._in_vain == CAPTURES_IN_VAIN:
            warnings.warn(
                f"for the {CAPTURES_IN_VAIN}rd time what the step depends on changed before it had been replayed "
                f"{FEW_REPLAYS} times, so that it mostly runs eagerly. Give a learning rate that a schedule changes as "
                "a tensor on the device (lr=torch.tensor(0.1, device=...), fused=True), or set cuda_graph=False.",
                RuntimeWarning,
                stacklevel=3,
            )
        if self._captured is None:
            # Only the last step of the warm-up has to be as the captured one.
            self._warm -= 1
            return
        self._captured.raise_if_inexact()
        self._start_over()


class _Captured:
    """A step that can be replayed."""

    def __init__(self, graph: Graph, loss: Tensor, performance: Performance, flag: Tensor) -> None:
        self._graph = graph
        self._loss = loss
        self._standing = performance.standing
        self._flag = flag

    def replay(self) -> Tensor:
        # In the host's own memory: reading it waits for nothing.
        if self._flag.item():
            self.raise_if_inexact()
        self._graph.replay()
        return self._loss.clone()

    def raise_if_inexact(self) -> None:
        try:
            for standing in self._standing:
                standing.raise_if_failed()
        finally:
            self._flag.zero_()


def _constant(value: object) -> object:
    return value.data_ptr() if isinstance(value, Tensor) else value


def _device_of(model: nn.Module) -> torch.device:
    devices = {tensor.device for tensor in _tensors_of(model)}
    if len(devices) != 1:
        where = ", ".join(sorted(map(str, devices))) or "no device, since it has no parameters"
        raise UnsupportedError(f"the model lies on {where}; a step is of one device. Move the model there.")
    return devices.pop()


def _tensors_of(model: nn.Module) -> Iterable[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _graphs_for(device: torch.device) -> Graphs:
    if device.type not in GRAPHS:
        raise UnsupportedError(
            f"a CUDA graph is of a CUDA device; the model is on {device}. Move the model and build the optimizer after "
            "that, or set cuda_graph=False."
        )
    return GRAPHS[device.type](device)


def capture_failure(error: BaseException) -> str:
    """In words."""
    # What ended the capture comes after what was wrong in it.
    while error.__context__ is not None:
        error = error.__context__
    first = (str(error).strip().splitlines() or [""])[0]
    return f"the step could not be captured: {type(error).__name__}: {first}"

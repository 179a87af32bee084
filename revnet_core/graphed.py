"""A model's forward and its backward, each captured as a CUDA graph, for a step that somebody else takes (DeepSpeed
with ZeRO 0 to 2, DDP)."""

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from revnet_core.capture import Pieces, StepRehearsal
from revnet_core.errors import CaptureError, ReversibleError, ShapeError, UnsupportedError
from revnet_core.exactness import StandingVerdict
from revnet_core.graphs import capture_failure
from revnet_core.obstacles import ObstacleWatch, raise_for

# DDP looks at what its backward does for so many steps, torch says.
WARMUP_STEPS = 11


class GraphedModel:
    """A model while its calls replay graphs.

    pool_bytes  what the capture took of the device, for as long as the graphs are there
    """

    def __init__(self, pool_bytes: int, standing: tuple[StandingVerdict, ...]) -> None:
        self.pool_bytes = pool_bytes
        self._standing = standing

    def raise_if_inexact(self) -> None:
        """Wait for the device and raise ReconstructionError if an exact reconstruction since the last call was not
        exact."""
        for standing in self._standing:
            standing.raise_if_failed()


@contextlib.contextmanager
def graph_model(model: nn.Module, *example_inputs: Tensor, warmup_steps: int = WARMUP_STEPS) -> Iterator[GraphedModel]:
    """Within, a call of the model in training mode, and the backward through it, each replay a graph.

    By `torch.cuda.make_graphed_callables`; the loss, the reduction of gradients and the update stay with whoever takes
    the step, and so do hooks on parameters and on the model itself. Wrap the model in DDP inside. An engine that moves
    the parameters when it is built (DeepSpeed with ZeRO 1 and 2) is built before; give its module here. Outside
    training mode the model runs as always, and after the context it is as it was; buffers, gradients and the random
    state are left alone.

    example_inputs  on the model's device; calls have as many, of these shapes and dtypes

    With autocast, enter under `torch.autocast(..., cache_enabled=False)`: what it casts is captured.

    Raises UnsupportedError off CUDA; CaptureError for what cannot be captured, such as random draws that a
    reconstruction has to repeat (`TrainingStep` can); ReconstructionError at the end, where an exact reconstruction was
    not exact. A call raises ShapeError for other inputs, CaptureError where the parameters lie elsewhere than captured.
    """
    device = example_inputs[0].device
    if device.type != "cuda":
        raise UnsupportedError(
            f"a CUDA graph is of a CUDA device; the inputs are on {device}. Move model and inputs, or run eagerly."
        )
    own = model.__dict__.get("forward")
    try:
        with _as_it_was(model, device), hooks_set_aside(model):
            rehearsal = rehearse(model, *example_inputs)
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
            before_bytes = torch.cuda.memory_reserved(device)
            pieces = Pieces(rehearsal.standing())
            with pieces.under_way():
                _make_graphs(model, example_inputs, warmup_steps)
            pool_bytes = torch.cuda.memory_reserved(device) - before_bytes
        model.forward = checked(model, model.forward, example_inputs)
        graphed = GraphedModel(pool_bytes, pieces.standing)
        yield graphed
        graphed.raise_if_inexact()
    finally:
        model.__dict__.pop("forward", None)
        if own is not None:
            model.forward = own


def rehearse(model: nn.Module, *inputs: Tensor) -> StepRehearsal:
    """A forward and a backward, to find out what a capture needs. Raises CaptureError where it is impossible."""
    rehearsal = StepRehearsal()
    learning = [p for p in model.parameters() if p.requires_grad]
    with rehearsal.under_way(), ObstacleWatch(model, inputs[0].device) as watch:
        outputs = [t for t in tree_leaves(model(*inputs)) if t.requires_grad]
        watch.phase = "backward"
        torch.autograd.grad(outputs, learning, [torch.zeros_like(t) for t in outputs], allow_unused=True)
    raise_for(watch.obstacles)
    if rehearsal.drew:
        raise CaptureError(
            "F or G draws at random, which the reconstruction has to repeat, and torch captures forward and backward "
            "with no place for that. Capture the whole step with TrainingStep, set activations='stored', or take out "
            "the draws."
        )
    return rehearsal


def _make_graphs(model: nn.Module, inputs: tuple[Tensor, ...], warmup_steps: int) -> None:
    try:
        torch.cuda.make_graphed_callables(model, inputs, num_warmup_iters=warmup_steps, allow_unused_input=True)
    except ReversibleError:
        raise
    except Exception as error:
        raise CaptureError(capture_failure(error)) from error


def checked(model: nn.Module, forward: Callable[..., Any], examples: tuple[Tensor, ...]) -> Callable[..., Any]:
    """torch copies inputs to where the graph reads them, and would spread a smaller batch over its place. Parameters it
    reads where they lay."""
    expected = [(tuple(t.shape), t.dtype) for t in examples]
    parameters = list(model.parameters())
    places = [p.data_ptr() for p in parameters]

    def call(*inputs: Tensor) -> Any:
        given = [(tuple(t.shape), t.dtype) for t in inputs]
        if model.training and given != expected:
            raise ShapeError(
                f"the inputs are {given}; the graphs are of {expected}. Leave out a last batch that is smaller "
                "(drop_last=True)."
            )
        if model.training and [p.data_ptr() for p in parameters] != places:
            raise CaptureError(
                "the parameters lie elsewhere than where the graphs read them. Build what moves them (DeepSpeed with "
                "ZeRO 1 and 2) before graph_model, and give it the engine's module."
            )
        return forward(*inputs)

    return call


@contextlib.contextmanager
def _as_it_was(model: nn.Module, device: torch.device) -> Iterator[None]:
    """What is run within is no training: buffers and the random state are put back."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    state = torch.cuda.get_rng_state(device)
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        torch.cuda.set_rng_state(state, device)


@contextlib.contextmanager
def hooks_set_aside(model: nn.Module) -> Iterator[None]:
    """The model's own, not its parts': torch captures no module that has any, and calls them around the graph."""
    names = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    aside = {name: vars(model)[name] for name in names}
    vars(model).update({name: OrderedDict() for name in names})
    try:
        yield
    finally:
        vars(model).update(aside)

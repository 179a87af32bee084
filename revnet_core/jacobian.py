"""The largest and smallest singular value of a block's Jacobian, without the Jacobian.

What an error in a block's output grows by in its rebuilt input is the Jacobian of the inverse; its largest singular
value is 1 by the smallest of the block's own. Both come from power iteration, whose products with a Jacobian and its
transpose run through graphs that are built once: the transpose's is an ordinary gradient, and the gradient of that
by what came from above is the Jacobian's own.

Legend: x1, x2 the two streams of a block's input; y1, y2 those of its output; v a direction among the inputs,
u one among the outputs.
Source: Behrmann et al. 2021, arXiv:2006.09347.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from revnet_core.chain import ChainRun, Streams, buffers
from revnet_core.coupling import Coupling
from revnet_core.errors import PrecisionError, UnsupportedError
from revnet_core.precision import STREAM_DTYPES, Precision
from revnet_core.sequence import ReversibleSequence

# How far, in relation, a Jacobian and its transpose may disagree.
TRANSPOSE_TOLERANCE = 1e-3


@dataclass(frozen=True)
class JacobianBounds:
    """Singular values of dy/dx at one input: what the map enlarges an error by at most and at least.

    largest   approached from below
    smallest  approached from above; 1 / smallest is what the inverse enlarges an error by at most
    """

    largest: float
    smallest: float


def singular_values(
    coupling: nn.Module, x1: Tensor, x2: Tensor, *, iterations: int = 100, seed: int = 0, **side: Any
) -> JacobianBounds:
    """Of the Jacobian of (x1, x2) -> (y1, y2) of a coupling, or of any module with `forward(x1, x2)` and
    `inverse(y1, y2)`, at an input.

    x1, x2      of one shape and dtype, which is the one that all is computed in: float64 for more than a few digits
    iterations  of the power method, at most; each costs two backward passes
    seed        of the directions that it starts from, drawn by a generator of its own

    The coupling is taken in the training mode that it is in: what batch norm's statistics contribute is part of the
    Jacobian, and what a coupling's nets drew at random is repeated (any other module has to draw nothing). Parameters,
    buffers and the random state stay as they are. Raises UnsupportedError for an F or G that is not twice
    differentiable, ValueError for fewer than one iteration, PrecisionError for streams of a dtype that `Precision` does
    not have.
    """
    require_positive(iterations=iterations)
    module = differentiable_copy(coupling)
    devices = [x1.device] if x1.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        if isinstance(module, Coupling):
            run = ChainRun([module], _precision_of(x1.dtype), side, bitwise=True)
            with torch.no_grad():
                y = run.forward(buffers([x1.clone(), x2.clone()], 0), lambda *_: None)
            there, back = forward_map(run, 0, (x1, x2)), inverse_map(run, 0, y)
        else:
            there = Linearized([partial(module, **side)], (x1, x2))
            back = Linearized([partial(module.inverse, **side)], there.value)  # pyright: ignore[reportCallIssue, reportArgumentType]
    return bounds_of(there, back, iterations, seed)


def require_positive(**counts: int) -> None:
    """Raises ValueError for one below 1."""
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} = {count}; at least 1 is needed.")


def _precision_of(dtype: torch.dtype) -> Precision:
    for name, stream_dtype in STREAM_DTYPES.items():
        if stream_dtype == dtype:
            return Precision(reconstruction=name)
    raise PrecisionError(f"the streams are {dtype}; allowed: {', '.join(map(str, STREAM_DTYPES.values()))}.")


def differentiable_copy(module: nn.Module) -> Any:
    """A copy whose inner sequences can be differentiated twice."""
    twin = copy.deepcopy(module)
    for part in twin.modules():
        if isinstance(part, ReversibleSequence):
            part.activations = "stored"
    return twin


class Linearized:
    """The derivative of maps of two streams, one after the other, at a point; holds their graphs.

    at     the point
    value  what the maps make of it
    """

    def __init__(self, maps: Sequence[Callable[..., Streams]], at: Streams) -> None:
        self.steps: list[Step] = []
        self.at = self.value = at
        for function in maps:
            self.steps.append(Step(function, self.value))
            self.value = self.steps[-1].value
        self._refuse_once_differentiable()

    def _refuse_once_differentiable(self) -> None:
        """Raises UnsupportedError unless `push` and `pull` are each other's transpose.

        The gradient of a gradient that is cut off comes as zeros, without a word.
        """
        u = drawn_like(self.value, torch.Generator(self.value[0].device).manual_seed(0))
        v = self.pull(u)
        pushed, expected = _inner(self.push(v), u), _inner(v, v)
        tolerance = max(TRANSPOSE_TOLERANCE, 16 * torch.finfo(u[0].dtype).eps)
        if math.isfinite(expected) and abs(pushed - expected) > tolerance * expected:
            raise UnsupportedError(
                "F or G cannot be differentiated twice, so its Jacobian is not known: a torch.autograd.Function in it "
                "is once_differentiable, or detaches. Write its backward in differentiable operations."
            )

    def push(self, v: Streams) -> Streams:
        """The Jacobian times v."""
        for step in self.steps:
            v = step.push(v)
        return v

    def pull(self, u: Streams) -> Streams:
        """The transposed Jacobian times u."""
        for step in reversed(self.steps):
            u = step.pull(u)
        return u

    def norm(self, iterations: int, generator: torch.Generator, *, tolerance: float = 1e-9) -> float:
        """The largest singular value, from below; ends when an iteration changes it by less than `tolerance` of it."""
        v = scaled(drawn_like(self.at, generator), 1.0)
        found = 0.0
        for _ in range(iterations):
            u = self.push(v)
            before, found = found, size_of(u)
            if not found or not math.isfinite(found) or abs(found - before) <= tolerance * found:
                break
            v = scaled(self.pull(u), 1.0)
        return found


class Step:
    """One map, its value and its derivative."""

    def __init__(self, function: Callable[..., Streams], at: Streams) -> None:
        self.function = function
        # The fused attention kernels cannot be differentiated twice.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            self._at = tuple(t.detach().requires_grad_() for t in at)
            self._out = function(*self._at)
            self._u = tuple(torch.zeros_like(t, requires_grad=True) for t in self._out)
            self._pulled = torch.autograd.grad(self._out, self._at, self._u, create_graph=True, materialize_grads=True)
        first, second = self._out
        self.value: Streams = first.detach(), second.detach()

    def push(self, v: Streams) -> Streams:
        return torch.autograd.grad(self._pulled, self._u, v, retain_graph=True, materialize_grads=True)  # pyright: ignore[reportReturnType]

    def pull(self, u: Streams) -> Streams:
        return torch.autograd.grad(self._out, self._at, u, retain_graph=True, materialize_grads=True)  # pyright: ignore[reportReturnType]


def forward_map(run: ChainRun, index: int, x: Streams) -> Linearized:
    """Of a block that `run` has recorded; a coupling in two steps, F's and G's."""
    block = run.blocks[index]
    if not isinstance(block, Coupling):
        return Linearized([block], x)
    return Linearized([partial(_change, run, index, name, "update") for name in ("f", "g")], x)


def inverse_map(run: ChainRun, index: int, y: Streams) -> Linearized:
    """As `forward_map`; a coupling's first step is G's."""
    block = run.blocks[index]
    if not isinstance(block, Coupling):
        return Linearized([block.inverse], y)
    return Linearized([partial(_change, run, index, name, "undo") for name in ("g", "f")], y)


def bounds_of(there: Linearized, back: Linearized, iterations: int, seed: int) -> JacobianBounds:
    """Of a map and its inverse. Each begins with directions of its own, always the same ones."""
    device = there.value[0].device
    largest, inverse = (m.norm(iterations, torch.Generator(device).manual_seed(seed)) for m in (there, back))
    return JacobianBounds(largest, 1 / inverse if inverse else math.inf)


def drawn_like(streams: Streams, generator: torch.Generator) -> Streams:
    """Isotropic: independent normal numbers."""
    first, second = (torch.randn(t.shape, generator=generator, dtype=t.dtype, device=t.device) for t in streams)
    return first, second


def size_of(streams: Streams) -> float:
    """The Euclidean norm over both, in float64."""
    return math.hypot(*(torch.linalg.vector_norm(t, dtype=torch.float64).item() for t in streams))


def _inner(a: Streams, b: Streams) -> float:
    return sum((one.double() * other.double()).sum().item() for one, other in zip(a, b, strict=True))


def scaled(streams: Streams, size: float) -> Streams:
    """To this norm; zeros stay."""
    factor = size / (size_of(streams) or 1.0)
    return streams[0] * factor, streams[1] * factor


def _change(
    run: ChainRun, index: int, name: Literal["f", "g"], how: Literal["update", "undo"], s1: Tensor, s2: Tensor
) -> Streams:
    """Half a coupling: one stream by what its net makes of the other."""
    block = run.blocks[index]
    assert isinstance(block, Coupling)
    source, target = (s2, s1) if name == "f" else (s1, s2)
    residual = run.precision.residual(run.replayed(index, block, name, source, constant_statistics=True))
    changed = getattr(block, how)(target, residual)
    return (changed, s2) if name == "f" else (s1, changed)

"""What can be checked, as a chain of blocks that can be walked forward and back, whoever wrote it."""

import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from harness.errors import HarnessError
from revnet_core import ReversibleSequence, UnsupportedError

Streams = tuple[Tensor, ...]
Map = Callable[..., Any]


class SubjectError(HarnessError):
    """Something that has no inverse to check."""


class Invertible(nn.Module):
    """A module under the names that the check knows, for one that calls them otherwise.

    module            what both maps run: it is copied and moved to other dtypes, and its parameters get gradients
    forward, inverse  called with the module (a copy, it may be) and tensors; return a tensor or several
    """

    def __init__(self, module: nn.Module, forward: Map, inverse: Map) -> None:
        super().__init__()
        self.module = module
        self._maps = forward, inverse

    def forward(self, *streams: Tensor) -> Any:
        return self._maps[0](self.module, *streams)

    def inverse(self, *streams: Tensor) -> Any:
        return self._maps[1](self.module, *streams)


@dataclass(frozen=True)
class Block:
    """One link: `run(streams, inverse)` maps a tuple of tensors to one, forward or back."""

    name: str
    module: nn.Module
    run: Callable[[Streams, bool], Streams]

    def forward(self, streams: Streams) -> Streams:
        return self.run(copies(streams), False)

    def inverse(self, streams: Streams) -> Streams:
        return self.run(copies(streams), True)


def copies(streams: Iterable[Tensor]) -> Streams:
    """Some libraries empty or overwrite what they are given."""
    return tuple(t.detach().clone() for t in streams)


def streams_of(value: Any) -> Streams:
    """A map's result as a tuple. Raises SubjectError for what is no tensor and no tuple or list of them."""
    parts = (value,) if isinstance(value, Tensor) else value
    if isinstance(parts, tuple | list) and parts and all(isinstance(part, Tensor) for part in parts):
        return tuple(parts)
    raise SubjectError(
        f"a map returned {type(value).__name__}; a forward or an inverse returns a tensor or a tuple of tensors. "
        "Wrap the module: harness.inverses.Invertible(module, forward, inverse)."
    )


def named(index: int, module: nn.Module) -> str:
    return f"{index} {type(module).__name__}"


def blocks_of(module: nn.Module) -> list[Block]:
    """The module's blocks, first to last: those of a sequence of invertible modules one by one, else itself.

    Invertible is what has a method `inverse` (as memcnn's), or a forward with an argument `rev` (as FrEIA's).
    Raises SubjectError for what is not.
    """
    return [Block(named(index, part), part, _runner(part)) for index, part in enumerate(_parts(module))]


def is_ours(module: nn.Module) -> bool:
    """Whether it has sequences of this project's, which are audited as their own backward works."""
    return any(isinstance(part, ReversibleSequence) for part in module.modules())


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    children = getattr(module, "module_list", None) if _has_rev(module) else module
    if isinstance(children, nn.Sequential | nn.ModuleList) and len(children):
        for child in children:
            yield from _parts(child)
    else:
        yield module


def _runner(module: nn.Module) -> Callable[[Streams, bool], Streams]:
    undo: Any = getattr(module, "inverse", None)
    if callable(undo):

        def run(streams: Streams, inverse: bool) -> Streams:
            return streams_of(undo(*streams) if inverse else module(*streams))

        return run
    if _has_rev(module):

        def run_reversed(streams: Streams, inverse: bool) -> Streams:
            # The logarithm of the Jacobian's determinant comes second.
            return streams_of(module(streams, rev=inverse, jac=False)[0])

        return run_reversed
    raise SubjectError(
        f"{type(module).__name__} has no inverse: neither a method `inverse` nor an argument `rev`. Give a "
        "ReversibleSequence, a network with one in it, an nn.Sequential of invertible modules, or wrap it: "
        "harness.inverses.Invertible(module, forward, inverse)."
    )


def _has_rev(module: nn.Module) -> bool:
    return {"rev", "jac"} <= inspect.signature(module.forward).parameters.keys()


def refuse_inputs(inputs: tuple[Any, ...]) -> Streams:
    """Raises SubjectError unless all are floating-point tensors on one device."""
    if not inputs or not all(isinstance(t, Tensor) and t.is_floating_point() for t in inputs):
        given = ", ".join(type(t).__name__ if not isinstance(t, Tensor) else str(t.dtype) for t in inputs) or "nothing"
        raise SubjectError(f"inputs: {given}; give the floating-point tensors that the module's forward takes.")
    if len({t.device for t in inputs}) > 1:
        raise UnsupportedError("inputs: on several devices; give them on the module's.")
    return copies(inputs)

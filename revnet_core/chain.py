"""One run through a chain of blocks and back: from one evaluation of F and one of G per coupling, both the rebuilt
input and the gradients.

Legend: s1, s2 the two streams; d1, d2 the gradients of the loss by them.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from revnet_core.coupling import Coupling, NetName
from revnet_core.downsampling import SpaceToDepth
from revnet_core.errors import located
from revnet_core.exactness import GridWatch, Verdict
from revnet_core.gradients import Gradients, refuse_outside_tensors, root_of
from revnet_core.precision import Precision
from revnet_core.replay import AutocastState, Replay

Block = Coupling | SpaceToDepth
Streams = tuple[Tensor, Tensor]
# Called with the index of a block and its input streams, before the forward and after the rebuild of it.
Observer = Callable[[int, Streams], None]


class Change(Protocol):
    """`update` or `undo` of a coupling."""

    def __call__(self, stream: Tensor, residual: Tensor, *, in_place: bool = False) -> Tensor: ...


class Meter(Protocol):
    """Makes the evaluations of F and G, each on a copy of its source, and the updates by what comes of them, in place
    of plain calls. Gets the index of the block."""

    def net(self, index: int, call: Callable[[Tensor], Tensor], source: Tensor) -> Tensor: ...

    def update(self, index: int, update: Change, stream: Tensor, residual: Tensor) -> Tensor: ...


class Buffer:
    """One stream. Written in place once it is the chain's own; a tensor that the caller may hold is first replaced."""

    def __init__(self, value: Tensor, *, own: bool) -> None:
        self.value = value
        self._own = own

    def add(self, other: Tensor) -> None:
        if self._own:
            self.value.add_(other)
        else:
            self.replace(self.value + other.to(self.value.dtype))

    def change(self, change: Change, residual: Tensor) -> None:
        self.replace(change(self.value, residual, in_place=self._own))

    def pull(self, block: Coupling, stream: Tensor, residual: Tensor) -> Tensor:
        """As a gradient, through a change of its stream; returns the one by the residual, which may be this one."""
        d_stream, d_residual = block.pull(self.value, stream, residual, in_place=self._own)
        if d_stream is not self.value:
            self.replace(d_stream)
        return d_residual

    def replace(self, value: Tensor) -> None:
        self.value, self._own = value, True


class Derivative:
    """The gradient by one stream, in a buffer as above; None as long as nothing has arrived."""

    def __init__(self, value: Tensor | None, *, own: bool) -> None:
        self._buffer = None if value is None else Buffer(value, own=own)

    @property
    def value(self) -> Tensor | None:
        return None if self._buffer is None else self._buffer.value

    def add(self, other: Tensor) -> None:
        if self._buffer is None:
            # A copy, since what a net hands back may be the gradient of the other stream itself.
            self._buffer = Buffer(other.clone(), own=True)
        else:
            self._buffer.add(other)

    def pull(self, block: Coupling, stream: Tensor, residual: Tensor) -> Tensor | None:
        return None if self._buffer is None else self._buffer.pull(block, stream, residual)

    def rearrange(self, function: Callable[[Tensor], Tensor]) -> None:
        if self._buffer is not None:
            self._buffer.replace(function(self._buffer.value))


Buffers = tuple[Buffer, Buffer]
Derivatives = tuple[Derivative, Derivative]


def split(x: Tensor, dim: int) -> Streams:
    """The two streams of a joined tensor, each a dense copy, so that a rebuilt stream has the strides of the original
    and the same kernels see the same layout twice."""
    first, second = x.chunk(2, dim)
    return first.clone(), second.clone()


def buffers(tensors: list[Tensor], split_dim: int) -> Buffers:
    """Of a joined tensor or of two streams. Takes them out of the list, so that they die when they are replaced."""
    first = tensors.pop(0)
    if tensors:
        return Buffer(first, own=False), Buffer(tensors.pop(0), own=False)
    s1, s2 = split(first, split_dim)
    return Buffer(s1, own=True), Buffer(s2, own=True)


def derivatives(tensors: list[Tensor | None], split_dim: int) -> Derivatives:
    """As `buffers`, of gradients."""
    first = tensors.pop(0)
    if tensors or first is None:
        return Derivative(first, own=False), Derivative(tensors.pop(0) if tensors else None, own=False)
    d1, d2 = split(first, split_dim)
    return Derivative(d1, own=True), Derivative(d2, own=True)


class ChainRun:
    """One forward through a chain of blocks, and what is needed to walk back; block by block, or at once.

    bitwise  F and G are evaluated again as they were, see `Replay`; as they always are where the precision is exact
    streams  where the walk is: the two streams between the blocks before and behind; None when it is nowhere
    """

    def __init__(
        self, blocks: Sequence[Block], precision: Precision, side: dict[str, Any], *, bitwise: bool = False
    ) -> None:
        self.blocks = blocks
        self._bitwise = bitwise or precision.exact
        self.precision = precision
        self.side = dict(side)
        self.streams: Buffers | None = None
        self._replays: list[dict[NetName, Replay]] = []
        self._autocast: AutocastState | None = None
        self._watch: GridWatch | None = None

    def open(self, streams: Buffers) -> None:
        """Begin the forward. Call this, `step` and `close` without grad."""
        self.streams = s1, s2 = streams
        self._autocast = AutocastState.of(s1.value.device)
        if self.precision.exact:
            self._watch = GridWatch(self.precision, s1.value, s2.value, len(self.blocks))

    def step(self, index: int, meter: Meter | None = None, *, walked_back: bool = True) -> None:
        """One block forward.

        walked_back  whether a backward may come to the block; it does not where nothing known needs a gradient, and
                     what is not known has to be found here
        """
        assert self._autocast is not None
        assert self.streams is not None
        block, (s1, s2) = self.blocks[index], self.streams
        with self._autocast.restored():
            if isinstance(block, SpaceToDepth):
                self._replays.append({})
                with located(f"couplings[{index}]: "):
                    y1, y2 = block(s1.value, s2.value)
                s1.replace(y1)
                s2.replace(y2)
                return
            self._replays.append({name: self._new_replay(getattr(block, name), s1.value.device) for name in ("f", "g")})
            self._forward_half(index, block, "f", s2, s1, meter, walked_back)
            self._forward_half(index, block, "g", s1, s2, meter, walked_back)

    def close(self) -> Streams:
        """End the forward; returns the chain's output."""
        assert self.streams is not None
        (s1, s2), self.streams = self.streams, None
        return s1.value, s2.value

    def forward(self, streams: Buffers, observe: Observer) -> Streams:
        """The whole forward at once."""
        self.open(streams)
        s1, s2 = streams
        for index in range(len(self.blocks)):
            observe(index, (s1.value, s2.value))
            self.step(index)
        return self.close()

    def rebuild(self, streams: Buffers, observe: Observer | None = None, *, end: int | None = None) -> Streams:
        """The chain's input from the output of its first `end` blocks (by default all), by the arithmetic of the
        backward but without gradients."""
        s1, s2 = streams
        with torch.no_grad():
            for index, block in reversed(list(enumerate(self.blocks[:end]))):
                if isinstance(block, SpaceToDepth):
                    _restore(block, s1, s2)
                else:
                    self._undo_half(index, block, "g", s1, s2)
                    self._undo_half(index, block, "f", s2, s1)
                if observe:
                    observe(index, (s1.value, s2.value))
        return s1.value, s2.value

    def back(self, index: int, derivatives: Derivatives, gradients: Gradients, *, forget: bool) -> None:
        """Take the streams and the gradients by them one block back; those by parameters and side inputs go to
        `gradients`.

        forget: the block will not be walked again, and leaves nothing behind.
        """
        assert self.streams is not None
        block, (s1, s2), (d1, d2) = self.blocks[index], self.streams, derivatives
        if isinstance(block, SpaceToDepth):
            _restore(block, s1, s2)
            d1.rearrange(block.restore)
            d2.rearrange(block.restore)
            return
        self._backward_half(index, block, "g", s1, s2, d1, d2, gradients)
        self._backward_half(index, block, "f", s2, s1, d2, d1, gradients)
        if forget:
            self.forget(index)

    def verdict(self) -> Verdict | None:
        """On the exact reconstruction of the chain's input, when all blocks have been walked back."""
        assert self.streams is not None
        s1, s2 = self.streams
        return None if self._watch is None else self._watch.verdict(s1.value, s2.value)

    def nets(self) -> Iterator[nn.Module]:
        """F and G of each coupling, each as often as it is evaluated."""
        for block in self.blocks:
            if isinstance(block, Coupling):
                yield from (block.f, block.g)

    def replayed(
        self, index: int, block: Coupling, name: NetName, source: Tensor, *, constant_statistics: bool = False
    ) -> Tensor:
        """F or G of a stream, with all that the block's forward found and drew; differentiable."""
        assert self._autocast is not None
        replay = self._replays[index][name]
        replaying = replay.replaying(constant_statistics=constant_statistics)
        with located(f"couplings[{index}].{name}: "), replaying, self._autocast.restored():
            return block.evaluate(name, source, self.side, own_copy=replay.observed)

    def residual(self, block: Coupling, out: Tensor, stream: Tensor) -> Tensor:
        """What a net made, as it changes the stream."""
        narrower = torch.promote_types(out.dtype, stream.dtype) == stream.dtype
        return out if block.widens and narrower and not self.precision.exact else self.precision.residual(out)

    def observed(self, index: int, name: NetName) -> bool:
        """Whether someone may keep what the net saw or made when it was last evaluated."""
        return self._replays[index][name].observed

    def collect(
        self,
        index: int,
        block: Coupling,
        name: NetName,
        leaf: Tensor,
        root: "Tensor | GradientEdge",
        d_out: Tensor,
        gradients: Gradients,
    ) -> Tensor | None:
        """Add the gradients of one replayed evaluation; returns the one by `leaf`."""
        parameters = self._replays[index][name].trained_parameters
        with located(f"couplings[{index}].{name}: "):
            return gradients.collect(getattr(block, name), parameters, leaf, root, d_out)

    def forget(self, index: int) -> None:
        """The block will not be walked again, and leaves nothing behind."""
        self._replays[index] = {}

    def with_side(self, tensors: dict[str, Tensor]) -> "ChainRun":
        """The same run with these side tensors in place of the forward's."""
        run = copy.copy(self)
        run.side = self.side | tensors
        return run

    def _new_replay(self, net: nn.Module, device: torch.device) -> Replay:
        return Replay(net, device, bitwise=self._bitwise)

    def _forward_half(
        self,
        index: int,
        block: Coupling,
        name: NetName,
        source: Buffer,
        target: Buffer,
        meter: Meter | None,
        walked_back: bool,
    ) -> None:
        replay = self._replays[index][name]

        def call(stream: Tensor) -> Tensor:
            copying = {"own_copy": replay.observed, "copied": meter is not None}
            if walked_back:
                return block.evaluate(name, stream, self.side, **copying)
            with torch.enable_grad():
                out = block.evaluate(name, stream.detach(), self.side, **copying)
            if root := root_of(out):
                refuse_outside_tensors(getattr(block, name), root, ())
            return out.detach()

        with located(f"couplings[{index}].{name}: "), replay.recording():
            out = meter.net(index, call, source.value) if meter else call(source.value)
        if meter:
            target.replace(meter.update(index, block.update, target.value, self.precision.residual(out)))
        else:
            target.change(block.update, self.residual(block, out, target.value))
        if self._watch:
            self._watch.note(index, int(name == "g"), target.value)

    def _undo_half(self, index: int, block: Coupling, name: NetName, source: Buffer, target: Buffer) -> None:
        out = self.replayed(index, block, name, source.value)
        target.change(block.undo, self.residual(block, out, target.value))

    def _backward_half(
        self,
        index: int,
        block: Coupling,
        name: NetName,
        source: Buffer,
        target: Buffer,
        d_source: Derivative,
        d_target: Derivative,
        gradients: Gradients,
    ) -> None:
        leaf = source.value.detach().requires_grad_()
        with torch.set_grad_enabled(d_target.value is not None):
            out = self.replayed(index, block, name, leaf)
        with torch.no_grad():
            residual = self.residual(block, out.detach(), target.value)
            target.change(block.undo, residual)
            d_residual = d_target.pull(block, target.value, residual)
        root, dtype = root_of(out), out.dtype
        del out, residual
        if root is None or d_residual is None:
            return
        d_out = d_residual.to(dtype, copy=self.observed(index, name))
        del d_residual
        d_leaf = self.collect(index, block, name, leaf, root, d_out, gradients)
        if d_leaf is not None:
            d_source.add(d_leaf)


def _restore(block: SpaceToDepth, first: Buffer, second: Buffer) -> None:
    first.replace(block.restore(first.value))
    second.replace(block.restore(second.value))

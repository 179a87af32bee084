"""The way back through a chain with the rebuild of the next block beside the gradient of this one.

Of block i, let R be the rebuild of its input with the graphs of F and G, and D the gradient through these graphs. R of
block i - 1 needs what R of block i has rebuilt, D of block i - 1 what D of block i has found, and D of block i and R of
block i - 1 need nothing of each other:

    lane of i        R(i)    D(i)      R(i-2)    D(i-2)
    lane of i - 1    D(i+1)  R(i-1)    D(i-1)    R(i-3)

Autograd runs a graph's backward on the stream that its forward ran on, so R and D of a block have one lane, and blocks
take turns. Between two columns all wait for each other. A third queue is the backward's own, where the gradients by
parameters arrive. The graphs of two blocks are alive at a time, and streams are rebuilt out of place, since graphs hold
them.

The idea is that of PaReprop (Zhu and Mangalam 2023, arXiv:2306.09342).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from revnet_core.chain import ChainRun, Derivative, Derivatives, Streams
from revnet_core.coupling import AdditiveCoupling, Coupling, NetName
from revnet_core.downsampling import SpaceToDepth
from revnet_core.gradients import Gradients, root_of
from revnet_core.lanes import Lanes, accumulation_elsewhere


class _Half(NamedTuple):
    """One evaluation of F or G.

    leaf      the stream that it read
    stream    the other one, in front of the coupling
    residual  what it added, or what stands for it where no gradient depends on it
    """

    name: NetName
    leaf: Tensor
    stream: Tensor
    residual: Tensor
    root: "Tensor | GradientEdge | None"
    dtype: torch.dtype


class _Rebuilt(NamedTuple):
    """A block that its gradient can be taken of.

    halves  G, then F; none of a SpaceToDepth
    side    the leaves that stand for the side inputs
    """

    streams: Streams
    halves: list[_Half]
    side: list[Tensor]


class OverlappedWay:
    """One backward through a run, a block at a time from the last on."""

    def __init__(self, run: ChainRun, side_names: Sequence[str], side: Sequence[Tensor]) -> None:
        assert run.streams is not None
        self._run = run
        self._side_names, self._side = side_names, side
        self._ahead: _Rebuilt | None = None
        self.lanes = Lanes(run.streams[0].value)

    def back(self, index: int, derivatives: Derivatives, *, forget: bool, goes_on: bool) -> Gradients:
        """As `ChainRun.back`, with `goes_on` for whether the block in front will be asked for next."""
        try:
            return self._back(index, derivatives, forget=forget, goes_on=goes_on)
        except BaseException:
            # What dies with the error may still be in use.
            self.lanes.join()
            raise

    def _back(self, index: int, derivatives: Derivatives, *, forget: bool, goes_on: bool) -> Gradients:
        run, lanes = self._run, self.lanes
        assert run.streams is not None
        lanes.begin(index)
        if self._ahead is None:
            with lanes.on(index):
                self._ahead = self._rebuilt(index, (run.streams[0].value, run.streams[1].value))
        rebuilt, self._ahead = self._ahead, None
        if goes_on:
            lanes.hand_over(index)
            lanes.begin(index - 1)
        # The next rebuild reads them on another lane than made them, which must not give their memory away meanwhile.
        # What dies in the gradient below was made on either lane: nothing is made on the other before both have met.
        for buffer, stream in zip(run.streams, rebuilt.streams, strict=True):
            buffer.replace(stream)
        if goes_on:
            with lanes.on(index - 1):
                self._ahead = self._rebuilt(index - 1, rebuilt.streams)
        gradients = Gradients(rebuilt.side, None)
        with lanes.on(index):
            self._pull(index, rebuilt.halves, derivatives, gradients)
        lanes.hand_over(index)
        lanes.give_away(gradients.found())
        if forget:
            run.forget(index)
        return gradients

    def leave(self, derivatives: Derivatives) -> None:
        """The gradients by the chain's inputs, behind the last block."""
        self.lanes.give_away([d.value for d in derivatives if d.value is not None])

    def _rebuilt(self, index: int, behind: Streams) -> _Rebuilt:
        """Of the streams behind the block, which stay as they are."""
        block, (y1, y2) = self._run.blocks[index], behind
        if isinstance(block, SpaceToDepth):
            return _Rebuilt((block.restore(y1), block.restore(y2)), [], self._leaves())
        # Leaves of this block's own: the node that a leaf's gradient arrives at belongs to the lane that made it.
        side = self._leaves()
        run = self._run.with_side(dict(zip(self._side_names, side, strict=True)))
        of_g = _half(run, index, block, "g", y1, y2)
        of_f = _half(run, index, block, "f", of_g.stream, y1)
        return _Rebuilt((of_f.stream, of_g.stream), [of_g, of_f], side)

    def _leaves(self) -> list[Tensor]:
        return [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in self._side]

    def _pull(self, index: int, halves: list[_Half], derivatives: Derivatives, gradients: Gradients) -> None:
        block, (d1, d2) = self._run.blocks[index], derivatives
        if isinstance(block, SpaceToDepth):
            d1.rearrange(block.restore)
            d2.rearrange(block.restore)
            return
        for d_source, d_target in ((d1, d2), (d2, d1)):
            self._pull_half(index, block, halves.pop(0), d_source, d_target, gradients)

    def _pull_half(
        self,
        index: int,
        block: Coupling,
        half: _Half,
        d_source: Derivative,
        d_target: Derivative,
        gradients: Gradients,
    ) -> None:
        with torch.no_grad():
            d_residual = d_target.pull(block, half.stream, half.residual)
        if half.root is None or d_residual is None:
            return
        d_out = d_residual.to(half.dtype, copy=self._run.observed(index, half.name))
        del d_residual
        with accumulation_elsewhere():
            d_leaf = self._run.collect(index, block, half.name, half.leaf, half.root, d_out, gradients)
        if d_leaf is not None:
            d_source.add(d_leaf)


def _half(run: ChainRun, index: int, block: Coupling, name: NetName, source: Tensor, target: Tensor) -> _Half:
    leaf = source.detach().requires_grad_()
    with torch.enable_grad():
        out = run.replayed(index, block, name, leaf)
    with torch.no_grad():
        residual = run.residual(block, out.detach(), target)
        stream = block.undo(target, residual)
    # What an additive coupling adds has no part in its gradient, and need not be kept for it.
    needed = type(block).pull is not AdditiveCoupling.pull
    return _Half(name, leaf, stream, residual if needed else stream, root_of(out), out.dtype)

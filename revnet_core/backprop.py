"""Backward without stored activations: a node of autograd's graph for each block, and one state that they share.

The forward keeps the chain's output and nothing else. The nodes are tied together by tokens, tensors without contents:
the streams and their gradients lie in buffers of the chain's own, which the backward of each node takes one block back.
So each block's gradients reach the parameters, and whoever waits for them there (DDP, say), before the next block is
walked.
"""

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from revnet_core.chain import ChainRun, Derivatives, Meter, Streams, buffers, derivatives
from revnet_core.errors import DoubleBackwardError, UnsupportedError
from revnet_core.exactness import Judge
from revnet_core.gradients import Gradients
from revnet_core.overlapped import OverlappedWay
from revnet_core.partitioned import Uses, is_partitioned
from revnet_core.probe import Probe
from revnet_core.walk import modules_of, trained_parameters


def backpropagate(
    run: ChainRun,
    inputs: tuple[Tensor, ...],
    *,
    split_dim: int,
    join: bool,
    judge: Judge,
    meter: Meter | None = None,
    probe: Probe | None = None,
    overlapped: bool = False,
) -> tuple[Tensor, ...]:
    """Run the chain so that backward rebuilds what it needs.

    inputs  a tensor that holds both streams in its halves along `split_dim`, or the two streams; in the streams' dtype
    join    whether the output is one tensor or the two streams
    judge   gets the verdict on each exact reconstruction
    probe   compares the input of a block with what the backward rebuilds
    overlapped
            see `OverlappedWay`

    Raises UnsupportedError for an overlapped walk of partitioned parameters; DoubleBackwardError, OutsideTensorError
    and what `judge` and `probe` raise in the backward.
    """
    side = {name: value for name, value in run.side.items() if isinstance(value, Tensor)}
    walk = _Walk(run, split_dim, list(side), judge, meter, probe, overlapped)
    # A partitioned parameter cannot be a node's input, so something else has to ask for a gradient.
    anchor = torch.empty((), device=inputs[0].device, requires_grad=walk.uses is not None)
    token: Any = _Open.apply(walk, anchor, *inputs)
    for index in range(len(run.blocks)):
        token = _Block.apply(walk, index, token, *side.values(), *walk.parameters(index))
    outputs: Any = _Close.apply(walk, join, token, *side.values())
    if walk.uses:
        walk.uses.belong_to(outputs[0].grad_fn)
    return outputs


class _Walk:
    """What the nodes of one forward share: between the forward's nodes the streams, between the backward's the way
    back."""

    def __init__(
        self,
        run: ChainRun,
        split_dim: int,
        side_names: list[str],
        judge: Judge,
        meter: Meter | None,
        probe: Probe | None,
        overlapped: bool,
    ) -> None:
        self.run = run
        self.split_dim = split_dim
        self.side_names = side_names
        self.meter = meter
        self.judge = judge
        self.probe = probe
        self.overlapped = overlapped
        self._parameters = [trained_parameters(modules_of(block)) for block in run.blocks]
        partitioned = any(is_partitioned(p) for parameters in self._parameters for p in parameters)
        if partitioned and overlapped:
            raise UnsupportedError(
                "overlapped=True evaluates a block while the gradient of another is taken, and ZeRO-3 gathers "
                "parameters for one at a time. Set overlapped=False, or use ZeRO 0 to 2."
            )
        self.uses = Uses(run.nets()) if partitioned else None
        self._back: weakref.ref[_Back] | None = None

    def parameters(self, index: int) -> list[nn.Parameter]:
        """Those that are inputs of the block's node."""
        return [] if self.uses else self._parameters[index]

    def start_back(self, outputs: list[Tensor], grads: list[Tensor | None], side: list[Tensor], *, last: bool) -> None:
        """last: the graph is not retained, so what a block leaves behind may be forgotten with it."""
        back = _Back(self, outputs, grads, side, last=last)
        self._back = weakref.ref(back)
        torch.autograd.Variable._execution_engine.queue_callback(back.end)
        if self.uses:
            weakref.finalize(back, self.uses.finish)
            self.uses.start()

    @property
    def back(self) -> "_Back":
        back = self._back() if self._back else None
        assert back is not None
        return back


class _Back:
    """One backward of a walk: the streams, and the gradients by them.

    Nothing but the engine's list of callbacks keeps it, so that its buffers end with the backward, whatever becomes of
    that: after an error the engine drops the list and calls nothing.
    """

    def __init__(
        self, walk: _Walk, outputs: list[Tensor], grads: list[Tensor | None], side: list[Tensor], *, last: bool
    ) -> None:
        self._walk = walk
        self._run = walk.run.with_side(dict(zip(walk.side_names, side, strict=True)))
        self._run.streams = buffers(outputs, walk.split_dim)
        self._gradients: Derivatives | None = derivatives(grads, walk.split_dim)
        self._side, self._last = side, last
        # The blocks from this one on have been walked back.
        self._walked = len(walk.run.blocks)
        self._way = OverlappedWay(self._run, walk.side_names, side) if walk.overlapped else None
        if self._way:
            # An error elsewhere ends the backward between two of its blocks.
            weakref.finalize(self, self._way.lanes.join).atexit = False

    def step(self, index: int, node: Any) -> Gradients:
        """node: of the block, in the backward that runs."""
        assert self._gradients is not None
        if self._way:
            goes_on = index > 0 and _will_run(node.next_functions[0][0])
            gradients = self._way.back(index, self._gradients, forget=self._last, goes_on=goes_on)
        else:
            gradients = Gradients(self._side, self._walk.uses)
            self._run.back(index, self._gradients, gradients, forget=self._last)
        self._walked = index
        if self._walk.probe:
            self._walk.probe.compare(index, _values(self._run))
        return gradients

    def finish(self, joined: bool) -> tuple[Tensor | None, ...]:
        """The gradients by the chain's inputs."""
        assert self._gradients is not None
        if self._way:
            self._way.leave(self._gradients)
        d1, d2 = self._gradients
        by_inputs = (_joined(d1.value, d2.value, self._walk.split_dim),) if joined else (d1.value, d2.value)
        self.end()
        return by_inputs

    def end(self) -> None:
        if self._run.streams is None:
            return
        if self._way:
            self._way.lanes.join()
            self._way = None
        try:
            if self._run.precision.exact:
                self._verify()
        finally:
            self._run.streams = self._gradients = None
            self._side = []
            if self._walk.uses:
                self._walk.uses.finish()

    def _verify(self) -> None:
        """Walk the rest of the way, which a backward by some of the parameters leaves, and judge."""
        assert self._run.streams is not None
        self._run.rebuild(self._run.streams, end=self._walked)
        if verdict := self._run.verdict():
            self._walk.judge(verdict)


class _Open(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, walk: _Walk, anchor: Tensor, *inputs: Tensor) -> Tensor:
        ctx.walk, ctx.joined = walk, len(inputs) == 1
        walk.run.open(buffers(list(inputs), walk.split_dim))
        return torch.empty_like(anchor)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        return None, None, *ctx.walk.back.finish(ctx.joined)


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, walk: _Walk, index: int, token: Tensor, *tensors: Tensor) -> Tensor:
        ctx.walk, ctx.index = walk, index
        walked_back = any(ctx.needs_input_grad)
        if walk.probe and walked_back:
            walk.probe.keep(index, _values(walk.run))
        walk.run.step(index, walk.meter, walked_back=walked_back)
        return torch.empty_like(token)

    @staticmethod
    def backward(ctx: Any, *token: Tensor) -> Any:
        walk: _Walk = ctx.walk
        gradients = walk.back.step(ctx.index, ctx)
        by_parameters = map(gradients.of_parameter, walk.parameters(ctx.index))
        return None, None, token[0], *gradients.by_side(), *by_parameters


class _Close(torch.autograd.Function):
    # The gradients come in a list that the backward empties: they would live until its end otherwise.
    boxed_grads_call = True

    @staticmethod
    def forward(ctx: Any, walk: _Walk, join: bool, token: Tensor, *side: Tensor) -> tuple[Tensor, ...]:
        outputs = walk.run.close()
        if join:
            outputs = (torch.cat(outputs, dim=walk.split_dim),)
        ctx.walk = walk
        ctx.set_materialize_grads(False)
        # Also for autograd's check that nobody changed them before the backward.
        ctx.save_for_backward(*outputs, *side)
        for name in walk.side_names:
            del walk.run.side[name]
        return outputs

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        if torch.is_grad_enabled():
            raise DoubleBackwardError(
                "a gradient of a gradient (create_graph=True) cannot pass reconstructed activations. "
                "Set activations='stored' or 'checkpointed' for this sequence."
            )
        grads: list[Tensor | None] = grad_outputs[0] if isinstance(grad_outputs[0], list) else list(grad_outputs)
        saved = list(ctx.saved_tensors)
        last = not torch._C._autograd._get_current_graph_task_keep_graph()  # pyright: ignore[reportAttributeAccessIssue]
        if last:
            ctx.maybe_clear_saved_tensors()
        outputs, side = saved[: len(grads)], saved[len(grads) :]
        del saved
        # With contents, since anomaly mode looks at them.
        token = torch.zeros((), device=outputs[0].device)
        needs = ctx.needs_input_grad[3:]
        leaves = [tensor.detach().requires_grad_(need) for tensor, need in zip(side, needs, strict=True)]
        ctx.walk.start_back(outputs, grads, leaves, last=last)
        return None, None, token, *[None] * len(side)


def _will_run(node: Node | None) -> bool:
    """In the backward that runs; nothing in front of a node that there is none of needs a gradient."""
    return node is not None and torch._C._will_engine_execute_node(node)  # pyright: ignore[reportAttributeAccessIssue]


def _values(run: ChainRun) -> Streams:
    assert run.streams is not None
    s1, s2 = run.streams
    return s1.value, s2.value


def _joined(d1: Tensor | None, d2: Tensor | None, dim: int) -> Tensor | None:
    known = d1 if d1 is not None else d2
    if known is None:
        return None
    return torch.cat([torch.zeros_like(known) if d is None else d for d in (d1, d2)], dim=dim)

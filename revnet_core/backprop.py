"""Backward without stored activations: one autograd function over a whole chain of couplings.

The forward keeps the chain's output; the backward walks from the last coupling to the first and gets, from
one evaluation of G and one of F per coupling, both the rebuilt input and the gradients.

Legend: s1, s2 the two streams; d1, d2 the gradients of the loss by them. All are buffers of the chain's own,
so they are updated in place.
"""

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from revnet_core.coupling import AdditiveCoupling, NetName
from revnet_core.errors import DoubleBackwardError, OutsideTensorError, ReconstructionError, located
from revnet_core.precision import Precision
from revnet_core.replay import AutocastState, Replay

Streams = tuple[Tensor, Tensor]
# Called with the index of a coupling and its input streams, before the forward and after the rebuild of it.
Observer = Callable[[int, Streams], None]


def split(x: Tensor, dim: int) -> Streams:
    """Two streams of one dense layout each, so that a rebuilt stream has the strides of the original and the
    same kernels see the same layout twice."""
    first, second = x.chunk(2, dim)
    return first.clone(), second.clone()


class ChainRun:
    """One forward through a chain of couplings, and what is needed to walk back."""

    def __init__(self, couplings: Sequence[AdditiveCoupling], precision: Precision, side: dict[str, Any]) -> None:
        self.couplings = couplings
        self.precision = precision
        self.side = dict(side)
        self._replays: list[tuple[Replay, Replay]] = []
        self._autocast: AutocastState | None = None
        self._checksum: Tensor | None = None

    def forward(self, s1: Tensor, s2: Tensor, observe: Observer | None = None) -> Streams:
        """The chain's output; the given streams are overwritten. Call without grad."""
        self._autocast = AutocastState.of(s1.device)
        if self.precision.exact:
            self._checksum = _checksum(s1, s2)
        with self._autocast.restored():
            for index, coupling in enumerate(self.couplings):
                if observe:
                    observe(index, (s1, s2))
                replays = Replay(coupling.f, s1.device), Replay(coupling.g, s1.device)
                self._replays.append(replays)
                s1 += self._recorded(index, "f", s2)
                s2 += self._recorded(index, "g", s1)
        return s1, s2

    def rebuild(self, s1: Tensor, s2: Tensor, observe: Observer | None = None) -> Streams:
        """The chain's input from its output, by the arithmetic of the backward but without gradients."""
        with torch.no_grad():
            for index in reversed(range(len(self.couplings))):
                s2 -= self._replayed(index, "g", s1)[1]
                s1 -= self._replayed(index, "f", s2)[1]
                if observe:
                    observe(index, (s1, s2))
        return s1, s2

    def backward(self, s1: Tensor, s2: Tensor, d1: Tensor, d2: Tensor, gradients: "Gradients") -> Streams:
        """The gradients by the chain's input streams; those by parameters and side inputs go to `gradients`.
        The given buffers are overwritten."""
        for index in reversed(range(len(self.couplings))):
            self._backward_half(index, "g", s1, s2, d1, d2, gradients)
            self._backward_half(index, "f", s2, s1, d2, d1, gradients)
        self._verify(s1, s2)
        return d1, d2

    def with_side(self, tensors: dict[str, Tensor]) -> "ChainRun":
        """The same run with these side tensors in place of the forward's."""
        run = copy.copy(self)
        run.side = self.side | tensors
        return run

    def _backward_half(
        self,
        index: int,
        name: NetName,
        source: Tensor,
        target: Tensor,
        d_source: Tensor,
        d_target: Tensor,
        gradients: "Gradients",
    ) -> None:
        leaf = source.detach().requires_grad_()
        with torch.enable_grad():
            out, residual = self._replayed(index, name, leaf)
        target -= residual
        del residual
        d_out = d_target.to(out.dtype, copy=self._replay(index, name).observed)
        with located(f"couplings[{index}].{name}: "):
            d_leaf = gradients.collect(getattr(self.couplings[index], name), leaf, out, d_out)
        if d_leaf is not None:
            d_source += d_leaf

    def _recorded(self, index: int, name: NetName, source: Tensor) -> Tensor:
        replay = self._replay(index, name)
        with located(f"couplings[{index}].{name}: "), replay.recording():
            out = self.couplings[index].evaluate(name, source, self.side, own_copy=replay.observed)
        return self.precision.residual(out)

    def _replayed(self, index: int, name: NetName, source: Tensor) -> Streams:
        assert self._autocast is not None
        replay = self._replay(index, name)
        with located(f"couplings[{index}].{name}: "), replay.replaying(), self._autocast.restored():
            out = self.couplings[index].evaluate(name, source, self.side, own_copy=replay.observed)
        with torch.no_grad():
            return out, self.precision.residual(out.detach())

    def _replay(self, index: int, name: NetName) -> Replay:
        return self._replays[index][0 if name == "f" else 1]

    def _verify(self, s1: Tensor, s2: Tensor) -> None:
        if self._checksum is None or bool(torch.equal(self._checksum, _checksum(s1, s2))):
            return
        limit = self.precision.grid_limit
        raise ReconstructionError(
            f"exact reconstruction did not give back the input of {len(self.couplings)} couplings bit for bit. "
            f"Either a stream left the grid's range of {limit:g} (residuals: {limit / 4:g}) or F or G is not "
            f"deterministic. Lower grid_bits (now {self.precision.grid_bits}; each step doubles the range), "
            "normalize the residuals, or use torch.use_deterministic_algorithms(True)."
        )


class Gradients:
    """Gradients by the parameters of F and G and by the side inputs, summed over a chain.

    With `engine_owned` the parameters belong to an engine that partitions them (ZeRO-3): its own hooks must see
    each gradient arrive, so backward runs inside and accumulates in .grad, and nothing is returned.
    """

    def __init__(self, side: Iterable[Tensor], engine_owned: bool) -> None:
        self.side = [tensor for tensor in side if tensor.requires_grad]
        self.engine_owned = engine_owned
        self._sums: dict[Tensor, Tensor] = {}

    def of(self, tensor: Tensor) -> Tensor | None:
        return self._sums.get(tensor)

    def collect(self, net: nn.Module, leaf: Tensor, out: Tensor, d_out: Tensor) -> Tensor | None:
        """Add the gradients of one evaluation; returns the one by `leaf`."""
        if not out.requires_grad:
            return None
        parameters = [p for p in net.parameters() if p.requires_grad]
        if self.engine_owned:
            torch.autograd.backward(out, d_out)
            return leaf.grad
        _refuse_outside_tensors(net, out, {leaf, *parameters, *self.side})
        with _without_hooks(parameters):
            d_leaf, *rest = torch.autograd.grad(out, [leaf, *parameters, *self.side], d_out, allow_unused=True)
        for tensor, gradient in zip([*parameters, *self.side], rest, strict=True):
            if gradient is None:
                continue
            if tensor in self._sums:
                self._sums[tensor] = self._sums[tensor] + gradient
            else:
                # A gradient may be d_out itself (of a bias of full shape), which is overwritten next.
                shares = gradient.untyped_storage().data_ptr() == d_out.untyped_storage().data_ptr()
                self._sums[tensor] = gradient.clone() if shares else gradient
        return d_leaf


@contextlib.contextmanager
def _without_hooks(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """The parameters' own hooks see the sum over the chain, when the chain returns it, and not each share of it."""
    hooked = [(p, p._backward_hooks) for p in parameters if p._backward_hooks]
    for parameter, _ in hooked:
        parameter._backward_hooks = None
    try:
        yield
    finally:
        for parameter, hooks in hooked:
            parameter._backward_hooks = hooks


def _refuse_outside_tensors(net: nn.Module, out: Tensor, known: Iterable[Tensor]) -> None:
    """Raise OutsideTensorError when the graph of `out` ends in a tensor whose gradient nobody would get."""
    known_ids = {id(tensor) for tensor in known}
    todo, seen = [out.grad_fn], {None, out.grad_fn}
    while todo:
        node = todo.pop()
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) not in known_ids:
            raise OutsideTensorError(
                f"{type(net).__name__} uses a tensor of shape {tuple(variable.shape)} that needs a gradient and is "
                "neither its parameter nor an input. Register it as a parameter of the module, pass it as a side input "
                "(sequence(x, name=tensor)), or detach it."
            )
        children = {child for child, _ in getattr(node, "next_functions", ())} - seen
        seen |= children
        todo.extend(children)


def _checksum(s1: Tensor, s2: Tensor) -> Tensor:
    """A sum over the bits of both streams; stays on the device."""
    return torch.stack([s.view(torch.int32).sum(dtype=torch.int64) for s in (s1, s2)])


def backpropagate(run: ChainRun, x: Tensor, split_dim: int) -> Tensor:
    """Run the chain on `x` (already in the streams' dtype) so that backward rebuilds what it needs.

    Raises DoubleBackwardError, OutsideTensorError and ReconstructionError in the backward.
    """
    side = {name: value for name, value in run.side.items() if isinstance(value, Tensor)}
    parameters = list({p: None for coupling in run.couplings for p in coupling.parameters() if p.requires_grad})
    # DeepSpeed marks a partitioned parameter so; its shape here is [0] and cannot be a function's input.
    engine_owned = any(hasattr(p, "ds_id") for p in parameters)
    call = _Call(run, split_dim, list(side), [] if engine_owned else parameters, engine_owned)
    # Without parameters among its inputs the function needs something else to be differentiated by.
    anchor = torch.empty((), device=x.device, requires_grad=True) if engine_owned else None
    return _Chain.apply(call, x, anchor, *side.values(), *call.parameters)  # pyright: ignore[reportReturnType]


class _Call(NamedTuple):
    run: ChainRun
    split_dim: int
    side_names: list[str]
    parameters: list[nn.Parameter]
    engine_owned: bool


class _Chain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, x: Tensor, anchor: Tensor | None, *tensors: Tensor) -> Tensor:
        y = torch.cat(call.run.forward(*split(x, call.split_dim)), dim=call.split_dim)
        ctx.call = call
        # Also for autograd's check that nobody changed them before the backward.
        ctx.save_for_backward(y, *tensors[: len(call.side_names)])
        for name in call.side_names:
            del call.run.side[name]
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise DoubleBackwardError(
                "a gradient of a gradient (create_graph=True) cannot pass reconstructed activations. "
                "Set activations='stored' or 'checkpointed' for this sequence."
            )
        call: _Call = ctx.call
        y, *tensors = ctx.saved_tensors
        needs_x, _, *needs = ctx.needs_input_grad[1:]
        side = {
            name: tensor.detach().requires_grad_(need)
            for name, tensor, need in zip(call.side_names, tensors, needs, strict=False)
        }
        gradients = Gradients(side.values(), call.engine_owned)
        d1, d2 = split(grad_outputs[0], call.split_dim)
        run = call.run.with_side(side)
        d1, d2 = run.backward(*split(y, call.split_dim), d1, d2, gradients)
        dx = torch.cat((d1, d2), dim=call.split_dim) if needs_x else None
        by_side = [s.grad if call.engine_owned else gradients.of(s) for s in side.values()]
        return None, dx, None, *by_side, *(gradients.of(p) for p in call.parameters)

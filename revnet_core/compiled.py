"""What a sequence does inside `torch.compile`: the same backward, in operations that a compiler can trace.

Within one graph there is no place for what `chain` does by hand: a generator's state cannot be set, modules cannot be
switched, nothing can be freed. In exchange the compiler sees the whole and does these itself. F and G become functions
of their parameters and buffers, whose gradients come from `torch.func.vjp`.
"""

import itertools
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.func import functional_call, vjp
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from revnet_core.chain import Block, Streams
from revnet_core.coupling import Coupling
from revnet_core.downsampling import SpaceToDepth
from revnet_core.errors import UnsupportedError
from revnet_core.precision import Precision
from revnet_core.replay import is_flagged
from revnet_core.walk import first_parameter, modules_of

_numbers = itertools.count()
_chains: weakref.WeakValueDictionary[int, nn.ModuleList] = weakref.WeakValueDictionary()


def trained(couplings: nn.ModuleList) -> list[nn.Parameter]:
    return [p for p in couplings.parameters() if p.requires_grad]


def register(couplings: nn.ModuleList) -> int:
    """A number by which what runs while a graph is traced finds the modules."""
    number = next(_numbers)
    _chains[number] = couplings
    return number


class _Net(NamedTuple):
    """F or G of a coupling as the trace sees it: names, and where the tensors are among the inputs."""

    parameters: tuple[tuple[str, int], ...]
    buffers: tuple[str, ...]
    dtype: str | None


def run_compiled(
    number: int,
    couplings: nn.ModuleList,
    activations: str,
    precision: Precision,
    inputs: tuple[Tensor, ...],
    split_dim: int | None,
    side: dict[str, Any],
    *,
    saving: bool,
) -> Tensor | Streams:
    """The chain within a graph; inputs and output are one tensor, or the two streams where split_dim is None.

    Raises UnsupportedError for what cannot be compiled, which names what can.
    """
    s1, s2 = _split(inputs, split_dim)
    blocks: list[Block] = list(couplings)  # pyright: ignore[reportAssignmentType]
    if not saving or activations == "stored":
        for block in blocks:
            s1, s2 = block(s1, s2, precision=precision, **side)
        return _join(s1, s2, split_dim)
    if activations == "checkpointed":
        for block in blocks:
            s1, s2 = checkpoint(block, s1, s2, use_reentrant=False, precision=precision, **side)  # pyright: ignore[reportGeneralTypeIssues]
        return _join(s1, s2, split_dim)
    if activations != "reconstructed" or precision.exact:
        what = "exact reconstruction" if precision.exact else f"activations = {activations!r}"
        raise UnsupportedError(
            f"{what} cannot be part of a compiled graph. Compile F and G each on their own, or the network's other "
            "parts; or choose stored, checkpointed or reconstructed with a floating reconstruction."
        )
    if _rebuilds_within(number):
        raise UnsupportedError(
            "F or G holds an inner sequence whose activations are not stored, and a compiled graph has room for one "
            "level of these. Set activations='stored' for the inner sequence, or compile F and G each on their own."
        )
    kind = s1.device.type
    described = tuple(
        (name, (_sizes(value), str(value.dtype)) if isinstance(value, Tensor) else value)
        for name, value in side.items()
    )
    autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    obstacle = _obstacle(number, _sizes(s1), str(s1.dtype), str(s1.device), described, *autocast)
    if obstacle:
        raise UnsupportedError(
            f"F or G {obstacle}. Compile F and G each on their own, or set activations='stored' or 'checkpointed' for "
            "this sequence."
        )
    nets = _plan(number)
    names = tuple(name for name, value in side.items() if isinstance(value, Tensor))
    constants = tuple((name, value) for name, value in side.items() if not isinstance(value, Tensor))
    call = _Call(nets, names, constants, kind, *autocast, split_dim)
    tensors = [*(side[name] for name in names), *trained(couplings)]
    return _CompiledChain.apply(couplings, precision, call, *inputs, *tensors)  # pyright: ignore[reportReturnType]


class _Call(NamedTuple):
    nets: tuple[tuple[_Net, ...], ...]
    side_names: tuple[str, ...]
    constants: tuple[tuple[str, Any], ...]
    device_type: str
    autocast_enabled: bool
    autocast_dtype: torch.dtype
    split_dim: int | None

    @property
    def streams(self) -> int:
        """How many tensors hold them."""
        return 2 if self.split_dim is None else 1

    def side(self, tensors: Sequence[Tensor]) -> dict[str, Any]:
        return dict(self.constants) | dict(zip(self.side_names, tensors, strict=True))

    def autocast(self) -> torch.autocast:
        return torch.autocast(
            self.device_type, dtype=self.autocast_dtype, enabled=self.autocast_enabled, cache_enabled=False
        )

    def given(self, net: _Net, stream: Tensor) -> Tensor:
        # A copy, which F may change in place; the compiler drops it where F does not.
        if net.dtype is None or (self.autocast_enabled and stream.dtype != torch.float64):
            return stream.clone()
        return stream.to(getattr(torch, net.dtype), copy=True)


class _CompiledChain(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, couplings: nn.ModuleList, precision: Precision, call: _Call, *tensors: Tensor
    ) -> Tensor | Streams:
        s1, s2 = _split(tensors[: call.streams], call.split_dim)
        tensors = tensors[call.streams :]
        side = call.side(tensors[: len(call.side_names)])
        buffers: list[Tensor] = []
        for block, nets in zip(couplings, call.nets, strict=True):
            if isinstance(block, SpaceToDepth):
                s1, s2 = block(s1, s2)
                continue
            assert isinstance(block, Coupling)
            buffers += _buffers(block.f, nets[0])
            s1 = block.update(s1, precision.residual(block.f(call.given(nets[0], s2), **side)))
            buffers += _buffers(block.g, nets[1])
            s2 = block.update(s2, precision.residual(block.g(call.given(nets[1], s1), **side)))
        ctx.couplings, ctx.precision, ctx.call, ctx.buffer_count = couplings, precision, call, len(buffers)
        # What is saved is what is returned, so that it is kept once.
        outputs = _join(s1, s2, call.split_dim)
        ctx.save_for_backward(*(outputs if isinstance(outputs, tuple) else (outputs,)), *buffers, *tensors)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        call: _Call = ctx.call
        precision: Precision = ctx.precision
        d1, d2 = _split(grad_outputs, call.split_dim)
        s1, s2 = _split(ctx.saved_tensors[: call.streams], call.split_dim)
        rest = ctx.saved_tensors[call.streams :]
        buffers, tensors = rest[: ctx.buffer_count], rest[ctx.buffer_count :]
        side, parameters = list(tensors[: len(call.side_names)]), tensors[len(call.side_names) :]
        needed = [tensor.is_floating_point() for tensor in side]
        d_side: list[Any] = [None] * len(side)
        d_parameters: list[Any] = [None] * len(parameters)
        for index in range(len(call.nets) - 1, -1, -1):
            block, nets = ctx.couplings[index], call.nets[index]
            if isinstance(block, SpaceToDepth):
                s1, s2, d1, d2 = (block.restore(t) for t in (s1, s2, d1, d2))
                continue
            for half in (1, 0):
                net, module = nets[half], block.g if half else block.f
                own = dict(zip(net.buffers, buffers[len(buffers) - len(net.buffers) :], strict=True))
                buffers = buffers[: len(buffers) - len(net.buffers)]
                source, target, d_target = (s1, s2, d2) if half else (s2, s1, d1)

                def evaluate(
                    weights: dict[str, Tensor],
                    stream: Tensor,
                    moving: list[Tensor],
                    net: _Net = net,
                    module: nn.Module = module,
                    own: Mapping[str, Tensor] = own,
                ) -> Tensor:
                    arrived = iter(moving)
                    values = [next(arrived) if need else s for s, need in zip(side, needed, strict=True)]
                    # Copies, which the recompute may change.
                    current = {name: own.get(name, buffer).clone() for name, buffer in module.named_buffers()}
                    with call.autocast():
                        return functional_call(
                            module, (weights, current), (call.given(net, stream),), call.side(values)
                        )

                weights = {name: parameters[position] for name, position in net.parameters}
                moving = [s for s, need in zip(side, needed, strict=True) if need]
                out, pull, *_ = vjp(evaluate, weights, source, moving)  # pyright: ignore[reportGeneralTypeIssues]
                residual = precision.residual(out)
                target = block.undo(target, residual)
                d_target, d_residual = block.pull(d_target, target, residual)
                d_weights, d_source, d_moving = pull(d_residual.to(out.dtype))
                for name, position in net.parameters:
                    d_parameters[position] = _sum(d_parameters[position], d_weights[name])
                moved = iter(d_moving)
                d_side = [_sum(d, next(moved)) if need else None for d, need in zip(d_side, needed, strict=True)]
                if half:
                    s2, d1, d2 = target, d1 + d_source, d_target
                else:
                    s1, d1, d2 = target, d_target, d2 + d_source
        by_inputs = (d1, d2) if call.split_dim is None else (torch.cat((d1, d2), dim=call.split_dim),)
        return None, None, None, *by_inputs, *d_side, *d_parameters


def _split(tensors: tuple[Tensor, ...], split_dim: int | None) -> Streams:
    return tensors if split_dim is None else tensors[0].chunk(2, split_dim)  # pyright: ignore[reportReturnType]


def _join(s1: Tensor, s2: Tensor, split_dim: int | None) -> Tensor | Streams:
    return (s1, s2) if split_dim is None else torch.cat((s1, s2), dim=split_dim)


def _sizes(tensor: Tensor) -> tuple[int, ...]:
    """As constants of the graph, which is traced anew for other sizes: a range has to know its length, while int()
    would leave a symbol."""
    return tuple(len(range(size)) for size in tensor.shape)


def _sum(total: Tensor | None, share: Tensor) -> Tensor:
    return share if total is None else total + share


def _buffers(module: nn.Module, net: _Net) -> list[Tensor]:
    """As they are before the evaluation, since it may change them."""
    found = dict(module.named_buffers())
    return [found[name].clone() for name in net.buffers]


@torch.compiler.assume_constant_result
def _plan(number: int) -> tuple[tuple[_Net, ...], ...]:
    """Of each block its F and G (of SpaceToDepth none). Runs once, when the graph is traced."""
    couplings = _chains[number]
    position = {p: i for i, p in enumerate(trained(couplings))}

    def describe(net: nn.Module) -> _Net:
        flagged = {id(b) for m in modules_of(net) if is_flagged(m) and m.training for b in m._buffers.values()}
        parameter = first_parameter(net)
        return _Net(
            tuple((name, position[p]) for name, p in net.named_parameters() if p in position),
            tuple(name for name, b in net.named_buffers() if id(b) not in flagged),
            None if parameter is None else str(parameter.dtype).removeprefix("torch."),
        )

    return tuple((describe(block.f), describe(block.g)) if isinstance(block, Coupling) else () for block in couplings)


@torch.compiler.assume_constant_result
def _rebuilds_within(number: int) -> bool:
    return any(getattr(module, "activations", "stored") != "stored" for module in modules_of(_chains[number]))


class _Spy(TorchDispatchMode):
    """Looks at every operation for what a recompute within a graph cannot do right; `found` says what."""

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self.found = ""
        self._mode = mode

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(Tensor, self._without_contents, (args, kwargs or {}))
        if torch.Tag.nondeterministic_seeded in func.tags and _has_chance(func, args, kwargs):
            self.found = "draws at random (dropout, say), which a recompute within a compiled graph cannot repeat"
        return func(*args, **kwargs)

    def _without_contents(self, tensor: Tensor) -> Tensor:
        if isinstance(tensor, FakeTensor):
            return tensor
        # Parameters, buffers and inputs are fakes already, so this one comes from elsewhere.
        if tensor.requires_grad:
            self.found = (
                f"uses a tensor of shape {tuple(tensor.shape)} that needs a gradient and is neither its parameter nor "
                "an input, so that its gradient would be lost; register it, pass it as a side input, or detach it"
            )
        return self._mode.from_tensor(tensor)


def _has_chance(func: Any, args: Any, kwargs: Any) -> bool:
    """False for attention without dropout, which counts as random all the same."""
    arguments = {argument.name: argument.default_value for argument in func._schema.arguments}
    arguments |= dict(zip(arguments, args, strict=False)) | (kwargs or {})
    return arguments.get("dropout_p") != 0


@torch.compiler.assume_constant_result
def _obstacle(
    number: int,
    shape: tuple[int, ...],
    dtype: str,
    device: str,
    side: tuple[tuple[str, Any], ...],
    autocast_enabled: bool,
    autocast_dtype: torch.dtype,
) -> str:
    """Run the chain on tensors without contents and see; empty where nothing is in the way.

    Runs once, when the graph is traced.
    """
    couplings = _chains[number]

    def like(shape: tuple[int, ...], dtype: str) -> Tensor:
        return torch.zeros(shape, dtype=getattr(torch, dtype.removeprefix("torch.")), device=device)

    with (
        FakeTensorMode() as mode,
        torch.no_grad(),
        torch.autocast(torch.device(device).type, dtype=autocast_dtype, enabled=autocast_enabled),
        _Spy(mode) as spy,
    ):
        s1, s2 = like(shape, dtype), like(shape, dtype)
        values = {name: like(*value) if isinstance(value, tuple) else value for name, value in side}
        for block in couplings:
            if isinstance(block, SpaceToDepth):
                s1, s2 = block(s1, s2)
                continue
            assert isinstance(block, Coupling)
            s1 = block.update(s1, _faked(mode, block.f, s2, values))
            s2 = block.update(s2, _faked(mode, block.g, s1, values))
    return spy.found


def _faked(mode: FakeTensorMode, net: nn.Module, stream: Tensor, side: dict[str, Any]) -> Tensor:
    tensors: dict[str, Tensor] = {
        name: mode.from_tensor(t) for name, t in (*net.named_parameters(), *net.named_buffers())
    }
    parameter = first_parameter(net)
    given = stream if parameter is None else stream.to(parameter.dtype)
    return functional_call(net, tensors, (given.clone(),), side).to(stream.dtype)

"""Inverse error per block and gradient parity, returned as numbers; thresholds are the caller's."""

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from revnet_core.chain import ChainRun, Streams, buffers
from revnet_core.networks.base import Network
from revnet_core.precision import Precision
from revnet_core.sequence import ReversibleSequence

Batch = tuple[Tensor, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class BlockDrift:
    """Error of one block's rebuilt input against the input that the forward saw.

    rel      relative L2 error over both streams
    max_abs  largest absolute error
    max_ulp  the same in units in the last place, in the streams' dtype, at the streams' root mean square (at each
             element's own magnitude a zero would make every error infinite)

    Where a float64 reference was asked for (None otherwise), relative L2 errors against the input that the block sees
    when the same weights run in float64 throughout, unrounded:
    reference_rel           of the rebuilt input
    forward_reference_rel   of the input that the forward saw: the floor, since it is itself off
    """

    block: int
    rel: float
    max_abs: float
    max_ulp: float
    reference_rel: float | None = None
    forward_reference_rel: float | None = None


@dataclass(frozen=True)
class GradientParity:
    """The gradient by all parameters, with the model's own activations, against two others.

    rel, angle_deg          against `stored`: same weights, batch and precision
    worst_parameter         the parameter with the largest share of that error
    reference_*             against the same network in float64 throughout, unrounded
    stored_reference_*      `stored` against float64: the floor, since it is itself off
    The reference is None where the network draws at random: its draws differ between dtypes.
    """

    rel: float
    angle_deg: float
    worst_parameter: str
    reference_rel: float | None
    reference_angle_deg: float | None
    stored_reference_rel: float | None
    stored_reference_angle_deg: float | None


def audit_inverse(
    sequence: ReversibleSequence, x: Tensor | Streams, *, reference: bool = False, **side: Any
) -> list[BlockDrift]:
    """Drift of each block, first to last, when the whole sequence is rebuilt from its output.

    x          the sequence's input: a tensor, or a pair of streams where its split_dim is None
    reference  also against float64; not for a network that draws at random, whose draws differ between dtypes

    Runs the backward's own arithmetic, in the module's training mode; statistics, parameters and the random
    sequence end as they were.
    """
    originals: dict[int, Streams] = {}
    wide: dict[int, Streams] = {}
    drifts: list[BlockDrift] = []
    audited = copy.deepcopy(sequence)
    if reference:
        twin = _twin(sequence, activations="stored", precision=Precision(reconstruction="fp64")).double()
        wide_x, wide_side = _map(x, Tensor.double), {name: _map(value, _widened) for name, value in side.items()}
        with torch.autocast(_device_of(x).type, enabled=False):
            _observed_forward(twin, wide_x, wide_side, wide)  # pyright: ignore[reportArgumentType]
    run, streams = _observed_forward(audited, x, side, originals)

    def compare(block: int, rebuilt: Streams) -> None:
        original = originals.pop(block)
        drift = _drift(block, original, rebuilt)
        if reference:
            true = torch.stack(wide.pop(block))
            errors = [_relative(torch.stack(streams).double(), true) for streams in (rebuilt, original)]
            drift = replace(drift, reference_rel=errors[0], forward_reference_rel=errors[1])
        drifts.append(drift)

    with _undisturbed(sequence.precision, x):
        # The random sequence begins where the forward began: what is not replayed would repeat the forward's by chance.
        torch.rand(1, device=_device_of(x))
        run.rebuild(buffers(list(streams), 0), observe=compare)
    return drifts[::-1]


@contextlib.contextmanager
def _undisturbed(precision: Precision, x: Tensor | Streams) -> Iterator[None]:
    devices = _cuda_devices(x)
    with torch.no_grad(), torch.random.fork_rng(devices), precision.autocast(_device_of(x).type):
        yield


def _observed_forward(
    sequence: ReversibleSequence, x: Tensor | Streams, side: dict[str, Any], inputs: dict[int, Streams]
) -> tuple[ChainRun, Streams]:
    """Run the sequence as its backward will find it; `inputs` gets a copy of each block's input streams."""
    precision = sequence.precision
    with _undisturbed(precision, x):
        run = ChainRun(list(sequence.couplings), precision, side)  # pyright: ignore[reportArgumentType]
        given = [precision.enter(t) for t in (x if isinstance(x, tuple) else (x,))]
        streams = run.forward(
            buffers(given, sequence.split_dim or 0),
            lambda block, s: inputs.update({block: (s[0].clone(), s[1].clone())}),
        )
    return run, streams


def _map(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, tuple):
        return tuple(_map(part, function) for part in value)
    return function(value) if isinstance(value, Tensor) else value


def _widened(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _device_of(x: Tensor | Streams) -> torch.device:
    return (x[0] if isinstance(x, tuple) else x).device


def audit_model_inverse(model: nn.Module, x: Tensor, *, reference: bool = False) -> list[BlockDrift]:
    """`audit_inverse` of every outermost ReversibleSequence on the input that it gets when the model sees x.

    Blocks are numbered through the model. Empty for a model without reversible blocks.
    """
    drifts = [
        drift
        for sequence, (streams, side) in sequence_inputs(model, x)
        for drift in audit_inverse(sequence, streams, reference=reference, **side)
    ]
    return [replace(drift, block=block) for block, drift in enumerate(drifts)]


def sequence_inputs(
    model: nn.Module, *given: Tensor | Streams
) -> list[tuple[ReversibleSequence, tuple[Tensor | Streams, dict[str, Any]]]]:
    """Of every outermost ReversibleSequence, in the order of registration, a copy and what it gets when the model sees
    what is given: its input and its side inputs. One that gets nothing is left out; the model stays as it is."""
    model = copy.deepcopy(model)
    inputs: dict[ReversibleSequence, tuple[Tensor | Streams, dict[str, Any]]] = {}

    def note(sequence: nn.Module, args: tuple[Any], side: dict[str, Any]) -> None:
        assert isinstance(sequence, ReversibleSequence)
        inputs[sequence] = _map(args[0], Tensor.clone), side

    with torch.no_grad(), torch.random.fork_rng(_cuda_devices(given[0])):
        sequences = list(outermost_sequences(model))
        hooks = [s.register_forward_pre_hook(note, with_kwargs=True) for s in sequences]
        model(*given)
        for hook in hooks:
            hook.remove()
    return [(sequence, inputs[sequence]) for sequence in sequences if sequence in inputs]


def audit_gradients(model: nn.Module, loss: Loss, batch: Batch) -> GradientParity:
    """Gradient parity of `loss(model(batch[0]), batch[1])`; the model is copied and stays as it is.

    Raises ValueError when no parameter needs a gradient.
    """
    x, target = batch
    devices = _cuda_devices(x)

    def gradients(twin: nn.Module, inputs: Tensor, target: Tensor = target) -> dict[str, Tensor]:
        with torch.random.fork_rng(devices):
            loss(twin(inputs), target).backward()
        return {name: p.grad.double() for name, p in twin.named_parameters() if p.grad is not None}

    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("no parameter of the model needs a gradient; there is nothing to compare.")
    chosen = gradients(_twin(model), x)
    stored = gradients(_twin(model, activations="stored"), x)
    rel, angle_deg = _compare(chosen, stored)
    errors = {name: (chosen[name] - stored[name]).norm().item() for name in stored}
    worst = max(errors, key=errors.__getitem__)
    reference = None
    if not _draws(model, x):
        wide = _twin(model, activations="stored", precision=Precision(reconstruction="fp64")).double()
        with torch.autocast(x.device.type, enabled=False):
            reference = gradients(wide, x.double(), target.double() if target.is_floating_point() else target)
    against = [_compare(g, reference) if reference else (None, None) for g in (chosen, stored)]
    return GradientParity(rel, angle_deg, worst, *against[0], *against[1])


def outermost_sequences(module: nn.Module) -> Iterator[ReversibleSequence]:
    """Every ReversibleSequence that is not inside another, in the order of registration."""
    if isinstance(module, ReversibleSequence):
        yield module
        return
    for child in module.children():
        yield from outermost_sequences(child)


def _twin(model: nn.Module, *, activations: str | None = None, precision: Precision | None = None) -> nn.Module:
    twin = copy.deepcopy(model)
    twin.zero_grad(set_to_none=True)
    for module in twin.modules():
        if isinstance(module, ReversibleSequence | Network):
            module.activations = activations or module.activations
            module.precision = precision or module.precision
    return twin


def _draws(model: nn.Module, x: Tensor) -> bool:
    """Whether a forward moves the global random state."""
    devices = _cuda_devices(x)
    with torch.no_grad(), torch.random.fork_rng(devices):
        before = torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in devices)
        copy.deepcopy(model)(x)
        after = torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in devices)
    return not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def _cuda_devices(x: Tensor | Streams) -> list[int]:
    device = _device_of(x)
    return [device.index or 0] if device.type == "cuda" else []


def _drift(block: int, original: Streams, rebuilt: Streams) -> BlockDrift:
    dtype = original[0].dtype
    a = torch.stack(original).double()
    error = (torch.stack(rebuilt).double() - a).abs()
    norm = a.norm().item()
    error_norm = error.norm().item()
    rel = error_norm / norm if norm else (0.0 if error_norm == 0 else math.inf)
    rms = norm / math.sqrt(a.numel())
    ulp = torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(rms)) if 0 < rms < math.inf else math.nan
    max_abs = error.max().item()
    return BlockDrift(block, rel, max_abs, max_abs / ulp if max_abs else 0.0)


def _relative(a: Tensor, b: Tensor) -> float:
    norm = b.norm().item()
    error = (a - b).norm().item()
    return error / norm if norm else (0.0 if error == 0 else math.inf)


def _compare(a: dict[str, Tensor], b: dict[str, Tensor]) -> tuple[float, float]:
    """Relative error and angle in degrees between two gradients over all parameters."""
    u = torch.cat([a[name].flatten() for name in b])
    v = torch.cat([b[name].flatten() for name in b])
    rel = _relative(u, v)
    u, v = u / u.norm(), v / v.norm()
    # Kahan's form: acos of the scalar product loses every angle below 1e-8.
    angle = 2 * math.atan2((u - v).norm().item(), (u + v).norm().item())
    return rel, math.degrees(angle)

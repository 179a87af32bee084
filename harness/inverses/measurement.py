"""Figures of each block and of the gradient, in one precision: errors, and marks that tell whether the map is the same.

inverse_rel        of a block alone: relative L2 error of the input that its inverse gives for its own output
drift_rel          the same when the whole chain is rebuilt from its output, which is what a backward does
output_rms         root mean square of the block's output, and
output_projection  its share of fixed random signs, over that root mean square: about 1 for unrelated outputs. Both tell
                   a changed forward, which an inverse that changed alike would hide
weights            a hash of parameters and buffers of each part, before anything ran
calls              its direct parts, in the order in which the forward runs them
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from harness.inverses.chain import Block, Streams, blocks_of, copies, is_ours, named, streams_of
from harness.inverses.precisions import FP64, at_precision
from harness.inverses.structure import Calls, hash_of, weights_of, weights_outside
from revnet_core import ReversibleSequence, audit_gradients, audit_inverse
from revnet_core.audit import outermost_sequences, sequence_inputs

ERRORS = ("inverse_rel", "drift_rel")
MARKS = ("output_rms", "output_projection")
SEED = 0
# Of the central difference that a gradient in float64 is held against; its error is about its square.
DIFFERENCE = 1e-5


@dataclass
class BlockFigures:
    name: str
    figures: dict[str, float]
    weights: list[str]
    calls: list[str]


@dataclass
class Figures:
    """Of one module in one precision.

    gradient  gradient_rel, gradient_angle_deg   of this project's modules, against stored activations
              gradient_reference_rel             against float64
              gradient_difference_rel            in float64, of other modules: against a difference quotient
    inputs    a hash of them
    outside   a hash of the weights that belong to no block
    """

    blocks: list[BlockFigures]
    gradient: dict[str, float]
    inputs: str
    outside: str


def measure(module: nn.Module, inputs: Streams, precision: str) -> Figures:
    """Nothing that is given changes, random states included; each draw is that of one fixed seed."""
    twin, given, context = at_precision(module, inputs, precision)
    devices = [t.device.index or 0 for t in inputs[:1] if t.device.type == "cuda"]
    with torch.random.fork_rng(devices), context:
        torch.manual_seed(SEED)
        blocks = list(_of_sequences(twin, given) if is_ours(twin) else _of_chain(blocks_of(twin), given))
        torch.manual_seed(SEED)
        gradient = _parity(twin, given) if is_ours(twin) else _reference(module, inputs, precision)
    return Figures(blocks, gradient, hash_of(inputs), weights_outside(module))


def single_blocks(
    sequence: ReversibleSequence, x: Any, side: dict[str, Any]
) -> Iterator[tuple[ReversibleSequence, Any]]:
    """Each coupling as a sequence of its own, with the streams that it sees."""
    streams = x if isinstance(x, tuple) else tuple(part.clone() for part in x.chunk(2, sequence.split_dim or 0))
    streams = tuple(sequence.precision.enter(t) for t in streams)
    for coupling in sequence.couplings:
        alone = ReversibleSequence([coupling], split_dim=None, activations="stored", precision=sequence.precision)  # pyright: ignore[reportArgumentType]
        yield alone, streams
        with torch.no_grad():
            streams = alone(copies(streams), **side)


def _of_sequences(model: nn.Module, inputs: Streams) -> Iterator[BlockFigures]:
    weights = [weights_of(c) for sequence in outermost_sequences(model) for c in sequence.couplings]
    index = 0
    for sequence, (x, side) in sequence_inputs(model, *arguments(model, copies(inputs))):
        drifts = audit_inverse(sequence, x, **side)
        for (alone, streams), drift in zip(single_blocks(sequence, x, side), drifts, strict=True):
            (own,) = audit_inverse(alone, streams, **side)
            coupling = alone.couplings[0]
            with torch.no_grad(), Calls(coupling) as calls:
                output = alone(copies(streams), **side)
            errors = {"inverse_rel": own.rel, "drift_rel": drift.rel}
            yield BlockFigures(named(index, coupling), errors | _marks(output), weights[index], calls.order)
            index += 1


def _of_chain(blocks: list[Block], inputs: Streams) -> Iterator[BlockFigures]:
    seen, streams, weights = [inputs], inputs, [weights_of(block.module) for block in blocks]
    orders: list[list[str]] = []
    with torch.no_grad():
        for block in blocks:
            with Calls(block.module) as calls:
                streams = block.forward(streams)
            orders.append(calls.order)
            seen.append(streams)
        alone = [relative(block.inverse(out), x) for block, x, out in zip(blocks, seen, seen[1:], strict=False)]
        drifts = []
        for block, x in zip(blocks[::-1], seen[-2::-1], strict=True):
            streams = block.inverse(streams)
            drifts.append(relative(streams, x))
    for i, block in enumerate(blocks):
        errors = {"inverse_rel": alone[i], "drift_rel": drifts[-1 - i]}
        yield BlockFigures(block.name, errors | _marks(seen[i + 1]), weights[i], orders[i])


class _Whole(nn.Module):
    """The model from one tensor to one tensor; of a pair of streams, stacked."""

    def __init__(self, model: nn.Module, count: int) -> None:
        super().__init__()
        self.model = model
        self.count = count

    def forward(self, x: Tensor) -> Tensor:
        out = self.model(*arguments(self.model, x.unbind() if self.count > 1 else (x,)))
        return torch.stack(out) if isinstance(out, tuple) else out


def arguments(model: nn.Module, inputs: Streams) -> tuple[Any, ...]:
    """What to call the model with; a sequence of two streams takes both as one."""
    as_pair = isinstance(model, ReversibleSequence) and model.split_dim is None
    return (tuple(inputs),) if as_pair else inputs


def _parity(model: nn.Module, inputs: Streams) -> dict[str, float]:
    if not any(p.requires_grad for p in model.parameters()):
        return {}
    whole = _Whole(model, len(inputs))
    x = torch.stack(inputs) if len(inputs) > 1 else next(iter(inputs))
    with torch.no_grad():
        signs = _signs(whole(x))
    parity = audit_gradients(whole, _projected, (x, signs))
    figures = {"gradient_rel": parity.rel, "gradient_angle_deg": parity.angle_deg}
    if parity.reference_rel is not None:
        figures["gradient_reference_rel"] = parity.reference_rel
    return figures


def _reference(module: nn.Module, inputs: Streams, precision: str) -> dict[str, float]:
    """Of the gradient by parameters and inputs; nothing where the module draws, whose draws differ between dtypes."""
    twin, given, context = at_precision(module, inputs, precision)
    with context:
        own = _gradients(twin, given)
    if precision == FP64:
        return {"gradient_difference_rel": _difference(twin, given, own)}
    if _draws(twin, given):
        return {}
    wide, wide_inputs, _ = at_precision(module, inputs, FP64)
    with torch.autocast(inputs[0].device.type, enabled=False):
        reference = _gradients(wide, wide_inputs)
    return {"gradient_reference_rel": relative(own, reference)}


def _gradients(module: nn.Module, inputs: Streams) -> Streams:
    """By the parameters and the inputs of the output's projection, with the module's own backward."""
    leaves = [t.requires_grad_() for t in copies(inputs)]
    taken = [*(p for p in module.parameters() if p.requires_grad), *leaves]
    module.zero_grad()
    torch.manual_seed(SEED)
    # A view, since some libraries empty their input, and refuse a leaf. Not torch.autograd.grad, which some refuse.
    _loss(_forward(module, tuple(t.view_as(t) for t in leaves))).backward()
    return tuple(torch.zeros_like(t) if t.grad is None else t.grad for t in taken)


def _difference(module: nn.Module, inputs: Streams, gradients: Streams) -> float:
    """Relative error of the slope along the gradient itself, against a central difference."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    norm = torch.cat([g.flatten() for g in gradients]).norm().item()
    if norm == 0:
        return 0.0
    values = []
    for sign in (1, -1):
        step = sign * DIFFERENCE / norm
        moved = tuple(t + step * g for t, g in zip(inputs, gradients[len(parameters) :], strict=True))
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=False):
                parameter.add_(gradient, alpha=step)
            torch.manual_seed(SEED)
            values.append(_loss(_forward(module, copies(moved))).item())
            for parameter, gradient in zip(parameters, gradients, strict=False):
                parameter.add_(gradient, alpha=-step)
    return abs((values[0] - values[1]) / (2 * DIFFERENCE) / norm - 1)


def _forward(module: nn.Module, streams: Streams) -> Streams:
    for block in blocks_of(module):
        streams = block.run(streams, False)
    return streams


def _draws(module: nn.Module, inputs: Streams) -> bool:
    device = inputs[0].device

    def state() -> Tensor:
        return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()

    before = state()
    with torch.no_grad():
        _forward(module, copies(inputs))
    return not torch.equal(before, state())


def _loss(outputs: Streams) -> Tensor:
    return sum((_projected(out, _signs(out)) for out in outputs), torch.zeros(()))


def _projected(out: Tensor, signs: Tensor) -> Tensor:
    wide = out if out.dtype == torch.float64 else out.float()
    return (wide * signs).sum() / math.sqrt(out.numel())


def _signs(like: Tensor) -> Tensor:
    """Random +-1 of this shape, the same at any time and on any device."""
    generator = torch.Generator().manual_seed(SEED)
    signs = torch.randint(0, 2, like.shape, generator=generator).mul_(2).sub_(1)
    return signs.to(like.device, torch.float64 if like.dtype == torch.float64 else torch.float32)


def _marks(outputs: Any) -> dict[str, float]:
    flat = torch.cat([t.detach().double().flatten() for t in streams_of(outputs)])
    rms = (flat.norm() / math.sqrt(flat.numel())).item()
    projection = _projected(flat, _signs(flat)).item()
    return {"output_rms": rms, "output_projection": projection / rms if rms else 0.0}


def relative(found: Streams, true: Streams) -> float:
    a, b = (torch.cat([t.detach().double().flatten() for t in streams]) for streams in (found, true))
    norm, error = b.norm().item(), (a - b).norm().item()
    return error / norm if norm else (0.0 if error == 0 else math.inf)

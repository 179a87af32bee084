"""How much each block's inverse enlarges rounding, and what that makes of a whole rebuild, before anything is rebuilt.

Legend: x the two streams in front of a block, y those behind it; e their errors, to first order.
Source: Behrmann et al. 2021, arXiv:2006.09347.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from revnet_core.chain import ChainRun, Streams, buffers
from revnet_core.coupling import Coupling, as_net_input
from revnet_core.jacobian import (
    Linearized,
    Step,
    bounds_of,
    differentiable_copy,
    drawn_like,
    forward_map,
    inverse_map,
    require_positive,
    size_of,
)
from revnet_core.precision import Precision
from revnet_core.sequence import ReversibleSequence


@dataclass(frozen=True)
class BlockAmplification:
    """What becomes of a small error in one block's output when its input is rebuilt from it.

    largest, smallest  singular values of the block's Jacobian, see `JacobianBounds`
    noise_gain         what the inverse enlarges an error without direction by: the root of the mean squared singular
                       value of the inverse's Jacobian
    predicted_rel      relative L2 error of the block's input when the whole sequence is rebuilt from its output, as
                       `BlockDrift.rel` measures it
    bound_rel          the same if every error met the worst direction of every inverse that it passes
    """

    block: int
    largest: float
    smallest: float
    noise_gain: float
    predicted_rel: float
    bound_rel: float

    @property
    def bound(self) -> float:
        """What the block's inverse enlarges an error by at most."""
        return 1 / self.smallest if self.smallest else math.inf


def audit_amplification(
    sequence: ReversibleSequence,
    x: Tensor | Streams,
    *,
    iterations: int = 30,
    probes: int = 4,
    seed: int = 0,
    **side: Any,
) -> list[BlockAmplification]:
    """Of each block, first to last, at the input that it sees when the sequence gets x.

    x           the sequence's input: a tensor, or a pair of streams where its split_dim is None
    iterations  of the power method, at most, for each of a block's two singular values
    probes      random errors that are carried through the inverses, each two backward passes a block

    The prediction carries errors back through the Jacobians of the inverses: what each block rounds by itself, found
    by evaluating its inverse once more beside its output, where F and G round anew, and what rounding the streams to
    their dtype adds. A product of the blocks' bounds would assume that the worst direction of one is what the next
    makes of its own, which overestimates by orders of magnitude; it is returned beside it. Left out are ReLUs that an
    error turns over, and autocast. So it is for F and G that compute in the streams' precision or a finer one: under
    bf16 or fp16 they flush most small errors and enlarge some to their own rounding, and it may be off by orders of
    magnitude either way. Errors of the order of the streams themselves are no longer small.

    Jacobians are those of the network in fp32 (in float64 where the streams are), without autocast, in the training
    mode that it is in, and as differentiable as `singular_values` asks for. Where the rebuild reuses batch norm's
    statistics, they are constants here too: an inverse that finds them anew would take out what errors have in common,
    and enlarge them less. Parameters, buffers and the random state
    stay as they are. An exact reconstruction rounds nothing. Raises ValueError for fewer than one iteration or probe.
    """
    require_positive(iterations=iterations, probes=probes)
    streams = x if isinstance(x, tuple) else (x,)
    device = streams[0].device
    is_wide = sequence.precision.stream_dtype == torch.float64
    precision = Precision(reconstruction="fp64" if is_wide else "fp32")
    inputs: list[Streams] = []
    found: list[BlockAmplification] = []
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.autocast(device.type, enabled=False):
        blocks = list(differentiable_copy(sequence).couplings)
        run = ChainRun(blocks, precision, side, bitwise=sequence.precision.exact)
        with torch.no_grad():
            y = run.forward(
                buffers([precision.enter(t) for t in streams], sequence.split_dim or 0),
                lambda _, s: inputs.append((s[0].clone(), s[1].clone())),
            )
        rounding = _Rounding(sequence.precision, precision, torch.Generator(device).manual_seed(seed))
        errors: list[Streams] = [(torch.zeros_like(y[0]), torch.zeros_like(y[1]))] * probes
        bound = 0.0
        for index, block in reversed(list(enumerate(run.blocks))):
            x_here, back = inputs.pop(), inverse_map(run, index, y)
            there = forward_map(run, index, x_here)
            bounds = bounds_of(there, back, iterations, seed)
            if isinstance(block, Coupling) and not sequence.precision.exact:
                rebuilt = [_rebuilt(block, back, e, x_here, y, rounding) for e in errors]
                errors = [one.error for one in rebuilt]
                behind = max(size_of(there.steps[1].push(one.by_g)) for one in rebuilt) + rounding.size(y)
                in_front = max(size_of(one.by_f) for one in rebuilt) + rounding.size(x_here)
                bound = (bound + behind) / bounds.smallest + in_front
            else:
                errors = [back.push(e) for e in errors]
            gain = _noise_gain(back, probes, torch.Generator(device).manual_seed(seed))
            predicted = math.sqrt(sum(size_of(e) ** 2 for e in errors) / probes)
            relative = (error / (size_of(x_here) or math.nan) for error in (predicted, bound))
            found.append(BlockAmplification(index, bounds.largest, bounds.smallest, gain, *relative))
            y = x_here
    return found[::-1]


def _noise_gain(back: Linearized, probes: int, generator: torch.Generator) -> float:
    directions = [drawn_like(back.at, generator) for _ in range(probes)]
    return math.hypot(*(size_of(back.push(v)) for v in directions)) / math.hypot(*map(size_of, directions))


class _Rebuilt(NamedTuple):
    """The error of a coupling's rebuilt input, and what its halves added to it."""

    error: Streams
    by_g: Streams
    by_f: Streams


def _rebuilt(
    block: Coupling, back: Linearized, error: Streams, x: Streams, y: Streams, rounding: "_Rounding"
) -> _Rebuilt:
    """From the error of the coupling's rebuilt output."""
    undo_g, undo_f = back.steps
    (x1, x2), (y1, y2), (e1, e2) = x, y, error
    # What the forward rounded off a stream comes in when that stream is rebuilt: the net that saw it saw it rounded.
    beside_y1 = rounding.beside(y1, block.g) if e1.any() else y1
    own2 = _own_error(undo_g, y, (beside_y1, y2), (y1, x2))[1]
    e1, e2 = undo_g.push((e1, e2 + rounding.draw(y2)))
    e2 = e2 + own2
    beside_x2 = rounding.beside(x2, block.f) if e2.any() else x2
    own1 = _own_error(undo_f, (y1, x2), (y1, beside_x2), x)[0]
    e1, e2 = undo_f.push((e1 + rounding.draw(y1), e2 + rounding.draw(x2)))
    e1 = e1 + own1 + rounding.draw(x1)
    return _Rebuilt((e1, e2), (torch.zeros_like(own2), own2), (own1, torch.zeros_like(own1)))


def _own_error(step: Step, at: Streams, beside: Streams, original: Streams) -> Streams:
    """What the step's value beside a point is off by from the original, but for what its derivative says."""
    shift = step.push((beside[0] - at[0], beside[1] - at[1]))
    value = step.function(*beside)
    return value[0] - original[0] - shift[0], value[1] - original[1] - shift[1]


class _Rounding:
    """Errors of values that are rounded: anything up to half the distance to the next number.

    taken  the precision that the streams are carried in
    run    the one that blocks are evaluated in here, whose rounding they show by themselves
    """

    def __init__(self, taken: Precision, run: Precision, generator: torch.Generator) -> None:
        eps, self._run_eps = (torch.finfo(precision.stream_dtype).eps for precision in (taken, run))
        self._eps = eps if eps > self._run_eps else 0.0
        self._generator = generator

    def draw(self, values: Tensor) -> Tensor:
        """By rounding to the streams' dtype; nothing where the blocks' evaluation has done that."""
        return self._drawn(values, self._eps)

    def beside(self, values: Tensor, net: nn.Module) -> Tensor:
        """Other values, so near that the net can just tell them apart."""
        return values + self._drawn(values, 2 * max(self._run_eps, torch.finfo(as_net_input(net, values).dtype).eps))

    def size(self, streams: Streams) -> float:
        """The expected norm of such errors of both streams as `draw` makes."""
        return size_of((_distances(streams[0], self._eps), _distances(streams[1], self._eps))) / math.sqrt(12)

    def _drawn(self, values: Tensor, eps: float) -> Tensor:
        uniform = torch.rand(values.shape, generator=self._generator, dtype=values.dtype, device=values.device)
        return (uniform - 0.5) * _distances(values, eps)


def _distances(values: Tensor, eps: float) -> Tensor:
    """From each value to the next number of a dtype; none from zero, which is never rounded."""
    mantissa, exponent = torch.frexp(values)
    return torch.ldexp(eps / 2 * mantissa.sign().abs(), exponent)

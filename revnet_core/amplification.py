"""How much each block's inverse enlarges rounding, and what that makes of a whole rebuild, before anything is rebuilt.

Legend: x the two streams in front of a block, y those behind it; e their errors, to first order.
Source: Behrmann et al. 2021, arXiv:2006.09347.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from revnet_core.chain import ChainRun, Streams, buffers
from revnet_core.coupling import Coupling
from revnet_core.jacobian import (
    Linearized,
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

    The prediction rounds both streams at each block as the forward and the rebuild do, in the streams' dtype, and
    carries these very errors back through the Jacobians of the inverses. A product of the blocks' bounds would assume
    that the worst direction of one is what the next makes of its own, which overestimates by orders of magnitude; it is
    returned beside it. Left out are what F and G round themselves, ReLUs that an error turns over, and that the rebuild
    reuses batch norm's statistics. So it is for F and G that compute in the streams' precision or a finer one: under
    bf16 or fp16 they flush most small errors and enlarge some to their own rounding, and it may be off by orders of
    magnitude either way. Errors of the order of the streams themselves are no longer small.

    Jacobians are those of the network in fp32 (in float64 where the streams are), without autocast, in the training
    mode that it is in, and as differentiable as `singular_values` asks for. Parameters, buffers and the random state
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
        run = ChainRun(list(differentiable_copy(sequence).couplings), precision, side, bitwise=True)
        with torch.no_grad():
            y = run.forward(
                buffers([precision.enter(t) for t in streams], sequence.split_dim or 0),
                lambda _, s: inputs.append((s[0].clone(), s[1].clone())),
            )
        rounding = _Rounding(sequence.precision, torch.Generator(device).manual_seed(seed))
        errors: list[Streams] = [(torch.zeros_like(y[0]), torch.zeros_like(y[1]))] * probes
        bound = 0.0
        for index, block in reversed(list(enumerate(run.blocks))):
            x_here, back = inputs.pop(), inverse_map(run, index, y)
            bounds = bounds_of(forward_map(run, index, x_here), back, iterations, seed)
            if isinstance(block, Coupling):
                errors = [_rebuilt(back, e, x_here, y, rounding) for e in errors]
                bound = (bound + rounding.size(y)) / bounds.smallest + rounding.size(x_here)
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


def _rebuilt(back: Linearized, error: Streams, x: Streams, y: Streams, rounding: "_Rounding") -> Streams:
    """The error of a coupling's rebuilt input from that of its rebuilt output."""
    by_g, by_f = back.steps
    (x1, x2), (y1, y2), (e1, e2) = x, y, error
    # What the forward rounded off a stream comes in when that stream is rebuilt: the net that saw it saw it rounded.
    e1, e2 = by_g.push((e1, e2 + rounding.draw(y2)))
    e1, e2 = by_f.push((e1 + rounding.draw(y1), e2 + rounding.draw(x2)))
    return e1 + rounding.draw(x1), e2


class _Rounding:
    """Errors of values that are rounded to the streams' dtype: anything up to half the distance to the next number."""

    def __init__(self, precision: Precision, generator: torch.Generator) -> None:
        self._eps = 0.0 if precision.exact else torch.finfo(precision.stream_dtype).eps
        self._generator = generator

    def draw(self, values: Tensor) -> Tensor:
        uniform = torch.rand(values.shape, generator=self._generator, dtype=values.dtype, device=values.device)
        return (uniform - 0.5) * self._distances(values)

    def size(self, streams: Streams) -> float:
        """The expected norm of such an error of both streams."""
        return size_of((self._distances(streams[0]), self._distances(streams[1]))) / math.sqrt(12)

    def _distances(self, values: Tensor) -> Tensor:
        """From each value to the next number of the dtype; none from zero, which is never rounded."""
        mantissa, exponent = torch.frexp(values)
        return torch.ldexp(self._eps / 2 * mantissa.sign().abs(), exponent)

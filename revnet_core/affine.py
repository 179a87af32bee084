"""Couplings that multiply, whose inverse divides: the one that can explode.

Legend: s scale, t shift, h what the scale is made of; x a stream in front of the coupling, y the one behind it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from revnet_core.coupling import Coupling
from revnet_core.errors import ShapeError, UnsupportedError
from revnet_core.precision import Precision


class AffineCoupling(Coupling):
    """y1 = x1 * s(F(x2)) + t(F(x2)); y2 = x2 * s(G(y1)) + t(G(y1)), with F and G any modules that double the stream
    along `dim`: the first half of what they return is h, the second t.

    The scale is s = exp(clamp * tanh(h / clamp)), so it lies between exp(-clamp) and exp(clamp) and is near exp(h) for
    small h. The inverse divides by it and may enlarge an error by exp(clamp) at each coupling, beside what F and G do;
    see `singular_values`. Scale, product and sum are computed in fp32 at least and rounded to the streams' dtype.

    clamp  above 0
    dim    the dimension of F's and G's output that holds both halves (channels: 1; features: -1)

    Raises UnsupportedError for a clamp that is not above 0.
    Source: Dinh et al. 2017, arXiv:1605.08803, eq. 4 to 8; the bounded scale as in FrEIA's GLOW couplings, for the
    reason given by Behrmann et al. 2021, arXiv:2006.09347.
    """

    def __init__(self, f: nn.Module, g: nn.Module, *, clamp: float = 2.0, dim: int = 1) -> None:
        super().__init__(f, g)
        if not clamp > 0:
            raise UnsupportedError(f"clamp = {clamp}; the bound of the log-scale is above 0. Give 2.0, say.")
        self.clamp = clamp
        self.dim = dim

    def update(self, stream: Tensor, residual: Tensor, *, in_place: bool = False) -> Tensor:
        _, scale, shift = self._parts(residual)
        if in_place and stream.dtype == scale.dtype:
            return stream.mul_(scale).add_(shift)
        return (stream * scale + shift).to(stream.dtype)

    def undo(self, stream: Tensor, residual: Tensor, *, in_place: bool = False) -> Tensor:
        _, scale, shift = self._parts(residual)
        if in_place and stream.dtype == scale.dtype:
            return stream.sub_(shift).div_(scale)
        return ((stream - shift) / scale).to(stream.dtype)

    def pull(
        self, d_stream: Tensor, stream: Tensor, residual: Tensor, *, in_place: bool = False
    ) -> tuple[Tensor, Tensor]:
        bent, scale, _ = self._parts(residual)
        d_log_scale = scale * stream * d_stream
        d_residual = torch.cat((d_log_scale * (1 - bent * bent), d_stream), dim=self.dim).to(residual.dtype)
        if in_place and d_stream.dtype == scale.dtype:
            return d_stream.mul_(scale), d_residual
        return (d_stream * scale).to(d_stream.dtype), d_residual

    def residual_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Raises ShapeError when the stream has no dimension `dim`."""
        if not -len(shape) <= self.dim < len(shape):
            raise ShapeError(
                f"dim = {self.dim}, and a stream of shape {tuple(shape)} has {len(shape)} dimensions. Set dim to the "
                "one that F and G double."
            )
        doubled = list(shape)
        doubled[self.dim] *= 2
        return tuple(doubled)

    def check_precision(self, precision: Precision) -> None:
        if precision.exact:
            raise UnsupportedError(
                f"{type(self).__name__} multiplies its streams, which takes them off the grid, so that reconstruction "
                "= 'exact' cannot hold. Use reconstruction = 'fp32' or 'fp64', or AdditiveCoupling."
            )

    def extra_repr(self) -> str:
        return f"clamp={self.clamp}, dim={self.dim}"

    def _parts(self, residual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """tanh(h / clamp), s and t."""
        h, shift = residual.chunk(2, self.dim)
        # Widened here and not by autocast, which is not the same in the forward and in the rebuild.
        wide = h if h.dtype == torch.float64 else h.float()
        bent = torch.tanh(wide / self.clamp)
        return bent, torch.exp(self.clamp * bent), shift

    def _shape_rule(self, shape: Sequence[int]) -> str:
        return f"in {type(self).__name__} F and G double dimension {self.dim}, to {self.residual_shape(shape)}."

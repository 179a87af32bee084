"""The maps: forward and inverse of a coupling. No autograd tricks here.

Legend: x1, x2 the two streams of a block's input; y1, y2 those of its output; all of one shape.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from revnet_core.errors import InPlaceError, ShapeError, located
from revnet_core.precision import Precision
from revnet_core.walk import first_parameter

PLAIN = Precision()
NetName = Literal["f", "g"]


class Coupling(nn.Module):
    """Two streams that change one after the other, each by what a net makes of the other: the first by F, then the
    second by G.

    A subclass says how a stream changes (`update`), how that is undone (`undo`), and what gradients it passes on
    (`pull`). All three get the net's output as it reaches the streams, in their dtype: the residual. With `in_place`
    the first tensor is the caller's to be written to, and may be what is returned.

    A subclass that `widens` takes a residual of a narrower dtype too, and computes with it as if it had been widened
    before: that saves a pass over the stream and a temporary of its size.
    """

    widens = False

    def __init__(self, f: nn.Module, g: nn.Module) -> None:
        super().__init__()
        self.f = f
        self.g = g
        # Whether a net changes its input in place (a leading ReLU(inplace=True), say); None until it has run.
        self._mutates_input: dict[str, bool | None] = {"f": None, "g": None}

    def update(self, stream: Tensor, residual: Tensor, *, in_place: bool = False) -> Tensor:
        """The stream behind the coupling. Differentiable where it is not in place."""
        raise NotImplementedError

    def undo(self, stream: Tensor, residual: Tensor, *, in_place: bool = False) -> Tensor:
        """The stream in front of the coupling, from the one behind it."""
        raise NotImplementedError

    def pull(
        self, d_stream: Tensor, stream: Tensor, residual: Tensor, *, in_place: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The gradients by the stream in front of the coupling and by the residual, from the gradient by the stream
        behind it; `stream` is the one in front."""
        raise NotImplementedError

    def residual_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """What F and G make of a stream of this shape."""
        return tuple(shape)

    def check_precision(self, precision: Precision) -> None:
        """Raises UnsupportedError for one that the coupling cannot keep."""

    def forward(self, x1: Tensor, x2: Tensor, *, precision: Precision = PLAIN, **side: Any) -> tuple[Tensor, Tensor]:
        """Map (x1, x2) to (y1, y2); the streams have `precision`'s dtype and stay as they are.

        Raises ShapeError when the output of F or G has a wrong shape, UnsupportedError as `check_precision`.
        """
        self.check_precision(precision)
        y1 = self.update(x1, self._residual("f", x2, precision, side))
        y2 = self.update(x2, self._residual("g", y1, precision, side))
        return y1, y2

    def inverse(self, y1: Tensor, y2: Tensor, *, precision: Precision = PLAIN, **side: Any) -> tuple[Tensor, Tensor]:
        """Rebuild (x1, x2) from (y1, y2); rounds once per operation unless the precision is exact.

        What F and G drew at random in the forward is not known here; `audit_inverse` replays it.
        """
        self.check_precision(precision)
        x2 = self.undo(y2, self._residual("g", y1, precision, side))
        x1 = self.undo(y1, self._residual("f", x2, precision, side))
        return x1, x2

    def evaluate(
        self, name: NetName, source: Tensor, side: dict[str, Any], *, own_copy: bool = False, copied: bool = False
    ) -> Tensor:
        """F or G of a stream, in the net's own dtype; the stream is protected from in-place changes.

        own_copy: the net gets a copy even when it leaves its input alone, because someone may keep it.
        copied: the source is such a copy.
        Raises ShapeError when its output has a wrong shape, InPlaceError when it changes its input in some
        calls only.
        """
        net: nn.Module = getattr(self, name)
        if torch.compiler.is_compiling():
            # The compiler drops the copy where F leaves it alone.
            return self._checked(net, source, net(as_net_input(net, source).clone(), **side))
        given = as_net_input(net, source)
        mutates = self._mutates_input[name]
        if given is source and not copied and (own_copy or mutates is not False):
            given = source.clone()
        version = None if given.is_inference() else given._version
        out = net(given, **side)
        if version is not None:
            changed = given._version != version
            if mutates is None:
                self._mutates_input[name] = changed
            elif changed and not mutates:
                raise InPlaceError(
                    f"{type(net).__name__} changed its input in place, which it did not do in its first "
                    f"call. Put a clone() in front of the in-place operation."
                )
        return self._checked(net, source, out)

    def _residual(self, name: NetName, source: Tensor, precision: Precision, side: dict[str, Any]) -> Tensor:
        with located(f"{name}: "):
            return precision.residual(self.evaluate(name, source, side))

    def _checked(self, net: nn.Module, source: Tensor, out: object) -> Tensor:
        if isinstance(out, Tensor) and out.shape == self.residual_shape(source.shape):
            return out
        got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ShapeError(
            f"{type(net).__name__} turned {tuple(source.shape)} into {got}; {self._shape_rule(source.shape)} Put "
            "strides and changes of width between sequences, where activations are stored."
        )

    def _shape_rule(self, shape: Sequence[int]) -> str:
        return "inside a coupling the shape must stay."


class AdditiveCoupling(Coupling):
    """y1 = x1 + F(x2); y2 = x2 + G(y1), with F and G any modules that keep the shape.

    Source: Gomez et al. 2017, arXiv:1707.04585, eq. 6 to 8.
    """

    widens = True

    def update(self, stream: Tensor, residual: Tensor, *, in_place: bool = False) -> Tensor:
        return stream.add_(residual) if in_place else stream + residual

    def undo(self, stream: Tensor, residual: Tensor, *, in_place: bool = False) -> Tensor:
        return stream.sub_(residual) if in_place else stream - residual

    def pull(
        self, d_stream: Tensor, stream: Tensor, residual: Tensor, *, in_place: bool = False
    ) -> tuple[Tensor, Tensor]:
        return d_stream, d_stream


def _is_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def as_net_input(net: nn.Module, stream: Tensor) -> Tensor:
    """The stream in the dtype that the net computes in: its parameters', unless autocast sees to that."""
    if stream.dtype != torch.float64 and _is_autocast(stream.device.type):
        return stream
    parameter = next(net.parameters(), None) if torch.compiler.is_compiling() else first_parameter(net)
    if parameter is None or not parameter.is_floating_point():
        return stream
    return stream.to(parameter.dtype)

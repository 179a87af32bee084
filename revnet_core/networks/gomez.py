"""RevNet as its paper's code builds it: two streams from the stem to the tail.

Depths as of `revnet`. The first unit of each stage takes and gives two streams as a coupling does, but F carries the
stride and the streams pass shortcuts. It cannot be inverted: its input is stored, and it is recomputed from that.
Source: Gomez et al. 2017, arXiv:1707.04585; layers as in github.com/renmengye/revnet-public.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from revnet_core.chain import Streams
from revnet_core.coupling import PLAIN, AdditiveCoupling, as_net_input
from revnet_core.networks.base import Network
from revnet_core.networks.units import UnitDesign, UnitShape
from revnet_core.precision import Precision
from revnet_core.sequence import ReversibleSequence


class TwoStreamUnit(nn.Module):
    """y1 = shortcut1(x1) + F(x2); y2 = shortcut2(x2) + G(y1).

    shape: that of one stream. F carries the stride; only F leaves out the batch norm and ReLU that the stem has done.
    """

    def __init__(self, design: UnitDesign, shape: UnitShape) -> None:
        super().__init__()
        self.f = design.residual_function(shape)
        self.g = design.residual_function(replace(shape, in_channels=shape.out_channels, stride=1, activate=True))
        self.shortcut1 = design.shortcut(shape)
        self.shortcut2 = design.shortcut(shape)

    def forward(self, x1_NCHW: Tensor, x2_NCHW: Tensor, *, precision: Precision = PLAIN) -> Streams:
        """The streams leave in the dtype of `precision`, on its grid where it is exact; G sees y1 as it leaves."""
        y1_NCHW = precision.enter(_run(self.shortcut1, x1_NCHW)) + precision.residual(_run(self.f, x2_NCHW))
        y2_NCHW = precision.enter(_run(self.shortcut2, x2_NCHW)) + precision.residual(_run(self.g, y1_NCHW))
        return y1_NCHW, y2_NCHW


class GomezRevNet(Network):
    """In each stage a TwoStreamUnit and, of the other units, a ReversibleSequence."""

    recomputes_units = True

    def build_stage(self, design: UnitDesign, shapes: Sequence[UnitShape]) -> list[nn.Module]:
        first, *rest = (shape.halved() for shape in shapes)
        modules: list[nn.Module] = [TwoStreamUnit(design, first)]
        if rest:
            couplings = [AdditiveCoupling(*(design.residual_function(shape) for _ in "fg")) for shape in rest]
            modules.append(
                ReversibleSequence(couplings, split_dim=None, activations=self.activations, precision=self.precision)
            )
        return modules

    def forward(self, x_NCHW: Tensor) -> Tensor:
        with self.precision.autocast(x_NCHW.device.type):
            streams = self.stem(x_NCHW).chunk(2, dim=1)
            for module in self.modules_in_order():
                if isinstance(module, ReversibleSequence):
                    streams = module(streams)
                else:
                    streams = self.run_unit(module, *streams, precision=self.precision)
            return self.tail(as_net_input(self.tail, torch.cat(streams, dim=1)))


def _run(net: nn.Module, stream: Tensor) -> Tensor:
    return net(as_net_input(net, stream))

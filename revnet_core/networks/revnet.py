"""RevNet as memcnn builds it: couplings, and units of full width where the shape changes.

Depth on CIFAR: 12n+2, bottlenecks 18n+2, of three stages of n units, since a coupling holds two residual functions of
half width. On ImageNet: 56 and 104, four stages of bottlenecks. A first unit that changes stride or width cannot be
reversed: it is a plain residual unit of full width, whose activations are stored.
Sources: Gomez et al. 2017, arXiv:1707.04585; layers as in memcnn's networks, van de Leemput et al. 2019.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from revnet_core.affine import AffineCoupling
from revnet_core.coupling import AdditiveCoupling, Coupling, as_net_input
from revnet_core.networks.base import Layout, Network
from revnet_core.networks.units import ResidualUnit, UnitDesign, UnitShape
from revnet_core.sequence import ReversibleSequence

LOG_SCALE_GAIN = 0.1


class RevNet(Network):
    """At most one ReversibleSequence a stage; see there for `activations` and `precision`."""

    def build_stage(self, design: UnitDesign, shapes: Sequence[UnitShape]) -> list[nn.Module]:
        modules: list[nn.Module] = [ResidualUnit(design, shape) for shape in shapes if not shape.keeps_shape]
        couplings = [self.build_coupling(design, shape.halved()) for shape in shapes if shape.keeps_shape]
        if couplings:
            modules.append(ReversibleSequence(couplings, activations=self.activations, precision=self.precision))
        return modules

    def build_coupling(self, design: UnitDesign, shape: UnitShape) -> Coupling:
        """shape: that of one stream."""
        return AdditiveCoupling(*(design.residual_function(shape) for _ in "fg"))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        with self.precision.autocast(x_NCHW.device.type):
            x_NCHW = self.stem(x_NCHW)
            for module in self.modules_in_order():
                reversible = isinstance(module, ReversibleSequence)
                x_NCHW = module(x_NCHW) if reversible else self.run_unit(module, x_NCHW)
            return self.tail(as_net_input(self.tail, x_NCHW))


class AffineRevNet(RevNet):
    """RevNet with affine couplings: F and G end in twice the channels of their stream, and are else the same.

    The weights of the last convolution that make the log-scale begin at `log_scale_gain` times PyTorch's initial ones.
    At their full size each coupling multiplies a stream by about e**0.4 or e**-0.4, and a deep network cannot be
    inverted: what RevNet-110 rebuilds in fp32 is off by 1e-1, with a tenth of them by 1e-6, as without scales. At zero
    the inverse is the additive one at the start.
    """

    def __init__(self, layout: Layout, *, log_scale_gain: float = LOG_SCALE_GAIN, **options: Any) -> None:
        # Before the couplings are built, which the base class does.
        self.log_scale_gain = log_scale_gain
        super().__init__(layout, **options)

    def build_coupling(self, design: UnitDesign, shape: UnitShape) -> Coupling:
        doubled = replace(shape, out_channels=2 * shape.out_channels)
        nets = [design.residual_function(doubled) for _ in "fg"]
        with torch.no_grad():
            for net in nets:
                last = net[-1]
                assert isinstance(last, nn.Conv2d)
                last.weight[: shape.out_channels].mul_(self.log_scale_gain)
        return AffineCoupling(*nets)

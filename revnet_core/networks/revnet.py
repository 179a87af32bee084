"""RevNet as memcnn builds it: couplings, and units of full width where the shape changes.

Depth on CIFAR: 12n+2, bottlenecks 18n+2, of three stages of n units, since a coupling holds two residual functions of
half width. On ImageNet: 56 and 104, four stages of bottlenecks. A first unit that changes stride or width cannot be
reversed: it is a plain residual unit of full width, whose activations are stored.
Sources: Gomez et al. 2017, arXiv:1707.04585; layers as in memcnn's networks, van de Leemput et al. 2019.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from revnet_core.coupling import AdditiveCoupling, as_net_input
from revnet_core.networks.base import Network
from revnet_core.networks.units import ResidualUnit, UnitDesign, UnitShape
from revnet_core.sequence import ReversibleSequence


class RevNet(Network):
    """At most one ReversibleSequence a stage; see there for `activations` and `precision`."""

    def build_stage(self, design: UnitDesign, shapes: Sequence[UnitShape]) -> list[nn.Module]:
        modules: list[nn.Module] = [ResidualUnit(design, shape) for shape in shapes if not shape.keeps_shape]
        couplings = [
            AdditiveCoupling(*(design.residual_function(shape.halved()) for _ in "fg"))
            for shape in shapes
            if shape.keeps_shape
        ]
        if couplings:
            modules.append(ReversibleSequence(couplings, activations=self.activations, precision=self.precision))
        return modules

    def forward(self, x_NCHW: Tensor) -> Tensor:
        with self.precision.autocast(x_NCHW.device.type):
            x_NCHW = self.stem(x_NCHW)
            for module in self.modules_in_order():
                reversible = isinstance(module, ReversibleSequence)
                x_NCHW = module(x_NCHW) if reversible else self.run_unit(module, x_NCHW)
            return self.tail(as_net_input(self.tail, x_NCHW))

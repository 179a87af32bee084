"""Pre-activation ResNet: every unit on one stream.

Depth on CIFAR: 6n+2, bottlenecks 9n+2, of three stages of n units. On ImageNet: 50 and 101, four stages of bottlenecks.
Sources: He et al. 2016, arXiv:1603.05027; the baselines of memcnn and of Gomez et al. 2017, see `units`.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from revnet_core.networks.base import Network
from revnet_core.networks.units import ResidualUnit, UnitDesign, UnitShape


class ResNet(Network):
    """The baseline: its activations are stored or checkpointed, never rebuilt."""

    def build_stage(self, design: UnitDesign, shapes: Sequence[UnitShape]) -> list[nn.Module]:
        return [ResidualUnit(design, shape) for shape in shapes]

    def forward(self, x_NCHW: Tensor) -> Tensor:
        with self.precision.autocast(x_NCHW.device.type):
            x_NCHW = self.stem(x_NCHW)
            for unit in self.modules_in_order():
                x_NCHW = self.run_unit(unit, x_NCHW)
            return self.tail(x_NCHW)

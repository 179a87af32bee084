"""Pre-activation ResNet for CIFAR, depth 6n+2: three stages of n units of two convolutions.

Source: He et al. 2016, arXiv:1603.05027; layers and widths as in memcnn's baselines.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from revnet_core.networks.base import Network, ResidualUnit, refuse_reconstruction, stem, tail
from revnet_core.precision import Precision

STAGE_CHANNELS = (16, 32, 64)


class ResNet(Network):
    """The baseline: its activations are stored or checkpointed, never rebuilt.

    Raises UnsupportedError for a reconstruction precision, which it has no streams for.
    """

    def __init__(
        self,
        units_per_stage: int,
        *,
        channels: Sequence[int] | None,
        num_classes: int,
        in_channels: int,
        activations: str,
        precision: Precision,
    ) -> None:
        super().__init__(activations=activations, precision=precision)
        refuse_reconstruction("resnet", precision)
        widths = channels or STAGE_CHANNELS
        self.blocks = units_per_stage * len(widths)
        self.reversible_blocks = 0
        width = widths[0]
        self.stem = stem(in_channels, width)
        self.units = nn.ModuleList()
        for stage, out in enumerate(widths):
            for unit in range(units_per_stage):
                first = stage > 0 and unit == 0
                self.units.append(ResidualUnit(width, out, stride=2 if first else 1, activate=(stage, unit) != (0, 0)))
                width = out
        self.tail = tail(width, num_classes)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        with self.precision.autocast(x_NCHW.device.type):
            x_NCHW = self.stem(x_NCHW)
            for unit in self.units:
                x_NCHW = self.run_unit(unit, x_NCHW)
            return self.tail(x_NCHW)

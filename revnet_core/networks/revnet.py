"""RevNet for CIFAR, depth 12n+2: three stages of n units; a coupling holds four convolutions of half width.

The first unit of stages 2 and 3 changes stride and width, so it cannot be reversed: it is a plain residual unit of
full width, and its activations are stored. Source: Gomez et al. 2017, arXiv:1707.04585; layers as in memcnn's networks.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from revnet_core.coupling import AdditiveCoupling, as_net_input
from revnet_core.networks.base import Network, ResidualUnit, residual_function, stem, tail
from revnet_core.precision import Precision
from revnet_core.sequence import ReversibleSequence


def stage_channels(units_per_stage: int) -> tuple[int, int, int]:
    """Widths of the published RevNet-38 up to its depth, and of the published RevNet-110 beyond it."""
    return (32, 64, 112) if units_per_stage <= 3 else (32, 64, 128)


class RevNet(Network):
    """One ReversibleSequence a stage; see `ReversibleSequence` for `activations` and `precision`."""

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
        widths = channels or stage_channels(units_per_stage)
        width = widths[0]
        self.stem = stem(in_channels, width)
        self.stages = nn.ModuleList()
        self.blocks = self.reversible_blocks = 0
        for stage, out in enumerate(widths):
            modules: list[nn.Module] = []
            if stage > 0:
                modules.append(ResidualUnit(width, out, stride=2))
            half = out // 2
            couplings = [
                AdditiveCoupling(*(residual_function(half, half, activate=(stage, unit) != (0, 0)) for _ in "fg"))
                for unit in range(len(modules), units_per_stage)
            ]
            if couplings:
                modules.append(ReversibleSequence(couplings, activations=activations, precision=precision))
            self.stages.append(nn.ModuleList(modules))
            self.blocks += units_per_stage
            self.reversible_blocks += len(couplings)
            width = out
        self.tail = tail(width, num_classes)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        with self.precision.autocast(x_NCHW.device.type):
            x_NCHW = self.stem(x_NCHW)
            for stage in self.stages.children():
                for module in stage.children():
                    reversible = isinstance(module, ReversibleSequence)
                    x_NCHW = module(x_NCHW) if reversible else self.run_unit(module, x_NCHW)
            return self.tail(as_net_input(self.tail, x_NCHW))

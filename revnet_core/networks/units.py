"""Residual units: what a unit is made of in each variant, and the unit of one stream.

A residual function is a chain of pre-activated convolutions: batch norm, ReLU, convolution, and again. Basic units
have two of 3x3; bottlenecks have 1x1, 3x3, 1x1 (i-RevNet's all 3x3), and end four times as wide as they are inside.

Sources: He et al. 2016, arXiv:1603.05027; Gomez et al. 2017, arXiv:1707.04585 (github.com/renmengye/revnet-public);
van de Leemput et al. 2019 (memcnn.readthedocs.io); Jacobsen et al. 2018, arXiv:1802.07088.
"""

from dataclasses import dataclass, replace
from itertools import pairwise

from torch import Tensor, nn

from revnet_core.coupling import as_net_input
from revnet_core.networks.layers import Norm, PoolAndPad, Shortcut, conv, normed_projection, projection, slow_batch_norm


@dataclass(frozen=True)
class UnitShape:
    """What one unit makes of its input.

    width     channels inside: of the 3x3 convolutions
    activate  whether the residual function opens with batch norm and ReLU
    """

    in_channels: int
    width: int
    out_channels: int
    stride: int = 1
    activate: bool = True

    @property
    def keeps_shape(self) -> bool:
        """Only such a unit can be a coupling."""
        return self.stride == 1 and self.in_channels == self.out_channels

    def halved(self) -> "UnitShape":
        """The same for one of two streams."""
        return replace(
            self, in_channels=self.in_channels // 2, width=self.width // 2, out_channels=self.out_channels // 2
        )


@dataclass(frozen=True)
class UnitDesign:
    """How a variant builds its units.

    kernels       of the convolutions of a residual function
    expansion     output channels by a stage's width
    strided       which of the convolutions carries the unit's stride; None where none does
    norm          of the units, and of stem and tail
    new_shortcut  what stands for the identity where a unit does not keep the shape; None where all keep it
    narrowing     a stage's width by channels inside
    """

    kernels: tuple[int, ...]
    expansion: int
    strided: int | None
    norm: Norm
    new_shortcut: Shortcut | None
    narrowing: int = 1

    def residual_function(self, shape: UnitShape) -> nn.Sequential:
        channels = [shape.in_channels, *[shape.width] * (len(self.kernels) - 1), shape.out_channels]
        layers: list[nn.Module] = []
        for index, (kernel, (before, after)) in enumerate(zip(self.kernels, pairwise(channels), strict=True)):
            if index > 0 or shape.activate:
                layers += [self.norm(before), nn.ReLU(inplace=True)]
            layers.append(conv(before, after, kernel, shape.stride if index == self.strided else 1))
        return nn.Sequential(*layers)

    def shortcut(self, shape: UnitShape) -> nn.Module:
        if shape.keeps_shape:
            return nn.Identity()
        assert self.new_shortcut is not None
        return self.new_shortcut(shape.in_channels, shape.out_channels, shape.stride)


MEMCNN_BASIC = UnitDesign(kernels=(3, 3), expansion=1, strided=0, norm=nn.BatchNorm2d, new_shortcut=normed_projection)
MEMCNN_BOTTLENECK = UnitDesign(
    kernels=(1, 3, 1), expansion=4, strided=1, norm=nn.BatchNorm2d, new_shortcut=normed_projection
)
GOMEZ_BASIC = UnitDesign(kernels=(3, 3), expansion=1, strided=0, norm=slow_batch_norm, new_shortcut=PoolAndPad)
GOMEZ_BOTTLENECK = UnitDesign(kernels=(1, 3, 1), expansion=4, strided=0, norm=slow_batch_norm, new_shortcut=projection)
IREVNET_BOTTLENECK = UnitDesign(
    kernels=(3, 3, 3), expansion=1, strided=None, norm=nn.BatchNorm2d, new_shortcut=None, narrowing=4
)


class ResidualUnit(nn.Module):
    """shortcut(x) + F(x)."""

    def __init__(self, design: UnitDesign, shape: UnitShape) -> None:
        super().__init__()
        self.f = design.residual_function(shape)
        self.shortcut = design.shortcut(shape)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """x may come in the dtype of residual streams; the output has that of F."""
        x_NCHW = as_net_input(self.f, x_NCHW)
        return self.f(x_NCHW) + self.shortcut(x_NCHW)

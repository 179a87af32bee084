"""i-RevNet: reversible throughout, so that its stages are one chain and only the chain's output is stored.

Depth on CIFAR: 18n+2, of three stages of n couplings, each of two bottlenecks of three 3x3 convolutions; the published
network is `irevnet164`. Its authors pair no functions and have no stem, so they count 18 blocks a stage and a depth of
163. The image enters with channels of zeros beside it, and between stages pixels become channels (SpaceToDepth), which
makes each stage four times as wide as the one before.

Three departures from their code. It puts the zeros behind the image, where we put them in front of it, see
`ZerosInFront`. It begins a later stage with a strided convolution of the stream before SpaceToDepth, we with one of
stride 1 on the rearranged stream. It has dropout.

Nothing is stored on the way, so the error of a rounded reconstruction grows through all stages;
reconstruction="exact" has none.

Source: Jacobsen et al. 2018, arXiv:1802.07088; layers as in github.com/jhjacobsen/pytorch-i-revnet.
"""

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor, nn

from revnet_core.chain import Block
from revnet_core.coupling import AdditiveCoupling, as_net_input
from revnet_core.downsampling import SpaceToDepth
from revnet_core.networks.base import Layout, Network
from revnet_core.networks.units import UnitDesign, UnitShape
from revnet_core.sequence import ReversibleSequence


class IRevNet(Network):
    """One ReversibleSequence from the padded image to the tail; the SpaceToDepth in it count as no blocks."""

    def build_stages(self, layout: Layout) -> list[list[nn.Module]]:
        blocks = [block for shapes in layout.stages() for shape in shapes for block in _blocks(layout.design, shape)]
        return [[ReversibleSequence(blocks, activations=self.activations, precision=self.precision)]]

    def forward(self, x_NCHW: Tensor) -> Tensor:
        with self.precision.autocast(x_NCHW.device.type):
            x_NCHW = self.stem(x_NCHW)
            for module in self.modules_in_order():
                x_NCHW = module(x_NCHW)
            return self.tail(as_net_input(self.tail, x_NCHW))


def _blocks(design: UnitDesign, shape: UnitShape) -> Iterator[Block]:
    if shape.stride > 1:
        yield SpaceToDepth(shape.stride)
    stream = replace(shape, in_channels=shape.out_channels, stride=1).halved()
    # Only F can be the very first; G sees what F has changed.
    yield AdditiveCoupling(design.residual_function(stream), design.residual_function(replace(stream, activate=True)))

"""Layers that every network is put together from: convolutions, shortcuts, stems and the tail.

No convolution has a bias. Padding is PyTorch's, the same on both sides, where TensorFlow, in which some of these
networks were published, pads strided convolutions on one side more.

Legend: N batch, C channels, H height, W width.
"""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torch.nn import functional

from revnet_core.errors import ShapeError

Norm = Callable[[int], nn.Module]  # of so many channels
Shortcut = Callable[[int, int, int], nn.Module]  # from in_channels to out_channels by a stride
Stem = Callable[[int, int, Norm], nn.Module]  # from in_channels to out_channels with a norm

# TensorFlow's statistics keep 0.99 of the old value, which PyTorch calls a momentum of 0.01.
slow_batch_norm: Norm = partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01)


def conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """Keeps height and width where the stride is 1; the kernel is odd."""
    return nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False)


def projection(in_channels: int, out_channels: int, stride: int) -> nn.Conv2d:
    return conv(in_channels, out_channels, 1, stride)


def normed_projection(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(projection(in_channels, out_channels, stride), nn.BatchNorm2d(out_channels))


class PoolAndPad(nn.Module):
    """Average pooling by the stride and zero channels on both sides, half of them each; no parameters.

    N,in_channels,H,W to N,out_channels,ceil(H/stride),ceil(W/stride); out_channels is not below in_channels.
    Of an odd number of zero channels the last side gets one more.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        added = out_channels - in_channels
        self.zeros = added // 2, added - added // 2

    def forward(self, x_NCHW: Tensor) -> Tensor:
        if self.stride > 1:
            # Rounded up, as the strided convolution that the shortcut is added to.
            x_NCHW = functional.avg_pool2d(x_NCHW, self.stride, ceil_mode=True)
        return functional.pad(x_NCHW, (0, 0, 0, 0, *self.zeros))


class ZerosInFront(nn.Module):
    """Injective padding: channels of zeros in front of the image's; no parameters.

    N,in_channels,H,W to N,out_channels,H,W. Raises ShapeError where out_channels is below in_channels.

    Behind the image, as in the paper's code, the zeros would be a whole stream. The first function would then see
    nothing, and in a backward the rounding errors of rebuilt zeros, which its batch norms divide by their deviation:
    in fp32 a gradient that is wrong by orders of magnitude.
    Source: Jacobsen et al. 2018, arXiv:1802.07088.
    """

    def __init__(self, in_channels: int, out_channels: int, norm: Norm) -> None:
        super().__init__()
        self.zeros = out_channels - in_channels
        if self.zeros < 0:
            raise ShapeError(
                f"in_channels = {in_channels}, channels[0] = {out_channels}; the image has to fit into it. "
                f"Give channels that begin with {in_channels} or more."
            )

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return functional.pad(x_NCHW, (0, 0, 0, 0, self.zeros, 0))


def cifar_stem(in_channels: int, out_channels: int, norm: Norm) -> nn.Sequential:
    return nn.Sequential(conv(in_channels, out_channels, 3), norm(out_channels), nn.ReLU(inplace=True))


def imagenet_stem(in_channels: int, out_channels: int, norm: Norm) -> nn.Sequential:
    """Makes height and width a quarter."""
    return nn.Sequential(
        conv(in_channels, out_channels, 7, 2),
        norm(out_channels),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, padding=1),
    )


def tail(in_channels: int, num_classes: int, norm: Norm) -> nn.Sequential:
    return nn.Sequential(
        norm(in_channels),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(in_channels, num_classes),
    )

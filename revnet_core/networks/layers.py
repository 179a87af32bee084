"""Layers that every network is put together from: convolutions, shortcuts, stems and the tail.

No convolution has a bias."""

from collections.abc import Callable

from torch import nn

Norm = Callable[[int], nn.Module]  # of so many channels
Shortcut = Callable[[int, int, int], nn.Module]  # from in_channels to out_channels by a stride
Stem = Callable[[int, int, Norm], nn.Module]  # from in_channels to out_channels with a norm


def conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """Keeps height and width where the stride is 1; the kernel is odd."""
    return nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False)


def projection(in_channels: int, out_channels: int, stride: int) -> nn.Conv2d:
    return conv(in_channels, out_channels, 1, stride)


def normed_projection(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(projection(in_channels, out_channels, stride), nn.BatchNorm2d(out_channels))


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

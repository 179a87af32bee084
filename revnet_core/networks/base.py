"""What the CIFAR networks share: the residual function, the strided unit, stem and tail.

The layers are those of memcnn's networks (van de Leemput et al. 2019, memcnn.readthedocs.io), which follow He et
al. 2016 (arXiv:1603.05027, pre-activation): no convolution has a bias; stem conv-BN-ReLU; tail BN-ReLU-pool-linear.
"""

import contextlib

import torch
from torch import Tensor, nn

from revnet_core.budget import Budgeted
from revnet_core.coupling import as_net_input
from revnet_core.errors import UnsupportedError
from revnet_core.offload import offloaded
from revnet_core.precision import Precision
from revnet_core.sequence import replayed_checkpoint


class Network(nn.Module):
    """An image classifier that knows its blocks.

    blocks             residual units
    reversible_blocks  those of them that can be rebuilt
    """

    blocks: int
    reversible_blocks: int

    def __init__(self, *, activations: str | Budgeted, precision: Precision) -> None:
        super().__init__()
        self.activations = activations
        self.precision = precision

    def run_unit(self, unit: nn.Module, x: Tensor) -> Tensor:
        """A unit that is no coupling: stored, or checkpointed or offloaded where the whole network is."""
        x = as_net_input(unit, x)
        if self.activations == "checkpointed" and torch.is_grad_enabled():
            return replayed_checkpoint(unit, x)
        with offloaded(unit) if self.activations == "offloaded" else contextlib.nullcontext():
            return unit(x)


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)


def residual_function(in_channels: int, out_channels: int, *, stride: int = 1, activate: bool = True) -> nn.Sequential:
    """[BN, ReLU], conv3x3, BN, ReLU, conv3x3; the bracket is left out where the stem has just done it."""
    lead = [nn.BatchNorm2d(in_channels), nn.ReLU(inplace=True)] if activate else []
    return nn.Sequential(
        *lead,
        conv3x3(in_channels, out_channels, stride),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
        conv3x3(out_channels, out_channels),
    )


class ResidualUnit(nn.Module):
    """x + F(x), or projection(x) + F(x) where stride or width changes."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1, activate: bool = True) -> None:
        super().__init__()
        self.f = residual_function(in_channels, out_channels, stride=stride, activate=activate)
        self.shortcut = None
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return self.f(x_NCHW) + (x_NCHW if self.shortcut is None else self.shortcut(x_NCHW))


def stem(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(conv3x3(in_channels, out_channels), nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))


def tail(in_channels: int, num_classes: int) -> nn.Sequential:
    return nn.Sequential(
        nn.BatchNorm2d(in_channels),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(in_channels, num_classes),
    )


def refuse_reconstruction(name: str, precision: Precision) -> None:
    if precision.reconstruction != "fp32":
        raise UnsupportedError(
            f"{name} carries no residual streams, so reconstruction = {precision.reconstruction!r} means nothing to "
            "it. Leave reconstruction at fp32, or use revnet."
        )

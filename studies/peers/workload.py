"""What every contender trains: a chain of couplings between a stem and a tail, and one fixed batch.

Legend: N batch, C channels of both streams together, H height, W width.
"""

import copy
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from revnet_core.networks.layers import conv, tail
from revnet_core.networks.units import MEMCNN_BASIC, UnitShape
from studies.peers.contenders import Build

CLASSES = 10


class Parts(nn.Module):
    """Stem, F and G of each coupling, and tail: the weights, without a choice of what becomes of activations.

    The stem is a bare convolution. After a ReLU, which keeps its output for the backward, memcnn would free what the
    ReLU kept.
    """

    def __init__(self, blocks: int, channels: int) -> None:
        super().__init__()
        of_stream = UnitShape(channels // 2, channels // 2, channels // 2)
        self.stem = conv(3, channels, 3, stride=1)
        self.f = nn.ModuleList(MEMCNN_BASIC.residual_function(of_stream) for _ in range(blocks))
        self.g = nn.ModuleList(MEMCNN_BASIC.residual_function(of_stream) for _ in range(blocks))
        self.tail = tail(channels, CLASSES, nn.BatchNorm2d)


class Model(nn.Module):
    """A copy of `parts` whose couplings are chained by `build`.

    A parameter has the same name whoever built the chain: that of `parts`, which comes first.
    """

    def __init__(self, parts: Parts, build: Build) -> None:
        super().__init__()
        self.parts = copy.deepcopy(parts)
        self.chain = build(list(zip(self.parts.f, self.parts.g, strict=True)))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return self.parts.tail(self.chain(self.parts.stem(x_NCHW)))


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Sizes, and what follows from them. `channels` is of both streams together and even."""

    blocks: int = 16
    channels: int = 64
    batch_size: int = 16
    image_size: int = 32

    def parts(self) -> Parts:
        """Always of the same weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return Parts(self.blocks, self.channels)

    def batch(self) -> tuple[Tensor, Tensor]:
        draws = torch.Generator().manual_seed(1)
        images_NCHW = torch.randn(self.batch_size, 3, self.image_size, self.image_size, generator=draws)
        return images_NCHW, torch.randint(CLASSES, (self.batch_size,), generator=draws)


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    images, labels = batch
    return cross_entropy(model(images), labels)


def gradients_of(model: Model, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """By all parameters, in float64; zeros where the backward gave none, as an optimizer would have it."""
    model.zero_grad(set_to_none=True)
    loss_of(model, batch).backward()
    return {
        name: torch.zeros_like(p, dtype=torch.float64) if p.grad is None else p.grad.double()
        for name, p in model.named_parameters()
    }


def relative_error(gradients: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    """Relative L2 distance over all parameters together."""
    assert gradients.keys() == reference.keys()
    error, norm = (
        torch.stack([part.norm() for part in parts]).norm().item()
        for parts in ([gradients[name] - reference[name] for name in reference], list(reference.values()))
    )
    return error / norm


def block_gradient_bytes(parts: Parts) -> int:
    """Of the parameters of one coupling's F and G."""
    nets = cast(list[nn.Module], [parts.f[0], parts.g[0]])
    return sum(p.numel() * p.element_size() for net in nets for p in net.parameters())

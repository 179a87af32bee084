"""Factories as a user would write them, of models that are small and sound."""

from typing import Any

import torch
from torch import Tensor, nn

from revnet_core import AdditiveCoupling, Precision, ReversibleSequence


class Reversible(nn.Module):
    """One coupling on two streams of eight features."""

    def __init__(self, num_classes: int, activations: Any, precision: Precision) -> None:
        super().__init__()
        self.first = nn.Linear(3 * 32 * 32, 16)
        couplings = [AdditiveCoupling(nn.Linear(8, 8), nn.Linear(8, 8))]
        self.sequence = ReversibleSequence(couplings, activations=activations, precision=precision)
        self.last = nn.Linear(16, num_classes)
        self.blocks = self.reversible_blocks = 1

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.sequence(self.first(x.flatten(1)))))


def reversible(*, num_classes: int, activations: Any, precision: Precision, **options: Any) -> nn.Module:
    return Reversible(num_classes, activations, precision)

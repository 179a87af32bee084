"""Chains with a fault that is planted, for the tests of what watches a reconstruction."""

import torch
from torch import Tensor, nn

from revnet_core import (
    AdditiveCoupling,
    Guard,
    ReversibleSequence,
)
from tests.core.nets import FP64, IMAGE_NCHW, weighted_sum

KINDS = ("conv_bn", "dropout", "counting", "nested", "conditioned", "inplace_first")
HEALTHY = 1e-10


class Wavering(nn.Module):
    """Gives another value at every call, by `step`; counts its calls."""

    def __init__(self, step: float = 0.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.step, self.calls = step, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.scale * torch.tanh(x) + self.step * self.calls


def wavering(*steps: float) -> ReversibleSequence:
    """A coupling for each step."""
    return ReversibleSequence([AdditiveCoupling(nn.Tanh(), Wavering(step)) for step in steps], precision=FP64)


def set_steps(sequence: ReversibleSequence, *steps: float) -> None:
    for block, step in zip(sequence.couplings, steps, strict=True):
        block.g.step = step  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]


def calls(sequence: ReversibleSequence) -> int:
    return sum(block.g.calls for block in sequence.couplings)  # pyright: ignore


def image(*, requires_grad: bool = True) -> Tensor:
    draws = torch.Generator().manual_seed(2)
    return torch.randn(IMAGE_NCHW, generator=draws, dtype=torch.float64).requires_grad_(requires_grad)


def step(model: nn.Module) -> None:
    weighted_sum(model(image())).backward()


def steps(model: nn.Module, count: int) -> None:
    for _ in range(count):
        step(model)


def blocks_of(guard: Guard) -> list[int]:
    return [report.block for report in guard.history]

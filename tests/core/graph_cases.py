"""What the tests of captured steps share: on a tape (tests/core) and on a GPU (tests/gpu).

Legend: N batch, P positions, C features.
"""

import copy
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor, nn

from revnet_core import AdditiveCoupling, Precision, ReversibleSequence, TrainingStep, graphs
from tests.core.nets import KINDS

CPU = torch.device("cpu")
Batch = tuple[Tensor, Tensor]


def sgd(model: nn.Module, **options: object) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), **({"lr": 0.05, "momentum": 0.9} | options))  # pyright: ignore[reportArgumentType]


def square(out: Tensor, target: Tensor) -> Tensor:
    return (out - target).square().mean()


def batches_for(kind: str, count: int, dtype: torch.dtype = torch.float64, device: torch.device = CPU) -> list[Batch]:
    shape = KINDS[kind].shape
    return [
        (torch.randn(shape, dtype=dtype, device=device), torch.randn(shape, dtype=dtype, device=device))
        for _ in range(count)
    ]


def train(step: TrainingStep, batches: list[Batch]) -> Tensor:
    losses = torch.stack([step(batch) for batch in batches])
    step.raise_if_inexact()
    return losses


def step_for(model: nn.Module, *, loss: graphs.Loss, example: Batch, cuda_graph: bool = True) -> TrainingStep:
    return TrainingStep(model, loss, sgd(model, dampening=0.1), example, cuda_graph=cuda_graph)


def clipped_step(model: nn.Module, *, example: Batch, cuda_graph: bool) -> TrainingStep:
    return TrainingStep(model, square, sgd(model), example, cuda_graph=cuda_graph, max_grad_norm=1e-3)


def assert_same_training(model: nn.Module, make_step: Callable[..., TrainingStep], batches: list[Batch]) -> None:
    """Captured as eager, bit for bit: each loss, and all that the training leaves behind."""
    twin = copy.deepcopy(model)
    eager, captured = make_step(model, cuda_graph=False), make_step(twin, cuda_graph=True)
    assert torch.equal(train(captured, batches), train(eager, batches))
    assert captured.captured
    assert_equal_states(twin, model)


def assert_equal_states(model: nn.Module, other: nn.Module) -> None:
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    for own, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert (own.grad is None) == (theirs.grad is None)
        assert own.grad is None or theirs.grad is None or torch.equal(own.grad, theirs.grad)


class Seen(nn.Module):
    """Dropout that keeps the places of what it dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.masks = deque[Tensor]()

    def forward(self, x: Tensor) -> Tensor:
        out = nn.functional.dropout(self.linear(x), 0.5, self.training)
        self.masks.append(out.detach() == 0)
        return out


def dropping(activations: str) -> tuple[ReversibleSequence, list[Seen]]:
    nets = [Seen() for _ in range(4)]
    couplings = [AdditiveCoupling(nets[0], nets[1]), AdditiveCoupling(nets[2], nets[3])]
    return ReversibleSequence(couplings, split_dim=-1, activations=activations), nets


def tokens(device: torch.device = CPU) -> Batch:
    return torch.randn(3, 4, 12, device=device), torch.randn(3, 4, 12, device=device)


def exact_beyond_its_range() -> tuple[ReversibleSequence, nn.Linear]:
    grows = nn.Linear(6, 6, bias=False)
    model = ReversibleSequence(
        [AdditiveCoupling(nn.Tanh(), nn.Tanh()), AdditiveCoupling(grows, nn.Tanh())],
        split_dim=-1,
        precision=Precision("fp32", "exact", grid_bits=20),
    )
    return model, grows


class Peeking(nn.Linear):
    """Decides by a value, which a capture has not."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * (2 if input.sum() > 0 else 1)

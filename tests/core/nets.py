"""Small F and G of every kind, sequences of them, and what one training step leaves behind.

Legend: N batch, P positions, C features of one stream, H height, W width.
"""

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from revnet_core import AdditiveCoupling, Precision, ReversibleSequence

IMAGE_NCHW = (3, 8, 5, 5)
TOKENS_NPC = (3, 4, 12)
FP64 = Precision(reconstruction="fp64")


def conv_bn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)
    )


def norm_mlp() -> nn.Module:
    return nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x_NPC: Tensor) -> Tensor:
        x_NPC = self.norm(x_NPC)
        return self.attention(x_NPC, x_NPC, x_NPC, need_weights=False)[0]


def dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.Tanh(), nn.Linear(6, 6), nn.Dropout(0.2))


def inplace_first() -> nn.Module:
    return nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(inplace=True))


class Conditioned(nn.Module):
    """Takes a tensor that needs a gradient, a mask that cannot have one, and a plain number."""

    def __init__(self) -> None:
        super().__init__()
        self.of_stream = nn.Linear(6, 6)
        self.of_condition = nn.Linear(6, 6)

    def forward(self, x_NPC: Tensor, *, condition: Tensor, mask: Tensor, scale: float) -> Tensor:
        return scale * torch.tanh(self.of_stream(x_NPC) + self.of_condition(condition)) * mask


class FullBias(nn.Module):
    """The gradient by the bias is the very tensor that arrives from above."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(*TOKENS_NPC[:-1], 6))

    def forward(self, x_NPC: Tensor) -> Tensor:
        return x_NPC + self.bias


def frozen_first() -> nn.Module:
    net = conv_bn()
    next(net.parameters()).requires_grad_(False)
    return net


class Counting(nn.Module):
    """Depends on a buffer that it changes in place and on one that it replaces."""

    calls: Tensor
    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x_NPC: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
            self.mean = 0.5 * self.mean + x_NPC.detach().mean()
        return torch.tanh(self.linear(x_NPC)) * (1 + 0.3 * self.calls) + self.mean


def spectral() -> nn.Module:
    return nn.Sequential(spectral_norm(nn.Linear(6, 6)), nn.Tanh(), nn.Linear(6, 6))


def instance_norm() -> nn.Module:
    return nn.Sequential(nn.InstanceNorm2d(4, track_running_stats=True, affine=True), nn.Conv2d(4, 4, 3, padding=1))


def nested() -> nn.Module:
    def inner() -> nn.Module:
        return nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), nn.Dropout(0.3), nn.ReLU(inplace=True))

    couplings = [AdditiveCoupling(inner(), inner()) for _ in range(2)]
    return nn.Sequential(nn.BatchNorm2d(4), ReversibleSequence(couplings, precision=FP64))


class Kind(NamedTuple):
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    split_dim: int


KINDS = {
    "conv_bn": Kind(conv_bn, IMAGE_NCHW, 1),
    "norm_mlp": Kind(norm_mlp, TOKENS_NPC, -1),
    "attention": Kind(Attention, TOKENS_NPC, -1),
    "dropout": Kind(dropout, TOKENS_NPC, -1),
    "inplace_first": Kind(inplace_first, IMAGE_NCHW, 1),
    "tanh": Kind(nn.Tanh, IMAGE_NCHW, 1),
    "identity": Kind(nn.Identity, TOKENS_NPC, -1),
    "conditioned": Kind(Conditioned, TOKENS_NPC, -1),
    "full_bias": Kind(FullBias, TOKENS_NPC, -1),
    "frozen_first": Kind(frozen_first, IMAGE_NCHW, 1),
    "counting": Kind(Counting, TOKENS_NPC, -1),
    "spectral": Kind(spectral, TOKENS_NPC, -1),
    "instance_norm": Kind(instance_norm, IMAGE_NCHW, 1),
    "nested": Kind(nested, IMAGE_NCHW, 1),
}


def sequence_of(
    kind: str, count: int = 2, *, shared: bool = False, precision: Precision = FP64, activations: str = "reconstructed"
) -> ReversibleSequence:
    """`count` couplings, or one coupling's F in all places where `shared`; always of the same weights."""
    make, _, split_dim = KINDS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        f = make()
        couplings = [AdditiveCoupling(f if shared else make(), f if shared else make()) for _ in range(count)]
    sequence = ReversibleSequence(couplings, split_dim=split_dim, precision=precision, activations=activations)
    return sequence.double() if precision.reconstruction == "fp64" else sequence


def twin_of(module: nn.Module, activations: str) -> nn.Module:
    """The same weights and buffers, with every sequence of it set to `activations`."""
    twin = copy.deepcopy(module)
    for part in twin.modules():
        if isinstance(part, ReversibleSequence):
            part.activations = activations
    return twin


def input_of(kind: str, dtype: torch.dtype = torch.float64, *, requires_grad: bool = True) -> Tensor:
    draws = torch.Generator().manual_seed(2)
    return torch.randn(KINDS[kind].shape, generator=draws, dtype=dtype).requires_grad_(requires_grad)


def side_of(kind: str) -> dict[str, Tensor | float]:
    if kind != "conditioned":
        return {}
    draws = torch.Generator().manual_seed(3)
    shape = (*TOKENS_NPC[:-1], 6)
    condition = torch.randn(shape, generator=draws, dtype=torch.float64).requires_grad_()
    return {"condition": condition, "mask": torch.rand(shape, generator=draws) > 0.3, "scale": 0.7}


class Outcome(NamedTuple):
    """All that a training step leaves behind."""

    y: Tensor
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]
    random_state: Tensor


def weighted_sum(y: Tensor) -> Tensor:
    """A loss whose gradient differs from element to element."""
    return (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum() + (y * y).mean()


def gradients_of(model: nn.Module, **inputs: object) -> dict[str, Tensor]:
    """The gradients of parameters and of those inputs that have one."""
    tensors = dict(model.named_parameters()) | {k: v for k, v in inputs.items() if isinstance(v, Tensor)}
    return {name: tensor.grad for name, tensor in tensors.items() if tensor.grad is not None}


def outcome_of(model: nn.Module, x: Tensor, y: Tensor, **side: object) -> Outcome:
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return Outcome(y.detach(), gradients_of(model, x=x, **side), buffers, torch.get_rng_state())


def training_step(model: nn.Module, x: Tensor, side: dict[str, Tensor | float] | None = None) -> Outcome:
    """Forward, loss and backward, with the same random draws every time."""
    side = side or {}
    torch.manual_seed(4)
    y = model(x, **side)
    weighted_sum(y).backward()
    return outcome_of(model, x, y, **side)


def assert_same(actual: Outcome, expected: Outcome, *, bits: bool = False) -> None:
    """Equal up to float64's rounding, or bit for bit."""
    assert actual.gradients.keys() == expected.gradients.keys()
    rtol, atol = (0, 0) if bits else (1e-8, 1e-10)
    torch.testing.assert_close(actual.gradients, expected.gradients, rtol=rtol, atol=atol)
    torch.testing.assert_close(actual.y, expected.y, rtol=rtol, atol=atol)
    torch.testing.assert_close(actual.buffers, expected.buffers, rtol=rtol, atol=atol)
    assert torch.equal(actual.random_state, expected.random_state)

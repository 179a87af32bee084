"""On the grid nothing is rounded: rebuilt inputs and gradients equal the stored run's bit for bit."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from revnet_core import AdditiveCoupling, Precision, ReconstructionError, ReversibleSequence, audit_inverse
from tests.core.nets import (
    IMAGE_NCHW,
    assert_same,
    conv_bn,
    input_of,
    sequence_of,
    training_step,
    twin_of,
    weighted_sum,
)

EXACT = Precision(reconstruction="exact")
EXACT_BF16 = Precision(compute="bf16", reconstruction="exact")


def deep(precision: Precision, couplings: int = 200) -> ReversibleSequence:
    torch.manual_seed(1)
    chain = [AdditiveCoupling(conv_bn(), conv_bn()) for _ in range(couplings)]
    return ReversibleSequence(chain, precision=precision)


def is_rebuilt_bit_for_bit(sequence: ReversibleSequence) -> bool:
    drifts = audit_inverse(sequence, input_of("conv_bn", torch.float32))
    assert len(drifts) == len(sequence.couplings)
    return all(drift.max_abs == 0 for drift in drifts)


@pytest.mark.parametrize("precision", [EXACT, EXACT_BF16], ids=["fp32", "bf16"])
def test_every_rebuilt_input_through_200_couplings_is_the_original(precision: Precision) -> None:
    assert is_rebuilt_bit_for_bit(deep(precision))


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_fp32_streams_do_not_give_the_input_back_bit_for_bit(compute: str) -> None:
    assert not is_rebuilt_bit_for_bit(deep(Precision(compute=compute)))


@pytest.mark.parametrize("activations", ["checkpointed", "reconstructed"])
@pytest.mark.parametrize("precision", [EXACT, EXACT_BF16], ids=["fp32", "bf16"])
def test_gradients_through_200_couplings_are_stored_ones_bit_for_bit(precision: Precision, activations: str) -> None:
    model = deep(precision)
    stored = training_step(twin_of(model, "stored"), input_of("conv_bn", torch.float32))
    assert all(gradient.isfinite().all() for gradient in stored.gradients.values())
    assert_same(training_step(twin_of(model, activations), input_of("conv_bn", torch.float32)), stored, bits=True)


def test_gradients_of_fp32_streams_are_not_stored_ones_bit_for_bit() -> None:
    model = deep(Precision(), couplings=20)
    stored, rebuilt = (
        training_step(twin_of(model, mode), input_of("conv_bn", torch.float32)) for mode in ("stored", "reconstructed")
    )
    assert any(not torch.equal(rebuilt.gradients[name], stored.gradients[name]) for name in stored.gradients)


@pytest.mark.parametrize("kind", ["norm_mlp", "attention", "dropout", "inplace_first", "instance_norm"])
@pytest.mark.parametrize("precision", [EXACT, EXACT_BF16], ids=["fp32", "bf16"])
def test_every_kind_of_net_is_exact(kind: str, precision: Precision) -> None:
    model = sequence_of(kind, 3, precision=precision)
    stored = training_step(twin_of(model, "stored"), input_of(kind, torch.float32))
    assert_same(training_step(twin_of(model, "reconstructed"), input_of(kind, torch.float32)), stored, bits=True)


@pytest.mark.parametrize("grid_bits", [8, 12, 16, 20])
def test_streams_lie_on_the_grid(grid_bits: int) -> None:
    precision = Precision(reconstruction="exact", grid_bits=grid_bits)
    with torch.no_grad():
        y = sequence_of("conv_bn", 3, precision=precision)(input_of("conv_bn", torch.float32))
    assert torch.equal(y * 2**grid_bits, (y * 2**grid_bits).round())


@pytest.mark.parametrize("grid_bits", [8, 12, 16, 20])
def test_a_residual_is_rounded_to_the_nearest_grid_point(grid_bits: int) -> None:
    precision = Precision(reconstruction="exact", grid_bits=grid_bits)
    limit = precision.grid_limit / 4
    residual = torch.linspace(-limit, limit, 10_001)
    expected = (residual.double() * 2**grid_bits).round() / 2**grid_bits
    assert torch.equal(precision.residual(residual).double(), expected)
    finer = residual + 2.0 ** -(grid_bits + 2)
    assert (precision.residual(finer) - finer).abs().max() <= 2.0 ** -(grid_bits + 1)


def test_rounding_passes_the_gradient_unchanged() -> None:
    x = torch.linspace(-1, 1, 7, requires_grad=True)
    EXACT.residual(x).mul(3).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.full_like(x, 3))


def test_numbers_in_range_are_added_and_subtracted_without_rounding() -> None:
    values = EXACT.residual(
        torch.tensor([-EXACT.grid_limit / 2 + 2**-16, -1 / 3, 0.0, 2**-16, 77.7, EXACT.grid_limit / 2 - 2**-16])
    )
    for a, b in itertools.product(values, values):
        assert (a + b) - b == a
        assert (a + b).double() == a.double() + b.double()


class Scale(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * torch.tanh(x)


def backward_of(*nets: nn.Module, grid_bits: int = 16) -> None:
    precision = Precision(reconstruction="exact", grid_bits=grid_bits)
    sequence = ReversibleSequence([AdditiveCoupling(net, net) for net in nets], precision=precision)
    torch.manual_seed(2)
    weighted_sum(sequence(torch.randn(IMAGE_NCHW))).backward()


@pytest.mark.parametrize(("factor", "grid_bits"), [(1e4, 16), (300.0, 16), (100.0, 20)])
def test_leaving_the_grids_range_is_noticed(factor: float, grid_bits: int) -> None:
    with pytest.raises(
        ReconstructionError, match=rf"2 couplings.*left the grid's range of .*Lower grid_bits \(now {grid_bits};"
    ):
        backward_of(Scale(factor), Scale(factor), grid_bits=grid_bits)


@pytest.mark.parametrize(("factor", "grid_bits"), [(50.0, 16), (300.0, 12), (1e4, 8), (3.0, 20)])
def test_within_the_range_nothing_is_raised(factor: float, grid_bits: int) -> None:
    backward_of(Scale(factor), Scale(factor), grid_bits=grid_bits)


class Unrepeatable(nn.Module):
    """Never gives the same twice, by means that no replay of torch's generators can undo."""

    def __init__(self, step: float) -> None:
        super().__init__()
        self.linear = nn.Conv2d(4, 4, 1)
        self.step, self.calls = step, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.linear(x) + self.step * self.calls


def test_a_net_that_is_not_deterministic_is_noticed() -> None:
    with pytest.raises(ReconstructionError, match=r"not deterministic.*use_deterministic_algorithms"):
        backward_of(conv_bn(), Unrepeatable(1e-3), conv_bn())
    backward_of(conv_bn(), Unrepeatable(0.0), conv_bn())


def test_streams_that_are_not_exact_claim_nothing() -> None:
    sequence = ReversibleSequence([AdditiveCoupling(Unrepeatable(1e-3), conv_bn())])
    weighted_sum(sequence(torch.randn(IMAGE_NCHW))).backward()

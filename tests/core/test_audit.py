"""An audit finds a fault where it is, finds none where there is none, and leaves no trace."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from revnet_core import (
    AdditiveCoupling,
    GradientParity,
    Precision,
    ReversibleSequence,
    audit_gradients,
    audit_inverse,
    audit_model_inverse,
    create_model,
)
from revnet_core.audit import Batch, BlockDrift
from tests.core.nets import FP64, conv_bn, input_of, sequence_of, side_of, training_step

FAULT = 0.25


class FaultyRecompute(nn.Module):
    """Adds FAULT to each even evaluation: to the recompute of the forward before it."""

    def __init__(self, size: float = FAULT) -> None:
        super().__init__()
        self.inner = conv_bn()
        self.size, self.calls = size, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.inner(x) + (0 if self.calls % 2 else self.size)


def chain_with_fault(place: str, fault_at: int, size: float = FAULT) -> ReversibleSequence:
    torch.manual_seed(1)
    nets = [{"f": conv_bn(), "g": conv_bn()} for _ in range(5)]
    nets[fault_at][place] = FaultyRecompute(size)
    return ReversibleSequence([AdditiveCoupling(**pair) for pair in nets], precision=FP64).double()


@pytest.mark.parametrize("place", ["f", "g"])
@pytest.mark.parametrize("fault_at", range(5))
def test_a_fault_is_found_at_its_block(fault_at: int, place: str) -> None:
    drifts = audit_inverse(chain_with_fault(place, fault_at), input_of("conv_bn"))
    assert [drift.block for drift in drifts] == list(range(5))
    # The rebuild goes from the last block to the first, so those behind the fault are rebuilt before it.
    assert all(drift.max_abs < 1e-12 for drift in drifts[fault_at + 1 :])
    assert all(drift.max_abs > FAULT / 2 for drift in drifts[: fault_at + 1])
    assert drifts[fault_at].max_abs >= FAULT * (1 - 1e-9)


def test_without_the_fault_nothing_is_found() -> None:
    drifts = audit_inverse(chain_with_fault("f", 2, size=0.0), input_of("conv_bn"))
    assert all(drift.max_abs < 1e-12 and drift.rel < 1e-12 for drift in drifts)


@pytest.mark.parametrize(
    "kind", ["conv_bn", "dropout", "attention", "inplace_first", "conditioned", "counting", "nested"]
)
def test_what_the_backward_replays_is_no_drift(kind: str) -> None:
    drifts = audit_inverse(sequence_of(kind, 3), input_of(kind), **side_of(kind))  # pyright: ignore[reportArgumentType]
    assert all(drift.max_abs < 1e-12 for drift in drifts)


@pytest.mark.parametrize("kind", ["conv_bn", "dropout", "attention"])
def test_exact_has_no_drift_and_bf16_has(kind: str) -> None:
    x = input_of(kind, torch.float32)
    exact = audit_inverse(sequence_of(kind, 3, precision=Precision(reconstruction="exact")), x)
    assert all((drift.rel, drift.max_abs, drift.max_ulp) == (0, 0, 0) for drift in exact)
    rounded = audit_inverse(sequence_of(kind, 3, precision=Precision(reconstruction="bf16")), x)
    assert all(drift.rel > 1e-4 for drift in rounded)


@pytest.mark.parametrize("reconstruction", ["fp64", "fp32", "bf16"])
def test_ulps_are_counted_at_the_root_mean_square_of_the_streams(reconstruction: str) -> None:
    precision = Precision(reconstruction=reconstruction)
    sequence = ReversibleSequence([AdditiveCoupling(FaultyConstant(), nn.Identity())], precision=precision)
    # The root mean square of the streams is 6, where one ULP is 4 * eps: the fault of 1/2 is 1/2 / (4 * eps).
    (drift,) = audit_inverse(sequence, torch.full((2, 4), 6.0))
    assert drift.max_abs == 0.5
    assert drift.max_ulp == 0.5 / (4 * torch.finfo(precision.stream_dtype).eps)
    assert drift.rel == pytest.approx(0.5 / (6 * math.sqrt(2)))


class FaultyConstant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return torch.full_like(x, 1.0 if self.calls % 2 else 0.5)


class Conditioning(nn.Module):
    """A model that gives its sequences side inputs, and holds two of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = sequence_of("conditioned", 2), sequence_of("conv_bn", 3)

    def forward(self, x_NPC: Tensor) -> Tensor:
        tokens_NPC = self.first(x_NPC, **side_of("conditioned"))
        return self.second(tokens_NPC.reshape(3, 8, 6, 1))


def test_a_model_is_audited_at_every_outermost_sequence() -> None:
    drifts = audit_model_inverse(Conditioning(), input_of("conditioned"))
    assert [drift.block for drift in drifts] == [0, 1, 2, 3, 4]
    assert all(drift.max_abs < 1e-12 for drift in drifts)
    assert audit_model_inverse(nn.Linear(3, 3), torch.zeros(2, 3)) == []


def test_blocks_of_a_network() -> None:
    model = create_model("revnet", depth=26, num_classes=10)
    assert len(audit_model_inverse(model, torch.randn(2, 3, 8, 8))) == model.reversible_blocks


class Classifier(nn.Module):
    """Convolutions and batch norm between a reversible sequence and a loss."""

    def __init__(self, precision: Precision, activations: str = "reconstructed", *, dropout: float = 0.0) -> None:
        super().__init__()
        self.sequence = sequence_of("conv_bn", 4, precision=precision, activations=activations)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(8 * 5 * 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(self.sequence(x).flatten(1).to(self.head.weight.dtype)))


def batch() -> Batch:
    return input_of("conv_bn", torch.float32).detach(), torch.tensor([0, 2, 1])


def parity(model: nn.Module) -> GradientParity:
    return audit_gradients(model, nn.functional.cross_entropy, batch())


@pytest.mark.parametrize(
    ("activations", "reconstruction"), [("stored", "fp32"), ("checkpointed", "fp32"), ("reconstructed", "exact")]
)
def test_no_angle_where_the_activations_are_the_same(activations: str, reconstruction: str) -> None:
    found = parity(Classifier(Precision(reconstruction=reconstruction), activations))
    assert (found.angle_deg, found.rel) == (0, 0)
    assert found.reference_angle_deg == found.stored_reference_angle_deg
    assert found.reference_angle_deg is not None
    assert 0 < found.reference_angle_deg < 1


def test_bf16_streams_turn_the_gradient_and_fp32_streams_less() -> None:
    coarse, fine = (parity(Classifier(Precision(reconstruction=name))) for name in ("bf16", "fp32"))
    assert coarse.angle_deg > 100 * fine.angle_deg > 0
    assert coarse.rel > 1e-3
    assert coarse.reference_angle_deg is not None
    assert coarse.reference_angle_deg > 0.01
    assert coarse.worst_parameter in dict(Classifier(Precision()).named_parameters())


def test_a_planted_fault_turns_the_gradient() -> None:
    assert parity(chain_with_loss(FAULT)).angle_deg > 0.1
    assert parity(chain_with_loss(0.0)).angle_deg < 1e-3


def chain_with_loss(size: float) -> nn.Module:
    head = nn.Sequential(nn.Flatten(), nn.Linear(8 * 5 * 5, 3))
    sequence = chain_with_fault("f", 4, size).float()
    sequence.precision = Precision()
    return nn.Sequential(sequence, head)


def test_a_random_network_has_no_float64_reference() -> None:
    found = parity(Classifier(Precision(), dropout=0.5))
    assert found.reference_angle_deg is None
    assert found.stored_reference_angle_deg is None
    assert found.angle_deg < 0.1


def test_a_loss_with_a_floating_target() -> None:
    x, _ = batch()
    found = audit_gradients(Classifier(Precision()), nn.functional.mse_loss, (x, torch.zeros(3, 3)))
    assert found.reference_angle_deg is not None
    assert found.reference_angle_deg < 1


def test_nothing_to_compare_is_an_error() -> None:
    model = Classifier(Precision()).requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of the model needs a gradient"):
        parity(model)


def test_audits_leave_no_trace() -> None:
    model = Classifier(Precision(), dropout=0.5)
    training_step(model, batch()[0])
    before = copy.deepcopy(model.state_dict())
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    state = torch.get_rng_state()
    parity(model)
    audit_model_inverse(model, batch()[0])
    audit_inverse(model.sequence, batch()[0])
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, gradients[name])
    assert torch.equal(torch.get_rng_state(), state)
    assert model.sequence.activations == "reconstructed"
    assert model.training


def audited(precision: Precision, *, pair: bool = False, reference: bool = True) -> list[BlockDrift]:
    torch.manual_seed(1)
    couplings = [AdditiveCoupling(conv_bn(), conv_bn()) for _ in range(6)]
    sequence = ReversibleSequence(couplings, precision=precision, split_dim=None if pair else 1)
    x, _ = batch()
    first, second = x.chunk(2, 1)
    return audit_inverse(sequence, (first, second) if pair else x, reference=reference)


@pytest.mark.parametrize("pair", [False, True])
def test_without_a_reference_there_are_no_errors_against_it(pair: bool) -> None:
    for drift in audited(Precision(), pair=pair, reference=False):
        assert (drift.reference_rel, drift.forward_reference_rel) == (None, None)


def referenced(drifts: list[BlockDrift]) -> list[tuple[float, float]]:
    """Of each block the errors of the rebuilt input and of the forward's."""
    found = [(d.reference_rel, d.forward_reference_rel) for d in drifts]
    return [(rebuilt, seen) for rebuilt, seen in found if rebuilt is not None and seen is not None]


@pytest.mark.parametrize("pair", [False, True])
def test_a_reference_to_fp32(pair: bool) -> None:
    drifts = audited(Precision(), pair=pair)
    errors = referenced(drifts)
    assert len(errors) == len(drifts) == 6
    # The first block sees the input itself, and each later one what more blocks have rounded.
    assert errors[0][1] == 0
    assert errors[1][1] < errors[5][1]
    for (rebuilt, seen), drift in zip(errors, drifts, strict=True):
        assert rebuilt < 1e-5
        assert abs(rebuilt - seen) <= 1.01 * drift.rel
        assert rebuilt <= 1.01 * (drift.rel + seen)
    # The last block's rebuilt input is about as far off as the forward's, and both by fp32's rounding.
    assert 1e-9 < errors[5][1] < 1e-5
    assert errors[5][0] < 5 * errors[5][1]


@pytest.mark.parametrize("pair", [False, True])
def test_a_reference_orders_the_precisions(pair: bool) -> None:
    fp64, fp32, bf16 = (
        max(max(errors) for errors in referenced(audited(Precision(reconstruction=name), pair=pair)))
        for name in ("fp64", "fp32", "bf16")
    )
    # With fp64 streams F and G still compute in fp32.
    assert 0 < fp64 < 1e-5
    assert 0 < fp32 < 1e-5
    assert bf16 > 1000 * fp32


@pytest.mark.parametrize("grid_bits", [16, 32])
def test_a_reference_tells_the_grids_rounding_from_drift(grid_bits: int) -> None:
    drifts = audited(Precision(reconstruction="exact", grid_bits=grid_bits))
    for drift, (rebuilt, seen) in zip(drifts, referenced(drifts), strict=True):
        assert drift.rel == 0
        assert rebuilt == seen
        assert (1e-6 < seen < 1e-4) if grid_bits == 16 else seen < 2e-6


def test_a_reference_shows_a_fault() -> None:
    drifts = audit_inverse(chain_with_fault("f", 2), input_of("conv_bn"), reference=True)
    for block, (rebuilt, seen) in enumerate(referenced(drifts)):
        assert seen < 1e-12
        assert (rebuilt > 1e-3) is (block <= 2)


def test_a_reference_with_side_inputs() -> None:
    side = side_of("conditioned")
    drifts = audit_inverse(sequence_of("conditioned", 3), input_of("conditioned"), reference=True, **side)  # pyright: ignore[reportArgumentType]
    assert all(rebuilt < 1e-12 and seen < 1e-12 for rebuilt, seen in referenced(drifts))


def test_a_models_blocks_have_a_reference_each() -> None:
    model = Classifier(Precision())
    state = copy.deepcopy(model.state_dict())
    errors = referenced(audit_model_inverse(model, batch()[0], reference=True))
    assert len(errors) == 4
    assert all(error < 1e-5 for pair in errors for error in pair)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)

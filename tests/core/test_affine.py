"""Affine couplings keep what additive ones promise, but for the exact grid, and their inverse divides.

Legend: N batch, P positions, C features of one stream.
"""

import pytest
import torch
from torch import Tensor, nn

from revnet_core import (
    ACTIVATIONS,
    AdditiveCoupling,
    AffineCoupling,
    Budgeted,
    Precision,
    ReversibleSequence,
    ShapeError,
    SpaceToDepth,
    UnsupportedError,
    audit_gradients,
    audit_inverse,
    audit_model_inverse,
)
from tests.core.nets import (
    FP64,
    KINDS,
    assert_same,
    conv_bn,
    gradients_of,
    input_of,
    outcome_of,
    side_of,
    training_step,
    twin_of,
    weighted_sum,
)
from tests.core.test_budget import forward_and_count

SAVING = ("checkpointed", "offloaded", "reconstructed")
DRAWING_OR_STATEFUL = {"dropout", "counting", "spectral", "nested"}


class Doubled(nn.Module):
    """Two nets of a kind, what the one makes of the stream beside what the other does; small, so that five couplings
    do not raise the gradients by orders of magnitude, and their rounding with them."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        make, _, self.dim = KINDS[kind]
        self.scale, self.shift = make(), make()

    def forward(self, x: Tensor, **side: Tensor | float) -> Tensor:
        # Only the second sees the stream itself, which it may change in place.
        return 0.25 * torch.cat((self.scale(x.clone(), **side), self.shift(x, **side)), dim=self.dim)


def affine(kind: str, count: int = 2, activations: str = "reconstructed", *, mixed: bool = False) -> ReversibleSequence:
    """`count` couplings of float64, every other one additive where `mixed`; always of the same weights."""
    make, _, dim = KINDS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        couplings = [
            AdditiveCoupling(make(), make())
            if mixed and index % 2
            else AffineCoupling(Doubled(kind), Doubled(kind), dim=dim)
            for index in range(count)
        ]
    return ReversibleSequence(couplings, split_dim=dim, precision=FP64, activations=activations).double()


def test_its_map_is_the_one_of_the_paper() -> None:
    h = torch.tensor([[0.5, -4.0]], dtype=torch.float64)
    t = torch.tensor([[2.0, 3.0]], dtype=torch.float64)

    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat((h, t), dim=1)

    x1, x2 = torch.tensor([[[1.0, -2.0]], [[3.0, 5.0]]], dtype=torch.float64)
    y1, y2 = AffineCoupling(Constant(), Constant(), clamp=1.5)(x1, x2, precision=FP64)
    scale = torch.exp(1.5 * torch.tanh(h / 1.5))
    torch.testing.assert_close((y1, y2), (x1 * scale + t, x2 * scale + t))
    assert scale[0, 1] > torch.exp(torch.tensor(-1.5))


@pytest.mark.parametrize("activations", SAVING)
@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_leaves_what_stored_leaves(kind: str, count: int, activations: str) -> None:
    stored = affine(kind, count, "stored")
    saving = twin_of(stored, activations)
    expected = training_step(twin_of(stored, "stored"), input_of(kind), side_of(kind))
    assert expected.y.isfinite().all()
    assert_same(training_step(saving, input_of(kind), side_of(kind)), expected)


def test_gradients_are_those_of_differences() -> None:
    model, x = affine("norm_mlp", 2), input_of("norm_mlp")
    training_step(model, x)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(5), dtype=x.dtype)
    with torch.no_grad():
        above, below = (weighted_sum(model(x + step * direction)) for step in (1e-6, -1e-6))
    assert x.grad is not None
    assert (x.grad * direction).sum().item() == pytest.approx(((above - below) / 2e-6).item(), rel=1e-6)


@pytest.mark.parametrize("activations", SAVING)
@pytest.mark.parametrize("kind", ["conv_bn", "dropout", "conditioned", "inplace_first"])
def test_both_couplings_in_one_sequence(kind: str, activations: str) -> None:
    stored = affine(kind, 5, "stored", mixed=True)
    saving = twin_of(stored, activations)
    assert_same(
        training_step(saving, input_of(kind), side_of(kind)), training_step(stored, input_of(kind), side_of(kind))
    )


class Ignoring(nn.Module):
    """A scale that depends on nothing, so that no gradient goes through the net."""

    def forward(self, x_NPC: Tensor) -> Tensor:
        return torch.full((*x_NPC.shape[:-1], 2 * x_NPC.shape[-1]), 0.7, dtype=x_NPC.dtype)


@pytest.mark.parametrize("frozen", [True, False])
def test_the_scale_acts_on_the_gradient_also_where_the_net_has_none(frozen: bool) -> None:
    outcomes = []
    for activations in ("stored", "reconstructed"):
        torch.manual_seed(1)
        f: nn.Module = nn.Linear(6, 12).requires_grad_(False) if frozen else Ignoring()
        model = ReversibleSequence(
            [AffineCoupling(f, Ignoring(), dim=-1)], split_dim=-1, precision=FP64, activations=activations
        ).double()
        outcomes.append(training_step(model, input_of("norm_mlp")))
    assert_same(outcomes[1], outcomes[0])
    assert not torch.equal(outcomes[0].gradients["x"], torch.ones_like(outcomes[0].gradients["x"]))


@pytest.mark.parametrize("used", [0, 1])
def test_one_of_the_two_outputs_may_be_unused(used: int) -> None:
    found = []
    for activations in ("stored", "reconstructed"):
        sequence = affine("conv_bn", 3, activations)
        sequence.split_dim = None
        first, second = (t.clone().requires_grad_() for t in input_of("conv_bn", requires_grad=False).chunk(2, 1))
        weighted_sum(sequence((first, second))[used]).backward()
        found.append([first.grad, second.grad, *(p.grad for p in sequence.parameters())])
    torch.testing.assert_close(found[1], found[0], rtol=1e-8, atol=1e-10)


def test_the_callers_tensors_stay_as_they_are() -> None:
    sequence = affine("conv_bn", 3)
    sequence.split_dim = None
    first, second = (t.clone().requires_grad_() for t in input_of("conv_bn", requires_grad=False).chunk(2, 1))
    y1, y2 = sequence((first, second))
    d1, d2 = torch.ones_like(y1), torch.ones_like(y2)
    kept = [t.detach().clone() for t in (first, second, y1, y2, d1, d2)]
    torch.autograd.backward((y1, y2), (d1, d2))
    for now, before in zip((first, second, y1, y2, d1, d2), kept, strict=True):
        assert torch.equal(now, before)


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - DRAWING_OR_STATEFUL))
def test_inverse_gives_the_input_back(kind: str) -> None:
    sequence = affine(kind, 3)
    with torch.no_grad():
        x = sequence.inverse(sequence(input_of(kind), **side_of(kind)), **side_of(kind))
    torch.testing.assert_close(x, input_of(kind).detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("reconstruction", ["fp32", "bf16"])
@pytest.mark.parametrize("inside", [True, False])
def test_autocast_is_that_of_the_forward(inside: bool, reconstruction: str) -> None:
    """Against `stored`, of the same arithmetic, from which only the rounding of rebuilt streams takes it away."""
    found = []
    for activations in ("stored", "reconstructed"):
        model = affine("conv_bn", 2, activations).float()
        model.precision = Precision("bf16" if inside else "fp32", reconstruction)
        x = input_of("conv_bn", torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not inside):
            y = model(x)
        weighted_sum(y).backward()
        found.append((y, torch.cat([gradient.flatten() for gradient in gradients_of(model, x=x).values()])))
    assert torch.equal(found[0][0], found[1][0])
    assert (found[1][1] - found[0][1]).norm() < 0.05 * found[0][1].norm()


@pytest.mark.parametrize("fitting", [0, 0.9, 1, 2.5, 5, 100])
@pytest.mark.parametrize("kind", ["conv_bn", "tanh"])
def test_a_budget_counts_what_the_products_save(kind: str, fitting: float) -> None:
    def saved_bytes(model: ReversibleSequence) -> int:
        """Once it is known which nets leave their input alone."""
        model(input_of(kind))
        return forward_and_count(model, input_of(kind)).saved_bytes

    two, three = (saved_bytes(affine(kind, n, "stored")) for n in (2, 3))
    block_bytes = three - two
    model, x = affine(kind, 5), input_of(kind)
    stream_bytes = x.numel() * x.element_size() // 2
    model.activations = Budgeted(budget_bytes := int(fitting * block_bytes) + stream_bytes)
    assert forward_and_count(model, x).saved_bytes == 0
    second_bytes = forward_and_count(model, x).saved_bytes
    # Between the reconstructed and the stored part are two streams, one's output and the other's input.
    assert min(int(fitting), 5) * block_bytes <= second_bytes + stream_bytes <= budget_bytes + 3 * stream_bytes
    expected = training_step(twin_of(model, "stored"), input_of(kind))
    assert_same(training_step(model, input_of(kind)), expected)


def test_a_budget_holds_where_streams_are_rearranged() -> None:
    torch.manual_seed(1)
    couplings = [
        AffineCoupling(nn.Conv2d(2, 4, 1), nn.Conv2d(2, 4, 1)),
        SpaceToDepth(),
        *(AffineCoupling(nn.Conv2d(8, 16, 1), nn.Conv2d(8, 16, 1)) for _ in range(3)),
    ]
    model = ReversibleSequence(couplings, activations="stored", precision=FP64).double()
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64, requires_grad=True)
    model(x)
    stored_bytes = forward_and_count(model, x).saved_bytes
    for part in (0.3, 0.6, 1.1):
        model.activations = Budgeted(budget_bytes := int(part * stored_bytes))
        model(x)
        between_bytes = x.numel() * x.element_size() if part < 1 else 0
        assert forward_and_count(model, x).saved_bytes <= budget_bytes + between_bytes
    assert forward_and_count(model, x).saved_bytes == stored_bytes


def test_state_dict_keys_are_those_of_additive_couplings() -> None:
    keys = [kind(conv_bn(), conv_bn()).state_dict().keys() for kind in (AffineCoupling, AdditiveCoupling)]
    assert keys[0] == keys[1]


# What cannot be


def test_it_cannot_be_exact() -> None:
    exact = Precision(reconstruction="exact")
    message = (
        r"couplings\[1\]: AffineCoupling multiplies its streams.*Use reconstruction = 'fp32' or 'fp64', or Additive"
    )
    couplings = [AdditiveCoupling(nn.Tanh(), nn.Tanh()), AffineCoupling(Doubled("tanh"), Doubled("tanh"))]
    with pytest.raises(UnsupportedError, match=message):
        ReversibleSequence(couplings, precision=exact)
    sequence = ReversibleSequence(couplings)
    with pytest.raises(UnsupportedError, match=message):
        sequence.precision = exact
    assert sequence.precision == Precision()
    with pytest.raises(UnsupportedError, match="AffineCoupling multiplies"):
        couplings[1](*torch.zeros(2, 1, 4, 5, 5), precision=exact)


@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_a_net_that_does_not_double_is_named(activations: str) -> None:
    couplings = [AffineCoupling(Doubled("conv_bn"), nn.Conv2d(4, 4, 1))]
    with pytest.raises(
        ShapeError,
        match=r"couplings\[0\]\.g: Conv2d turned \(3, 4, 5, 5\) into \(3, 4, 5, 5\); in AffineCoupling F and G double "
        r"dimension 1, to \(3, 8, 5, 5\)",
    ):
        ReversibleSequence(couplings, activations=activations)(torch.zeros(3, 8, 5, 5, requires_grad=True))


def test_a_dimension_that_is_not_there_is_named() -> None:
    with pytest.raises(ShapeError, match=r"dim = 4, and a stream of shape \(3, 4\) has 2 dimensions"):
        AffineCoupling(nn.Linear(4, 8), nn.Linear(4, 8), dim=4)(torch.zeros(3, 4), torch.zeros(3, 4))


@pytest.mark.parametrize("clamp", [0.0, -1.0, float("nan")])
def test_a_clamp_that_bounds_nothing_is_refused(clamp: float) -> None:
    with pytest.raises(UnsupportedError, match=r"clamp = .*above 0"):
        AffineCoupling(nn.Tanh(), nn.Tanh(), clamp=clamp)


# Compiled


@pytest.mark.parametrize("activations", ["stored", "checkpointed", "reconstructed"])
@pytest.mark.parametrize("kind", ["conv_bn", "conditioned", "inplace_first"])
def test_the_whole_in_one_graph(kind: str, activations: str) -> None:
    torch._dynamo.reset()
    expected = training_step(affine(kind, 3, "stored", mixed=True), input_of(kind), side_of(kind))
    model, x, side = affine(kind, 3, activations, mixed=True), input_of(kind), side_of(kind)
    torch.manual_seed(4)
    y = torch.compile(model, fullgraph=True, backend="aot_eager")(x, **side)
    weighted_sum(y).backward()
    assert_same(outcome_of(model, x, y, **side), expected)
    torch._dynamo.reset()


# Audited


@pytest.mark.parametrize("kind", ["conv_bn", "dropout", "conditioned", "counting", "nested"])
def test_its_inverse_is_audited(kind: str) -> None:
    drifts = audit_inverse(affine(kind, 3), input_of(kind), **side_of(kind))  # pyright: ignore[reportArgumentType]
    assert all(drift.max_abs < 1e-10 for drift in drifts)


def test_a_coarse_reconstruction_shows_in_the_audits() -> None:
    def model(reconstruction: str) -> nn.Module:
        sequence = affine("conv_bn", 3).float()
        sequence.precision = Precision(reconstruction=reconstruction)
        return nn.Sequential(sequence, nn.Flatten(), Wide(nn.Linear(8 * 5 * 5, 3)))

    x, labels = input_of("conv_bn", torch.float32).detach(), torch.tensor([0, 2, 1])
    coarse, fine = (audit_gradients(model(name), nn.functional.cross_entropy, (x, labels)) for name in ("bf16", "fp32"))
    assert coarse.angle_deg > 100 * fine.angle_deg
    assert fine.rel < 1e-3
    assert fine.reference_rel is not None
    coarse_drifts, fine_drifts = (audit_model_inverse(model(name), x) for name in ("bf16", "fp32"))
    for coarse_one, fine_one in zip(coarse_drifts, fine_drifts, strict=True):
        assert coarse_one.rel > 1000 * fine_one.rel > 0


class Wide(nn.Module):
    """Its net in the dtype of its parameters, whatever comes in."""

    def __init__(self, net: nn.Linear) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.to(self.net.weight.dtype))

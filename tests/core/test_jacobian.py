"""Singular values are those of the dense Jacobian, and the error they predict is about the one that a rebuild has."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from revnet_core import (
    AdditiveCoupling,
    AffineCoupling,
    BlockAmplification,
    JacobianBounds,
    Precision,
    PrecisionError,
    ReversibleSequence,
    SpaceToDepth,
    UnsupportedError,
    audit_amplification,
    audit_inverse,
    singular_values,
)
from revnet_core.chain import ChainRun, buffers
from revnet_core.coupling import Coupling
from revnet_core.jacobian import inverse_map
from tests.core.nets import FP64, KINDS, conv_bn, input_of, norm_mlp, side_of
from tests.core.test_affine import Doubled

ENOUGH = 1000


def coupling_of(kind: str, *, affine: bool) -> Coupling:
    make, _, dim = KINDS[kind]
    torch.manual_seed(1)
    if affine:
        return AffineCoupling(Doubled(kind), Doubled(kind), dim=dim).double()
    return AdditiveCoupling(make(), make()).double()


def streams_of(kind: str) -> tuple[Tensor, Tensor]:
    first, second = input_of(kind, requires_grad=False).chunk(2, KINDS[kind].split_dim)
    return first.clone(), second.clone()


def dense(coupling: nn.Module, x1: Tensor, x2: Tensor, **options: Any) -> Tensor:
    """All singular values of the whole Jacobian."""

    def joined(*x: Tensor) -> Tensor:
        return torch.cat([y.flatten() for y in copy.deepcopy(coupling)(*x, **options)])

    by_streams = torch.autograd.functional.jacobian(joined, (x1, x2))
    return torch.linalg.svdvals(torch.cat([part.flatten(1) for part in by_streams], dim=1))


def assert_bounds(found: JacobianBounds, singular: Tensor, rel: float = 1e-3) -> None:
    assert found.largest == pytest.approx(singular[0].item(), rel=rel)
    assert found.smallest == pytest.approx(singular[-1].item(), rel=rel)
    # Each is approached from its own side.
    assert found.largest <= singular[0] * (1 + 1e-9)
    assert found.smallest >= singular[-1] * (1 - 1e-9)


@pytest.mark.parametrize("affine", [False, True], ids=["additive", "affine"])
@pytest.mark.parametrize(
    "kind", ["conv_bn", "norm_mlp", "attention", "inplace_first", "tanh", "conditioned", "nested", "dropout"]
)
def test_the_ends_of_the_dense_jacobians_spectrum(kind: str, affine: bool) -> None:
    coupling, x, side = coupling_of(kind, affine=affine), streams_of(kind), side_of(kind)
    plain = copy.deepcopy(coupling)
    for part in plain.modules():
        if isinstance(part, ReversibleSequence):
            part.activations = "stored"
    torch.manual_seed(4)
    singular = dense(plain, *x, precision=FP64, **side)
    torch.manual_seed(4)  # the same draws
    assert_bounds(singular_values(coupling, *x, iterations=ENOUGH, **side), singular)  # pyright: ignore[reportArgumentType]


def test_few_iterations_are_near_already() -> None:
    coupling, x = coupling_of("norm_mlp", affine=True), streams_of("norm_mlp")
    assert_bounds(singular_values(coupling, *x, iterations=30), dense(coupling, *x, precision=FP64), rel=0.1)


def test_another_coupling_has_others() -> None:
    """The comparison's negative control."""
    coupling, x = coupling_of("norm_mlp", affine=False), streams_of("norm_mlp")
    singular = dense(coupling, *x, precision=FP64)
    with torch.no_grad():
        coupling.f.get_parameter("3.weight").mul_(1.1)
    with pytest.raises(AssertionError):
        assert_bounds(singular_values(coupling, *x, iterations=ENOUGH), singular)


def linear(factor: float, rows: int = 3) -> nn.Linear:
    net = nn.Linear(3, rows, bias=False).double()
    with torch.no_grad():
        net.weight.copy_(factor * torch.eye(rows, 3))
    return net


def test_a_shear_has_the_singular_values_of_its_matrix() -> None:
    """y1 = x1, y2 = x2 + 2 x1: the matrix (1 0; 2 1), whose singular values are sqrt(2) + 1 and sqrt(2) - 1."""
    found = singular_values(AdditiveCoupling(linear(0), linear(2)), *torch.zeros(2, 4, 3, dtype=torch.float64))
    assert (found.largest, found.smallest) == pytest.approx((2**0.5 + 1, 2**0.5 - 1), rel=1e-9)


def test_a_constant_scale_is_the_singular_value() -> None:
    class Constant(nn.Module):
        def __init__(self, log_scale: float) -> None:
            super().__init__()
            self.log_scale = log_scale

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat((torch.full_like(x, self.log_scale), torch.ones_like(x)), dim=1)

    coupling = AffineCoupling(Constant(100.0), Constant(-100.0), clamp=1.5)
    found = singular_values(coupling, *torch.randn(2, 4, 3, dtype=torch.float64))
    scale = torch.exp(torch.tensor(1.5, dtype=torch.float64)).item()
    assert (found.largest, found.smallest) == pytest.approx((scale, 1 / scale), rel=1e-6)


class Half(nn.Module):
    """A map of pairs that is no coupling; its inverse multiplies by `factor`, which is right for 2."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        return x2 / 2, x1

    def inverse(self, y1: Tensor, y2: Tensor) -> tuple[Tensor, Tensor]:
        return y2, y1 * self.factor


@pytest.mark.parametrize(("factor", "smallest"), [(2.0, 0.5), (5.0, 0.2)])
def test_any_module_with_an_inverse_will_do(factor: float, smallest: float) -> None:
    """Also a wrong one, of which the smallest singular value tells."""
    found = singular_values(Half(factor), *torch.randn(2, 4, 3, dtype=torch.float64))
    assert (found.largest, found.smallest) == pytest.approx((1.0, smallest), rel=1e-6)


def test_space_to_depth_only_rearranges() -> None:
    found = singular_values(SpaceToDepth(), *torch.randn(2, 2, 3, 4, 4, dtype=torch.float64))
    assert (found.largest, found.smallest) == pytest.approx((1, 1), rel=1e-12)


@pytest.mark.parametrize("kind", ["conv_bn", "dropout", "counting", "spectral"])
def test_it_leaves_no_trace_and_starts_from_its_own_draws(kind: str) -> None:
    coupling, x = coupling_of(kind, affine=True), streams_of(kind)
    sequence = ReversibleSequence([coupling], split_dim=None, precision=FP64)
    state_dict = copy.deepcopy(coupling.state_dict())
    found = []
    for seed in (5, 5) if kind == "dropout" else (5, 6):
        torch.manual_seed(seed)
        random_state = torch.get_rng_state()
        found.append((singular_values(coupling, *x, iterations=3), audit_amplification(sequence, x, iterations=3)))
        assert torch.equal(torch.get_rng_state(), random_state)
    assert found[0] == found[1]
    torch.testing.assert_close(coupling.state_dict(), state_dict, rtol=0, atol=0)
    assert coupling.training
    assert all(p.grad is None for p in coupling.parameters())
    assert all(not t.requires_grad for t in x)


def test_what_cannot_be_computed_is_refused() -> None:
    coupling, x = coupling_of("tanh", affine=False), streams_of("tanh")
    sequence = ReversibleSequence([coupling], split_dim=None, precision=FP64)
    with pytest.raises(ValueError, match="iterations = 0; at least 1"):
        singular_values(coupling, *x, iterations=0)
    with pytest.raises(ValueError, match="probes = 0; at least 1"):
        audit_amplification(sequence, x, probes=0)
    with pytest.raises(PrecisionError, match=r"the streams are torch.int64; allowed: torch.float64"):
        singular_values(coupling, x[0].long(), x[1].long())


# Through a whole sequence


def chain(count: int, precision: Precision, *, affine: bool, kind: str = "conv_bn") -> ReversibleSequence:
    make, _, dim = KINDS[kind]
    torch.manual_seed(1)
    couplings = [
        AffineCoupling(Doubled(kind), Doubled(kind), dim=dim) if affine else AdditiveCoupling(make(), make())
        for _ in range(count)
    ]
    sequence = ReversibleSequence(couplings, split_dim=dim, precision=precision)
    return sequence.double() if precision == FP64 else sequence


def input_for(sequence: ReversibleSequence, dtype: torch.dtype = torch.float32) -> Tensor:
    shape = (4, 8, 9, 9) if sequence.split_dim == 1 else (4, 16, 12)
    return torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=dtype)


def factors(sequence: ReversibleSequence) -> list[float]:
    """Of each block the predicted error by the measured one."""
    x = input_for(sequence)
    predicted, measured = audit_amplification(sequence, x, iterations=3), audit_inverse(sequence, x)
    assert [p.block for p in predicted] == [m.block for m in measured]
    return [p.predicted_rel / m.rel for p, m in zip(predicted, measured, strict=True)]


@pytest.mark.parametrize("affine", [False, True], ids=["additive", "affine"])
@pytest.mark.parametrize("kind", ["conv_bn", "norm_mlp"])
@pytest.mark.parametrize("count", [1, 6, 16])
@pytest.mark.parametrize("reconstruction", ["fp32", "bf16"])
def test_the_predicted_error_is_about_the_measured_one(
    kind: str, count: int, affine: bool, reconstruction: str
) -> None:
    """Found were 0.76 to 1.85 times as much."""
    found = factors(chain(count, Precision(reconstruction=reconstruction), affine=affine, kind=kind))
    assert len(found) == count
    assert all(1 / 3 < factor < 3 for factor in found), found


class OfLastBits(nn.Module):
    """Adds what the last bits of its input decide, as rounding does, but a thousand times as much."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = conv_bn()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + 1e-4 * torch.sin(1e8 * x).detach()


def test_what_f_and_g_round_themselves_is_predicted() -> None:
    torch.manual_seed(1)
    sequence = ReversibleSequence([AdditiveCoupling(OfLastBits(), OfLastBits()) for _ in range(6)])
    found = factors(sequence)
    assert all(1 / 2 < factor < 2 for factor in found), found
    plain = audit_amplification(chain(6, Precision(), affine=False), input_for(sequence), iterations=3)
    rough = audit_amplification(sequence, input_for(sequence), iterations=3)
    assert rough[0].predicted_rel > 100 * plain[0].predicted_rel


@pytest.mark.parametrize("affine", [False, True], ids=["additive", "affine"])
def test_gain_and_bounds_are_those_of_the_dense_jacobian(affine: bool) -> None:
    sequence, x = chain(2, FP64, affine=affine, kind="norm_mlp"), input_of("norm_mlp", requires_grad=False)
    last = audit_amplification(sequence, x, iterations=ENOUGH, probes=100)[1]
    first_coupling, second_coupling = sequence.couplings
    singular = dense(second_coupling, *first_coupling(*x.chunk(2, -1), precision=FP64), precision=FP64).detach()
    assert_bounds(JacobianBounds(last.largest, last.smallest), singular)
    assert last.noise_gain == pytest.approx(singular.reciprocal().square().mean().sqrt().item(), rel=0.05)
    assert last.bound == pytest.approx(1 / singular[-1].item(), rel=1e-3)


def test_bounds_multiply_and_errors_do_not() -> None:
    found = audit_amplification(chain(16, Precision(), affine=False), input_for(chain(1, Precision(), affine=False)))
    for one in found:
        assert one.smallest < 1 < one.noise_gain < one.bound
        assert one.predicted_rel < one.bound_rel
    assert found[0].bound_rel > 100 * found[0].predicted_rel


def amplified(reconstruction: str, grid_bits: int = 16) -> list[BlockAmplification]:
    sequence = chain(4, Precision(reconstruction=reconstruction, grid_bits=grid_bits), affine=False)
    return audit_amplification(sequence, input_for(sequence), iterations=3)


def test_the_streams_precision_is_what_is_predicted() -> None:
    fp64, fp32, bf16 = (amplified(name) for name in ("fp64", "fp32", "bf16"))
    for wide, plain, narrow in zip(fp64, fp32, bf16, strict=True):
        assert plain.predicted_rel == pytest.approx(wide.predicted_rel * 2**29, rel=0.2)
        # What F and G round themselves does not grow with the streams' rounding.
        assert 0.5 < narrow.predicted_rel / plain.predicted_rel / 2**16 < 1
        assert narrow.noise_gain == pytest.approx(plain.noise_gain, rel=1e-4)


@pytest.mark.parametrize("grid_bits", [16, 32])
def test_an_exact_reconstruction_has_no_error_to_enlarge(grid_bits: int) -> None:
    for one in amplified("exact", grid_bits):
        assert (one.predicted_rel, one.bound_rel) == (0, 0)
        assert one.noise_gain > 1


def scaled_chain(factor: float) -> ReversibleSequence:
    """Affine couplings with log-scales that are so many times as large."""
    sequence = chain(8, Precision(), affine=True)
    with torch.no_grad():
        for coupling in sequence.couplings:
            for name in ("f", "g"):
                coupling.get_parameter(f"{name}.scale.3.weight").mul_(factor)
    return sequence


def test_an_error_that_explodes_is_predicted_too() -> None:
    sequence = scaled_chain(60.0)
    assert audit_inverse(sequence, input_for(sequence))[0].rel > 1e-4
    found = factors(sequence)
    assert all(1 / 3 < factor < 3 for factor in found), found


def test_a_prediction_for_another_network_is_none_for_this() -> None:
    """The comparison's negative control."""
    mild, strong = scaled_chain(1.0), scaled_chain(60.0)
    x = input_for(mild)
    for predicted, measured in ((mild, strong), (strong, mild)):
        factor = audit_amplification(predicted, x, iterations=3)[0].predicted_rel / audit_inverse(measured, x)[0].rel
        assert not 1 / 10 < factor < 10


def test_the_inverse_is_the_one_that_the_rebuild_runs() -> None:
    """With batch norm's statistics of the forward, which are constants to it; found anew they would take out what an
    error has in common everywhere."""
    sequence = chain(1, FP64, affine=False)
    x = input_for(sequence, torch.float64)
    pushed = []
    for bitwise in (False, True):
        run = ChainRun(list(sequence.couplings), FP64, {}, bitwise=bitwise)  # pyright: ignore[reportArgumentType]
        with torch.no_grad():
            y = run.forward(buffers([x.clone()], 1), lambda *_: None)
        everywhere = (torch.ones_like(y[0]), torch.ones_like(y[1]))
        back = inverse_map(run, 0, y)
        off = run.rebuild(buffers([t + 1e-7 * e for t, e in zip(y, everywhere, strict=True)], 0))
        pushed.append(torch.cat(back.push(everywhere)))
        # A few ReLUs turn over.
        torch.testing.assert_close((torch.cat(off) - torch.cat(back.value)) / 1e-7, pushed[-1], rtol=1e-3, atol=1e-3)
    reused, found_anew = pushed
    assert (found_anew - reused).norm() > 0.1 * reused.norm()


def test_side_inputs_pairs_and_rearrangements() -> None:
    torch.manual_seed(1)
    couplings = [
        AdditiveCoupling(nn.Conv2d(2, 2, 1), nn.Tanh()),
        SpaceToDepth(),
        AffineCoupling(nn.Conv2d(8, 16, 1), nn.Conv2d(8, 16, 1)),
    ]
    sequence = ReversibleSequence(couplings, split_dim=None, precision=FP64).double()
    found = audit_amplification(sequence, (torch.randn(2, 2, 4, 4).double(), torch.randn(2, 2, 4, 4).double()))
    assert (found[1].largest, found[1].smallest, found[1].noise_gain) == pytest.approx((1, 1, 1), rel=1e-12)
    assert found[1].predicted_rel == pytest.approx(found[2].predicted_rel, rel=1e-12)
    conditioned = chain(2, FP64, affine=True, kind="conditioned")
    x = input_of("conditioned", requires_grad=False)
    assert len(audit_amplification(conditioned, x, **side_of("conditioned"))) == 2  # pyright: ignore[reportArgumentType]


def test_norm_mlp_is_twice_differentiable_in_float32() -> None:
    x1, x2 = torch.randn(2, 3, 4, 6)
    found = singular_values(AdditiveCoupling(norm_mlp(), norm_mlp()), x1, x2, iterations=20)
    assert 0 < found.smallest < 1 < found.largest


class _Tanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (y,) = ctx.saved_tensors
        return grads[0] * (1 - y * y)


class _OnceDifferentiable(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return _Tanh.apply(super().forward(input))  # pyright: ignore[reportReturnType]


def test_what_cannot_be_differentiated_twice_is_refused_and_not_passed_over() -> None:
    """Torch hands back zeros for it, and the block would seem to enlarge nothing."""
    torch.manual_seed(0)
    coupling = AdditiveCoupling(_OnceDifferentiable(3, 3), nn.Linear(3, 3)).double()
    x = torch.randn(2, 6, dtype=torch.float64)
    with pytest.raises(UnsupportedError, match="F or G cannot be differentiated twice"):
        singular_values(coupling, *x.chunk(2, 1))
    with pytest.raises(UnsupportedError, match="F or G cannot be differentiated twice"):
        audit_amplification(ReversibleSequence([coupling], precision=FP64), x)

"""What cannot work raises an error that names the block and the remedy; a wrong gradient is never silent."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from revnet_core import (
    ACTIVATIONS,
    AdditiveCoupling,
    ChangedStateError,
    DoubleBackwardError,
    InPlaceError,
    OutsideTensorError,
    Precision,
    PrecisionError,
    ReversibleSequence,
    ShapeError,
    UnsupportedError,
)
from tests.core.nets import (
    FP64,
    assert_same,
    conv_bn,
    input_of,
    outcome_of,
    sequence_of,
    training_step,
    twin_of,
    weighted_sum,
)

SAVING = ("checkpointed", "reconstructed")


def sequence_with(
    net: nn.Module, place: str = "f", *, activations: str = "reconstructed", before: int = 1
) -> ReversibleSequence:
    """`before` ordinary couplings, then one with `net` in `place`, on features."""
    ordinary = [AdditiveCoupling(nn.Linear(6, 6), nn.Linear(6, 6)) for _ in range(before)]
    nets = {"f": nn.Linear(6, 6), "g": nn.Linear(6, 6)} | {place: net}
    sequence = ReversibleSequence(
        [*ordinary, AdditiveCoupling(**nets)], split_dim=-1, precision=FP64, activations=activations
    )
    return sequence.double()


@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_odd_size(activations: str) -> None:
    sequence = sequence_of("tanh", activations=activations)
    with pytest.raises(ShapeError, match=r"dimension 1 of the input \(2, 7, 4\) has odd size 7.* even one\. Widen"):
        sequence(torch.zeros(2, 7, 4, dtype=torch.float64))


@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("place", ["f", "g"])
def test_changed_shape_names_the_block(place: str, activations: str) -> None:
    sequence = sequence_with(nn.Linear(6, 5), place, activations=activations)
    with pytest.raises(
        ShapeError, match=rf"couplings\[1\]\.{place}: Linear turned \(2, 6\) into \(2, 5\).*between sequences"
    ):
        sequence(torch.zeros(2, 12, dtype=torch.float64))


def test_changed_shape_inside_a_nested_sequence_names_both_blocks() -> None:
    inner = ReversibleSequence([AdditiveCoupling(nn.Linear(3, 2), nn.Linear(3, 3))], split_dim=-1, precision=FP64)
    with pytest.raises(ShapeError, match=r"couplings\[1\]\.g: couplings\[0\]\.f: Linear"):
        sequence_with(inner, "g")(torch.zeros(2, 12, dtype=torch.float64))


def test_changed_shape_in_the_inverse_names_the_block() -> None:
    with pytest.raises(ShapeError, match=r"couplings\[1\]\.g: Linear"):
        sequence_with(nn.Linear(6, 5), "g").inverse(torch.zeros(2, 12, dtype=torch.float64))


def test_double_backward_of_reconstructed() -> None:
    x = input_of("conv_bn")
    y = sequence_of("conv_bn")(x)
    with pytest.raises(DoubleBackwardError, match=r"create_graph=True.*activations='stored' or 'checkpointed'"):
        torch.autograd.grad(weighted_sum(y), x, create_graph=True)


def test_double_backward_of_checkpointed_is_that_of_stored() -> None:
    found = []
    for activations in ("stored", "checkpointed"):
        model, x = twin_of(sequence_of("norm_mlp"), activations), input_of("norm_mlp")
        (dx,) = torch.autograd.grad(weighted_sum(model(x)), x, create_graph=True)
        found.append(torch.autograd.grad(weighted_sum(dx), [x, *model.parameters()], allow_unused=True))
    torch.testing.assert_close(found[1], found[0], rtol=1e-8, atol=1e-10)


class Closure(nn.Module):
    """Uses tensors that are registered nowhere."""

    def __init__(self, *outside: Tensor) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.outside = list(outside)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + sum(tensor.sum() for tensor in self.outside)


def features(*, requires_grad: bool = True) -> Tensor:
    return torch.linspace(-1, 1, 24, dtype=torch.float64).view(2, 12).requires_grad_(requires_grad)


@pytest.mark.parametrize("place", ["f", "g"])
def test_an_outside_tensor_that_needs_a_gradient(place: str) -> None:
    outside = torch.ones(5, dtype=torch.float64, requires_grad=True)
    y = sequence_with(Closure(outside), place)(features())
    with pytest.raises(
        OutsideTensorError, match=rf"couplings\[1\]\.{place}: Closure uses a tensor of shape \(5,\).*side input"
    ):
        y.sum().backward()


class Constant(nn.Module):
    """Hands out a tensor that is registered nowhere, as it is."""

    def __init__(self, outside: Tensor) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.outside = [outside]

    def forward(self, x: Tensor) -> Tensor:
        return self.outside[0]


@pytest.mark.parametrize("place", ["f", "g"])
def test_an_outside_tensor_that_is_the_output(place: str) -> None:
    outside = torch.ones(2, 6, dtype=torch.float64, requires_grad=True)
    y = sequence_with(Constant(outside), place)(features())
    with pytest.raises(OutsideTensorError, match=rf"couplings\[1\]\.{place}: Constant uses a tensor of shape \(2, 6\)"):
        y.sum().backward()
    outside.requires_grad_(False)
    sequence_with(Constant(outside), place)(features()).sum().backward()


@pytest.mark.parametrize("place", ["f", "g"])
def test_an_outside_tensor_in_a_block_that_no_backward_reaches(place: str) -> None:
    """Frozen, and nothing before it needs a gradient."""
    outside = torch.ones(5, dtype=torch.float64, requires_grad=True)
    sequence = sequence_with(Closure(outside), place).requires_grad_(False)
    sequence.couplings.append(AdditiveCoupling(nn.Linear(6, 6), nn.Linear(6, 6)).double())
    with pytest.raises(OutsideTensorError, match=rf"couplings\[1\]\.{place}: Closure uses a tensor of shape \(5,\)"):
        sequence(features(requires_grad=False))
    outside.requires_grad_(False)
    sequence(features(requires_grad=False)).sum().backward()


def test_an_outside_tensor_that_comes_to_need_a_gradient_later() -> None:
    outside = torch.ones(5, dtype=torch.float64)
    sequence = sequence_with(Closure(outside))
    sequence(features()).sum().backward()
    outside.requires_grad_()
    with pytest.raises(OutsideTensorError):
        sequence(features()).sum().backward()


def test_an_outside_tensor_beside_nothing_else_that_needs_a_gradient_gets_its_own() -> None:
    outside = torch.ones(5, dtype=torch.float64, requires_grad=True)
    sequence = sequence_with(Closure(outside)).requires_grad_(False)
    sequence(features(requires_grad=False)).sum().backward()
    assert outside.grad is not None
    assert outside.grad.count_nonzero() == 5


@pytest.mark.parametrize("activations", SAVING)
def test_an_outside_tensor_that_needs_no_gradient_is_fine(activations: str) -> None:
    outcomes = []
    for mode in ("stored", activations):
        torch.manual_seed(0)
        outcomes.append(training_step(sequence_with(Closure(torch.ones(5)), activations=mode), features()))
    assert_same(outcomes[1], outcomes[0])


class LaterInPlace(nn.Module):
    """Changes its input in place from the second call on."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x.relu() if self.calls == 1 else x.relu_()


@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_in_place_in_a_later_call_only(activations: str) -> None:
    sequence = sequence_with(LaterInPlace(), activations=activations)
    with torch.no_grad():
        sequence(features())
    with pytest.raises(InPlaceError, match=r"couplings\[1\]\.f: LaterInPlace changed its input in place.*clone\(\)"):
        sequence(features())


@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_float64_is_never_narrowed_silently(activations: str) -> None:
    sequence = sequence_of("tanh", precision=Precision(), activations=activations)
    with pytest.raises(PrecisionError, match=r"float64 but the streams are torch\.float32.*reconstruction='fp64'"):
        sequence(input_of("tanh"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"compute": "int8"}, "compute = 'int8'; allowed: fp32, tf32, bf16, fp16"),
        ({"reconstruction": "fp8"}, "reconstruction = 'fp8'; allowed: fp64, fp32, bf16, fp16, exact"),
        ({"grid_bits": 50}, "grid_bits = 50; allowed: 8 to 20"),
    ],
)
def test_a_precision_that_does_not_exist(wrong: dict[str, str], message: str) -> None:
    with pytest.raises(PrecisionError, match=message):
        Precision(**wrong)  # pyright: ignore[reportArgumentType]


def first_weight(model: nn.Module) -> nn.Parameter:
    return next(p for name, p in model.named_parameters() if name.endswith("f.0.weight"))


def add_to_weight(model: nn.Module) -> None:
    with torch.no_grad():
        first_weight(model).add_(0.1)


def replace_weight(model: nn.Module) -> None:
    model.get_submodule("couplings.0.f.0").weight = nn.Parameter(first_weight(model).detach() + 0.1)


@pytest.mark.parametrize("activations", SAVING)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("change", [add_to_weight, replace_weight])
def test_a_parameter_changed_between_forward_and_backward(
    change: Callable[[nn.Module], None], frozen: bool, activations: str
) -> None:
    model = sequence_of("conv_bn", activations=activations)
    first_weight(model).requires_grad_(not frozen)
    y = model(input_of("conv_bn"))
    change(model)
    with pytest.raises(
        ChangedStateError, match=r"parameter '(f\.)?0\.weight' of \w+ was (changed|replaced).*after the forward"
    ):
        weighted_sum(y).backward()


@pytest.mark.parametrize("activations", SAVING)
def test_functional_call_with_other_weights_is_refused(activations: str) -> None:
    model = sequence_of("conv_bn", activations=activations)
    other = {name: (p.detach() * 2).requires_grad_() for name, p in model.named_parameters()}
    y = torch.func.functional_call(model, other, input_of("conv_bn"))
    with pytest.raises(ChangedStateError, match="replaced"):
        weighted_sum(y).backward()


def relu_on_the_output(y: Tensor) -> Tensor:
    return y.relu_()


def scale_of_the_output(y: Tensor) -> Tensor:
    return y.mul_(2)


def write_to_the_output(y: Tensor) -> Tensor:
    with torch.no_grad():
        y[0] = 0
    return y


@pytest.mark.parametrize("change", [relu_on_the_output, scale_of_the_output, write_to_the_output])
def test_an_output_changed_in_place_is_refused(change: Callable[[Tensor], Tensor]) -> None:
    y = change(sequence_of("conv_bn")(input_of("conv_bn")))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        weighted_sum(y).backward()


@pytest.mark.parametrize("activations", SAVING)
def test_an_input_changed_in_place_after_the_forward(activations: str) -> None:
    outcomes = []
    for mode in ("stored", activations):
        model, x = twin_of(sequence_of("conv_bn"), mode), input_of("conv_bn")
        y = model(x)
        with torch.no_grad():
            x.zero_()
        weighted_sum(y).backward()
        outcomes.append(outcome_of(model, x, y))
    assert_same(outcomes[1], outcomes[0])


def test_an_error_in_f_passes_as_it_is() -> None:
    with pytest.raises(RuntimeError, match="expected input"):
        ReversibleSequence([AdditiveCoupling(conv_bn(), conv_bn())])(torch.zeros(1, 6, 4, 4))


class ScaledCoupling(AdditiveCoupling):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return tuple(2 * stream for stream in super().forward(*args, **kwargs))


@pytest.mark.parametrize("block", [ScaledCoupling(nn.Tanh(), nn.Tanh()), nn.Tanh()])
def test_a_block_that_the_backward_would_not_undo_is_refused(block: Any) -> None:
    with pytest.raises(UnsupportedError, match=rf"couplings\[1\] is a {type(block).__name__}"):
        ReversibleSequence([AdditiveCoupling(nn.Tanh(), nn.Tanh()), block])

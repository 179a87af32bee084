"""Compiled as a whole or net by net, a sequence does what it does uncompiled; what cannot be compiled says so.

Most cases stop before code is generated (backend aot_eager), which is where tracing and gradients are decided.
"""

import shutil
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import Unsupported

from revnet_core import AdditiveCoupling, Precision, ReversibleSequence, SpaceToDepth, UnsupportedError, create_model
from tests.core.nets import (
    FP64,
    IMAGE_NCHW,
    assert_same,
    conv_bn,
    input_of,
    outcome_of,
    sequence_of,
    side_of,
    training_step,
    twin_of,
    weighted_sum,
)

KINDS_THAT_COMPILE = ("conv_bn", "inplace_first", "conditioned", "frozen_first", "attention", "identity")


@pytest.fixture(autouse=True)
def forget_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model: nn.Module, backend: str = "aot_eager") -> nn.Module:
    return torch.compile(model, fullgraph=True, backend=backend)  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("activations", ["stored", "checkpointed", "reconstructed"])
@pytest.mark.parametrize("kind", KINDS_THAT_COMPILE)
def test_the_whole_in_one_graph(kind: str, activations: str) -> None:
    expected = training_step(twin_of(sequence_of(kind, 3), "stored"), input_of(kind), side_of(kind))
    model, x, side = twin_of(sequence_of(kind, 3), activations), input_of(kind), side_of(kind)
    torch.manual_seed(4)
    y = compiled(model)(x, **side)
    weighted_sum(y).backward()
    assert_same(outcome_of(model, x, y, **side), expected)


def test_one_net_in_all_places() -> None:
    expected = training_step(twin_of(sequence_of("norm_mlp", 3, shared=True), "stored"), input_of("norm_mlp"))
    model, x = sequence_of("norm_mlp", 3, shared=True), input_of("norm_mlp")
    y = compiled(model)(x)
    weighted_sum(y).backward()
    assert_same(outcome_of(model, x, y)._replace(random_state=expected.random_state), expected)


class Downsampling(nn.Module):
    """Two streams all the way, of changing resolution."""

    def __init__(self, activations: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.sequence = ReversibleSequence(
            [
                AdditiveCoupling(nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 1)),
                SpaceToDepth(),
                AdditiveCoupling(nn.Conv2d(8, 8, 1), nn.Tanh()),
            ],
            split_dim=None,
            activations=activations,
            precision=FP64,
        ).double()

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(self.sequence((x[:, :2], x[:, 2:])), dim=1)


def test_pairs_of_streams_and_changes_of_resolution() -> None:
    outcomes = []
    for activations in ("stored", "reconstructed"):
        model = Downsampling(activations)
        x = torch.randn(2, 4, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
        y = (model if activations == "stored" else compiled(model))(x)
        weighted_sum(y).backward()
        outcomes.append(outcome_of(model, x, y))
    assert_same(outcomes[1], outcomes[0])


def test_units_that_a_network_recomputes() -> None:
    outcomes = []
    for activations in ("stored", "checkpointed"):
        torch.manual_seed(1)
        model = create_model("resnet", num_classes=4, depth=8, channels=(4, 4, 4), activations=activations)
        model.double().train()
        x = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
        y = (model if activations == "stored" else compiled(model))(x)
        weighted_sum(y).backward()
        outcomes.append(outcome_of(model, x, y))
    assert_same(outcomes[1], outcomes[0])


@pytest.mark.parametrize("inside", [True, False])
def test_autocast_is_that_of_the_forward(inside: bool) -> None:
    """bf16 alone makes the gradients coarse; that they are bf16's shows in the float32 ones being further away."""
    gradients = []
    for activations, compute, compile_it in (("stored", "bf16", False), ("reconstructed", "bf16", True)):
        precision = Precision(compute=compute if inside else "fp32")
        model = twin_of(sequence_of("conv_bn", 2, precision=precision), activations)
        x = input_of("conv_bn", torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not inside):
            y = (compiled(model) if compile_it else model)(x)
        weighted_sum(y).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert (gradients[0] - gradients[1]).norm() < 0.03 * gradients[0].norm()


@pytest.mark.parametrize("activations", ["stored", "reconstructed"])
def test_evaluation_needs_no_backward(activations: str) -> None:
    model = twin_of(sequence_of("conv_bn", 2), activations).eval()
    x = input_of("conv_bn", requires_grad=False)
    with torch.no_grad():
        torch.testing.assert_close(compiled(model)(x), model(x))


class FunctionalDropout(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.5, training=self.training)


def raised(model: nn.Module, x: Tensor) -> BaseException:
    with pytest.raises(Unsupported) as caught:
        compiled(model)(x)
    error: BaseException | None = caught.value
    while error is not None and UnsupportedError.__name__ not in str(error):
        error = error.__cause__ or error.__context__
    assert error is not None
    return error


@pytest.mark.parametrize("net", [nn.Dropout(0.5), FunctionalDropout()])
def test_random_draws_are_refused_and_not_drawn_twice(net: nn.Module) -> None:
    model = ReversibleSequence([AdditiveCoupling(net, nn.Tanh())])
    assert "draws at random" in str(raised(model, torch.randn(2, 4, requires_grad=True)))
    model.eval()
    compiled(model)(torch.randn(2, 4, requires_grad=True)).sum().backward()


class Scaled(nn.Module):
    """Multiplies by a tensor that is not registered anywhere."""

    def __init__(self, factor: Tensor) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.held = [factor]

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.held[0]


def test_a_tensor_from_elsewhere_may_be_used_unless_its_gradient_would_be_lost() -> None:
    factor = torch.tensor([2.0, 3.0])
    results = []
    for compile_it in (False, True):
        torch.manual_seed(1)
        model = ReversibleSequence([AdditiveCoupling(Scaled(factor), nn.Tanh())])
        x = torch.ones(3, 4, requires_grad=True)
        weighted_sum((compiled(model) if compile_it else model)(x)).backward()
        results.append([x.grad, *(p.grad for p in model.parameters())])
    torch.testing.assert_close(results[1], results[0])
    learning = ReversibleSequence([AdditiveCoupling(Scaled(factor.clone().requires_grad_()), nn.Tanh())])
    assert "its gradient would be lost" in str(raised(learning, torch.ones(3, 4, requires_grad=True)))


def test_exact_reconstruction_and_nested_sequences_are_refused() -> None:
    exact = ReversibleSequence([AdditiveCoupling(nn.Tanh(), nn.Tanh())], precision=Precision(reconstruction="exact"))
    assert "exact reconstruction cannot be part" in str(raised(exact, torch.randn(2, 4, requires_grad=True)))
    inner = ReversibleSequence([AdditiveCoupling(nn.Tanh(), nn.Tanh())])
    outer = ReversibleSequence([AdditiveCoupling(inner, nn.Tanh())])
    assert "inner sequence" in str(raised(outer, torch.randn(2, 8, requires_grad=True)))
    inner.activations = "stored"
    compiled(outer)(torch.randn(2, 8, requires_grad=True)).sum().backward()


def test_without_fullgraph_what_cannot_be_compiled_runs_as_it_is() -> None:
    expected = training_step(twin_of(sequence_of("dropout", 2), "stored"), input_of("dropout"))
    model = sequence_of("dropout", 2)
    torch.manual_seed(4)
    x = input_of("dropout")
    y = torch.compile(model, backend="aot_eager")(x)
    weighted_sum(y).backward()
    assert_same(outcome_of(model, x, y), expected)


@pytest.mark.parametrize("kind", ["conv_bn", "dropout", "attention", "inplace_first", "counting"])
def test_nets_compiled_each_on_its_own(kind: str) -> None:
    expected = training_step(twin_of(sequence_of(kind, 2), "stored"), input_of(kind))
    model = sequence_of(kind, 2)
    for coupling in model.couplings:
        for name in ("f", "g"):
            getattr(coupling, name).compile(backend="eager")
    assert_same(training_step(model, input_of(kind)), expected)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler to generate code with")
def test_generated_code_gives_the_same_gradients() -> None:
    torch.manual_seed(1)
    couplings = [AdditiveCoupling(conv_bn(), conv_bn())]
    results = []
    for activations in ("stored", "reconstructed"):
        model = ReversibleSequence(couplings, activations=activations)
        model.zero_grad()
        x = torch.randn(IMAGE_NCHW, generator=torch.Generator().manual_seed(2)).requires_grad_()
        weighted_sum((model if activations == "stored" else compiled(model, "inductor"))(x)).backward()
        results.append([x.grad, *(p.grad for p in model.parameters())])
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)

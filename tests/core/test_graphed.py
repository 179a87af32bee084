"""What `graph_model` does before torch captures; tests/gpu has the graphs themselves."""

import copy

import pytest
import torch
from torch import Tensor

from revnet_core import (
    AdditiveCoupling,
    CaptureError,
    Guard,
    Precision,
    ReversibleSequence,
    ShapeError,
    UnsupportedError,
    graph_model,
)
from revnet_core.graphed import checked, hooks_set_aside, rehearse
from tests.core.nets import KINDS, sequence_of


def model_and_input(
    kind: str, activations: str, precision: Precision | None = None
) -> tuple[ReversibleSequence, Tensor]:
    model = sequence_of(kind, 2, activations=activations).double().train()
    if precision:
        model.precision = precision
    return model, torch.randn(KINDS[kind].shape, dtype=torch.float64)


def test_off_cuda_it_says_what_to_do() -> None:
    model, x = model_and_input("conv_bn", "reconstructed")
    forward = model.forward
    with pytest.raises(UnsupportedError, match="the inputs are on cpu"), graph_model(model, x):
        pass
    assert model.forward == forward
    assert "forward" not in vars(model)


@pytest.mark.parametrize("activations", ["reconstructed", "checkpointed"])
def test_draws_that_have_to_be_repeated_are_refused(activations: str) -> None:
    model, x = model_and_input("dropout", activations)
    with pytest.raises(CaptureError, match="Capture the whole step with TrainingStep"):
        rehearse(model, x)
    model.activations = "stored"
    rehearse(model, x)


def test_a_guard_is_refused() -> None:
    model, x = model_and_input("conv_bn", "reconstructed")
    Guard().attach(model)
    with pytest.raises(CaptureError, match="a guard counts steps on the host"):
        rehearse(model, x)


@pytest.mark.parametrize("activations", ["stored", "checkpointed", "reconstructed"])
def test_a_rehearsal_leaves_no_gradient(activations: str) -> None:
    model, x = model_and_input("conv_bn", activations)
    parameters = copy.deepcopy(dict(model.named_parameters()))
    rehearse(model, x)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, parameters[name]) for name, p in model.named_parameters())


def test_each_exact_sequence_gets_a_verdict_that_stands() -> None:
    first, x = model_and_input("conv_bn", "reconstructed", Precision(reconstruction="exact", grid_bits=24))
    second, _ = model_and_input("conv_bn", "reconstructed", Precision(reconstruction="exact", grid_bits=24))
    assert len(rehearse(torch.nn.Sequential(first, second), x).standing()) == 2
    second.activations = "stored"
    assert len(rehearse(torch.nn.Sequential(first, second), x).standing()) == 1


def test_coupled_identity_needs_nothing() -> None:
    model = ReversibleSequence([AdditiveCoupling(torch.nn.Linear(3, 3), torch.nn.Tanh())], split_dim=-1)
    assert not rehearse(model, torch.randn(2, 6)).drew


def test_a_call_with_another_batch_or_moved_parameters_is_refused() -> None:
    model, x = model_and_input("conv_bn", "reconstructed")
    call = checked(model, model.forward, (x,))
    expected = call(x)
    with pytest.raises(ShapeError, match="Leave out a last batch that is smaller"):
        call(x[:1])
    parameter = next(model.parameters())
    at, parameter.data = parameter.data, parameter.data.clone()
    with pytest.raises(CaptureError, match="lie elsewhere than where the graphs read them"):
        call(x)
    parameter.data = at
    assert torch.equal(call(x), expected)
    parameter.data = at.clone()
    model.eval()
    call(x[:1])


def test_the_model_s_own_hooks_are_not_captured_and_come_back() -> None:
    model, x = model_and_input("conv_bn", "stored")
    calls: list[str] = []
    model.register_forward_pre_hook(lambda module, given: calls.append("before"))
    model.register_forward_hook(lambda module, given, out: calls.append("after"))
    with hooks_set_aside(model):
        model(x)
        assert not calls
        assert not any((model._forward_hooks, model._forward_pre_hooks, model._backward_hooks))
    model(x)
    assert calls == ["before", "after"]

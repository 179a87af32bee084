"""Whatever F and G are, a step leaves the same behind for every choice of activations."""

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from revnet_core import ACTIVATIONS, ReversibleSequence, UnsupportedError
from tests.core.nets import IMAGE_NCHW, KINDS, assert_same, input_of, sequence_of, side_of, training_step, twin_of

SAVING = ("checkpointed", "offloaded", "reconstructed")
SHARED_KINDS = ("conv_bn", "dropout", "full_bias", "counting", "conditioned")


class SkipAround(nn.Module):
    """The sequence's input is used a second time, and a third time in place of the output."""

    def __init__(self, sequence: ReversibleSequence) -> None:
        super().__init__()
        self.sequence = sequence

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(x)
        return self.sequence(hidden) * hidden + x


@pytest.mark.parametrize("activations", SAVING)
@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_leaves_what_stored_leaves(kind: str, count: int, activations: str) -> None:
    stored = sequence_of(kind, count, activations="stored")
    saving = twin_of(stored, activations)
    expected = training_step(twin_of(stored, "stored"), input_of(kind), side_of(kind))
    assert "x" in expected.gradients
    assert_same(training_step(saving, input_of(kind), side_of(kind)), expected)


@pytest.mark.parametrize("activations", SAVING)
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("kind", SHARED_KINDS)
def test_one_net_in_every_place(kind: str, count: int, activations: str) -> None:
    stored = sequence_of(kind, count, shared=True, activations="stored")
    saving = twin_of(stored, activations)
    expected = training_step(stored, input_of(kind), side_of(kind))
    assert_same(training_step(saving, input_of(kind), side_of(kind)), expected)


@pytest.mark.parametrize("activations", SAVING)
@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"tanh", "identity"}))
def test_an_input_that_needs_no_gradient(kind: str, activations: str) -> None:
    stored = sequence_of(kind, 3, activations="stored")
    saving = twin_of(stored, activations)
    expected = training_step(stored, input_of(kind, requires_grad=False), side_of(kind))
    assert expected.gradients
    assert "x" not in expected.gradients
    assert_same(training_step(saving, input_of(kind, requires_grad=False), side_of(kind)), expected)


@pytest.mark.parametrize("activations", SAVING)
def test_steps_in_a_row(activations: str) -> None:
    stored = sequence_of("conv_bn", 3, activations="stored")
    saving = twin_of(stored, activations)
    for model in (stored, saving):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            training_step(model, input_of("conv_bn"))
            optimizer.step()
    torch.testing.assert_close(saving.state_dict(), stored.state_dict(), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("activations", SAVING)
@pytest.mark.parametrize("kind", ["conv_bn", "inplace_first"])
def test_the_input_used_elsewhere(kind: str, activations: str) -> None:
    stored = SkipAround(sequence_of(kind, 3, activations="stored"))
    saving = twin_of(stored, activations)
    assert_same(training_step(saving, input_of(kind)), training_step(stored, input_of(kind)))


@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_callers_tensors_stay_as_they_are(kind: str, activations: str) -> None:
    x, side = input_of(kind), side_of(kind)
    given = x.detach().clone(), {k: v.detach().clone() for k, v in side.items() if isinstance(v, Tensor)}
    training_step(sequence_of(kind, 2, activations=activations), x, side)
    assert torch.equal(x, given[0])
    assert x._version == 0
    for name, before in given[1].items():
        now = side[name]
        assert isinstance(now, Tensor)
        assert torch.equal(now, before)


@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"dropout", "counting", "spectral", "nested"}))
def test_inverse_gives_the_input_back(kind: str, activations: str) -> None:
    sequence = sequence_of(kind, 3, activations=activations)
    with torch.no_grad():
        y = sequence(input_of(kind), **side_of(kind))
        buffers = copy.deepcopy(dict(sequence.named_buffers()))
        x = sequence.inverse(y, **side_of(kind))
    torch.testing.assert_close(x, input_of(kind).detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(dict(sequence.named_buffers()), buffers, rtol=0, atol=0)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_without_gradients_all_activations_are_one(kind: str, training: bool) -> None:
    outcomes = []
    for activations in ACTIVATIONS:
        sequence = sequence_of(kind, 3, activations=activations).train(training)
        torch.manual_seed(4)
        with torch.no_grad():
            y = sequence(input_of(kind), **side_of(kind))
        assert not y.requires_grad
        outcomes.append((y, dict(sequence.named_buffers()), torch.get_rng_state()))
    for outcome in outcomes[1:]:
        torch.testing.assert_close(outcome, outcomes[0], rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["conv_bn", "dropout", "counting", "instance_norm"])
def test_a_step_in_eval_mode(kind: str) -> None:
    stored = sequence_of(kind, 3, activations="stored").eval()
    saving = twin_of(stored, "reconstructed")
    assert_same(training_step(saving, input_of(kind)), training_step(stored, input_of(kind)))


def test_nothing_to_learn_costs_no_graph() -> None:
    sequence = sequence_of("conv_bn").requires_grad_(False)
    assert not sequence(input_of("conv_bn", requires_grad=False)).requires_grad


def test_no_couplings_are_the_identity() -> None:
    x = input_of("tanh")
    y = ReversibleSequence([], precision=sequence_of("tanh").precision)(x)
    y.sum().backward()
    assert torch.equal(y, x)
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_state_dict_keys_do_not_depend_on_activations(activations: str) -> None:
    keys = sequence_of("conv_bn", activations="stored").state_dict().keys()
    assert sequence_of("conv_bn", activations=activations).state_dict().keys() == keys
    assert "couplings.0.f.0.weight" in keys


def _pickled(sequence: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(sequence))


def _saved(sequence: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(sequence, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("again", [copy.deepcopy, _pickled, _saved])
@pytest.mark.parametrize("kind", ["conv_bn", "dropout", "inplace_first", "nested"])
def test_a_copy_trains_as_the_original(kind: str, again: Callable[[nn.Module], nn.Module]) -> None:
    original = sequence_of(kind, 2)
    training_step(original, input_of(kind))
    original.zero_grad()
    twin = again(original)
    assert_same(training_step(twin, input_of(kind)), training_step(original, input_of(kind)))


def test_activations_may_be_changed_between_steps() -> None:
    stored, switched = sequence_of("conv_bn", 3, activations="stored"), sequence_of("conv_bn", 3)
    for activations in ACTIVATIONS:
        switched.activations = activations
        assert_same(training_step(switched, input_of("conv_bn")), training_step(stored, input_of("conv_bn")))


def test_unknown_activations_name_the_allowed_ones() -> None:
    with pytest.raises(
        UnsupportedError, match="activations = 'rebuilt'; allowed: stored, checkpointed, offloaded, reconstructed"
    ):
        sequence_of("tanh", activations="rebuilt")


@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_shapes_alone_are_enough(activations: str) -> None:
    """A device without contents, which has no autocast either, as planning uses it."""
    model = twin_of(sequence_of("conv_bn", 2), activations).to("meta")
    x = torch.empty(IMAGE_NCHW, dtype=torch.float64, device="meta", requires_grad=True)
    y = model(x)
    y.sum().backward()
    assert y.shape == x.shape
    assert x.grad is not None
    assert x.grad.shape == x.shape

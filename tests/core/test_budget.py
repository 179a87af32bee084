"""A budget stores the last blocks that fit, never more than it holds, and changes no gradient."""

import copy
import pickle
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from revnet_core import AdditiveCoupling, Budgeted, Precision, ReversibleSequence, UnsupportedError
from tests.core.nets import IMAGE_NCHW, assert_same, conv_bn, input_of, sequence_of, training_step, twin_of

COUPLINGS = 5


class Saved(NamedTuple):
    y: Tensor
    saved_bytes: int


def forward_and_count(model: nn.Module, x: Tensor) -> Saved:
    """What autograd saves beside parameters, buffers, the input and the output."""
    # Kept, since a buffer that is replaced would leave its address to somebody else.
    alive = [*model.parameters(), *model.buffers(), x]
    known = {t.untyped_storage().data_ptr() for t in alive}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        alive.append(tensor)
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
    known.add(y.untyped_storage().data_ptr())
    return Saved(y, sum(size for address, size in storages.items() if address not in known))


def budgeted(budget_bytes: int, kind: str = "conv_bn", precision: Precision | None = None) -> ReversibleSequence:
    sequence = sequence_of(kind, COUPLINGS) if precision is None else sequence_of(kind, COUPLINGS, precision=precision)
    sequence.activations = Budgeted(budget_bytes)
    return sequence


def block_bytes(kind: str = "conv_bn") -> int:
    """What one coupling saves when it is stored."""
    stored = [forward_and_count(twin_of(sequence_of(kind, n), "stored"), input_of(kind)).saved_bytes for n in (1, 2, 3)]
    assert stored[2] - stored[1] == stored[1] - stored[0] > 0
    return stored[1] - stored[0]


@pytest.mark.parametrize("fitting", [0, 0.9, 1, 2.5, COUPLINGS, 100])
def test_as_many_blocks_are_stored_as_fit_and_never_more(fitting: float) -> None:
    budget_bytes = int(fitting * block_bytes())
    model, x = budgeted(budget_bytes), input_of("conv_bn")
    first = forward_and_count(model, x)
    assert first.saved_bytes == 0
    second = forward_and_count(model, x).saved_bytes
    stored_blocks = min(int(fitting), COUPLINGS)
    # The streams between the reconstructed and the stored part are the one's output and the other's input.
    between_bytes = x.numel() * x.element_size() if 0 < stored_blocks < COUPLINGS else 0
    assert second <= budget_bytes + between_bytes
    assert second >= stored_blocks * block_bytes()


@pytest.mark.parametrize("kind", ["conv_bn", "dropout", "counting", "inplace_first", "nested"])
@pytest.mark.parametrize("fitting", [0, 2, COUPLINGS])
def test_gradients_are_those_of_stored(kind: str, fitting: int) -> None:
    expected_model = twin_of(sequence_of(kind, COUPLINGS), "stored")
    model = budgeted(fitting * block_bytes(kind), kind)
    for _ in range(2):  # the first step measures
        for each in (expected_model, model):
            each.zero_grad()
        expected = training_step(expected_model, input_of(kind))
        assert_same(training_step(model, input_of(kind)), expected)


def test_exact_gradients_are_bit_equal_across_the_border() -> None:
    precision = Precision(reconstruction="exact")
    stored = training_step(
        twin_of(sequence_of("conv_bn", COUPLINGS, precision=precision), "stored"), input_of("conv_bn", torch.float32)
    )
    for blocks in (1, 3):
        model = budgeted(blocks * block_bytes() // 2, precision=precision)
        with torch.random.fork_rng():
            copy_of_buffers = copy.deepcopy(dict(model.named_buffers()))
            model(input_of("conv_bn", torch.float32))
            for name, buffer in model.named_buffers():
                buffer.copy_(copy_of_buffers[name])
        assert_same(training_step(model, input_of("conv_bn", torch.float32)), stored, bits=True)


class TwoSequences(nn.Module):
    def __init__(self, budget: Budgeted) -> None:
        super().__init__()
        self.first, self.second = sequence_of("conv_bn", 3), sequence_of("conv_bn", 2)
        self.first.activations = self.second.activations = budget

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


@pytest.mark.parametrize(("fitting", "expected"), [(1, (0, 1)), (2, (0, 2)), (4, (2, 2)), (9, (3, 2))])
def test_sequences_share_a_budget_and_later_ones_come_first(fitting: int, expected: tuple[int, int]) -> None:
    budget = Budgeted(fitting * block_bytes())
    model, x = TwoSequences(budget), input_of("conv_bn")
    model(x)
    sequences = model.first, model.second
    assert tuple(budget.stored_blocks(sequence, sequence._key((x,))) for sequence in sequences) == expected


def test_another_shape_or_mode_is_measured_anew() -> None:
    model, x = budgeted(10**9), input_of("conv_bn")
    model(x)
    assert forward_and_count(model, x).saved_bytes > 0
    larger = torch.cat((x, x)).detach().requires_grad_()
    assert forward_and_count(model, larger).saved_bytes == 0
    assert forward_and_count(model, larger).saved_bytes > 0
    model.eval()
    assert forward_and_count(model, larger).saved_bytes == 0


def test_copies_keep_the_budget_and_what_they_share() -> None:
    model = TwoSequences(Budgeted(12345))
    model(input_of("conv_bn"))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(twin.first.activations, Budgeted)
        assert twin.first.activations is twin.second.activations
        assert twin.first.activations is not model.first.activations
        assert twin.first.activations.budget_bytes == 12345


def test_a_sequence_that_is_gone_frees_its_share() -> None:
    budget = Budgeted(block_bytes())
    x = input_of("conv_bn")
    kept, gone = sequence_of("conv_bn", 2), sequence_of("conv_bn", 2)
    kept.activations = gone.activations = budget
    kept(x)
    gone(x)
    assert budget.stored_blocks(kept, kept._key((x,))) == 0
    del gone
    assert budget.stored_blocks(kept, kept._key((x,))) == 1


def test_a_negative_budget_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="budget_bytes = -1"):
        Budgeted(-1)
    with pytest.raises(UnsupportedError, match=r"or Budgeted\(budget_bytes\)"):
        ReversibleSequence([], activations="budgeted")


def test_without_gradients_nothing_is_measured() -> None:
    budget = Budgeted(10**9)
    sequence = ReversibleSequence([AdditiveCoupling(conv_bn(), conv_bn())], activations=budget)
    with torch.no_grad():
        sequence(torch.randn(IMAGE_NCHW))
    assert budget.stored_blocks(sequence, sequence._key((torch.randn(IMAGE_NCHW),))) is None

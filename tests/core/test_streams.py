"""Two streams pass between sequences unjoined, are rearranged among couplings, and die when they are replaced."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from revnet_core import AdditiveCoupling, Precision, ReversibleSequence, ShapeError, SpaceToDepth, audit_inverse
from tests.core.nets import FP64, KINDS, Outcome, assert_same, conv_bn, input_of, outcome_of, sequence_of, weighted_sum

EXACT = Precision(reconstruction="exact")
MODES = ("checkpointed", "offloaded", "reconstructed")


class Passing(nn.Module):
    """Sequences one after another, between which the streams are passed on as a pair, or joined and split."""

    def __init__(self, kind: str, precision: Precision, activations: str, *, joined: bool) -> None:
        super().__init__()
        self.dim = KINDS[kind].split_dim
        self.joined = joined
        self.sequences = nn.ModuleList(sequence_of(kind, n, precision=precision) for n in (1, 2, 1))
        for sequence in self._parts():
            sequence.activations = activations
            sequence.split_dim = self.dim if joined else None

    def _parts(self) -> list[ReversibleSequence]:
        return list(self.sequences)  # pyright: ignore[reportReturnType]

    def forward(self, x: Tensor) -> Tensor:
        if self.joined:
            for sequence in self._parts():
                x = sequence(x)
            return x
        first, second = x.chunk(2, self.dim)
        streams = first.clone(), second.clone()
        for sequence in self._parts():
            streams = sequence(streams)
        return torch.cat(streams, self.dim)


def outcome(kind: str, precision: Precision, activations: str, *, joined: bool) -> Outcome:
    dtype = torch.float64 if precision == FP64 else torch.float32
    model, x = Passing(kind, precision, activations, joined=joined), input_of(kind, dtype)
    torch.manual_seed(4)
    y = model(x)
    weighted_sum(y).backward()
    return outcome_of(model, x, y)


@pytest.mark.parametrize("activations", MODES)
@pytest.mark.parametrize("kind", ["conv_bn", "dropout", "inplace_first", "attention", "identity", "counting"])
def test_a_pair_of_streams_gives_what_their_join_gives(kind: str, activations: str) -> None:
    expected = outcome(kind, FP64, "stored", joined=True)
    assert_same(outcome(kind, FP64, activations, joined=False), expected)


@pytest.mark.parametrize("joined", [True, False])
def test_exact_streams_are_exact_between_sequences_too(joined: bool) -> None:
    expected = outcome("conv_bn", EXACT, "stored", joined=joined)
    assert_same(outcome("conv_bn", EXACT, "reconstructed", joined=joined), expected, bits=True)


def streams_of(kind: str) -> tuple[Tensor, Tensor]:
    first, second = input_of(kind, requires_grad=False).chunk(2, KINDS[kind].split_dim)
    return first.clone().requires_grad_(), second.clone().requires_grad_()


def pair_sequence(kind: str, activations: str) -> ReversibleSequence:
    sequence = sequence_of(kind, 3, activations=activations)
    sequence.split_dim = None
    return sequence


@pytest.mark.parametrize("used", [0, 1])
def test_one_of_the_two_outputs_may_be_unused(used: int) -> None:
    found = []
    for activations in ("stored", "reconstructed"):
        sequence, x = pair_sequence("conv_bn", activations), streams_of("conv_bn")
        weighted_sum(sequence(x)[used]).backward()
        found.append([t.grad for t in (*x, *sequence.parameters())])
    torch.testing.assert_close(found[1], found[0], rtol=1e-8, atol=1e-10)


def test_tensors_of_the_caller_are_never_changed() -> None:
    """Neither the streams given, nor those returned, nor a gradient that goes elsewhere too."""
    sequence, x = pair_sequence("conv_bn", "reconstructed"), streams_of("conv_bn")
    other = torch.zeros_like(x[0], requires_grad=True)
    y1, y2 = sequence(x)
    kept = [t.detach().clone() for t in (*x, y1, y2)]
    # The sum hands the very same gradient tensor to y1 and to `other`.
    weighted_sum(y1 + other).backward(retain_graph=True)
    expected = torch.autograd.grad(weighted_sum(y1 + other), other)[0]
    assert all(torch.equal(a, b) for a, b in zip((*x, y1, y2), kept, strict=True))
    assert other.grad is not None
    assert torch.equal(other.grad, expected)


class Spy(nn.Module):
    """Notes at each evaluation whether a storage is still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.watched: StorageWeakRef | None = None
        self.alive: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        if self.watched is not None:
            self.alive.append(not self.watched.expired())
        return self.conv(x)


@pytest.mark.parametrize("retain_graph", [False, True])
def test_the_output_dies_at_the_start_of_the_backward_unless_it_is_needed_again(retain_graph: bool) -> None:
    spy = Spy()
    sequence = ReversibleSequence([AdditiveCoupling(spy, nn.Conv2d(4, 4, 1)), AdditiveCoupling(nn.Tanh(), nn.Tanh())])
    y = sequence(torch.randn(2, 8, 5, 5))
    spy.watched = StorageWeakRef(y.untyped_storage())
    loss = y.sum()
    del y
    loss.backward(retain_graph=retain_graph)
    assert spy.alive == [retain_graph]


def downsampled(activations: str, precision: Precision) -> nn.Module:
    def net(channels: int) -> nn.Module:
        return nn.Sequential(
            nn.BatchNorm2d(channels), nn.ReLU(inplace=True), nn.Conv2d(channels, channels, 3, padding=1)
        )

    torch.manual_seed(1)
    blocks: list[Any] = [AdditiveCoupling(net(2), net(2)), SpaceToDepth(2), AdditiveCoupling(net(8), net(8))]
    blocks += [AdditiveCoupling(net(8), net(8)), SpaceToDepth(2)]
    return ReversibleSequence(blocks, activations=activations, precision=precision)


@pytest.mark.parametrize("activations", MODES)
def test_a_chain_may_change_its_resolution(activations: str) -> None:
    x = torch.randn(3, 4, 8, 12, dtype=torch.float64)
    outcomes = []
    for mode in ("stored", activations):
        model, leaf = downsampled(mode, FP64).double(), x.clone().requires_grad_()
        y = model(leaf)
        assert y.shape == (3, 64, 2, 3)
        weighted_sum(y).backward()
        outcomes.append(outcome_of(model, leaf, y))
    assert_same(outcomes[1], outcomes[0])


def test_a_chain_that_changes_its_resolution_is_rebuilt_bit_for_bit_on_the_grid() -> None:
    model = downsampled("reconstructed", EXACT)
    assert isinstance(model, ReversibleSequence)
    assert all(drift.max_abs == 0 for drift in audit_inverse(model, torch.randn(3, 4, 8, 12)))
    model.eval()
    x = EXACT.enter(torch.randn(3, 4, 8, 12))
    assert torch.equal(model.inverse(model(x)), x)


@pytest.mark.parametrize(
    ("split_dim", "given", "message"),
    [
        (None, torch.zeros(2, 4), "pair .* of tensors of one shape; this is Tensor"),
        (None, (torch.zeros(2, 4), torch.zeros(2, 3)), r"this is shapes \[\(2, 4\), \(2, 3\)\]"),
        (1, (torch.zeros(2, 4), torch.zeros(2, 4)), "set split_dim=None"),
    ],
)
def test_what_is_no_input_is_refused(split_dim: int | None, given: Any, message: str) -> None:
    sequence = ReversibleSequence([AdditiveCoupling(nn.Tanh(), nn.Tanh())], split_dim=split_dim)
    with pytest.raises(ShapeError, match=message):
        sequence(given)


def test_an_image_that_does_not_divide_into_blocks_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"couplings\[1\].*5 x 4 pixels are no multiple of block_size = 2"):
        ReversibleSequence([AdditiveCoupling(nn.Tanh(), nn.Tanh()), SpaceToDepth()])(
            torch.zeros(1, 4, 5, 4, requires_grad=True)
        )
    with pytest.raises(ShapeError, match="block_size = 0"):
        SpaceToDepth(0)


def test_a_sequence_of_nothing_is_the_identity() -> None:
    x = torch.randn(2, 4, requires_grad=True)
    assert torch.equal(ReversibleSequence([])(x), x)


def test_layouts_other_than_contiguous_are_exact() -> None:
    x = input_of("conv_bn", torch.float32, requires_grad=False).to(memory_format=torch.channels_last)
    torch.manual_seed(1)
    sequence = ReversibleSequence([AdditiveCoupling(conv_bn(), conv_bn()) for _ in range(20)], precision=EXACT)
    assert all(drift.max_abs == 0 for drift in audit_inverse(sequence, x))

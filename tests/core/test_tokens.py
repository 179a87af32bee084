"""A node of autograd's graph for each block: what is not asked for is not walked, and nothing outlives a backward."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from revnet_core import AdditiveCoupling, Precision, ReconstructionError, ReversibleSequence
from tests.core.nets import (
    FP64,
    assert_same,
    input_of,
    sequence_of,
    side_of,
    training_step,
    twin_of,
    weighted_sum,
)

EXACT = Precision(reconstruction="exact")


class Spy(nn.Module):
    """Notes its evaluations, and what it is given in those of the backward; may fail at one of these."""

    def __init__(self, log: list[str], name: str) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.log, self.name = log, name
        self.given: list[StorageWeakRef] = []
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        if self.fails:
            raise ValueError(f"{self.name} fails")
        self.log.append(self.name)
        self.given.append(StorageWeakRef(x.untyped_storage()))
        return torch.tanh(self.inner(x))


def watched(
    blocks: int = 3, *, precision: Precision = FP64, pair: bool = False
) -> tuple[ReversibleSequence, list[Spy], list[str]]:
    """Spies f0, g0, f1, ..., and the log that they share."""
    torch.manual_seed(1)
    log: list[str] = []
    spies = [Spy(log, f"{place}{index}") for index in range(blocks) for place in "fg"]
    couplings = [AdditiveCoupling(spies[2 * index], spies[2 * index + 1]) for index in range(blocks)]
    sequence = ReversibleSequence(couplings, split_dim=None if pair else 1, precision=precision)
    return sequence.double() if precision == FP64 else sequence, spies, log


def features(*, requires_grad: bool = True, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.linspace(-1, 1, 40, dtype=dtype).view(5, 8).requires_grad_(requires_grad)


def fails_in_a_net(spies: list[Spy]) -> None:
    spies[0].fails = True


def fails_in_a_hook(spies: list[Spy]) -> None:
    def fail(parameter: Tensor) -> None:
        raise ValueError("a hook fails")

    spies[-1].inner.weight.register_post_accumulate_grad_hook(fail)


def does_not_fail(spies: list[Spy]) -> None: ...


@pytest.mark.parametrize("retain_graph", [False, True])
@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("arrange", [does_not_fail, fails_in_a_net, fails_in_a_hook])
def test_buffers_end_with_the_backward_whatever_becomes_of_it(
    arrange: Callable[[list[Spy]], None], pair: bool, retain_graph: bool
) -> None:
    sequence, spies, log = watched(pair=pair)
    x = features()
    y = sequence(tuple(x.chunk(2, 1))) if pair else sequence(x)
    loss = sum(weighted_sum(part) for part in y) if pair else weighted_sum(y)
    assert isinstance(loss, Tensor)
    for spy in spies:
        spy.given.clear()
    arrange(spies)
    log.clear()
    if arrange is does_not_fail:
        loss.backward(retain_graph=retain_graph)
    else:
        with pytest.raises(ValueError, match="fails"):
            loss.backward(retain_graph=retain_graph)
    assert log[:2] == ["g2", "f2"]
    held = {StorageWeakRef(part.untyped_storage()) for part in (y if pair else (y,))}
    given = [ref for spy in spies for ref in spy.given if ref not in held]
    assert given
    assert all(ref.expired() for ref in given)
    assert loss.grad_fn is not None


def test_the_probe_of_buffers_sees_one_that_is_kept() -> None:
    sequence, spies, _ = watched()
    kept: list[Tensor] = []
    weighted_sum(sequence(features())).backward()
    weighted = sequence(features())
    spies[1].register_forward_hook(lambda module, args, out: kept.append(args[0]))
    weighted_sum(weighted).backward()
    assert not spies[1].given[-1].expired()


class Unrepeatable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.calls = 0
        self.given: StorageWeakRef | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.given = StorageWeakRef(x.untyped_storage())
        return self.linear(x) + self.calls


def test_buffers_end_with_a_backward_that_was_not_exact() -> None:
    net = Unrepeatable()
    sequence = ReversibleSequence([AdditiveCoupling(net, nn.Linear(4, 4))], precision=EXACT)
    y = sequence(features(dtype=torch.float32))
    with pytest.raises(ReconstructionError):
        weighted_sum(y).backward()
    assert net.given is not None
    assert net.given.expired()
    assert y.grad_fn is not None


@pytest.mark.parametrize("kind", ["conv_bn", "dropout", "conditioned", "nested"])
def test_anomaly_mode_finds_nothing_where_there_is_nothing(kind: str) -> None:
    expected = training_step(twin_of(sequence_of(kind, 2), "stored"), input_of(kind), side_of(kind))
    # This also fills with NaN whatever is allocated without contents.
    torch.use_deterministic_algorithms(True)
    try:
        with torch.autograd.set_detect_anomaly(True):
            assert_same(training_step(sequence_of(kind, 2), input_of(kind), side_of(kind)), expected)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.filterwarnings("ignore:Error detected in")
def test_anomaly_mode_finds_a_gradient_that_is_not_a_number() -> None:
    sequence = ReversibleSequence([AdditiveCoupling(nn.Linear(4, 4), nn.Tanh())], precision=FP64).double()
    y = sequence(features())
    y.register_hook(lambda gradient: gradient * torch.nan)
    with torch.autograd.set_detect_anomaly(True), pytest.raises(RuntimeError, match="returned nan values"):
        weighted_sum(y).backward()

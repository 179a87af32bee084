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
    gradients_of,
    input_of,
    outcome_of,
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


def frozen(sequence: ReversibleSequence, blocks: range) -> ReversibleSequence:
    for index in blocks:
        sequence.couplings[index].requires_grad_(False)
    return sequence


@pytest.mark.parametrize("x_needs_gradient", [False, True])
def test_leading_blocks_that_nothing_asks_for_are_not_evaluated(x_needs_gradient: bool) -> None:
    sequence, _, log = watched(4)
    y = frozen(sequence, range(2))(features(requires_grad=x_needs_gradient))
    log.clear()
    weighted_sum(y).backward()
    walked = ["g3", "f3", "g2", "f2"]
    assert log == ([*walked, "g1", "f1", "g0", "f0"] if x_needs_gradient else walked)


def test_blocks_behind_a_trained_one_are_evaluated_also_when_frozen() -> None:
    sequence, _, log = watched(3)
    y = frozen(sequence, range(1, 3))(features(requires_grad=False))
    log.clear()
    weighted_sum(y).backward()
    assert log == ["g2", "f2", "g1", "f1", "g0", "f0"]


@pytest.mark.parametrize("leading", [1, 2, 3])
@pytest.mark.parametrize("kind", ["conv_bn", "dropout", "counting", "nested", "conditioned"])
def test_gradients_behind_frozen_blocks(kind: str, leading: int) -> None:
    outcomes = []
    for mode in ("stored", "reconstructed"):
        model = frozen(sequence_of(kind, 4, activations=mode), range(leading))
        outcomes.append(training_step(model, input_of(kind, requires_grad=False), side_of(kind)))
    assert outcomes[0].gradients
    assert_same(outcomes[1], outcomes[0])


def last_blocks(model: ReversibleSequence) -> list[nn.Parameter]:
    return list(model.couplings[2:].parameters())


def every_third(model: ReversibleSequence) -> list[nn.Parameter]:
    return list(model.parameters())[::3]


def first_of_all(model: ReversibleSequence) -> list[nn.Parameter]:
    return list(model.parameters())[:1]


@pytest.mark.parametrize("choose", [last_blocks, every_third, first_of_all])
@pytest.mark.parametrize("kind", ["conv_bn", "dropout", "counting", "nested"])
def test_gradients_by_some_of_the_parameters(
    kind: str, choose: Callable[[ReversibleSequence], list[nn.Parameter]]
) -> None:
    found = []
    for mode in ("stored", "reconstructed"):
        model, x = sequence_of(kind, 4, activations=mode), input_of(kind)
        torch.manual_seed(4)
        loss = weighted_sum(model(x))
        # The part first, then the whole, from one graph.
        found.append(
            [
                *torch.autograd.grad(loss, choose(model), retain_graph=True),
                *torch.autograd.grad(loss, [*model.parameters(), x]),
            ]
        )
        assert not gradients_of(model, x=x)
    torch.testing.assert_close(found[1], found[0], rtol=1e-8, atol=1e-10)


def test_a_gradient_by_the_last_block_walks_no_further() -> None:
    sequence, _, log = watched(4)
    loss = weighted_sum(sequence(features()))
    log.clear()
    torch.autograd.grad(loss, list(sequence.couplings[3].parameters()))
    assert log == ["g3", "f3"]


def test_the_gradients_of_a_block_arrive_before_the_next_is_walked() -> None:
    sequence, spies, log = watched(3)
    for spy in spies:
        spy.inner.weight.register_post_accumulate_grad_hook(lambda _, spy=spy: log.append(f"d_{spy.name}"))
    loss = weighted_sum(sequence(features()))
    log.clear()
    loss.backward()
    for index in range(3):
        arrived = max(log.index(f"d_f{index}"), log.index(f"d_g{index}"))
        walked = [log.index(f"{place}{block}") for block in range(index) for place in "fg"]
        assert all(arrived < position for position in walked)
    assert len(log) == 12


@pytest.mark.parametrize("kind", ["conv_bn", "dropout", "norm_mlp", "nested"])
def test_a_parameter_may_be_stepped_as_soon_as_its_gradient_is_there(kind: str) -> None:
    trained = []
    for mode in ("stored", "reconstructed"):
        model = sequence_of(kind, 3, activations=mode)
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(step)
        training_step(model, input_of(kind))
        trained.append(model.state_dict())
    torch.testing.assert_close(trained[1], trained[0], rtol=1e-8, atol=1e-10)
    assert not torch.equal(next(iter(trained[0].values())), next(iter(sequence_of(kind, 3).state_dict().values())))


def step(parameter: Tensor) -> None:
    assert parameter.grad is not None
    with torch.no_grad():
        parameter.add_(parameter.grad, alpha=-0.1)
    parameter.grad = None


class Twice(nn.Module):
    """One sequence in two places of one graph."""

    def __init__(self, first: ReversibleSequence, second: ReversibleSequence) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        return self.second(hidden) + self.first(2 * hidden)


def same_sequence(kind: str, mode: str) -> nn.Module:
    sequence = sequence_of(kind, 2, activations=mode)
    return Twice(sequence, sequence)


def one_net_in_two_sequences(kind: str, mode: str) -> nn.Module:
    first = sequence_of(kind, 2, activations=mode)
    couplings = [AdditiveCoupling(block.g, block.f) for block in first.couplings]  # pyright: ignore[reportArgumentType]
    return Twice(first, ReversibleSequence(couplings, split_dim=first.split_dim, precision=FP64, activations=mode))


@pytest.mark.parametrize("make", [same_sequence, one_net_in_two_sequences])
@pytest.mark.parametrize("kind", ["conv_bn", "dropout", "counting", "full_bias", "nested"])
def test_a_net_in_several_places_of_a_graph(kind: str, make: Callable[[str, str], nn.Module]) -> None:
    outcomes = [training_step(make(kind, mode), input_of(kind)) for mode in ("stored", "reconstructed")]
    assert_same(outcomes[1], outcomes[0])


def three_deep(mode: str) -> ReversibleSequence:
    def nest(channels: int, depth: int) -> nn.Module:
        norm_conv = nn.Sequential(
            nn.BatchNorm2d(channels), nn.Conv2d(channels, channels, 3, padding=1), nn.Dropout(0.2)
        )
        if depth == 0:
            return norm_conv
        couplings = [AdditiveCoupling(nest(channels // 2, depth - 1), nest(channels // 2, depth - 1)) for _ in range(2)]
        return nn.Sequential(norm_conv, ReversibleSequence(couplings, precision=FP64, activations=mode))

    torch.manual_seed(1)
    (sequence,) = [part for part in nest(8, 3).double().children() if isinstance(part, ReversibleSequence)]
    return sequence


def test_three_levels_of_sequences() -> None:
    x = torch.randn(3, 8, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    outcomes = []
    for mode in ("stored", "reconstructed"):
        model, leaf = three_deep(mode), x.clone().requires_grad_()
        assert sum(isinstance(module, ReversibleSequence) for module in model.modules()) == 1 + 4 + 16
        outcomes.append(training_step(model, leaf))
    assert_same(outcomes[1], outcomes[0])


@pytest.mark.parametrize("kind", ["conv_bn", "dropout", "counting", "nested", "conditioned"])
def test_three_backwards_of_one_graph_and_no_fourth(kind: str) -> None:
    outcomes = []
    for mode in ("stored", "reconstructed"):
        model, x, side = sequence_of(kind, 2, activations=mode), input_of(kind), side_of(kind)
        torch.manual_seed(4)
        y = model(x, **side)
        loss = weighted_sum(y)
        for retain in (True, True, False):
            loss.backward(retain_graph=retain)
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            loss.backward()
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            y.sum().backward()
        outcomes.append(outcome_of(model, x, y, **side))
    assert_same(outcomes[1], outcomes[0])


def test_a_backward_may_be_repeated_after_one_that_failed() -> None:
    expected = training_step(watched()[0], features())
    sequence, spies, _ = watched()
    x = features()
    y = sequence(x)
    loss = weighted_sum(y)
    spies[0].fails = True
    with pytest.raises(ValueError, match="f0 fails"):
        loss.backward(retain_graph=True)
    spies[0].fails = False
    for parameter in sequence.parameters():
        parameter.grad = None
    loss.backward()
    torch.testing.assert_close(gradients_of(sequence, x=x), expected.gradients, rtol=1e-8, atol=1e-10)

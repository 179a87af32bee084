"""A recompute normalizes by the batch statistics that the forward found, and is otherwise as if it had found them."""

import copy
import pickle
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from revnet_core import AdditiveCoupling, Budgeted, Precision, ReversibleSequence
from revnet_core.norms import NormReplay, _Statistics
from tests.core.nets import FP64, Outcome, assert_same, outcome_of, training_step, twin_of, weighted_sum

EXACT = Precision(reconstruction="exact")
# N batch, C channels of one stream, then positions.
SHAPES = {1: (5, 6, 4), 2: (4, 6, 3, 5), 3: (3, 6, 2, 3, 2)}
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class Normalized(nn.Module):
    """A norm between two pointwise convolutions, used `uses` times."""

    def __init__(self, norm: nn.Module, dims: int = 2, uses: int = 1) -> None:
        super().__init__()
        self.first, self.last = CONVS[dims](3, 3, 1), CONVS[dims](3, 3, 1)
        self.norm, self.uses = norm, uses

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(self.uses):
            x = torch.tanh(3 * self.norm(x) + 0.3)
        return self.last(x)


class OwnForward(nn.BatchNorm2d):
    """Not a batch norm as torch has it, though one in name."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 0.1 * input.mean()


class Functional(nn.Module):
    """Torch's operation writes these two without counting a version."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(3))
        self.register_buffer("running_var", torch.ones(3))

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.batch_norm(input, self.running_mean, self.running_var, training=True)


def rescaled(norm: nn.Module) -> nn.Module:
    """Weights and statistics that a mistake would not leave alone."""
    for tensor in (*norm.parameters(), *(b for b in norm.buffers() if b.is_floating_point())):
        tensor.data = torch.rand(3) + 0.5
    return norm


MAKERS: dict[str, Callable[[], nn.Module]] = {
    "plain_1d": lambda: Normalized(rescaled(nn.BatchNorm1d(3)), 1),
    "plain_2d": lambda: Normalized(rescaled(nn.BatchNorm2d(3))),
    "plain_3d": lambda: Normalized(rescaled(nn.BatchNorm3d(3)), 3),
    "cumulative": lambda: Normalized(rescaled(nn.BatchNorm2d(3, momentum=None))),
    "no_momentum": lambda: Normalized(rescaled(nn.BatchNorm2d(3, momentum=0.0))),
    "large_eps": lambda: Normalized(rescaled(nn.BatchNorm2d(3, eps=0.5))),
    "untracked": lambda: Normalized(rescaled(nn.BatchNorm2d(3, track_running_stats=False))),
    "not_affine": lambda: Normalized(rescaled(nn.BatchNorm2d(3, affine=False))),
    "neither": lambda: Normalized(nn.BatchNorm2d(3, affine=False, track_running_stats=False)),
    "eval": lambda: Normalized(rescaled(nn.BatchNorm2d(3))),
    "used_twice": lambda: Normalized(rescaled(nn.BatchNorm2d(3)), uses=2),
    "own_forward": lambda: Normalized(rescaled(OwnForward(3))),
    "functional": lambda: Normalized(rescaled(Functional())),
}


def sequence_of_norms(name: str, *, precision: Precision = FP64, activations: str = "stored") -> ReversibleSequence:
    torch.manual_seed(1)
    couplings = [AdditiveCoupling(MAKERS[name](), MAKERS[name]()) for _ in range(2)]
    sequence = ReversibleSequence(couplings, precision=precision, activations=activations)
    if name == "eval":
        for norm in norms_of(sequence)[::2]:
            norm.eval()
    return sequence.double() if precision == FP64 else sequence


def norms_of(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def input_of_norms(name: str, dtype: torch.dtype = torch.float64) -> Tensor:
    shape = SHAPES[int(name[-2])] if name.startswith("plain") else SHAPES[2]
    draws = torch.Generator().manual_seed(2)
    return (3 * torch.randn(shape, generator=draws) + 1).to(dtype).requires_grad_()


def three_steps(model: nn.Module, name: str) -> Outcome:
    """So that a statistic that depends on how many there were shows."""
    for _ in range(2):
        training_step(model, input_of_norms(name))
    return training_step(model, input_of_norms(name))


@pytest.mark.parametrize("activations", ["checkpointed", "reconstructed"])
@pytest.mark.parametrize("name", MAKERS)
def test_gradients_and_statistics_are_those_of_stored(name: str, activations: str) -> None:
    expected = three_steps(sequence_of_norms(name), name)
    assert_same(three_steps(sequence_of_norms(name, activations=activations), name), expected)
    counts = [count for key, count in expected.buffers.items() if key.endswith("num_batches_tracked")]
    uses = 2 if name == "used_twice" else 1
    assert {int(count) for count in counts} == {
        "untracked": set(),
        "neither": set(),
        "functional": set(),
        "eval": {0, 3},
    }.get(name, {3 * uses})


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often statistics are noted and taken up again."""
    counts = {"_record": 0, "_repeat": 0}
    for name in counts:
        original = getattr(NormReplay, name)

        def counted(*args: object, name: str = name, original: Callable[..., Tensor] = original) -> Tensor:
            counts[name] += 1
            return original(*args)

        monkeypatch.setattr(NormReplay, name, counted)
    return counts


@pytest.mark.parametrize("name", MAKERS)
def test_statistics_are_found_once_and_used_again(name: str, found: dict[str, int]) -> None:
    training_step(sequence_of_norms(name, activations="reconstructed"), input_of_norms(name))
    expected = {"eval": 2, "used_twice": 8, "own_forward": 0, "functional": 0}.get(name, 4)
    assert found == {"_record": expected, "_repeat": expected}


def test_an_exact_reconstruction_finds_its_own(found: dict[str, int]) -> None:
    model = sequence_of_norms("plain_2d", precision=EXACT, activations="reconstructed")
    training_step(model, input_of_norms("plain_2d", torch.float32))
    assert found == {"_record": 0, "_repeat": 0}


def test_the_gradient_depends_on_what_was_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of all that is compared here: with other statistics the gradient is another."""
    expected = training_step(sequence_of_norms("plain_2d"), input_of_norms("plain_2d"))
    original = NormReplay._repeat

    def disturbed(
        self: NormReplay, norm: nn.BatchNorm2d, x: Tensor, left: Iterator[_Statistics], *normalize: Any
    ) -> Tensor:
        mean_C, inverse_deviation_C = next(left)
        return original(self, norm, x, iter([_Statistics(mean_C, 1.01 * inverse_deviation_C)]), *normalize)

    monkeypatch.setattr(NormReplay, "_repeat", disturbed)
    actual = training_step(sequence_of_norms("plain_2d", activations="reconstructed"), input_of_norms("plain_2d"))
    assert torch.equal(actual.y, expected.y)
    assert not torch.allclose(actual.gradients["x"], expected.gradients["x"], rtol=1e-3)


@pytest.mark.parametrize("norm", [nn.SyncBatchNorm(3), OwnForward(3), nn.BatchNorm2d(3).eval(), nn.InstanceNorm2d(3)])
def test_what_is_left_alone(norm: nn.Module) -> None:
    assert NormReplay.of([norm, nn.Conv2d(3, 3, 1)]) is None
    assert NormReplay.of([norm, nn.BatchNorm2d(3)]) is not None


def test_a_norm_whose_forward_somebody_replaced_is_left_alone() -> None:
    norm = nn.BatchNorm2d(3)
    norm.forward = lambda input: input  # pyright: ignore[reportAttributeAccessIssue]
    assert NormReplay.of([norm]) is None


@pytest.mark.parametrize("dims", SHAPES)
def test_a_repeated_norm_has_the_derivative_of_a_norm(dims: int) -> None:
    norm = rescaled(NORMS[dims](3)).double()
    replay = NormReplay.of([norm])
    assert replay is not None
    x = torch.randn(SHAPES[dims], dtype=torch.float64)[:, :3].clone().requires_grad_()
    found = []
    for context in (replay.recording(), replay.replaying()):
        with context:
            y = norm(x)
        # A gradient that is expanded, and one that lies in another order.
        for gradient in (torch.ones(1, dtype=y.dtype).expand_as(y), weights_in_reverse_order(y)):
            found.append((y, *torch.autograd.grad(y, [x, *norm.parameters()], gradient, retain_graph=True)))
    torch.testing.assert_close(found[2:], found[:2], rtol=1e-9, atol=1e-10)


def weights_in_reverse_order(y: Tensor) -> Tensor:
    order = list(range(y.dim()))[::-1]
    reverse = [y.shape[dim] for dim in order]
    return torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(reverse).permute(order)


@pytest.mark.parametrize("name", ["plain_1d", "plain_2d", "untracked", "not_affine", "used_twice"])
def test_bf16_autocast(name: str) -> None:
    """As near to float64 as `stored` is, which is itself off by bf16's rounding."""
    reference = training_step(sequence_of_norms(name), input_of_norms(name)).gradients
    errors = {}
    outputs = []
    for activations in ("stored", "reconstructed"):
        model = sequence_of_norms(
            name, precision=Precision(compute="bf16", reconstruction="fp32"), activations=activations
        )
        outcome = training_step(model, input_of_norms(name, torch.float32))
        errors[activations] = relative(outcome.gradients, reference)
        outputs.append((outcome.y, outcome.buffers))
    # The forward, whose statistics are noted, is the very same arithmetic.
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=0)
    assert 1e-4 < errors["reconstructed"] < 1.5 * errors["stored"] < 0.2


def relative(gradients: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    actual = torch.cat([gradients[name].double().flatten() for name in reference])
    expected = torch.cat([gradient.flatten() for gradient in reference.values()])
    return ((actual - expected).norm() / expected.norm()).item()


class Failing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        if self.fails:
            raise ValueError("a net fails")
        return x


@pytest.mark.parametrize("when", ["forward", "backward"])
def test_an_error_leaves_the_modules_as_they_were(when: str) -> None:
    failing = Failing()
    net = nn.Sequential(nn.BatchNorm2d(3), failing)
    sequence = ReversibleSequence([AdditiveCoupling(nn.BatchNorm2d(3), net)], precision=FP64).double()
    before = {module: dict(module.__dict__) for module in sequence.modules()}
    x = input_of_norms("plain_2d")
    failing.fails = when == "forward"

    def step() -> None:
        y = sequence(x)
        failing.fails = True
        weighted_sum(y).backward()

    with pytest.raises(ValueError, match="a net fails"):
        step()
    failing.fails = False
    for module in sequence.modules():
        assert "forward" not in module.__dict__
        assert module.__dict__.keys() == before[module].keys()
    assert all(norm.track_running_stats for norm in norms_of(sequence))
    weighted_sum(sequence(x)).backward()


def keep_input(calls: list[Tensor], module: nn.Module, args: tuple[Tensor]) -> None:
    calls.append(args[0])


def keep_output(calls: list[Tensor], module: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
    calls.append(out)


def keep_gradients(calls: list[Tensor], module: nn.Module, d_in: Any, d_out: Any) -> None:
    calls.extend((*d_in, *d_out))


def test_hooks_on_a_norm_see_what_stored_shows_them() -> None:
    shown: dict[str, list[Tensor]] = {}
    for activations in ("stored", "reconstructed"):
        model = sequence_of_norms("plain_2d", activations=activations)
        norm = norms_of(model)[1]
        calls: list[Tensor] = shown.setdefault(activations, [])
        norm.register_forward_pre_hook(partial(keep_input, calls))
        norm.register_forward_hook(partial(keep_output, calls))
        norm.register_full_backward_hook(partial(keep_gradients, calls))
        training_step(model, input_of_norms("plain_2d"))
    # The recompute shows its input and output once more.
    stored, rebuilt = shown["stored"], shown["reconstructed"]
    assert (len(stored), len(rebuilt)) == (4, 6)
    for expected, actual in zip([*stored[:2], *stored], rebuilt, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_between_forward_and_backward(again: Callable[[nn.Module], nn.Module]) -> None:
    expected = three_steps(sequence_of_norms("cumulative"), "cumulative")
    model, x = sequence_of_norms("cumulative", activations="reconstructed"), input_of_norms("cumulative")
    for _ in range(2):
        training_step(model, input_of_norms("cumulative"))
    y = model(x)
    twin = again(model)
    weighted_sum(y).backward()
    torch.manual_seed(4)
    assert_same(outcome_of(model, x, y), expected)
    # The copy has the forward's statistics, and its own gradients.
    torch.testing.assert_close(dict(twin.named_buffers()), expected.buffers)
    for parameter, original in zip(twin.parameters(), model.parameters(), strict=True):
        assert original.grad is not None
        before = parameter.grad
        parameter.grad = None
        if before is not None:
            assert not torch.equal(before, original.grad)
    training_step(twin, input_of_norms("cumulative"))


@pytest.mark.parametrize("precision", [FP64, EXACT], ids=["fp64", "exact"])
@pytest.mark.parametrize("name", ["plain_2d", "not_affine", "used_twice"])
def test_an_empty_batch(name: str, precision: Precision) -> None:
    dtype = precision.stream_dtype
    outcomes = []
    for activations in ("stored", "reconstructed"):
        model = sequence_of_norms(name, precision=precision, activations=activations)
        x = torch.zeros(0, *SHAPES[2][1:], dtype=dtype, requires_grad=True)
        y = model(x)
        y.sum().backward()
        outcomes.append(outcome_of(model, x, y))
    assert_same(outcomes[1], outcomes[0])


@pytest.mark.parametrize("activations", ["stored", "reconstructed"])
def test_one_value_per_channel_is_refused_as_torch_refuses_it(activations: str) -> None:
    model = ReversibleSequence([AdditiveCoupling(nn.BatchNorm1d(3), nn.Tanh())], activations=activations)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        model(torch.zeros(1, 6, requires_grad=True))
    with pytest.raises(ValueError, match="expected 2D or 3D input"):
        model(torch.zeros(2, 6, 2, 2, requires_grad=True))


def holding(inner: str | Budgeted, precision: Precision) -> nn.Module:
    """A net with a norm, around an inner sequence of nets with norms."""
    couplings = [AdditiveCoupling(conv_norm(), conv_norm()) for _ in range(2)]
    return nn.Sequential(nn.BatchNorm2d(4), ReversibleSequence(couplings, activations=inner, precision=precision))


def conv_norm() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU(inplace=True))


@pytest.mark.parametrize("inner", ["stored", "checkpointed", "offloaded", "reconstructed", "budgeted"])
def test_sequences_within_sequences(inner: str) -> None:
    torch.manual_seed(1)
    mode = Budgeted(10**4) if inner == "budgeted" else inner
    couplings = [AdditiveCoupling(holding(mode, FP64), holding(mode, FP64)) for _ in range(2)]
    stored = ReversibleSequence(couplings, activations="stored", precision=FP64).double()
    model = copy.deepcopy(stored)
    model.activations = "reconstructed"
    expected_model = twin_of(stored, "stored")
    draws = torch.Generator().manual_seed(2)
    data = torch.randn(3, 8, 5, 5, generator=draws, dtype=torch.float64)
    for _ in range(2):
        expected = training_step(expected_model, data.clone().requires_grad_())
        assert_same(training_step(model, data.clone().requires_grad_()), expected)


def test_an_exact_sequence_within_one_that_is_not(found: dict[str, int]) -> None:
    """Its verdict would see the least rounding between the outer recompute and its own."""
    torch.manual_seed(1)
    couplings = [AdditiveCoupling(holding("reconstructed", EXACT), holding("reconstructed", EXACT)) for _ in range(2)]
    model = ReversibleSequence(couplings)
    for _ in range(5):
        weighted_sum(model(torch.randn(8, 8, 12, 12, requires_grad=True))).backward()
    assert {found["_record"], found["_repeat"]} == {5 * 4}

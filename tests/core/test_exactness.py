"""Whether an exact reconstruction was exact is judged in every backward, and the error says where it ceased to be."""

import itertools
import math
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from revnet_core import AdditiveCoupling, Precision, ReconstructionError, ReversibleSequence, audit_inverse
from revnet_core.exactness import GridWatch, Verdict
from tests.core.nets import assert_same, conv_bn, input_of, sequence_of, training_step, twin_of, weighted_sum

EXACT = Precision(reconstruction="exact")
IMAGE_NCHW = (3, 8, 5, 5)


class Scale(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * torch.tanh(x)


class Unrepeatable(nn.Module):
    """Never gives the same twice."""

    def __init__(self, step: float = 0.5) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.step, self.calls = step, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.scale * torch.tanh(x) + self.step * self.calls


def chain(*nets: nn.Module, precision: Precision = EXACT) -> ReversibleSequence:
    return ReversibleSequence([AdditiveCoupling(net, net) for net in nets], precision=precision)


def image(*, requires_grad: bool = False) -> Tensor:
    return torch.randn(IMAGE_NCHW, generator=torch.Generator().manual_seed(2)).requires_grad_(requires_grad)


@pytest.mark.parametrize("at", range(4))
def test_the_error_names_the_first_block_that_left_the_range(at: int) -> None:
    # It stays outside from there on.
    sequence = chain(*(Scale(1e4 if index == at else 0.1) for index in range(4)))
    y = sequence(image())
    with pytest.raises(ReconstructionError, match=rf"input of 4 couplings .*couplings\[{at}\]: a stream left the grid"):
        weighted_sum(y).backward()


@pytest.mark.parametrize("at", range(3))
def test_a_stream_that_is_not_a_number_is_noticed(at: int) -> None:
    sequence = chain(*(Scale(math.nan if index == at else 0.1) for index in range(3)))
    y = sequence(image())
    with pytest.raises(ReconstructionError, match=rf"couplings\[{at}\]: .*\(it reached nan\)"):
        weighted_sum(y).backward()


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_a_stream_that_is_infinite_is_noticed(value: float) -> None:
    y = chain(Scale(0.1), Scale(value), Scale(0.1))(image())
    with pytest.raises(ReconstructionError, match=r"couplings\[1\]: a stream left"):
        weighted_sum(y).backward()


def test_within_the_range_nothing_is_noticed() -> None:
    weighted_sum(chain(*(Scale(50.0) for _ in range(3)))(image())).backward()


@pytest.mark.parametrize("grid_bits", [8, 16, 20, 21, 32, 48])
def test_how_far_a_stream_reached_is_its_greatest_magnitude(grid_bits: int) -> None:
    precision = Precision(reconstruction="exact", grid_bits=grid_bits)
    zero = torch.zeros(4, dtype=precision.stream_dtype)
    beyond = 2 * precision.grid_limit
    for index, which, value in itertools.product(range(3), (0, 1), (beyond, -beyond)):
        watch = GridWatch(precision, zero, zero, blocks=3)
        for block in range(3):
            watch.note(block, 0, zero)
        watch.verdict(zero, zero).raise_if_failed()
        watch.note(index, which, torch.tensor([0.5, value, -0.5, 0], dtype=zero.dtype))
        watch.note(index, 1 - which, zero)
        with pytest.raises(ReconstructionError, match=re.escape(f"(it reached {beyond:.3g})")):
            watch.verdict(zero + 1, zero).raise_if_failed()


@pytest.mark.parametrize("stream", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_single_bit_is_noticed(dtype: torch.dtype, stream: int) -> None:
    precision = Precision(reconstruction="exact", grid_bits=16 if dtype == torch.float32 else 32)
    streams = [torch.randn(7, dtype=dtype) for _ in range(2)]
    watch = GridWatch(precision, *streams, blocks=1)
    # In whatever order the elements lie.
    watch.verdict(*(s.flip(0) for s in streams)).raise_if_failed()
    streams[stream][3] = torch.nextafter(streams[stream][3], torch.tensor(math.inf, dtype=dtype))
    with pytest.raises(ReconstructionError):
        watch.verdict(*streams).raise_if_failed()


def fine(grid_bits: int, count: int = 50) -> ReversibleSequence:
    torch.manual_seed(1)
    couplings = [AdditiveCoupling(conv_bn(), conv_bn()) for _ in range(count)]
    return ReversibleSequence(couplings, precision=Precision(reconstruction="exact", grid_bits=grid_bits))


@pytest.mark.parametrize("grid_bits", [21, 32, 40])
def test_a_fine_grid_is_exact_through_50_couplings(grid_bits: int) -> None:
    model, x = fine(grid_bits), input_of("conv_bn", torch.float32)
    with torch.no_grad():
        assert twin_of(model, "stored")(x).dtype == torch.float64
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert all(drift.max_abs == 0 for drift in audit_inverse(model, x))
    assert_same(training_step(model, x), training_step(twin_of(fine(grid_bits), "stored"), x_again()), bits=True)


def x_again() -> Tensor:
    return input_of("conv_bn", torch.float32)


def test_the_same_in_fp64_streams_off_the_grid_is_not_exact() -> None:
    model = fine(32)
    model.precision = Precision(reconstruction="fp64")
    assert any(drift.max_abs > 0 for drift in audit_inverse(model, x_again()))


@pytest.mark.parametrize("grid_bits", range(21, 49))
def test_every_fine_grid_rounds_to_its_points(grid_bits: int) -> None:
    precision = Precision(reconstruction="exact", grid_bits=grid_bits)
    assert precision.stream_dtype == torch.float64
    limit = precision.grid_limit / 4
    residual = torch.cat([torch.linspace(-limit, limit, 1001), torch.linspace(-1, 1, 1001)]).double()
    rounded = precision.residual(residual)
    assert torch.equal(rounded * 2.0**grid_bits, (residual * 2.0**grid_bits).round())


def test_a_finer_grid_is_nearer_to_the_unrounded_network() -> None:
    """By the forward of 10 couplings, in float64 throughout, so that nothing but the grid differs."""
    x = x_again().detach().double()
    unrounded = fine(16, 10).double()
    unrounded.precision = Precision(reconstruction="fp64")
    with torch.no_grad():
        expected = unrounded(x)
        errors = {}
        for grid_bits in (21, 24, 32, 40):
            errors[grid_bits] = (fine(grid_bits, 10).double()(x) - expected).norm().item()
        coarse = fine(16, 10)
        errors[16] = (coarse(x.float()).double() - expected).norm().item()
    # Each bit halves the rounding, which the network then carries on; the margin is a factor of four.
    for grid_bits in (21, 24, 32, 40):
        ratio = errors[16] / errors[grid_bits]
        assert 2.0 ** (grid_bits - 16) / 4 < ratio < 2.0 ** (grid_bits - 16) * 4


def test_a_fine_grid_with_fp32_nets_is_nearer_than_the_default() -> None:
    x = x_again().detach()
    wide = fine(16, 10).double()
    wide.precision = Precision(reconstruction="fp64")
    with torch.no_grad():
        expected = wide(x.double())
        errors = [(fine(bits, 10)(x).double() - expected).norm().item() for bits in (16, 32)]
    # What remains with 32 bits is the rounding of F and G themselves.
    assert errors[0] > 10 * errors[1] > 0


@pytest.fixture
def device_that_is_not_ready(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Verdicts are as on a device that the host would have to wait for; the function says when they are ready."""

    def become(ready: bool) -> None:
        monkeypatch.setattr(Verdict, "is_ready", lambda self: ready)

    monkeypatch.setattr(Verdict, "on_host", False)
    become(False)
    return become


def backward(sequence: ReversibleSequence) -> None:
    weighted_sum(sequence(image(requires_grad=True))).backward()


def test_a_verdict_that_is_not_there_is_read_when_asked_for(
    device_that_is_not_ready: Callable[[bool], None],
) -> None:
    sequence = chain(Unrepeatable())
    backward(sequence)
    backward(sequence)
    for _ in range(2):
        with pytest.raises(ReconstructionError):
            sequence.raise_if_inexact()
    sequence.raise_if_inexact()


def test_a_verdict_that_is_there_is_read_in_the_next_forward(
    device_that_is_not_ready: Callable[[bool], None],
) -> None:
    sequence = chain(Unrepeatable())
    backward(sequence)
    sequence(image())
    device_that_is_not_ready(True)
    with pytest.raises(ReconstructionError):
        sequence(image())
    sequence(image())


def test_good_verdicts_are_read_in_silence(device_that_is_not_ready: Callable[[bool], None]) -> None:
    sequence = chain(Unrepeatable(0.0))
    backward(sequence)
    sequence.raise_if_inexact()
    backward(sequence)
    device_that_is_not_ready(True)
    sequence(image())
    sequence.raise_if_inexact()


def by_the_last_block(sequence: ReversibleSequence) -> None:
    loss = weighted_sum(sequence(image(requires_grad=True)))
    torch.autograd.grad(loss, list(sequence.couplings[-1].parameters()))


def behind_frozen_blocks(sequence: ReversibleSequence) -> None:
    for block in sequence.couplings[:-1]:
        block.requires_grad_(False)
    weighted_sum(sequence(image())).backward()


def by_the_input(sequence: ReversibleSequence) -> None:
    torch.autograd.grad(weighted_sum(sequence(x := image(requires_grad=True))), x)


def retained(sequence: ReversibleSequence) -> None:
    weighted_sum(sequence(image())).backward(retain_graph=True)


def as_a_pair(sequence: ReversibleSequence) -> None:
    sequence.split_dim = None
    y1, _ = sequence(tuple(image(requires_grad=True).chunk(2, 1)))  # pyright: ignore[reportArgumentType]
    weighted_sum(y1).backward()


@pytest.mark.parametrize("at", range(3))
@pytest.mark.parametrize("go", [by_the_last_block, behind_frozen_blocks, by_the_input, retained, as_a_pair])
def test_whatever_is_asked_for_the_whole_chain_is_judged(go: Callable[[ReversibleSequence], None], at: int) -> None:
    nets = [Unrepeatable(0.5 if index == at else 0.0) for index in range(3)]
    with pytest.raises(ReconstructionError, match="input of 3 couplings"):
        go(chain(*nets))
    go(chain(*(Unrepeatable(0.0) for _ in range(3))))


@pytest.mark.parametrize("kind", ["conv_bn", "dropout", "instance_norm"])
def test_judging_leaves_random_state_and_buffers_alone(kind: str) -> None:
    """Also where it walks blocks that the backward did not."""
    left = []
    for mode in ("stored", "reconstructed"):
        model = sequence_of(kind, 3, precision=EXACT, activations=mode)
        for block in model.couplings[:-1]:
            block.requires_grad_(False)
        left.append(training_step(model, input_of(kind, torch.float32, requires_grad=False)))
    assert_same(left[1], left[0], bits=True)

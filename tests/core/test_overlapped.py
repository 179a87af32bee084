"""Rebuilding a block while the gradient of the one behind it is taken changes no bit of what a step leaves behind.

On the CPU the operations run in the overlapped order on one queue; test_lanes has who waits for whom.
"""

import copy
import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from harness.measure.live import LiveStorages
from revnet_core import (
    Budgeted,
    Guard,
    Precision,
    ReversibleSequence,
    UnsupportedError,
    create_model,
)
from revnet_core.overlapped import OverlappedWay
from tests.core.nets import (
    KINDS,
    Outcome,
    assert_same,
    gradients_of,
    input_of,
    outcome_of,
    sequence_of,
    side_of,
    training_step,
    weighted_sum,
)
from tests.core.test_backprop import backward_twice, two_forwards_first

EXACT = Precision("fp32", "exact")


def overlapped(model: nn.Module) -> nn.Module:
    """A copy."""
    twin = copy.deepcopy(model)
    for part in twin.modules():
        if isinstance(part, ReversibleSequence):
            part.overlapped = True
    return twin


def both(model: nn.Module, step: Callable[[nn.Module], Outcome]) -> tuple[Outcome, Outcome]:
    """Overlapped, and plain."""
    return step(overlapped(model)), step(model)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_leaves_the_same_bits(kind: str, count: int, shared: bool) -> None:
    model = sequence_of(kind, count, shared=shared)
    assert_same(*both(model, lambda m: training_step(m, input_of(kind), side_of(kind))), bits=True)


@pytest.mark.parametrize("precision", [EXACT, Precision("bf16", "exact"), Precision("bf16"), Precision("fp32", "bf16")])
@pytest.mark.parametrize("count", [2, 3])
def test_in_every_precision(count: int, precision: Precision) -> None:
    model = sequence_of("conv_bn", count, precision=precision)
    assert_same(*both(model, lambda m: training_step(m, input_of("conv_bn", torch.float32))), bits=True)


@pytest.mark.parametrize("activations", [Budgeted(0), Budgeted(20_000), "stored", "checkpointed"], ids=str)
def test_whatever_becomes_of_the_activations(activations: str | Budgeted) -> None:
    model = sequence_of("conv_bn", 5)
    model.activations = activations

    def steps(model: nn.Module) -> Outcome:
        # In the first a budget measures.
        training_step(model, input_of("conv_bn"))
        return training_step(model, input_of("conv_bn"))

    assert_same(*both(model, steps), bits=True)


@pytest.mark.parametrize("name", ["revnet26", "gomez_revnet26", "irevnet20", "revnet_affine26"])
def test_networks(name: str) -> None:
    channels = {"irevnet20": (8, 32, 128)}.get(name, (4, 6, 8))
    family, depth = name.rstrip("0123456789"), int(name[-2:])
    made = []
    for on in (True, False):
        torch.manual_seed(0)
        model = create_model(family, depth=depth, num_classes=10, channels=channels, overlapped=on).double()
        sequences = [m for m in model.modules() if isinstance(m, ReversibleSequence)]
        assert sequences
        assert all(s.overlapped == on for s in sequences)
        precision = Precision(reconstruction="fp64")
        for sequence in sequences:
            sequence.precision = precision
        model.precision = precision
        made.append(training_step(model, torch.randn(2, 3, 8, 8, dtype=torch.float64)))
    assert_same(*made, bits=True)


def side_by_side(model: nn.Module, x: Tensor) -> Tensor:
    first, second = model(x), model(2 * x)
    (weighted_sum(first) + weighted_sum(second)).backward()
    return first


def frozen(index: int) -> Callable[[nn.Module, Tensor], Tensor]:
    def call(model: nn.Module, x: Tensor) -> Tensor:
        for parameter in model.get_submodule(f"couplings.{index}").parameters():
            parameter.requires_grad_(False)
        y = model(x.detach())
        weighted_sum(y).backward()
        return y

    return call


def of_some(*indices: int) -> Callable[[nn.Module, Tensor], Tensor]:
    """A backward that ends early."""

    def call(model: nn.Module, x: Tensor) -> Tensor:
        y = model(x)
        parameters = [p for i in indices for p in model.get_submodule(f"couplings.{i}").parameters()]
        weighted_sum(y).backward(inputs=parameters)
        return y

    return call


def one_stream(model: nn.Module, x: Tensor) -> Tensor:
    """The other gets no gradient from behind."""
    assert isinstance(model, ReversibleSequence)
    model.split_dim = None
    first, second = x.chunk(2, 1)
    y = model((first, second))[1]
    weighted_sum(y).backward()
    return y


CALLS = {
    "backward_twice": backward_twice,
    "two forwards first": two_forwards_first,
    "side by side": side_by_side,
    "first frozen": frozen(0),
    "middle frozen": frozen(1),
    "last frozen": frozen(3),
    "of the last": of_some(3),
    "of the middle": of_some(1),
    "of two": of_some(0, 2),
    "one stream": one_stream,
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("precision", [Precision(reconstruction="fp64"), EXACT], ids=["fp64", "exact"])
@pytest.mark.parametrize("kind", ["conv_bn", "inplace_first", "instance_norm"])
def test_ways_of_calling_backward(kind: str, precision: Precision, call: str) -> None:
    def step(model: nn.Module) -> Outcome:
        torch.manual_seed(4)
        x = input_of(kind, precision.stream_dtype)
        return outcome_of(model, x, CALLS[call](model, x))

    assert_same(*both(sequence_of(kind, 4, precision=precision), step), bits=True)


@pytest.fixture
def rebuilt(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The blocks, in the order of their rebuild."""
    found: list[int] = []
    original = OverlappedWay._rebuilt
    monkeypatch.setattr(
        OverlappedWay, "_rebuilt", lambda way, index, behind: (found.append(index), original(way, index, behind))[1]
    )
    return found


@pytest.mark.parametrize(("call", "expected"), [("of the last", [3]), ("of the middle", [3, 2, 1])])
def test_nothing_is_rebuilt_that_nobody_asks_for(call: str, expected: list[int], rebuilt: list[int]) -> None:
    CALLS[call](overlapped(sequence_of("conv_bn", 4)), input_of("conv_bn"))
    assert rebuilt == expected


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_each_block_is_rebuilt_once(count: int, rebuilt: list[int]) -> None:
    training_step(overlapped(sequence_of("conv_bn", count)), input_of("conv_bn"))
    assert rebuilt == list(range(count))[::-1]


def test_it_is_off_unless_asked_for_and_may_be_changed(rebuilt: list[int]) -> None:
    model = sequence_of("conv_bn", 2)
    assert not model.overlapped
    assert "overlapped" not in repr(model)
    training_step(model, input_of("conv_bn"))
    assert rebuilt == []
    keys = list(model.state_dict())
    model.overlapped = True
    assert "overlapped=True" in repr(model)
    assert list(model.state_dict()) == keys
    training_step(model, input_of("conv_bn"))
    assert rebuilt == [1, 0]


def test_a_guard_compares_the_same(rebuilt: list[int]) -> None:
    found = []
    for model in (sequence_of("conv_bn", 3), overlapped(sequence_of("conv_bn", 3))):
        guard = Guard(every=1).attach(model)
        for _ in range(4):
            training_step(model, input_of("conv_bn"))
        found.append([(r.block, r.rel) for r in guard.history])
    assert found[0] == found[1]
    assert len(found[0]) == 4
    assert len(rebuilt) == 12


def test_an_inexact_reconstruction_is_noticed() -> None:
    model = sequence_of("conv_bn", 3, precision=EXACT)
    model.overlapped = True
    x = input_of("conv_bn", torch.float32).detach() * 1e4
    with pytest.raises(Exception, match=r"couplings\[0\]: a stream left the grid's range"):
        training_step(model, x)
    training_step(model, input_of("conv_bn", torch.float32))


def test_what_the_backward_holds_ends_with_an_error() -> None:
    def fail(gradient: Tensor) -> None:
        raise ZeroDivisionError

    kept_bytes = []
    for model in (sequence_of("conv_bn", 3), overlapped(sequence_of("conv_bn", 3))):
        handle = next(model.get_submodule("couplings.1").parameters()).register_hook(fail)
        x = input_of("conv_bn")
        with LiveStorages(existing=[*model.parameters(), *model.buffers(), x]) as live:
            loss = weighted_sum(model(x))
            with pytest.raises(ZeroDivisionError):
                loss.backward()
            del loss
            gc.collect()
            kept_bytes.append(live.level_bytes)
        handle.remove()
        model.zero_grad()
        expected = training_step(sequence_of("conv_bn", 3), input_of("conv_bn"))
        assert expected.gradients.keys() == training_step(model, input_of("conv_bn")).gradients.keys()
    assert kept_bytes[0] == kept_bytes[1]


def test_hooks_on_modules_see_the_same() -> None:
    shown: list[dict[str, Tensor]] = []
    for model in (sequence_of("norm_mlp", 3), overlapped(sequence_of("norm_mlp", 3))):
        shown.append({})
        for name, module in model.named_modules():
            if name.endswith((".f", ".g")):
                # The last of a net's evaluations, of which the first is the forward's.
                module.register_forward_hook(
                    lambda m, args, out, c=shown[-1], n=name: c.update({f"{n} in": args[0], f"{n} out": out})
                )
                module.register_full_backward_hook(
                    lambda m, d_in, d_out, c=shown[-1], n=name: c.update({f"{n} d_out": d_out[0]})
                )
        training_step(model, input_of("norm_mlp"))
    assert len(shown[0]) == 18
    torch.testing.assert_close(shown[1], shown[0], rtol=0, atol=0)


def test_partitioned_parameters_are_refused() -> None:
    model = sequence_of("norm_mlp", 2)
    model.overlapped = True
    parameter = next(model.parameters())
    parameter.ds_id = 0  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(UnsupportedError, match="Set overlapped=False, or use ZeRO 0 to 2"):
        model(input_of("norm_mlp"))


def test_a_compiled_graph_refuses() -> None:
    model = sequence_of("norm_mlp", 2)
    model.overlapped = True
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="overlapped=True has no place in a compiled graph"):
        compiled(input_of("norm_mlp"))


@pytest.mark.parametrize("wrong", ["lost gradient", "another order"])
def test_a_way_that_goes_wrong_is_seen(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control of all equalities here."""
    pull = OverlappedWay._pull

    def wrongly(way: OverlappedWay, index: int, halves: list, derivatives: tuple, gradients: object) -> None:
        if wrong == "another order":
            derivatives = derivatives[::-1]
        elif index == 1:
            halves[0] = halves[0]._replace(root=None)
        pull(way, index, halves, derivatives, gradients)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(OverlappedWay, "_pull", wrongly)
    ours, plain = both(sequence_of("conv_bn", 3), lambda m: training_step(m, input_of("conv_bn")))
    with pytest.raises(AssertionError):
        assert_same(ours, plain, bits=True)


def test_gradients_of_gradients_are_refused_as_before() -> None:
    model = sequence_of("norm_mlp", 2)
    model.overlapped = True
    x = input_of("norm_mlp")
    with pytest.raises(Exception, match="create_graph=True"):
        torch.autograd.grad(weighted_sum(model(x)), [x], create_graph=True)
    assert not gradients_of(model, x=x)

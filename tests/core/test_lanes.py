"""The lanes of an overlapped backward wait for each other where they have to, and nowhere else.

The queues are stand-ins that a check watches; the checks at the end show that it finds what is wrong.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from revnet_core import AdditiveCoupling, AffineCoupling, Guard, Precision, ReversibleSequence, SpaceToDepth
from revnet_core.errors import OutsideTensorError
from revnet_core.lanes import Lanes
from tests.core.nets import FP64, KINDS, conv_bn, input_of, sequence_of, side_of, training_step, weighted_sum
from tests.core.queue_check import QueueCheck, checked

Step = Callable[[QueueCheck], None]


def overlapped_of(kind: str, count: int, **options: Any) -> ReversibleSequence:
    model = sequence_of(kind, count, **options)
    for module in model.modules():
        if isinstance(module, ReversibleSequence):
            module.overlapped = True
    return model


def two_steps(model: nn.Module, kind: str) -> Step:
    """With updates, and gradients that die in between."""

    def steps(check: QueueCheck) -> None:
        parameters = list(model.parameters())
        optimizer = torch.optim.SGD(parameters, lr=0.01, momentum=0.9) if parameters else None
        for _ in range(2):
            x = input_of(kind, next((p.dtype for p in parameters), torch.float64))
            training_step(model, x, side_of(kind))
            if optimizer:
                optimizer.step()
                optimizer.zero_grad()

    return steps


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_everything_is_waited_for(kind: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    check = checked(monkeypatch, two_steps(overlapped_of(kind, count), kind))
    assert check.faults == []
    assert check.operations["even"]
    # Of nested sequences the inner ones have two blocks.
    assert bool(check.operations["odd"]) == (count > 1 or kind == "nested")


def shared(count: int) -> ReversibleSequence:
    return overlapped_of("conv_bn", count, shared=True)


def exact(count: int) -> ReversibleSequence:
    return overlapped_of("conv_bn", count, precision=Precision("fp32", "exact"))


def narrow(count: int) -> ReversibleSequence:
    return overlapped_of("conv_bn", count, precision=Precision("bf16", "fp32"))


def guarded(count: int) -> ReversibleSequence:
    model = overlapped_of("conv_bn", count)
    Guard(every=1).attach(model)
    return model


def affine(count: int) -> ReversibleSequence:
    def doubling() -> nn.Module:
        return nn.Sequential(conv_bn(), nn.Conv2d(4, 8, 1))

    couplings = [AffineCoupling(doubling(), doubling()) for _ in range(count)]
    return ReversibleSequence(couplings, precision=FP64, overlapped=True).double()


def partly_frozen(count: int) -> ReversibleSequence:
    model = overlapped_of("conv_bn", count)
    for parameter in model.couplings[0].parameters():
        parameter.requires_grad_(False)
    return model


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("make", [shared, exact, narrow, guarded, affine, partly_frozen])
def test_everything_is_waited_for_in(
    make: Callable[[int], ReversibleSequence], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert checked(monkeypatch, two_steps(make(count), "conv_bn")).faults == []


def test_pixels_that_become_channels_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def wide() -> nn.Module:
        return nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.Tanh())

    blocks = [AdditiveCoupling(nn.Conv2d(2, 2, 3, padding=1), nn.Tanh()), SpaceToDepth(2)]
    blocks += [AdditiveCoupling(wide(), wide()) for _ in range(2)]
    model = ReversibleSequence(blocks, overlapped=True)

    def step(check: QueueCheck) -> None:
        for _ in range(2):
            weighted_sum(model(torch.randn(2, 4, 4, 4))).backward()

    assert checked(monkeypatch, step).faults == []


def two_backwards(model: ReversibleSequence, x: Tensor) -> None:
    y = model(x)
    weighted_sum(y).backward(retain_graph=True)
    weighted_sum(y).backward()


def input_only(model: ReversibleSequence, x: Tensor) -> None:
    torch.autograd.grad(weighted_sum(model(x)), [x])


def last_block_only(model: ReversibleSequence, x: Tensor) -> None:
    for _ in range(2):
        torch.autograd.grad(weighted_sum(model(x)), list(model.couplings[-1].parameters()))


def two_chains_in_one_backward(model: ReversibleSequence, x: Tensor) -> None:
    (weighted_sum(model(x)) + weighted_sum(model(2 * x))).backward()


def one_behind_the_other(model: ReversibleSequence, x: Tensor) -> None:
    weighted_sum(model(model(x))).backward()


def updates_within_the_backward(model: ReversibleSequence, x: Tensor) -> None:
    """Each gradient is used and dies as soon as it is there."""

    def update(parameter: Tensor) -> None:
        assert parameter.grad is not None
        with torch.no_grad():
            parameter -= 0.01 * parameter.grad
        parameter.grad = None

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(update)
    for _ in range(2):
        weighted_sum(model(x)).backward()


def an_error_in_a_hook(model: ReversibleSequence, x: Tensor) -> None:
    def fail(gradient: Tensor) -> None:
        raise ZeroDivisionError

    handle = next(model.couplings[-2].parameters()).register_hook(fail)
    for _ in range(2):
        with contextlib.suppress(ZeroDivisionError):
            weighted_sum(model(x)).backward()
    handle.remove()
    weighted_sum(model(x)).backward()


class Outside(nn.Module):
    """Uses a tensor whose gradient nobody would get, which the backward refuses."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.tensors = [torch.ones((), dtype=torch.float64, requires_grad=True)]

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * self.tensors[0]


def an_error_in_the_gradient(model: ReversibleSequence, x: Tensor) -> None:
    net = model.get_submodule("couplings.1.f")
    for f in (Outside(net), net, net):
        model.couplings[1].f = f
        with contextlib.suppress(OutsideTensorError):
            weighted_sum(model(x)).backward()


WAYS = [two_backwards, input_only, last_block_only, two_chains_in_one_backward, one_behind_the_other]
WAYS += [updates_within_the_backward, an_error_in_a_hook, an_error_in_the_gradient]


@pytest.mark.parametrize("call", WAYS)
@pytest.mark.parametrize("count", [3, 4])
@pytest.mark.parametrize("make", [exact, affine])
def test_however_backward_is_called(
    make: Callable[[int], ReversibleSequence],
    count: int,
    call: Callable[[ReversibleSequence, Tensor], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make(count)
    x = input_of("conv_bn", next(model.parameters()).dtype)
    assert checked(monkeypatch, lambda check: call(model, x)).faults == []


class Marked(torch.autograd.Function):
    """Notes where the queue of its evaluation and of its gradient were."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, note: Callable[[str], None]) -> Tensor:
        ctx.note = note
        note("R")
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *d: Tensor) -> Any:
        ctx.note("D")
        return d[0].clone(), None


class Marking(nn.Module):
    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__()
        self._note = note

    def forward(self, x: Tensor) -> Tensor:
        return Marked.apply(torch.tanh(x), self._note)  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("overlapped", [True, False])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_a_block_s_gradient_and_the_next_rebuild_need_nothing_of_each_other(
    count: int, overlapped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every column but those at the ends; and the gradient of a block is where its rebuild was."""
    marks: dict[tuple[str, int], tuple[str, dict[str, int]]] = {}

    def step(check: QueueCheck) -> None:
        def mark(index: int) -> Callable[[str], None]:
            # Of the two halves of a block and its forward the last counts.
            return lambda what: marks.update({(what, index): (check.now.name, dict(check.now.clock))})

        nets = [(Marking(mark(i)), Marking(mark(i))) for i in range(count)]
        model = ReversibleSequence([AdditiveCoupling(*pair) for pair in nets], overlapped=overlapped)
        weighted_sum(model(input_of("tanh", torch.float32))).backward()

    checked(monkeypatch, step)
    for i in range(count):
        assert marks["R", i][0] == marks["D", i][0] == (("even", "odd")[i % 2] if overlapped else "own")
    for i in range(1, count):
        (lane, rebuild), (other, gradient) = marks["R", i - 1], marks["D", i]
        concurrent = lane != other and rebuild[lane] > gradient.get(lane, 0) and gradient[other] > rebuild.get(other, 0)
        assert concurrent == overlapped
        # What they do need.
        assert rebuild.get(marks["R", i][0], 0) >= marks["R", i][1][marks["R", i][0]]
        following, before = marks["D", i - 1], marks["D", i]
        assert following[1].get(before[0], 0) >= before[1][before[0]]


def test_the_host_of_a_cpu_has_no_lanes() -> None:
    lanes = Lanes(torch.zeros(1))
    lanes.begin(0)
    with lanes.on(0):
        pass
    lanes.hand_over(0)
    lanes.give_away([torch.zeros(1)])
    lanes.join()


def test_all_gradients_that_leave_are_given_away(monkeypatch: pytest.MonkeyPatch) -> None:
    model = overlapped_of("conv_bn", 3)
    check = checked(monkeypatch, lambda check: void(training_step(model, input_of("conv_bn"))))
    # By the parameters, and by the two streams.
    assert check.given_away == len(list(model.parameters())) + 2


def void(result: object) -> None:
    pass


# Negative controls.


def simplest(count: int) -> Step:
    """Every kind of dependence, and nothing that makes one of the waits needless."""
    return two_steps(affine(count), "conv_bn")


COUNT = 4


def test_each_wait_that_is_left_out_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = checked(monkeypatch, simplest(COUNT)).waits
    assert waits == 2 * (1 + 4 * (COUNT - 1) + 1)
    faults = [checked(monkeypatch, simplest(COUNT), left_out=k).faults for k in range(waits)]
    assert [k for k, found in enumerate(faults) if not found] == []
    for what in ("reads what", "overwrites what", "gets memory"):
        assert any(what in fault for found in faults for fault in found)


def test_a_rebuild_in_place_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    undo = AdditiveCoupling.undo
    monkeypatch.setattr(
        AdditiveCoupling,
        "undo",
        lambda self, stream, residual, in_place=False: undo(self, stream, residual, in_place=True),
    )
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        checked(monkeypatch, two_steps(overlapped_of("conv_bn", COUNT), "conv_bn"))


def test_lanes_that_the_error_leaves_busy_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Lanes, "join", lambda lanes: None)
    model = affine(COUNT)
    check = checked(monkeypatch, lambda check: an_error_in_a_hook(model, input_of("conv_bn")))
    assert check.faults


def test_the_check_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def step(check: QueueCheck) -> None:
        own, even, odd = check.queues.values()
        with check.within(even):
            a = torch.ones(3)
        b = a + 1
        own.wait_event(even.record_event())
        c = a + b
        with check.within(odd):
            c.add_(1)
        odd.wait_event(own.record_event())
        with check.within(odd):
            a.add_(1)
        del a
        with check.within(even):
            torch.ones(1)

    assert checked(monkeypatch, step).faults == [
        "aten.add.Tensor on own reads what even wrote",
        "aten.add_.Tensor on odd overwrites what own wrote",
        "aten.add_.Tensor on odd overwrites what own uses",
        "aten.ones.default on even gets memory that own uses",
        "aten.ones.default on even gets memory that odd uses",
    ]

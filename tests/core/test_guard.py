"""A guard looks at all blocks in turn, names the one that is off, and answers as it was told."""

import copy
import math
import pickle
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from revnet_core import (
    DriftError,
    Guard,
    UnsupportedError,
    audit_gradients,
)
from revnet_core.probe import Finding
from tests.core.guard_cases import HEALTHY, KINDS, blocks_of, calls, image, set_steps, step, steps, wavering
from tests.core.nets import (
    assert_same,
    input_of,
    sequence_of,
    side_of,
    training_step,
    twin_of,
    weighted_sum,
)


@pytest.fixture
def device_that_is_not_ready(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Findings are as on a device that the host would have to wait for; the function says when they are ready."""

    def become(ready: bool) -> None:
        monkeypatch.setattr(Finding, "is_ready", lambda self: ready)

    monkeypatch.setattr(Finding, "on_host", False)
    become(False)
    return become


@pytest.mark.parametrize("kind", KINDS)
def test_a_healthy_chain_gives_no_alarm_and_all_blocks_are_visited(kind: str) -> None:
    model = sequence_of(kind, 5)
    guard = Guard(every=1, tolerance=HEALTHY).attach(model)
    for _ in range(40):
        training_step(model, input_of(kind), side_of(kind))
    assert [report.step for report in guard.history] == list(range(1, 41))
    assert Counter(blocks_of(guard)) == {0: 20, 1: 5, 2: 5, 3: 5, 4: 5}
    assert all(0 <= report.rel <= HEALTHY for report in guard.history)


def test_only_every_nth_step_is_compared_the_first_included() -> None:
    model = wavering(0, 0, 0)
    guard = Guard(every=4).attach(model)
    for _ in range(20):
        step(model)
    assert [(report.step, report.block) for report in guard.history] == [(1, 0), (5, 1), (9, 0), (13, 2), (17, 0)]


def test_other_forwards_are_no_steps() -> None:
    model = wavering(0, 0)
    guard = Guard(every=1).attach(model)
    with torch.no_grad():
        model(image())
    model.eval()
    step(model)
    model.train().requires_grad_(False)(image(requires_grad=False))
    assert not guard.history
    step(model.requires_grad_(True))
    assert [report.step for report in guard.history] == [1]


@pytest.mark.parametrize("at", range(4))
def test_a_fault_is_seen_from_its_block_to_the_first_and_not_behind(at: int) -> None:
    model = wavering(*(0.5 * (index == at) for index in range(4)))
    guard = Guard(every=1, tolerance=HEALTHY, action="warn").attach(model)
    with pytest.warns(RuntimeWarning) as caught:
        steps(model, 12)
    assert set(blocks_of(guard)) == set(range(4))
    assert all((report.rel > HEALTHY) == (report.block <= at) for report in guard.history)
    # Once per block.
    assert sorted(str(w.message).split(":")[0] for w in caught) == [f"couplings[{index}]" for index in range(at + 1)]


@pytest.mark.parametrize("action", ["stop", "warn", "store"])
def test_a_fault_that_arises_later_is_answered(action: str) -> None:
    model = wavering(0, 0, 0, 0)
    guard = Guard(every=1, tolerance=HEALTHY, action=action).attach(model)
    for _ in range(3):
        step(model)
    set_steps(model, 0, 0, 0.5, 0)
    what = r"couplings\[2\]: at step 4 its rebuilt input was off by .* of 0\.\d+, above the tolerance of 1e-10"
    if action == "stop":
        with pytest.raises(DriftError, match=what + ".*exact.*wider streams.*fewer blocks"):
            step(model)
    else:
        with pytest.warns(RuntimeWarning, match=what + ".*exact.*wider streams.*fewer blocks"):
            step(model)
    assert model.activations == ("stored" if action == "store" else "reconstructed")
    assert guard.history[-1].block == 2


def test_a_finding_that_is_not_there_is_read_when_asked_for(device_that_is_not_ready: Callable[[bool], None]) -> None:
    model = wavering(0.5)
    guard = Guard(every=1).attach(model)
    step(model)
    step(model)
    for _ in range(2):
        with pytest.raises(DriftError):
            guard.settle()
    guard.settle()


def test_a_finding_that_is_there_is_answered_in_the_next_forward(
    device_that_is_not_ready: Callable[[bool], None],
) -> None:
    model = wavering(0.5)
    Guard(every=2).attach(model)
    step(model)
    step(model)
    device_that_is_not_ready(True)
    with torch.no_grad(), pytest.raises(DriftError, match="at step 1 "):
        model(image())
    step(model)


def test_reading_the_history_leaves_the_answer_to_the_next_forward(
    device_that_is_not_ready: Callable[[bool], None],
) -> None:
    model = wavering(0.5)
    guard = Guard(every=1).attach(model)
    step(model)
    assert len(guard.history) == len(guard.history) == 1
    with pytest.raises(DriftError):
        step(model)


def test_storing_begins_with_the_forward_that_learns_of_it(device_that_is_not_ready: Callable[[bool], None]) -> None:
    model = wavering(0.5, 0.5)
    Guard(every=1, action="store").attach(model)
    step(model)
    before = calls(model)
    step(model)
    assert calls(model) - before == 4
    device_that_is_not_ready(True)
    with pytest.warns(RuntimeWarning, match="stores its activations") as caught:
        step(model)
    assert calls(model) - before == 4 + 2
    assert len(caught) == 1


def test_storing_is_storing_and_its_gradients_are_right() -> None:
    model = wavering(0, 0.5, 0)
    guard = Guard(every=1, action="store").attach(model)
    with pytest.warns(RuntimeWarning, match=r"From the next forward on this sequence stores"):
        step(model)
    set_steps(model, 0, 0, 0)
    before = calls(model)
    model.zero_grad()
    seen = training_step(model, image())
    assert calls(model) - before == 3
    assert_same(seen, training_step(twin_of(wavering(0, 0, 0), "stored"), image()), bits=True)
    # What is stored is not compared, and says nothing more.
    assert len(guard.history) == 1
    model.activations = "reconstructed"
    before = calls(model)
    step(model)
    assert calls(model) - before == 6
    assert [report.step for report in guard.history] == [1, 3]


def test_a_forward_without_a_backward_is_a_step_and_finds_nothing() -> None:
    model = wavering(0, 0.5)
    guard = Guard(every=1, action="warn").attach(model)
    model(image())
    assert not guard.history
    with pytest.warns(RuntimeWarning):
        step(model)
    assert [report.step for report in guard.history] == [2]


class TwoStages(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = wavering(0, 0), wavering(0, 0, 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def test_sequences_take_turns_and_are_named() -> None:
    model = TwoStages()
    guard = Guard(every=1, tolerance=HEALTHY).attach(model)
    for _ in range(8):
        step(model)
    assert [(report.step, report.sequence, report.block) for report in guard.history] == [
        (1, "first", 0),
        (2, "second", 0),
        (3, "first", 1),
        (4, "second", 1),
        (5, "first", 0),
        (6, "second", 0),
        (7, "first", 1),
        (8, "second", 2),
    ]
    set_steps(model.second, 0.5, 0, 0)
    step(model)
    with pytest.raises(DriftError, match=r"second\.couplings\[0\]: at step 10 "):
        step(model)


def test_storing_is_for_the_sequence_that_drifts() -> None:
    model = TwoStages()
    set_steps(model.second, 0.5, 0, 0)
    Guard(every=1, action="store").attach(model)
    with pytest.warns(RuntimeWarning):
        steps(model, 2)
    assert (model.first.activations, model.second.activations) == ("reconstructed", "stored")


def test_an_inner_sequence_is_guarded_where_it_is_asked_for() -> None:
    model = sequence_of("nested", 2)
    inner = model.couplings[0].f
    assert isinstance(inner, nn.Sequential)
    outer_guard, inner_guard = Guard(every=1, tolerance=HEALTHY), Guard(every=1, tolerance=HEALTHY)
    outer_guard.attach(model)
    inner_guard.attach(inner)
    for _ in range(4):
        training_step(model, input_of("nested"))
    assert blocks_of(outer_guard) == blocks_of(inner_guard) == [0, 1, 0, 1]
    assert {report.sequence for report in inner_guard.history} == {"1"}


@pytest.mark.parametrize("again", [copy.deepcopy, copy.copy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_no_guard(again: Callable[[nn.Module], nn.Module]) -> None:
    model = wavering(0.5)
    guard = Guard(every=1).attach(model)
    twin = again(model)
    step(twin)
    assert not guard.history
    Guard().attach(twin)
    with pytest.raises(DriftError):
        step(model)


def test_an_audit_does_not_count() -> None:
    model = sequence_of("conv_bn")
    guard = Guard(every=1).attach(model)
    audit_gradients(model, lambda y, target: (y * target).sum(), (image(requires_grad=False), torch.ones(())))
    assert not guard.history


def test_the_state_dict_is_as_without_a_guard() -> None:
    model, plain = sequence_of("conv_bn"), sequence_of("conv_bn")
    Guard().attach(model)
    assert model.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(model.state_dict())
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]


@pytest.mark.parametrize("again", [copy.deepcopy, lambda guard: pickle.loads(pickle.dumps(guard))])
def test_a_copied_guard_is_its_settings(again: Callable[[Guard], Guard]) -> None:
    guard = Guard(every=7, tolerance=0.5, action="warn").attach(wavering(0))
    twin = again(guard)
    assert repr(twin) == repr(guard) == "Guard(every=7, tolerance=0.5, action='warn')"
    twin.attach(wavering(0))


def test_a_guard_does_not_keep_the_model() -> None:
    guard = Guard(every=1, tolerance=HEALTHY)
    for _ in range(3):
        model = wavering(0)
        guard.attach(model)
        step(model)
        del model
    assert [report.step for report in guard.history] == [1, 1, 1]
    assert len(guard._posts) == 0


def test_attached_twice_is_attached_once_and_detached_is_gone(
    device_that_is_not_ready: Callable[[bool], None],
) -> None:
    model = wavering(0.5)
    guard = Guard(every=1).attach(model).attach(model)
    step(model)
    guard.detach()
    assert len(guard.history) == 1
    device_that_is_not_ready(True)
    step(model)
    guard.settle()
    other = Guard(every=1).attach(model)
    step(model)
    assert (len(guard.history), len(other.history)) == (1, 1)


def test_another_guard_s_sequence_is_refused_and_nothing_half_attached() -> None:
    model = TwoStages()
    Guard().attach(model.second)
    other = Guard(every=1)
    with pytest.raises(UnsupportedError, match="second has a guard already"):
        other.attach(model)
    step(model)
    assert not other.history


def test_nothing_to_guard_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="Linear holds no ReversibleSequence"):
        Guard().attach(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every": 0}, "every = 0; .* at least 1"),
        ({"tolerance": -1.0}, "tolerance = -1.0"),
        ({"tolerance": math.nan}, "tolerance = nan"),
        ({"tolerance": math.inf}, "tolerance = inf"),
        ({"action": "pause"}, "action = 'pause'; allowed: stop, warn, store"),
    ],
)
def test_settings_that_do_not_exist_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        Guard(**settings)


@pytest.mark.parametrize("mark", ["ds_id", "param_idx_in_group"], ids=["ZeRO-3", "ZeRO-1-and-2"])
def test_storing_is_refused_where_ranks_have_to_go_alike(mark: str) -> None:
    model = wavering(0)
    setattr(next(model.parameters()), mark, 0)
    guard = Guard(every=1, action="store").attach(model)
    with pytest.raises(UnsupportedError, match="under ZeRO 1 to 3 all have to"):
        model(image())
    guard.detach()
    model(image())


def test_in_one_graph_a_guard_is_refused_and_otherwise_works() -> None:
    torch._dynamo.reset()
    model = sequence_of("conv_bn")
    guard = Guard(every=1, tolerance=HEALTHY).attach(model)
    with pytest.raises(Exception, match="guard cannot follow"):
        torch.compile(model, fullgraph=True, backend="eager")(image())
    broken: Any = torch.compile(model, backend="eager")
    weighted_sum(broken(image())).backward()
    assert len(guard.history) == 1
    guard.detach()
    torch._dynamo.reset()
    weighted_sum(torch.compile(model, fullgraph=True, backend="eager")(image())).backward()
    torch._dynamo.reset()

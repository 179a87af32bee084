"""A recompute finds random state, training mode and buffers as the forward found them, or says that it cannot."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from revnet_core import ChangedStateError
from revnet_core.replay import Replay
from tests.core.nets import (
    KINDS,
    assert_same,
    conv_bn,
    dropout,
    input_of,
    outcome_of,
    sequence_of,
    training_step,
    twin_of,
    weighted_sum,
)

SAVING = ("checkpointed", "reconstructed")
CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", ["conv_bn", "dropout", "counting", "spectral", "instance_norm", "nested"])
def test_a_replay_repeats_the_recording_and_leaves_no_trace(kind: str) -> None:
    net = KINDS[kind].make().double()
    x = input_of(kind).detach().chunk(2, KINDS[kind].split_dim)[0].clone()
    replay = Replay(net, CPU)
    with replay.recording():
        first = net(x.clone())
    buffers = {name: b.clone() for name, b in net.named_buffers()}
    state = torch.get_rng_state()
    for _ in range(2):
        with replay.replaying():
            assert torch.equal(net(x.clone()), first)
        torch.testing.assert_close(dict(net.named_buffers()), buffers, rtol=0, atol=0)
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", ["dropout", "counting"])
def test_without_a_replay_a_second_evaluation_differs(kind: str) -> None:
    net = KINDS[kind].make().double()
    x = input_of(kind).detach().chunk(2, -1)[0]
    assert not torch.equal(net(x), net(x))


@pytest.mark.parametrize("kind", ["conv_bn", "counting", "nested"])
def test_statistics_are_updated_once_a_step(kind: str) -> None:
    model = sequence_of(kind, 2)
    training_step(model, input_of(kind))
    counts = [b for name, b in model.named_buffers() if name.endswith(("num_batches_tracked", "calls"))]
    assert counts
    assert all(count == 1 for count in counts)


def test_two_evaluations_update_statistics_twice() -> None:
    net = conv_bn()
    for _ in range(2):
        net(input_of("conv_bn", torch.float32).chunk(2, 1)[0])
    assert net.get_buffer("1.num_batches_tracked") == 2


@pytest.mark.parametrize("activations", SAVING)
@pytest.mark.parametrize("kind", ["conv_bn", "dropout", "counting", "nested"])
@pytest.mark.parametrize("training", [True, False])
def test_mode_switched_between_forward_and_backward(training: bool, kind: str, activations: str) -> None:
    outcomes = []
    for mode in ("stored", activations):
        model, x = twin_of(sequence_of(kind, 3), mode).train(training), input_of(kind)
        torch.manual_seed(4)
        y = model(x)
        model.train(not training)
        weighted_sum(y).backward()
        assert all(module.training is not training for module in model.modules())
        outcomes.append(outcome_of(model, x, y))
    assert_same(outcomes[1], outcomes[0])


@pytest.mark.parametrize("kind", ["dropout", "conv_bn"])
def test_the_modes_differ(kind: str) -> None:
    model = sequence_of(kind, 3)
    assert not torch.equal(model.train()(input_of(kind)), model.eval()(input_of(kind)))


def test_draws_do_not_repeat_between_steps() -> None:
    model, x = sequence_of("dropout"), input_of("dropout")
    assert not torch.equal(model(x), model(x))


def forward_in_training_mode(model: nn.Module, x: Tensor) -> None:
    model.train()
    model(2 * x)


def fill_buffers(model: nn.Module, x: Tensor) -> None:
    for buffer in model.buffers():
        buffer.add_(1)


@pytest.mark.parametrize("activations", SAVING)
@pytest.mark.parametrize("change", [forward_in_training_mode, fill_buffers])
@pytest.mark.parametrize("kind", ["conv_bn", "counting", "instance_norm"])
def test_buffers_that_the_forward_read_and_someone_changed(
    kind: str, change: Callable[[nn.Module, Tensor], None], activations: str
) -> None:
    model, x = sequence_of(kind, 2, activations=activations).eval(), input_of(kind)
    y = model(x)
    change(model, x)
    with pytest.raises(ChangedStateError, match=r"buffer '.*' of .* was changed in place after the forward"):
        weighted_sum(y).backward()


@pytest.mark.parametrize("activations", SAVING)
@pytest.mark.parametrize("kind", ["conv_bn", "counting", "instance_norm"])
def test_buffers_that_the_forward_wrote_may_change(kind: str, activations: str) -> None:
    outcomes = []
    for mode in ("stored", activations):
        model, x = twin_of(sequence_of(kind, 2), mode), input_of(kind)
        y = model(x)
        with torch.no_grad():
            model(2 * x)
        weighted_sum(y).backward()
        outcomes.append(outcome_of(model, x, y))
    assert_same(outcomes[1], outcomes[0])


def held_by(replay: Replay) -> list[Tensor]:
    held = [*vars(replay).values(), *vars(replay._draws).values()]
    return [value for value in held if isinstance(value, Tensor)]


def test_a_net_without_state_costs_nothing_lasting() -> None:
    net = nn.Linear(6, 6)
    replay = Replay(net, CPU)
    with replay.recording():
        net(torch.zeros(2, 6))
    assert not held_by(replay)


def test_a_net_that_draws_keeps_one_state() -> None:
    net = dropout()
    replay = Replay(net, CPU)
    with replay.recording():
        net(torch.zeros(2, 6))
    assert [state.numel() for state in held_by(replay)] == [torch.get_rng_state().numel()]


def broken(module: nn.Module, args: object, out: object) -> None:
    raise ValueError("broken")


def test_the_forwards_training_mode_survives_an_error_in_the_recompute() -> None:
    model, x = sequence_of("conv_bn"), input_of("conv_bn")
    y = model(x)
    relu = next(module for module in model.modules() if isinstance(module, nn.ReLU))
    handle = relu.register_forward_hook(broken)
    model.eval()
    with pytest.raises(ValueError, match="broken"):
        weighted_sum(y).backward()
    handle.remove()
    assert not any(module.training for module in model.modules())
    assert all(m.track_running_stats for m in model.modules() if isinstance(m, nn.BatchNorm2d))

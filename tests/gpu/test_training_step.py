"""TrainingStep as a CUDA graph: trains as eager steps do, bit for bit, draws anew, and says what it cannot capture."""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from revnet_core import (
    Budgeted,
    CaptureError,
    Precision,
    ReconstructionError,
    TrainingStep,
    create_model,
)
from tests.core.graph_cases import (
    Batch,
    Peeking,
    assert_equal_states,
    assert_same_training,
    batches_for,
    clipped_step,
    dropping,
    exact_beyond_its_range,
    sgd,
    square,
    step_for,
    tokens,
    train,
)
from tests.core.nets import sequence_of

pytestmark = pytest.mark.gpu
EXACT, EXACT_BF16 = Precision("fp32", "exact"), Precision("bf16", "exact")
PRECISIONS = (Precision("fp32"), Precision("tf32"), Precision("bf16"), EXACT, EXACT_BF16)
ACTIVATIONS = ("stored", "checkpointed", "reconstructed", "budgeted")
LONG_STEPS, STEPS = 200, 10


def network(device: torch.device, activations: str, precision: Precision) -> nn.Module:
    chosen = Budgeted(200_000) if activations == "budgeted" else activations
    widths = (16, 32, 64) if device.type == "cuda" else (4, 6, 8)
    model = create_model("revnet", num_classes=10, depth=26, channels=widths, activations=chosen, precision=precision)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision.compute == "tf32"
    return model.to(device).train()


def images(device: torch.device, count: int) -> list[Batch]:
    size = (16, 3, 32, 32) if device.type == "cuda" else (4, 3, 8, 8)
    labels = torch.randint(10, (count, size[0]), device=device)
    return [(torch.randn(size, device=device), own) for own in labels]


def steps_on(device: torch.device, count: int) -> int:
    return count if device.type == "cuda" else 6


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_eager_steps_are_deterministic(device: torch.device, precision: Precision) -> None:
    """The control: if two eager trainings differed, the equality below would be chance."""
    model = network(device, "reconstructed", precision)
    twin = copy.deepcopy(model)
    batches = images(device, 4)
    losses = [
        train(step_for(m, loss=nn.functional.cross_entropy, example=batches[0], cuda_graph=False), batches)
        for m in (model, twin)
    ]
    assert torch.equal(*losses)
    assert_equal_states(model, twin)


def test_a_training_that_is_another_is_noticed(device: torch.device) -> None:
    """The negative control: one weight is off by one rounding."""

    def make(model: nn.Module, *, cuda_graph: bool) -> TrainingStep:
        if cuda_graph:
            with torch.no_grad():
                first = next(model.parameters()).view(-1)
                first[0] = torch.nextafter(first[0], first[0] + 1)
        return step_for(model, loss=nn.functional.cross_entropy, example=batches[0], cuda_graph=cuda_graph)

    batches = images(device, 6)
    with pytest.raises(AssertionError):
        assert_same_training(network(device, "reconstructed", Precision()), make, batches)


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_a_captured_step_trains_as_an_eager_one(device: torch.device, activations: str, precision: Precision) -> None:
    batches = images(device, steps_on(device, STEPS))
    make = partial(step_for, loss=nn.functional.cross_entropy, example=batches[0])
    assert_same_training(network(device, activations, precision), make, batches)


LONG = [
    ("stored", Precision("bf16")),
    ("reconstructed", Precision("fp32")),
    ("reconstructed", Precision("tf32")),
    ("reconstructed", Precision("bf16")),
    ("reconstructed", EXACT),
    ("reconstructed", EXACT_BF16),
]


@pytest.mark.parametrize(("activations", "precision"), LONG, ids=str)
def test_it_does_so_for_200_steps(device: torch.device, activations: str, precision: Precision) -> None:
    batches = images(device, 8)
    make = partial(step_for, loss=nn.functional.cross_entropy, example=batches[0])
    steps = steps_on(device, LONG_STEPS)
    assert_same_training(network(device, activations, precision), make, [batches[i % 8] for i in range(steps)])


@pytest.mark.parametrize("precision", [EXACT, EXACT_BF16], ids=str)
def test_exact_gradients_are_those_of_a_stored_run_of_the_same_arithmetic(
    device: torch.device, precision: Precision
) -> None:
    stored = network(device, "stored", precision)
    exact = network(device, "reconstructed", precision)
    exact.load_state_dict(stored.state_dict())
    batches = images(device, steps_on(device, STEPS))
    losses = [
        train(step_for(m, loss=nn.functional.cross_entropy, example=batches[0]), batches) for m in (stored, exact)
    ]
    assert torch.equal(*losses)
    assert_equal_states(stored, exact)


@pytest.mark.parametrize("activations", ["stored", "checkpointed", "reconstructed"])
@pytest.mark.parametrize(
    "kind", ["norm_mlp", "attention", "inplace_first", "frozen_first", "instance_norm", "spectral"]
)
def test_nets_of_every_kind_are_captured(device: torch.device, kind: str, activations: str) -> None:
    model = sequence_of(kind, 3, activations=activations).double().to(device).train()
    batches = batches_for(kind, 7, device=device)
    assert_same_training(model, partial(step_for, loss=square, example=batches[0]), batches)


def masks_of_replays(device: torch.device, activations: str, replays: int) -> list[list[list[Tensor]]]:
    """Of each replay, by net: where the forward dropped, and where the recompute did."""
    model, nets = dropping(activations)
    model.to(device)
    batch = tokens(device)
    step = TrainingStep(model, square, sgd(model, lr=0.0), batch)
    for _ in range(4):
        step(batch)
    found = []
    for _ in range(replays):
        step(batch)
        # The last two evaluations of a net are the captured ones.
        found.append([[mask.clone() for mask in (net.masks[-2], net.masks[-1])] for net in nets])
    return found


@pytest.mark.parametrize("activations", ["reconstructed", "checkpointed"])
def test_a_replay_draws_anew_and_its_recompute_draws_the_same(device: torch.device, activations: str) -> None:
    replays = masks_of_replays(device, activations, 3)
    assert all(torch.equal(*pair) for replay in replays for pair in replay)
    masks = [pair[0] for replay in replays for pair in replay]
    assert all(not torch.equal(a, b) for i, a in enumerate(masks) for b in masks[:i])


@pytest.mark.usefixtures("unlike_states")
def test_states_that_are_unlike_are_noticed(device: torch.device) -> None:
    """The negative control of the test above."""
    (replay,) = masks_of_replays(device, "reconstructed", 1)
    assert not any(torch.equal(*pair) for pair in replay)


def test_the_seed_decides_what_is_drawn(device: torch.device) -> None:
    runs: list[Tensor] = []
    for seed in (3, 3, 4):
        torch.manual_seed(2)
        model, _ = dropping("reconstructed")
        model.to(device)
        batch = tokens(device)
        torch.manual_seed(seed)
        runs.append(train(TrainingStep(model, square, sgd(model), batch), [batch] * 7))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_an_inexact_reconstruction_is_told_of_after_its_replay(device: torch.device) -> None:
    model, grows = exact_beyond_its_range()
    model.to(device)
    batch = tokens(device)
    step = TrainingStep(model, square, sgd(model, lr=0.0), batch)
    train(step, [batch] * 5)
    with torch.no_grad():
        weight = grows.weight.clone()
        grows.weight.mul_(1e4)
    step(batch)
    with torch.no_grad():
        grows.weight.copy_(weight)
    with pytest.raises(ReconstructionError, match=r"couplings\[1\]: a stream left the grid's range"):
        train(step, [batch])
    train(step, [batch] * 2)


def halve(optimizer: torch.optim.Optimizer) -> None:
    group = optimizer.param_groups[0]
    if isinstance(group["lr"], Tensor):
        group["lr"].mul_(0.5)
    else:
        group["lr"] *= 0.5


Make = Callable[[nn.Module, torch.device], torch.optim.Optimizer]


def by_sgd(model: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    return sgd(model)


def by_fused_sgd(model: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    rate = torch.tensor(0.05, dtype=torch.float64 if device.type == "cpu" else torch.float32, device=device)
    return sgd(model, lr=rate, fused=True)


def by_adam(model: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    # `capturable` is for CUDA, where a step count on the host would be that of the capture for good.
    return torch.optim.Adam(model.parameters(), lr=1e-3, capturable=device.type == "cuda", foreach=True)


@pytest.mark.parametrize(("make", "recaptures"), [(by_sgd, True), (by_fused_sgd, False)])
def test_a_learning_rate_that_changes_counts(device: torch.device, make: Make, recaptures: bool) -> None:
    batches = batches_for("norm_mlp", 12, device=device)
    model = sequence_of("norm_mlp", 2).double().to(device).train()
    twin = copy.deepcopy(model)
    losses: list[Tensor] = []
    for one, on in ((model, False), (twin, True)):
        optimizer = make(one, device)
        step = TrainingStep(one, square, optimizer, batches[0], cuda_graph=on)
        first = train(step, batches[:5])
        halve(optimizer)
        second = step(batches[5])
        assert step.captured == (on and not recaptures)
        losses.append(torch.cat([first, second[None], train(step, batches[6:])]))
        assert step.captured == on
    assert torch.equal(*losses)
    assert_equal_states(twin, model)


def test_adam_is_captured(gpu: torch.device) -> None:
    batches = batches_for("norm_mlp", 8, device=gpu)
    model = sequence_of("norm_mlp", 2).double().to(gpu).train()

    def make(one: nn.Module, *, cuda_graph: bool) -> TrainingStep:
        return TrainingStep(one, square, by_adam(one, gpu), batches[0], cuda_graph=cuda_graph)

    assert_same_training(model, make, batches)


def test_gradients_may_be_scaled_down_to_a_norm(device: torch.device) -> None:
    batches = batches_for("norm_mlp", 6, device=device)
    model = sequence_of("norm_mlp", 2).double().to(device).train()
    assert_same_training(model, partial(clipped_step, example=batches[0]), batches)


def test_what_cannot_be_captured_is_named_and_the_process_goes_on(device: torch.device) -> None:
    batch: Batch = (torch.randn(2, 6, device=device), torch.randn(2, 6, device=device))
    model = Peeking(6, 6).to(device)
    step = TrainingStep(model, square, sgd(model), batch)
    with pytest.raises(CaptureError, match="_local_scalar_dense"):
        train(step, [batch] * 4)
    train(TrainingStep(model, square, sgd(model), batch, cuda_graph=False), [batch] * 2)
    batches = images(device, 6)
    make = partial(step_for, loss=nn.functional.cross_entropy, example=batches[0])
    assert_same_training(network(device, "reconstructed", Precision("bf16", "exact")), make, batches)


def test_draws_of_the_host_are_refused(gpu: torch.device) -> None:
    class HostNoise(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + torch.randn(6).to(input.device)

    model = HostNoise(6, 6).to(gpu)
    batch = (torch.randn(2, 6, device=gpu), torch.randn(2, 6, device=gpu))
    with pytest.raises(CaptureError, match=r"aten\.randn"):
        train(TrainingStep(model, square, sgd(model), batch), [batch] * 4)

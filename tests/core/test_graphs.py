"""TrainingStep, captured on a tape that behaves as a CUDA graph does; tests/gpu has the graphs themselves.

Legend: N batch, P positions, C features.
"""

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from revnet_core import (
    AdditiveCoupling,
    Budgeted,
    CaptureError,
    Precision,
    ReconstructionError,
    ReversibleSequence,
    ShapeError,
    TrainingStep,
    UnsupportedError,
    create_model,
    graphs,
)
from tests.core.graph_cases import (
    Batch,
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
from tests.core.nets import FP64, sequence_of
from tests.core.tape import CpuGraphs

# Of modules that count where no watch looks: in themselves it would be found.
CALLS = Counter[int]()


@pytest.fixture(autouse=True)
def _tape(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(graphs.GRAPHS, "cpu", CpuGraphs)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


ACTIVATIONS = ("stored", "checkpointed", "reconstructed", 3000)


@pytest.mark.parametrize("activations", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("kind", ["conv_bn", "norm_mlp", "inplace_first", "frozen_first", "instance_norm", "spectral"])
def test_a_captured_step_trains_as_an_eager_one(kind: str, activations: str | int) -> None:
    chosen = Budgeted(activations) if isinstance(activations, int) else activations
    model = sequence_of(kind, 3, activations="stored").double().train()
    model.activations = chosen
    batches = batches_for(kind, 8)
    make = partial(step_for, loss=square, example=batches[0])
    assert_same_training(model, make, batches)


PRECISIONS = (Precision("bf16"), Precision("fp32", "bf16"), Precision("bf16", "exact"))


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("activations", ["stored", "reconstructed"])
def test_a_whole_network_is_captured(activations: str, precision: Precision) -> None:
    model = create_model(
        "revnet", num_classes=10, depth=26, channels=(4, 6, 8), activations=activations, precision=precision
    )
    batches = [(torch.randn(4, 3, 8, 8), torch.randint(10, (4,))) for _ in range(6)]
    make = partial(step_for, loss=nn.functional.cross_entropy, example=batches[0])
    assert_same_training(model, make, batches)


def test_the_tape_decides_as_a_graph_does() -> None:
    """Otherwise the tests here could not fail."""

    class Counting(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            CALLS[id(self)] += 1
            return super().forward(input) * CALLS[id(self)]

    model = Counting(6, 6)
    twin = copy.deepcopy(model)
    batches: list[Batch] = [(torch.randn(2, 6), torch.randn(2, 6)) for _ in range(8)]
    losses = [
        train(TrainingStep(m, square, sgd(m), batches[0], cuda_graph=on), batches)
        for m, on in ((model, False), (twin, True))
    ]
    # The fourth call captures; its own count is right, and is decided for good.
    assert torch.equal(losses[0][:4], losses[1][:4])
    assert not torch.equal(losses[0][4], losses[1][4])


@pytest.mark.parametrize("activations", ["reconstructed", "checkpointed"])
def test_a_replay_draws_anew_and_its_recompute_draws_the_same(activations: str) -> None:
    model, nets = dropping(activations)
    batch = tokens()
    step = TrainingStep(model, square, sgd(model, lr=0.0), batch)
    for _ in range(4):
        step(batch)
    found: list[list[Tensor]] = []
    for _ in range(3):
        step(batch)
        # The last two evaluations of a net are the captured ones.
        assert all(torch.equal(net.masks[-2], net.masks[-1]) for net in nets)
        found.append([net.masks[-1].clone() for net in nets])
    masks = [mask for replay in found for mask in replay]
    assert all(not torch.equal(a, b) for i, a in enumerate(masks) for b in masks[:i])


def test_states_that_are_unlike_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control of the test above."""
    monkeypatch.setitem(graphs.GRAPHS, "cpu", partial(CpuGraphs, alike=False))
    model, nets = dropping("reconstructed")
    batch = tokens()
    step = TrainingStep(model, square, sgd(model), batch)
    for _ in range(4):
        step(batch)
    assert not any(torch.equal(net.masks[-2], net.masks[-1]) for net in nets)


def test_dropout_outside_the_sequences_is_drawn_anew_too() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 6))
    batch = torch.ones(5, 6), torch.zeros(5, 6)
    step = TrainingStep(model, square, sgd(model, lr=0.0), batch)
    losses = train(step, [batch] * 8)
    assert losses.unique().numel() == 8


def test_the_seed_decides_what_is_drawn() -> None:
    runs: list[Tensor] = []
    for _ in range(2):
        torch.manual_seed(3)
        model, _ = dropping("reconstructed")
        batch = tokens()
        runs.append(train(TrainingStep(model, square, sgd(model), batch), [batch] * 7))
    assert torch.equal(*runs)


def test_draws_of_an_inner_sequence_that_is_rebuilt_too_are_refused() -> None:
    inner = ReversibleSequence([AdditiveCoupling(nn.Dropout(0.5), nn.Linear(3, 3))], split_dim=-1)
    model = ReversibleSequence([AdditiveCoupling(inner, nn.Linear(6, 6))], split_dim=-1)
    batch = tokens()
    step = TrainingStep(model, square, sgd(model), batch)
    with pytest.raises(CaptureError, match="inner sequence whose activations are not stored"):
        train(step, [batch] * 4)
    inner.activations = "stored"
    train(TrainingStep(model, square, sgd(model), batch), [batch] * 5)


def test_a_step_that_chooses_is_refused() -> None:
    """Stochastic depth by Python's own choice: which nets draw would change with the step."""

    class Choosing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = (dropping("reconstructed")[0] for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            CALLS[id(self)] += 1
            return self.first(x) if CALLS[id(self)] % 2 else self.second(self.first(x))

    model = Choosing()
    batch = tokens()
    with pytest.raises(CaptureError, match="another number of times"):
        train(TrainingStep(model, square, sgd(model), batch), [batch] * 4)


def linear(activations: str = "reconstructed", precision: Precision = FP64) -> ReversibleSequence:
    return sequence_of("norm_mlp", 2, activations=activations, precision=precision).double().train()


def set_rate(model: ReversibleSequence, optimizer: torch.optim.Optimizer) -> None:
    optimizer.param_groups[0]["lr"] = 0.5


def set_evaluation(model: ReversibleSequence, optimizer: torch.optim.Optimizer) -> None:
    model.eval()


def freeze(model: ReversibleSequence, optimizer: torch.optim.Optimizer) -> None:
    next(model.parameters()).requires_grad_(False)


def set_precision(model: ReversibleSequence, optimizer: torch.optim.Optimizer) -> None:
    model.precision = Precision("fp32", "exact", grid_bits=24)


def store(model: ReversibleSequence, optimizer: torch.optim.Optimizer) -> None:
    model.activations = "stored"


def move(model: ReversibleSequence, optimizer: torch.optim.Optimizer) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


@pytest.mark.parametrize("change", [set_rate, set_evaluation, freeze, set_precision, store, move])
@pytest.mark.parametrize("after", [2, 3, 6])
def test_what_is_changed_between_two_steps_counts(
    change: Callable[[ReversibleSequence, torch.optim.Optimizer], None], after: int
) -> None:
    batches = batches_for("norm_mlp", 12)
    model = linear()
    twin = copy.deepcopy(model)
    losses: list[Tensor] = []
    for one, on in ((model, False), (twin, True)):
        optimizer = sgd(one)
        step = TrainingStep(one, square, optimizer, batches[0], cuda_graph=on)
        first = train(step, batches[:after])
        change(one, optimizer)
        losses.append(torch.cat([first, train(step, batches[after:])]))
        assert step.captured == on
    assert torch.equal(*losses)
    assert_equal_states(twin, model)


def test_a_rate_that_changes_at_each_step_is_spoken_of_and_right() -> None:
    batches = batches_for("norm_mlp", 10)
    model = linear()
    twin = copy.deepcopy(model)
    losses: list[list[Tensor]] = []
    for one, on in ((model, False), (twin, True)):
        optimizer = sgd(one)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        step = TrainingStep(one, square, optimizer, batches[0], cuda_graph=on)
        losses.append([])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for batch in batches:
                losses[-1].append(step(batch))
                schedule.step()
        assert [str(w.message) for w in caught if "lr=torch.tensor" in str(w.message)] == [
            str(w.message) for w in caught
        ]
        assert len(caught) == on
    assert torch.equal(torch.stack(losses[0]), torch.stack(losses[1]))


def test_a_rate_that_is_a_tensor_may_change_at_each_step() -> None:
    batches = batches_for("norm_mlp", 9)
    model = linear()
    twin = copy.deepcopy(model)
    losses: list[list[Tensor]] = []
    for one, on in ((model, False), (twin, True)):
        optimizer = sgd(one, lr=torch.tensor(0.05, dtype=torch.float64), fused=True)
        step = TrainingStep(one, square, optimizer, batches[0], cuda_graph=on)
        losses.append([])
        for batch in batches:
            losses[-1].append(step(batch))
            optimizer.param_groups[0]["lr"].mul_(0.5)
        assert step.captured == on
    assert torch.equal(torch.stack(losses[0]), torch.stack(losses[1]))


def test_a_loss_is_the_caller_s_own() -> None:
    batches = batches_for("norm_mlp", 7)
    model = linear()
    step = TrainingStep(model, square, sgd(model), batches[0])
    kept, values = [], []
    for batch in batches:
        kept.append(step(batch))
        values.append(kept[-1].item())
    assert [loss.item() for loss in kept] == values


def test_gradients_may_be_scaled_down_to_a_norm() -> None:
    batches = batches_for("norm_mlp", 6)
    model = linear()
    make = partial(clipped_step, example=batches[0])
    assert_same_training(model, make, batches)
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    assert norm.item() == pytest.approx(1e-3, rel=1e-2)


def test_an_inexact_reconstruction_is_told_of_after_its_replay() -> None:
    model, grows = exact_beyond_its_range()
    batch = tokens()
    step = TrainingStep(model, square, sgd(model, lr=0.0), batch)
    train(step, [batch] * 5)
    with torch.no_grad():
        weight = grows.weight.clone()
        grows.weight.mul_(1e4)
    step(batch)
    with torch.no_grad():
        grows.weight.copy_(weight)
    # One good replay after it does not hide it.
    with pytest.raises(ReconstructionError, match=r"couplings\[1\]: a stream left the grid's range"):
        train(step, [batch])
    train(step, [batch] * 2)


def test_an_inexact_reconstruction_ends_the_training_by_itself() -> None:
    model, grows = exact_beyond_its_range()
    batch = tokens()
    step = TrainingStep(model, square, sgd(model, lr=0.0), batch)
    train(step, [batch] * 5)
    with torch.no_grad():
        grows.weight.mul_(1e4)
    step(batch)
    with pytest.raises(ReconstructionError):
        step(batch)


def test_another_batch_is_refused_and_nothing_is_lost() -> None:
    model = linear()
    batches = batches_for("norm_mlp", 6)
    step = TrainingStep(model, square, sgd(model), batches[0])
    train(step, batches)
    before = copy.deepcopy(model.state_dict())
    x, target = batches[0]
    for wrong in [(x[:2], target[:2]), (x.float(), target), (x,)]:
        with pytest.raises(ShapeError, match="the example batch has"):
            step(wrong)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))


def test_where_there_are_no_graphs_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(graphs.GRAPHS, "cpu")
    model = linear()
    example = batches_for("norm_mlp", 1)[0]
    with pytest.raises(UnsupportedError, match=r"the model is on cpu\. Move the model"):
        TrainingStep(model, square, sgd(model), example)
    TrainingStep(model, square, sgd(model), example, cuda_graph=False)(example)


def test_a_model_on_two_devices_is_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6, device="meta"))
    with pytest.raises(UnsupportedError, match="cpu, meta"):
        TrainingStep(model, square, sgd(model), (torch.zeros(1, 6), torch.zeros(1, 6)))

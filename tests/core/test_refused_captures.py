"""What the last eager step is refused for, each time that it is tried."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from revnet_core import CaptureError, Guard, TrainingStep, graphs
from tests.core.graph_cases import Peeking, batches_for, sgd, square, train
from tests.core.nets import sequence_of
from tests.core.tape import CpuGraphs


@pytest.fixture(autouse=True)
def _tape(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(graphs.GRAPHS, "cpu", CpuGraphs)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def test_a_guard_is_refused() -> None:
    model = sequence_of("norm_mlp", 2).double().train()
    guard = Guard().attach(model)
    batches = batches_for("norm_mlp", 4)
    step = TrainingStep(model, square, sgd(model), batches[0])
    with pytest.raises(CaptureError, match="a guard counts steps on the host"):
        train(step, batches)
    guard.detach()
    train(TrainingStep(model, square, sgd(model), batches[0]), batches)


def test_what_cannot_be_captured_is_named() -> None:
    model = Peeking(6, 6)
    batch = torch.randn(2, 6), torch.randn(2, 6)
    step = TrainingStep(model, square, sgd(model), batch)
    with pytest.raises(CaptureError, match=r"_local_scalar_dense \(forward, the model \(Peeking\), graph_cases.py"):
        train(step, [batch] * 3)


def test_who_goes_on_after_a_refusal_is_refused_again() -> None:
    """A capture would freeze what the step was refused for."""

    class Counting(nn.Linear):
        calls = 0

        def forward(self, input: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(input) * self.calls

    model = Counting(6, 6)
    batch = torch.randn(2, 6), torch.randn(2, 6)
    step = TrainingStep(model, square, sgd(model), batch)
    for _ in range(2):
        step(batch)
    for _ in range(3):
        with pytest.raises(CaptureError, match=r"self\.calls"):
            step(batch)
        assert not step.captured

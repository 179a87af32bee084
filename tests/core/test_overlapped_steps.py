"""What rebuilding ahead is in a captured step, and what it holds beside the plain way."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from harness.measure.live import LiveStorages
from revnet_core import (
    AdditiveCoupling,
    ReversibleSequence,
    TrainingStep,
    graphs,
)
from tests.core.nets import KINDS, sequence_of, weighted_sum
from tests.core.tape import CpuGraphs
from tests.core.test_overlapped import overlapped


@pytest.fixture
def _tape(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(graphs.GRAPHS, "cpu", CpuGraphs)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.mark.usefixtures("_tape")
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("kind", ["conv_bn", "norm_mlp", "inplace_first", "frozen_first", "instance_norm"])
def test_a_captured_step_trains_as_a_plain_eager_one(kind: str, count: int) -> None:
    plain = sequence_of(kind, count).train()
    twin = overlapped(plain)
    shape = KINDS[kind].shape
    batches = [(torch.randn(shape).double(), torch.randn(shape).double()) for _ in range(7)]
    losses = []
    for model, cuda_graph in ((plain, False), (twin, True)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        step = TrainingStep(model, nn.functional.mse_loss, optimizer, batches[0], cuda_graph=cuda_graph)
        losses.append(torch.stack([step(batch) for batch in batches]))
        assert step.captured == cuda_graph
    assert torch.equal(*losses)
    for ours, theirs in zip(twin.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.usefixtures("_tape")
def test_a_change_is_captured_anew_and_draws_are_repeated() -> None:
    couplings = [AdditiveCoupling(nn.Dropout(0.5), nn.Linear(6, 6)) for _ in range(3)]
    model = ReversibleSequence(couplings, split_dim=-1, overlapped=True)
    batch = torch.randn(3, 4, 12), torch.randn(3, 4, 12)
    step = TrainingStep(model, nn.functional.mse_loss, torch.optim.SGD(model.parameters(), lr=0.0), batch)
    losses = [step(batch).item() for _ in range(7)]
    assert step.captured
    assert len(set(losses)) == 7
    model.overlapped = False
    step(batch)
    assert not step.captured


def peak_bytes(model: ReversibleSequence, x: Tensor) -> int:
    existing = [*model.parameters(), *model.buffers(), x]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    existing += [p.grad for p in model.parameters() if p.grad is not None]
    with LiveStorages(existing) as live:
        loss = weighted_sum(model(x))
        live.end_forward()
        loss.backward()
    return live.peak.level_bytes


def saved_bytes(model: ReversibleSequence, x: Tensor) -> int:
    with LiveStorages([*model.parameters(), *model.buffers(), x]) as live:
        loss = weighted_sum(model(x))
        saved = live.end_forward()
        del loss
    return saved


@pytest.mark.parametrize("kind", ["conv_bn", "norm_mlp", "attention"])
def test_it_holds_a_block_and_a_half_more_whatever_the_depth(kind: str) -> None:
    batch = (64, *KINDS[kind].shape[1:])
    x = torch.randn(batch, dtype=torch.float64, requires_grad=True)
    stream_bytes = x.untyped_storage().nbytes() // 2
    stored = [saved_bytes(sequence_of(kind, count, activations="stored"), x) for count in (2, 3)]
    block_bytes = stored[1] - stored[0]
    peaks = {}
    for count in (2, 8):
        model = sequence_of(kind, count)
        plain = peak_bytes(model, x)
        model.overlapped = True
        peaks[count] = peak_bytes(model, x)
        # The graphs of four nets instead of one, and a stream.
        assert plain + block_bytes < peaks[count] <= plain + 3 * block_bytes // 2 + stream_bytes
    # Nothing grows with depth but the few bytes that batch norm keeps of each block.
    assert peaks[8] - peaks[2] < stream_bytes / 4

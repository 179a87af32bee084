"""Overlapped backwards on CUDA streams: the bits of the plain walk, step after step, eagerly and as a graph.

Blocks are large, so that kernels of both lanes are under way together, and a missing wait or memory that is given away
too early has its chance to show; tests/core/test_lanes.py shows on the CPU that none is missing.
"""

import copy
import warnings

import pytest
import torch
from torch import nn

from revnet_core import AdditiveCoupling, AffineCoupling, Precision, ReversibleSequence, TrainingStep, lanes
from tests.core.graph_cases import Batch, assert_equal_states, sgd, square, train

pytestmark = pytest.mark.gpu
EXACT = Precision("fp32", "exact")


def net(channels: int, out: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(inplace=True),
        nn.Conv2d(channels, out, 3, padding=1),
    )


def chain(device: torch.device, count: int, precision: Precision, *, affine: bool = False) -> ReversibleSequence:
    width = 64 if device.type == "cuda" else 4
    blocks = [
        AffineCoupling(net(width, 2 * width), net(width, 2 * width))
        if affine
        else AdditiveCoupling(net(width, width), net(width, width))
        for _ in range(count)
    ]
    return ReversibleSequence(blocks, precision=precision).to(device).train()


def batches_on(device: torch.device, count: int) -> list[Batch]:
    size = (32, 128, 32, 32) if device.type == "cuda" else (2, 8, 4, 4)
    return [(torch.randn(size, device=device), torch.randn(size, device=device)) for _ in range(count)]


@pytest.mark.parametrize("cuda_graph", [False, True])
@pytest.mark.parametrize("count", [1, 2, 5, 8])
@pytest.mark.parametrize("kind", ["fp32", "exact", "affine"])
def test_trains_as_the_plain_walk(kind: str, count: int, cuda_graph: bool, device: torch.device) -> None:
    model = chain(device, count, EXACT if kind == "exact" else Precision(), affine=kind == "affine")
    twin = copy.deepcopy(model)
    twin.overlapped = True
    batches = batches_on(device, 60 if device.type == "cuda" else 6)
    losses = []
    for one, captured in ((model, False), (twin, cuda_graph)):
        step = TrainingStep(one, square, sgd(one, lr=1e-3), batches[0], cuda_graph=captured)
        losses.append(train(step, batches))
        assert step.captured == captured
    assert torch.equal(*losses)
    assert_equal_states(twin, model)


def test_the_host_waits_for_nothing_and_torch_says_nothing(gpu: torch.device) -> None:
    model = chain(gpu, 5, EXACT)
    model.overlapped = True
    (x, target), *_ = batches_on(gpu, 1)
    square(model(x), target).backward()
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                square(model(x), target).backward()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert [str(w.message) for w in caught if "AccumulateGrad" in str(w.message)] == []
    model.raise_if_inexact()


def test_on_a_stream_of_the_caller_s_own(gpu: torch.device) -> None:
    model = chain(gpu, 4, Precision())
    twin = copy.deepcopy(model)
    twin.overlapped = True
    (x, target), *_ = batches_on(gpu, 1)
    square(model(x), target).backward()
    stream = torch.cuda.Stream(gpu)
    stream.wait_stream(torch.cuda.current_stream(gpu))
    with torch.cuda.stream(stream):
        for _ in range(20):
            twin.zero_grad()
            square(twin(x), target).backward()
    torch.cuda.current_stream(gpu).wait_stream(stream)
    for ours, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert torch.equal(ours.grad, theirs.grad)


def test_memory_does_not_grow_with_depth(gpu: torch.device) -> None:
    (x, target), *_ = batches_on(gpu, 1)
    peaks = []
    for count in (4, 12):
        model = chain(gpu, count, Precision())
        model.overlapped = True
        for _ in range(2):
            square(model(x), target).backward()
        torch.cuda.synchronize()
        base = torch.cuda.memory_allocated(gpu)
        torch.cuda.reset_peak_memory_stats(gpu)
        square(model(x), target).backward()
        peaks.append(torch.cuda.max_memory_allocated(gpu) - base)
        del model
    assert peaks[1] - peaks[0] < x.untyped_storage().nbytes() // 2


def test_there_are_two_lanes_beside_the_current_stream(gpu: torch.device) -> None:
    queues = lanes.CudaQueues(gpu)
    pair = queues.pair()
    assert pair[0] != pair[1]
    assert queues.current() not in pair
    assert queues.pair() == pair

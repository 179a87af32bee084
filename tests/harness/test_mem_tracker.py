"""Our tracker of live storages beside PyTorch's own, which is private and may go: their totals agree to the byte."""

import pytest
import torch
from torch import Tensor, nn

from harness.measure.live import LiveStorages

mem_tracker = pytest.importorskip(
    "torch.distributed._tools.mem_tracker", reason="this version of PyTorch has no MemTracker"
)


def network() -> tuple[nn.Module, Tensor]:
    """A conv net that stores its activations, with gradients, and its input."""
    layers = (nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    net = nn.Sequential(*layers, nn.Sequential(*layers))
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return net, torch.zeros(4, 16, 16, 16)


def existing(net: nn.Module, x: Tensor) -> list[Tensor]:
    return [x, *net.buffers(), *net.parameters(), *(p.grad for p in net.parameters() if p.grad is not None)]


def test_totals_are_those_of_pytorch_s_mem_tracker() -> None:
    net, x = network()
    with LiveStorages(existing(net, x), model=net) as live:
        loss = net(x).square().mean()
        saved_bytes = live.end_forward()
        loss.backward()

    net, x = network()
    held_bytes = sum(tensor.untyped_storage().nbytes() for tensor in existing(net, x))
    tracker = mem_tracker.MemTracker()
    tracker.track_external(net, x)
    with tracker:
        loss = net(x).square().mean()
        between = tracker.get_tracker_snapshot("current")[x.device]["Total"]
        loss.backward()
    peak = tracker.get_tracker_snapshot("peak")[x.device]["Total"]
    assert saved_bytes == between - held_bytes
    assert live.peak.level_bytes == peak - held_bytes

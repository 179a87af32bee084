"""Live-storage tracking, on tensors of known size: on the CPU and on `meta`, which allocates nothing."""

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _push_mode

from harness.measure.live import LiveStorages, _called_by_engine
from harness.measure.memory import measure_memory

MIB = 2**20
ELEMENTS_PER_MIB = MIB // 4
DEVICES = ("cpu", "meta")


class Net(nn.Module):
    """exp saves its output; the sum saves nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x).exp().sum()


@pytest.mark.parametrize("device", DEVICES)
def test_known_tensors_are_counted_to_the_byte(device: str) -> None:
    x = torch.zeros(3 * ELEMENTS_PER_MIB, device=device, requires_grad=True)
    x.grad = torch.zeros_like(x)
    net = Net()
    with LiveStorages([x, x.grad], model=net) as live:
        loss = net(x)
        saved_bytes = live.end_forward()
        loss.backward()
    scalar_bytes = 4
    assert saved_bytes == 3 * MIB + scalar_bytes  # exp's output, and the loss
    # In the backward the gradient of the loss by itself, and of exp's input; that of the sum is a view of the first.
    assert live.peak.level_bytes == 6 * MIB + 2 * scalar_bytes
    assert [(s.nbytes, s.saved, s.owner) for s in live.storages[:2]] == [(3 * MIB, True, "Net"), (4, True, "Net")]
    assert live.storages[-1].by_engine
    assert (live.storages[0].address == 0) == (device == "meta")


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_kept_is_caught_and_what_existed_is_not_counted(device: str) -> None:
    existing = torch.zeros(ELEMENTS_PER_MIB, device=device)
    kept = []
    with LiveStorages([existing]) as live:
        kept.append(existing.view(-1)[:3])  # a view of it
        kept.append(existing + 1)
        (existing + 2).sum()
    scalar_bytes = 4
    assert live.level_bytes == MIB
    assert live.peak.level_bytes == 2 * MIB + scalar_bytes
    assert sorted(nbytes for _, nbytes in live.changes) == [-MIB, -scalar_bytes, scalar_bytes, MIB, MIB]


def test_a_view_of_what_nobody_named_is_no_allocation() -> None:
    unnamed = torch.zeros(ELEMENTS_PER_MIB)
    with LiveStorages([]) as live:
        view = unnamed.view(-1)[:3]
    assert view.shape == (3,)
    assert live.level_bytes == 0


@pytest.mark.parametrize("named", [True, False])
def test_what_is_born_where_something_died_is_seen(named: bool) -> None:
    """Storage objects are told apart by their address, which is used again."""
    existing = [torch.zeros(4) for _ in range(50)]
    with LiveStorages(existing if named else []) as live:
        for tensor in existing:
            tensor.view(2, 2)
            tensor.data = torch.empty(0)
        kept = [torch.zeros(4) for _ in range(50)]
    assert live.level_bytes == sum(tensor.nbytes for tensor in kept)


def meet(x: Tensor) -> Tensor:
    y = x * 1
    return (y * 2).sum() + (y * 3).sum() + (y * 4).sum()


def meet_in_part_of_a_gradient(x: Tensor) -> Tensor:
    """The gradients by the halves share one storage; once one half is done with, the other adds in place to all."""
    y = x * 1
    first, second = y * 1, y * 2
    both = torch.cat([first, second])
    return (both * both).sum() + (second * 3).sum()


@pytest.mark.parametrize("forward", [meet, meet_in_part_of_a_gradient])
@pytest.mark.parametrize("device", DEVICES)
def test_gradients_that_meet_are_added_in_place_as_without_a_tracker(
    device: str, forward: Callable[[Tensor], Tensor]
) -> None:
    def leaf(device: str) -> Tensor:
        x = torch.zeros(ELEMENTS_PER_MIB, device=device, requires_grad=True)
        x.grad = torch.zeros_like(x)
        return x

    x, real = leaf(device), leaf("cpu")
    with LiveStorages([x]) as live:
        loss = forward(x)
        live.end_forward()
        loss.backward()
    use = measure_memory(torch.device("cpu"), lambda: forward(real), lambda loss: loss.backward())
    scalars_bytes = 64  # that a factor becomes within a kernel
    assert 0 <= use.activation_peak_bytes - live.peak.level_bytes < scalars_bytes


def test_owners_are_the_innermost_modules() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Sigmoid()))
    with LiveStorages(net.parameters(), model=net) as live:
        net(torch.zeros(2, 4))
    assert [s.owner for s in live.storages] == ["", "0", "1.0"]


def test_a_kernel_s_own_memory_is_in_the_peak_and_in_no_storage() -> None:
    x = torch.zeros(ELEMENTS_PER_MIB)
    with LiveStorages([x], kernel_peak=lambda func, args, out: 5 * MIB) as live:
        y = x + 1
    assert y.shape == x.shape
    assert live.peak.level_bytes == 5 * MIB
    assert live.peak.kernel_bytes == 4 * MIB
    assert live.level_bytes == MIB


def test_an_allocation_takes_whole_granules() -> None:
    with LiveStorages([], granularity_bytes=512) as live:
        kept = torch.zeros(129, device="meta")
    assert kept.nbytes == 516
    assert live.level_bytes == 1024


def test_what_runs_in_another_thread_is_the_engine_s() -> None:
    """It has one for each GPU; the mode goes with it."""

    def rebuild(x: Tensor) -> None:
        _push_mode(live)
        x.exp()

    x = torch.zeros(4)
    with LiveStorages([x]) as live:
        x.exp()
        live.end_forward()
        thread = threading.Thread(target=rebuild, args=[x])
        thread.start()
        thread.join()
    assert [(s.in_engine, s.by_engine, s.caller) for s in live.storages] == [
        (False, False, __name__),
        (True, False, __name__),
    ]
    assert _called_by_engine(None)


def test_modules_are_called_as_before_afterwards() -> None:
    before = nn.Module.__call__
    with pytest.raises(ZeroDivisionError), LiveStorages([]):
        raise ZeroDivisionError
    assert nn.Module.__call__ is before

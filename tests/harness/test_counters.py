"""The meter that reads counters, on an allocator that only counts; and who resets PyTorch's counters is noticed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil
import pytest
import torch
from torch import Tensor

from harness.errors import MeasurementError
from harness.measure.counters import peak_resets_noted, resident_peak_bytes
from harness.measure.memory import MemoryUse, measure_with_counters

LOSS = torch.zeros(())
HELD_BYTES = 100
MIB = 2**20


class FakeAllocator:
    """Counts what it is told; reserves in steps of 64 bytes."""

    def __init__(self) -> None:
        self.level = self.peak = HELD_BYTES
        self._notes: list[Callable[[], None]] = []

    def rise(self, nbytes: int) -> None:
        self.level += nbytes
        self.peak = max(self.peak, self.level)

    def reset_unnoticed(self) -> None:
        self.peak = self.level

    def allocated_bytes(self) -> int:
        return self.level

    def allocated_peak_bytes(self) -> int:
        return self.peak

    def reserved_peak_bytes(self) -> int:
        return -(-self.peak // 64) * 64

    def device_used_bytes(self) -> int:
        return 1000

    def reset_peaks(self) -> None:
        for note in self._notes:
            note()
        self.reset_unnoticed()

    @contextmanager
    def resets_noted(self, note: Callable[[], None]) -> Iterator[None]:
        self._notes.append(note)
        yield
        self._notes.remove(note)


def step(*, in_forward: str | None = None, in_backward: str | None = None) -> MemoryUse:
    """Forward 50 up, of which 10 for a moment; backward another 30 up, then all down. `in_...`: a method to call."""
    allocator = FakeAllocator()

    def forward() -> Tensor:
        allocator.rise(50)
        if in_forward:
            getattr(allocator, in_forward)()
        allocator.rise(-10)
        return LOSS

    def backward(loss: Tensor) -> None:
        allocator.rise(30)
        allocator.rise(-60)
        if in_backward:
            getattr(allocator, in_backward)()
        allocator.rise(-10)

    return measure_with_counters(allocator, forward, backward)


def test_the_counters_are_read_at_the_right_moments() -> None:
    use = step()
    assert use.activation_saved_bytes == 40
    assert use.activation_peak_bytes == 70
    assert use.allocated_peak_bytes == HELD_BYTES + 70
    assert use.reserved_peak_bytes == 192
    assert use.device_used_bytes == 1000
    assert use.timeline == []


@pytest.mark.parametrize(
    ("where", "method"),
    [("in_forward", "reset_peaks"), ("in_backward", "reset_peaks"), ("in_backward", "reset_unnoticed")],
)
def test_a_reset_within_the_step_is_refused(where: str, method: str) -> None:
    """The last by its effect only: the counter fell below what it was at the forward's end."""
    with pytest.raises(MeasurementError, match=r"reset within the (forward|backward|step).*memory_breakdown"):
        step(**{where: method})


@pytest.mark.parametrize("name", ["_cuda_resetPeakMemoryStats", "_accelerator_resetPeakStats"])
def test_pytorch_s_own_resets_are_noted_and_still_happen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    done, noted = [], []
    monkeypatch.setattr(torch._C, name, done.append, raising=False)
    monkeypatch.setattr(torch._C, "_accelerator_isAllocatorInitialized", lambda: True)
    monkeypatch.setattr("torch.accelerator.memory._get_device_index", lambda index, optional: index)
    reset = torch.cuda.reset_peak_memory_stats if "cuda" in name else torch.accelerator.reset_peak_memory_stats
    reset(0)
    with peak_resets_noted(lambda: noted.append(len(done))):
        reset(1)
    reset(2)
    assert done == [0, 1, 2]
    assert noted == [1]


def test_the_resident_peak_grows_with_what_is_touched() -> None:
    before_bytes = resident_peak_bytes()
    if before_bytes is None:
        pytest.skip("this system has no /proc")
    to_the_peak_bytes = before_bytes - psutil.Process().memory_info().rss
    touched = torch.ones(to_the_peak_bytes + 64 * MIB, dtype=torch.uint8)
    after_bytes = resident_peak_bytes()
    assert after_bytes is not None
    assert 32 * MIB < after_bytes - before_bytes < touched.nbytes + 32 * MIB

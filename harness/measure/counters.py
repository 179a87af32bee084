"""What a device says of its own memory: the CUDA allocator's counters, and the device's or the process's own figure."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

# Everything that resets the allocator's peak goes through one of these.
_RESETS = ("_cuda_resetPeakMemoryStats", "_accelerator_resetPeakStats")
_STATUS = Path("/proc/self/status")


class Counters(Protocol):
    """An allocator that counts; all in bytes."""

    def allocated_bytes(self) -> int: ...
    def allocated_peak_bytes(self) -> int:
        """Since the last reset."""
        ...

    def reserved_peak_bytes(self) -> int:
        """Since the last reset: what the allocator took from the device, in use or not."""
        ...

    def device_used_bytes(self) -> int: ...
    def reset_peaks(self) -> None: ...
    def resets_noted(self, note: Callable[[], None]) -> AbstractContextManager[None]:
        """Within the context `note` is called whenever anybody resets the peaks."""
        ...


class CudaCounters:
    """The caching allocator of one CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def allocated_bytes(self) -> int:
        # What another stream still uses is freed only once that has finished.
        torch.cuda.synchronize(self._device)
        return torch.cuda.memory_allocated(self._device)

    def allocated_peak_bytes(self) -> int:
        return torch.cuda.max_memory_allocated(self._device)

    def reserved_peak_bytes(self) -> int:
        return torch.cuda.max_memory_reserved(self._device)

    def device_used_bytes(self) -> int:
        free_bytes, total_bytes = torch.cuda.mem_get_info(self._device)
        return total_bytes - free_bytes

    def reset_peaks(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)

    def resets_noted(self, note: Callable[[], None]) -> AbstractContextManager[None]:
        return peak_resets_noted(note)


@contextmanager
def peak_resets_noted(note: Callable[[], None]) -> Iterator[None]:
    """Within the context `note` is called before PyTorch resets the peak counters of any device."""
    originals = {name: getattr(torch._C, name) for name in _RESETS if hasattr(torch._C, name)}

    def noting(original: Callable[..., Any]) -> Callable[..., Any]:
        def reset(*arguments: Any) -> Any:
            note()
            return original(*arguments)

        return reset

    for name, original in originals.items():
        setattr(torch._C, name, noting(original))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(torch._C, name, original)


def resident_peak_bytes() -> int | None:
    """The most physical memory that this process ever had, libraries included; None where the system does not say."""
    if not _STATUS.exists():
        return None
    kib = next((int(line.split()[1]) for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:")), None)
    return None if kib is None else kib * 2**10

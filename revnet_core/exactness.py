"""Whether an exact reconstruction was exact: noticed on the device, read by the host when it asks."""

from collections.abc import Callable

import torch
from torch import Tensor

from revnet_core.errors import ReconstructionError
from revnet_core.pending import Pending
from revnet_core.precision import Precision


class Verdict(Pending):
    """What the device found out about one backward; nothing is copied to the host until `raise_if_failed`."""

    def __init__(self, failed: Tensor, peaks_B: Tensor, precision: Precision) -> None:
        super().__init__(failed)
        self._failed = failed
        self._peaks_B = peaks_B
        self._precision = precision

    def raise_if_failed(self) -> None:
        """Raises ReconstructionError, which names the first block that left the range."""
        if self.is_blank or not self._failed.item():
            return
        raise ReconstructionError(_complaint(self._peaks_B, self._precision))

    def standing(self) -> "StandingVerdict":
        """One that no verdict has been added to, for chains like this verdict's."""
        failed, peaks_B = torch.zeros_like(self._failed), torch.zeros_like(self._peaks_B)
        return StandingVerdict(failed, peaks_B, self._precision)


class StandingVerdict:
    """What the device found out about the backwards of many replays, in tensors that stay where they are.

    failed  a scalar, whether any reconstruction failed
    """

    def __init__(self, failed: Tensor, peaks_B: Tensor, precision: Precision) -> None:
        self.failed = failed
        self._peaks_B = peaks_B
        self._precision = precision

    def add(self, verdict: Verdict) -> None:
        """On the device, without waiting for it."""
        self.failed.logical_or_(verdict._failed)
        torch.maximum(self._peaks_B, verdict._peaks_B, out=self._peaks_B)

    def raise_if_failed(self) -> None:
        """Waits for the device. Raises ReconstructionError once, and stands again as at the beginning."""
        if not self.failed.item():
            return
        complaint = _complaint(self._peaks_B, self._precision)
        self.failed.zero_()
        self._peaks_B.zero_()
        raise ReconstructionError(complaint)


def _complaint(peaks_B: Tensor, precision: Precision) -> str:
    limit = precision.grid_limit
    outside = (~(peaks_B <= limit)).nonzero().flatten().tolist()
    cause = (
        f"couplings[{outside[0]}]: a stream left the grid's range of {limit:g} (it reached "
        f"{peaks_B[outside[0]].item():.3g})"
        if outside
        else f"no stream left the grid's range of {limit:g}, so a residual left its own of {limit / 4:g}, or F or G is "
        "not deterministic"
    )
    return (
        f"exact reconstruction did not give back the input of {len(peaks_B)} couplings bit for bit. {cause}. "
        f"Lower grid_bits (now {precision.grid_bits}; each step doubles the range), normalize the residuals, or use "
        "torch.use_deterministic_algorithms(True)."
    )


# Gets the verdict on each exact reconstruction.
Judge = Callable[[Verdict], None]


class GridWatch:
    """Follows one run through a chain: a checksum of what went in, and how far each block's streams reached.

    The checksum tells, at a cost that does not grow with depth, whether the rebuilt input equals the original; the
    peaks tell where it began.
    """

    def __init__(self, precision: Precision, s1: Tensor, s2: Tensor, blocks: int) -> None:
        self._precision = precision
        self._before = _checksum(s1, s2)
        # The lowest and the highest value of each block's two streams, each looked at once.
        self._ends_BSE = torch.zeros(blocks, 2, 2, device=s1.device, dtype=s1.dtype)

    def note(self, block: int, which: int, stream: Tensor) -> None:
        """which: of the block's streams, 0 or 1."""
        if not stream.numel():
            return
        # One pass without a temporary of the stream's size, as abs() would make; a norm takes 20 times as long.
        lowest, highest = self._ends_BSE[block, which]
        torch.aminmax(stream, out=(lowest, highest))

    def verdict(self, s1: Tensor, s2: Tensor) -> Verdict:
        peaks_B = self._ends_BSE.abs().amax(dim=(1, 2))
        return Verdict((self._before != _checksum(s1, s2)).any(), peaks_B, self._precision)


def _checksum(s1: Tensor, s2: Tensor) -> Tensor:
    """A sum over the bits of both streams, in whatever order they lie."""
    bits = torch.int64 if s1.dtype == torch.float64 else torch.int32
    return torch.stack([s.view(bits).sum(dtype=torch.int64) for s in (s1, s2)])

"""How far off one block's rebuilt input is: found on the device in a backward, read by the host when it is there."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from revnet_core.chain import Streams
from revnet_core.pending import Pending, is_blank


class Finding(Pending):
    """The comparison of one rebuilt input with the original; nothing waits for it until `rel` is read.

    block  whose input it is
    """

    def __init__(self, block: int, norms: Tensor) -> None:
        self.block = block
        self._norms = norms
        if norms.device.type == "cuda" and not is_blank(norms):
            # Copied in the device's own order: a copy at reading would wait for all that was queued since.
            self._norms = torch.empty(4, dtype=norms.dtype, pin_memory=True).copy_(norms, non_blocking=True)
        super().__init__(norms)

    def rel(self) -> float:
        """Relative L2 error over both streams; nan where the original itself is not finite. Waits for the device."""
        self.wait()
        error1, error2, norm1, norm2 = self._norms.tolist()
        error, norm = math.hypot(error1, error2), math.hypot(norm1, norm2)
        if not math.isfinite(norm):
            return math.nan
        return error / norm if norm else (0.0 if error == 0 else math.inf)


class Probe:
    """Compares the input of one block of one forward: a copy of the two streams, from there to that block's backward.

    block  the block to compare; where the backward will not come to it, the first behind it that it comes to
    """

    def __init__(self, block: int, report: Callable[[Finding], None]) -> None:
        self._block = block
        self._report = report
        self._original: Streams | None = None
        self._kept = False

    def keep(self, index: int, streams: Streams) -> None:
        """To be called in the forward, with the input of each block that will be walked back, first to last."""
        if not self._kept and index >= self._block:
            self._block, self._kept = index, True
            s1, s2 = streams
            self._original = s1.clone(), s2.clone()

    def compare(self, index: int, rebuilt: Streams) -> None:
        """To be called in the backward, with the rebuilt input of each block. Of a retained graph the first counts."""
        if self._original is None or index != self._block:
            return
        original, self._original = self._original, None
        norms = [_norm(s) for s in original]
        # In place, so that a comparison takes no memory beside the copy.
        errors = [_norm(s.sub_(r)) for s, r in zip(original, rebuilt, strict=True)]
        self._report(Finding(index, torch.stack(errors + norms)))


def _norm(stream: Tensor) -> Tensor:
    """A sum of squares in bf16 would round, and one in fp16 overflow."""
    wide = torch.float64 if stream.dtype == torch.float64 else torch.float32
    return torch.linalg.vector_norm(stream, dtype=wide)

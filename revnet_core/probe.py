"""How far off one block's rebuilt input is: found on the device in a backward, read by the host when it is there."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from revnet_core.chain import Streams


class Finding:
    """The comparison of one rebuilt input with the original; nothing waits for it until `rel` is read.

    block  whose input it is
    """

    def __init__(self, block: int, norms: Tensor) -> None:
        self.block = block
        self._norms = norms
        self._event: torch.cuda.Event | None = None
        if norms.device.type == "cuda" and not self.is_blank:
            # Copied in the device's own order: a copy at reading would wait for all that was queued since.
            self._norms = torch.empty(4, dtype=norms.dtype, pin_memory=True).copy_(norms, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    @property
    def is_blank(self) -> bool:
        """A tensor without contents, on `meta` or a fake one, has nothing to say."""
        return self._norms.device.type == "meta" or type(self._norms) is not Tensor

    @property
    def on_host(self) -> bool:
        """Whether the device is the host itself, which never waits."""
        return self._event is None and self._norms.device.type == "cpu"

    def is_ready(self) -> bool:
        """Whether reading it waits for nothing."""
        return self._event is None or self._event.query()

    def rel(self) -> float:
        """Relative L2 error over both streams; nan where the original itself is not finite. Waits for the device."""
        if self._event is not None:
            self._event.synchronize()
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

"""Invertible downsampling: pixels become channels, so that a network can be reversible throughout.

Legend: N batch, C channels of one stream, H height, W width, k block size.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from revnet_core.errors import ShapeError


class SpaceToDepth(nn.Module):
    """Each k x k block of pixels becomes k**2 channels: N,C,H,W to N,C*k**2,H/k,W/k, in both streams.

    Stands among the couplings of a ReversibleSequence. It only rearranges, so its inverse is exact, nothing is stored
    for it, and the gradient by its input is the inverse of the gradient by its output.

    Source: Jacobsen et al. 2018, arXiv:1802.07088, section 3.1.
    """

    def __init__(self, block_size: int = 2) -> None:
        super().__init__()
        if block_size < 1:
            raise ShapeError(f"block_size = {block_size}; it is at least 1.")
        self.block_size = block_size

    def forward(self, x1_NCHW: Tensor, x2_NCHW: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        """Rearrange both streams. Raises ShapeError when H or W is no multiple of the block size."""
        height, width = x1_NCHW.shape[-2:]
        if height % self.block_size or width % self.block_size:
            raise ShapeError(
                f"{height} x {width} pixels are no multiple of block_size = {self.block_size} in both directions. "
                "Pad the image, or choose another block size."
            )
        return self.rearrange(x1_NCHW), self.rearrange(x2_NCHW)

    def inverse(self, y1_NCHW: Tensor, y2_NCHW: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        """Bit for bit the input of `forward`."""
        return self.restore(y1_NCHW), self.restore(y2_NCHW)

    def rearrange(self, x_NCHW: Tensor) -> Tensor:
        return functional.pixel_unshuffle(x_NCHW, self.block_size)

    def restore(self, y_NCHW: Tensor) -> Tensor:
        return functional.pixel_shuffle(y_NCHW, self.block_size)

    def extra_repr(self) -> str:
        return f"block_size={self.block_size}"

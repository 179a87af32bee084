"""Compute and reconstruction precision, and the exact grid.

Two settings, because they fail in different ways: F and G may run in bf16 without harm to the inverse,
while two streams carried in bf16 lose bits at every addition.
"""

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor

from revnet_core.errors import PrecisionError

AUTOCAST_DTYPES: dict[str, torch.dtype | None] = {
    "fp32": None,
    "tf32": None,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
STREAM_DTYPES: dict[str, torch.dtype] = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
RECONSTRUCTIONS = (*STREAM_DTYPES, "exact")
SIGNIFICAND_BITS = {torch.float32: 24, torch.float64: 53}
# Beyond, too little range is left in fp32.
FP32_GRID_BITS = 20


@dataclass(frozen=True)
class Precision:
    """How F and G compute, and how the two residual streams are carried, added and subtracted.

    compute         "fp32", "tf32": F and G run in the dtype of their parameters, under whatever autocast
                    the caller has active (tf32 is a switch of the whole process,
                    `torch.backends.*.allow_tf32`, that the caller sets); "bf16", "fp16": under autocast.
    reconstruction  dtype of the streams: "fp64", "fp32", "bf16", "fp16"; or "exact": streams on the
                    grid of multiples of 2**-grid_bits. Each residual is rounded to the grid before it is
                    added, so sums and differences below the grid's limit round nothing and the
                    rebuilt input equals the original bit for bit.
    grid_bits       the grid's fraction bits. 8 to 20: held in fp32, streams up to 2**(24 - grid_bits). 21 to
                    48: held in fp64 (twice the memory for the streams; F and G compute as before), streams up
                    to 2**(53 - grid_bits). Residuals up to a quarter of that. The default 16 leaves streams up
                    to 256; the forward is then a network whose residuals are rounded to 2**-17 = 7.6e-6 at
                    most, which is a slightly different network. 32 leaves streams up to 2**21 and rounds
                    by 1.2e-10, less than F and G themselves do in fp32.

    Raises PrecisionError for a name that does not exist.
    """

    compute: str = "fp32"
    reconstruction: str = "fp32"
    grid_bits: int = 16

    def __post_init__(self) -> None:
        if self.compute not in AUTOCAST_DTYPES:
            raise PrecisionError(f"compute = {self.compute!r}; allowed: {', '.join(AUTOCAST_DTYPES)}.")
        if self.reconstruction not in RECONSTRUCTIONS:
            raise PrecisionError(f"reconstruction = {self.reconstruction!r}; allowed: {', '.join(RECONSTRUCTIONS)}.")
        if not 8 <= self.grid_bits <= 48:
            raise PrecisionError(f"grid_bits = {self.grid_bits}; allowed: 8 to 20 (fp32), 21 to 48 (fp64).")

    @property
    def exact(self) -> bool:
        return self.reconstruction == "exact"

    @property
    def stream_dtype(self) -> torch.dtype:
        if self.exact:
            return torch.float32 if self.grid_bits <= FP32_GRID_BITS else torch.float64
        return STREAM_DTYPES[self.reconstruction]

    @property
    def grid_limit(self) -> float:
        """Streams below this magnitude are added and subtracted without rounding."""
        return 2.0 ** (SIGNIFICAND_BITS[self.stream_dtype] - self.grid_bits)

    def autocast(self, device_type: str) -> contextlib.AbstractContextManager[object]:
        """The autocast of `compute`; the caller's own where compute asks for none, and on `meta`."""
        dtype = AUTOCAST_DTYPES[self.compute]
        # Torch has no autocast for tensors without contents, and casts none.
        if dtype is None or device_type == "meta":
            return contextlib.nullcontext()
        return torch.autocast(device_type, dtype=dtype, cache_enabled=False)

    def enter(self, x: Tensor) -> Tensor:
        """Bring a tensor into the streams' dtype and onto the grid. Any shape; differentiable.

        Raises PrecisionError when float64 would be narrowed: that is never what a float64 caller wants.
        """
        if x.dtype == torch.float64 and self.stream_dtype != torch.float64:
            raise PrecisionError(
                f"the input is float64 but the streams are {self.stream_dtype} (reconstruction = "
                f"{self.reconstruction!r}). Use Precision(reconstruction='fp64'), or 'exact' with grid_bits above 20, "
                "or give a float32 input."
            )
        return self.residual(x)

    def residual(self, out: Tensor) -> Tensor:
        """The output of F or G as it is added to a stream: cast, and rounded to the grid when exact."""
        out = out.to(self.stream_dtype)
        return _RoundToGrid.apply(out, self.grid_bits) if self.exact else out  # pyright: ignore[reportReturnType]


class _RoundToGrid(torch.autograd.Function):
    """Round fp32 or fp64 to multiples of 2**-grid_bits; the gradient passes unchanged."""

    @staticmethod
    def forward(ctx: object, out: Tensor, grid_bits: int) -> Tensor:
        # Adding 1.5 * 2**(23 - k) moves the value to where fp32's spacing is the grid's, so the addition
        # itself rounds; a quarter of the time of scaling, round() and scaling back. 52 in place of 23 for fp64.
        shift = 1.5 * 2.0 ** (SIGNIFICAND_BITS[out.dtype] - 1 - grid_bits)
        return (out + shift).sub_(shift)

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None

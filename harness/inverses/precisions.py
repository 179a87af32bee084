"""The same module in another precision, and what can be told apart in it."""

import contextlib
import copy
from contextlib import AbstractContextManager

import torch
from torch import nn

from harness.inverses.chain import Streams, is_ours
from revnet_core import Precision, PrecisionError
from revnet_core.precision import AUTOCAST_DTYPES

FP64 = "fp64"
# From the same weights and inputs: how far an output may move, over its root mean square, for another order of the
# same sums (more threads, other kernels) in this precision.
OUTPUT_CHANGE = {FP64: 1e-9, "fp32": 1e-4, "tf32": 1e-1, "bf16": 1e-1, "fp16": 1e-2}


def own_precision(module: nn.Module) -> str:
    """What the module is in as it comes: `compute/reconstruction` of this project's, else its parameters' dtype."""
    dtypes = {p.dtype for p in module.parameters() if p.is_floating_point()}
    if dtypes == {torch.float64}:
        return FP64
    for part in module.modules():
        if isinstance(precision := getattr(part, "precision", None), Precision):
            return f"{precision.compute}/{precision.reconstruction}"
    return "fp32"


def compute_of(precision: str) -> str:
    return precision.split("/")[0]


def at_precision(
    module: nn.Module, inputs: Streams, precision: str
) -> tuple[nn.Module, Streams, AbstractContextManager[object]]:
    """A copy of the module, the inputs, and what to run them under. In its own precision the module is as it comes.

    precision  fp64 (everything), fp32, bf16 or fp16 (autocast over fp32 streams); of this project's modules also
               `compute/reconstruction` as in a study, e.g. bf16/exact
    Raises PrecisionError for another.
    """
    twin = copy.deepcopy(module)
    if precision == FP64:
        wide = Precision(reconstruction="fp64")
        return _set(twin, wide).double(), tuple(t.double() for t in inputs), contextlib.nullcontext()
    if is_ours(module):
        if precision == own_precision(module):
            return twin, inputs, contextlib.nullcontext()
        compute, _, reconstruction = precision.partition("/")
        return _set(twin, Precision(compute, reconstruction or "fp32")), inputs, contextlib.nullcontext()
    if precision not in ("fp32", "bf16", "fp16"):
        raise PrecisionError(
            f"precisions: {precision!r} is none for a {type(module).__name__}; give some of fp64, fp32, bf16, fp16. "
            "A reconstruction of its own is what ReversibleSequence has."
        )
    dtype = AUTOCAST_DTYPES[precision]
    context = torch.autocast(inputs[0].device.type, dtype=dtype) if dtype else contextlib.nullcontext()
    return twin.float(), tuple(t.float() for t in inputs), context


def _set(module: nn.Module, precision: Precision) -> nn.Module:
    for part in module.modules():
        if isinstance(getattr(part, "precision", None), Precision):
            setattr(part, "precision", precision)  # noqa: B010 - not a tensor, as the type of such an attribute would have it
    return module

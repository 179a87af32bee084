"""Batch statistics found once and used twice: a recompute normalizes by the mean and deviation that the forward found.

Finding them is most of a batch norm's time. What the recompute normalizes is then a little off the forward's, by the
rounding of one division; an exact reconstruction, which allows for none, does without.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm


class _Statistics(NamedTuple):
    """Of each channel."""

    mean_C: Tensor
    inverse_deviation_C: Tensor


class NormReplay:
    """The statistics of the batch norms of one net in one evaluation, in the order of their use."""

    @classmethod
    def of(cls, modules: Sequence[nn.Module]) -> "NormReplay | None":
        """None where no batch norm takes its statistics from the batch, or where the net is compiled: a graph has no
        place for other operations than its own."""
        if any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in modules):
            return None
        norms = [
            m for m in modules if type(m).forward is _BatchNorm.forward and m.training and "forward" not in m.__dict__
        ]
        return cls(norms) if norms else None  # pyright: ignore[reportArgumentType]

    def __init__(self, norms: Sequence[_BatchNorm]) -> None:
        self._norms = norms
        self._found: list[_Statistics] = []

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        self._found = []
        with self._made_by(self._record):
            yield

    @contextlib.contextmanager
    def replaying(self, *, as_constants: bool = False) -> Iterator[None]:
        """as_constants: gradients leave out that the statistics are of the batch; they can be differentiated again."""
        left = iter(self._found)
        normalize = _normalized if as_constants else _Normalize.apply
        with self._made_by(lambda norm, x: self._repeat(norm, x, left, normalize)):
            yield

    @contextlib.contextmanager
    def _made_by(self, forward: Callable[[_BatchNorm, Tensor], Tensor]) -> Iterator[None]:
        for norm in self._norms:
            norm.__dict__["forward"] = partial(forward, norm)
        try:
            yield
        finally:
            for norm in self._norms:
                del norm.__dict__["forward"]

    def _record(self, norm: _BatchNorm, x: Tensor) -> Tensor:
        """What the module's own forward does in training mode, by the operation that does not drop the statistics."""
        if x.dim() < 2 or x.numel() <= x.size(1):
            return type(norm).forward(norm, x)  # which says what is wrong with it, if an empty batch is not all
        norm._check_input_dim(x)
        momentum = norm.momentum or 0.0
        if norm.track_running_stats and norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
            if norm.momentum is None:
                momentum = 1.0 / float(norm.num_batches_tracked)
        running = (norm.running_mean, norm.running_var) if norm.track_running_stats else (None, None)
        out, mean_C, inverse_deviation_C, *_ = torch._batch_norm_impl_index(
            x, norm.weight, norm.bias, *running, True, momentum, norm.eps, torch.backends.cudnn.enabled
        )
        self._found.append(_Statistics(mean_C, inverse_deviation_C))
        return out

    def _repeat(
        self, norm: _BatchNorm, x: Tensor, left: Iterator[_Statistics], normalize: Callable[..., Any]
    ) -> Tensor:
        if not x.numel():
            return type(norm).forward(norm, x)
        return normalize(x, norm.weight, norm.bias, *next(left), norm.eps)


def _normalized(
    x: Tensor, weight_C: Tensor | None, bias_C: Tensor | None, mean_C: Tensor, inverse_deviation_C: Tensor, eps: float
) -> Tensor:
    variance_C = inverse_deviation_C.square().reciprocal_().sub_(eps)
    return torch.batch_norm(x, weight_C, bias_C, mean_C, variance_C, False, 0.0, eps, torch.backends.cudnn.enabled)


class _Normalize(torch.autograd.Function):
    """Batch norm by statistics of the batch that are known; their part of the gradient is taken into account."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_C: Tensor | None,
        bias_C: Tensor | None,
        mean_C: Tensor,
        inverse_deviation_C: Tensor,
        eps: float,
    ) -> Tensor:
        ctx.eps = eps
        ctx.save_for_backward(x, weight_C, mean_C, inverse_deviation_C)
        if x.is_cuda and (weight_C is None or weight_C.dtype == mean_C.dtype):
            # One kernel, where the way by the variance is four; it has no derivative of its own.
            return torch.batch_norm_elemt(x, weight_C, bias_C, mean_C, inverse_deviation_C, eps)
        return _normalized(x, weight_C, bias_C, mean_C, inverse_deviation_C, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight_C, mean_C, inverse_deviation_C = ctx.saved_tensors
        gradients = torch.ops.aten.native_batch_norm_backward(
            *(grad_outputs[0], x, weight_C, None, None, mean_C, inverse_deviation_C, True, ctx.eps),
            ctx.needs_input_grad[:3],
        )
        return *gradients, None, None, None

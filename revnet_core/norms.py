"""Batch statistics found once and used twice: a recompute normalizes by the mean and deviation that the forward found.

Finding them is most of a batch norm's time. What the recompute normalizes is then a little off the forward's, by the
rounding of one division; an exact reconstruction, which allows for none, does without.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class _Statistics(NamedTuple):
    """Of each channel."""

    mean_C: Tensor
    inverse_deviation_C: Tensor


class NormReplay:
    """The statistics of each batch norm of one evaluation, in the order of their use."""

    def __init__(self) -> None:
        self._found: list[_Statistics] = []

    def recording(self) -> TorchFunctionMode:
        self._found = []
        return _BatchNorms(self._record)

    def replaying(self) -> TorchFunctionMode:
        left = iter(self._found)
        return _BatchNorms(lambda call: self._repeat(call, left))

    def _record(self, call: "_Call") -> Tensor:
        # What functional.batch_norm itself calls, with what it otherwise drops.
        out, mean_C, inverse_deviation_C, *_ = torch._batch_norm_impl_index(
            *(call.x, call.weight, call.bias, call.running_mean, call.running_var),
            *(True, call.momentum, call.eps, torch.backends.cudnn.enabled),
        )
        self._found.append(_Statistics(mean_C, inverse_deviation_C))
        return out

    def _repeat(self, call: "_Call", left: Iterator[_Statistics]) -> Tensor:
        known = next(left, None)
        if known is None:
            return call.as_it_is()
        return _Normalize.apply(call.x, call.weight, call.bias, *known, call.eps)  # pyright: ignore[reportReturnType]


class _Call(NamedTuple):
    """The arguments of `torch.nn.functional.batch_norm`."""

    x: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None = None
    bias: Tensor | None = None
    training: bool = False
    momentum: float = 0.1
    eps: float = 1e-5

    def as_it_is(self) -> Tensor:
        return functional.batch_norm(*self)


class _BatchNorms(TorchFunctionMode):
    """Within it `handle` makes the batch norms that take their statistics from the batch."""

    def __init__(self, handle: Callable[[_Call], Tensor]) -> None:
        super().__init__()
        self._handle = handle

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.batch_norm:
            call = _Call(*args, **{"x" if name == "input" else name: value for name, value in kwargs.items()})
            # A batch of one value has no statistics; the original says so.
            if call.training and call.x.numel() > call.x.size(1):
                return self._handle(call)
        return func(*args, **kwargs)


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
        variance_C = inverse_deviation_C.square().reciprocal_().sub_(eps)
        return torch.batch_norm(x, weight_C, bias_C, mean_C, variance_C, False, 0.0, eps, torch.backends.cudnn.enabled)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        x, weight_C, mean_C, inverse_deviation_C = ctx.saved_tensors
        gradients = torch.ops.aten.native_batch_norm_backward(
            *(grad_outputs[0], x, weight_C, None, None, mean_C, inverse_deviation_C, True, ctx.eps),
            ctx.needs_input_grad[:3],
        )
        return *gradients, None, None, None

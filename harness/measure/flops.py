"""Floating-point operations of one step, counted on tensors without contents, and the share of the device's peak.

Counted are matrix products, convolutions and attention, by the formulas of `torch.utils.flop_counter`; a multiplication
and the addition of its product are two operations. Additions of streams, normalization and activation functions are
not counted.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import conv_flop_count, flop_registry

from harness.measure.fakes import Batch, Loss, blank_batch, fake_tensors, first_line, forward_loss
from harness.measure.peaks import peak_flops_per_s

NAMES = ("flops_forward", "flops_backward", "flops_recompute")
# Where an operator without a formula has no product in it, but for those of such a name.
_TORCH_S_OWN = frozenset({"aten", "prim", "prims", "profiler", "c10d", "_c10d_functional", "c10d_functional"})
_PRODUCT = re.compile(r"mm(_|$)|attention|conv(?!ert)|rnn|lstm|gru")
# From a choice of activations to a model.
Build = Callable[[str], nn.Module]


def _convolution_backward(*args: Any, out_val: Any) -> int:
    """By x and by the weight each as many as in the forward, where it is asked for. Torch's own formula multiplies the
    latter by the number of groups."""
    grad_out, x, weight, *_ = args
    transposed, output_mask = args[7], args[10]
    forward = conv_flop_count(list(x.shape), list(weight.shape), list(grad_out.shape), transposed=transposed)
    return forward * sum(output_mask[:2])


_ATEN = torch.ops.aten
# Before torch's own, which are looked up at each call, since a user's module may register one there.
_FORMULAS: dict[Any, Callable[..., int]] = {
    _ATEN.convolution_backward: _convolution_backward,
    # As on a GPU, where torch has a formula.
    _ATEN._scaled_dot_product_flash_attention_for_cpu: flop_registry[_ATEN._scaled_dot_product_flash_attention],
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        _ATEN._scaled_dot_product_flash_attention_backward
    ],
}


class UncountedError(RuntimeError):
    """There is no count that could be trusted."""


@dataclass(frozen=True)
class StepFlops:
    """Operations of one forward and of one backward, the recompute in it included."""

    forward: int
    backward: int


class FlopCount(TorchDispatchMode):
    """Use as a context around a step, and call `end_forward` between forward and backward.

    Not `FlopCounterMode`: its hooks on all modules change how a reversible sequence evaluates its nets.
    """

    def __init__(self) -> None:
        super().__init__()
        self.unknown: set[str] = set()
        self._forward: int | None = None
        self._flops = 0

    def end_forward(self) -> None:
        self._forward, self._flops = self._flops, 0

    def result(self) -> StepFlops:
        """Raises UncountedError when an operator's operations are not known, or nothing was counted at all."""
        if self.unknown:
            raise UncountedError(
                f"{', '.join(sorted(self.unknown))} has no FLOP formula; give it one by "
                "torch.utils.flop_counter.register_flop_formula"
            )
        assert self._forward is not None
        if not self._forward:
            raise UncountedError("the forward has no matrix product, convolution or attention")
        return StepFlops(self._forward, self._flops)

    def ran(self, func: Any, arguments: Any, out: Any, flops: int) -> None:
        """Told of each operation that is not made of others, when it has run; for who counts more than this."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        formula = _FORMULAS.get(func._overloadpacket) or flop_registry.get(func._overloadpacket)
        if formula is None and func is not torch.ops.prim.device.default:
            # In inference mode an operator that is made of others arrives whole.
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        flops = 0 if formula is None else formula(*args, **kwargs, out_val=out)
        self._flops += flops
        self.ran(func, (args, kwargs), out, flops)
        if formula is None and (func.namespace not in _TORCH_S_OWN or _PRODUCT.search(func._overloadpacket.__name__)):
            self.unknown.add(f"torch.ops.{func._overloadpacket}")
        return out


def count_step(
    model: nn.Module,
    loss: Loss,
    batch: Batch,
    *,
    autocast: torch.dtype | None = None,
    forwards: int = 1,
) -> StepFlops:
    """Operations of a step of `model`, on whatever device it is; of the last of so many steps.

    autocast  around the forward of the model, as the engine's
    forwards  how many it takes until the model does what it goes on doing; a budget is learnt in the first

    Raises UncountedError, and what the model raises.
    """
    for _ in range(forwards - 1):
        forward_loss(model, loss, batch, autocast).backward()
    with FlopCount() as count:
        out = forward_loss(model, loss, batch, autocast)
        count.end_forward()
        out.backward()
    return count.result()


def measure_flops(
    build: Build,
    activations: str,
    loss: Loss,
    image_shape: tuple[int, int, int, int],
    *,
    autocast: torch.dtype | None = None,
) -> tuple[dict[str, int], dict[str, str]]:
    """Metrics of one rank's step, and why they are missing: a user's model may not run without contents.

    build        called with fake tensors in place of real ones, also with "stored"
    image_shape  of the batch: samples, channels, height, width

        flops_forward    of the forward
        flops_backward   of the gradients: the backward with stored activations
        flops_recompute  what a step computes beyond a step with stored activations

    Nothing is allocated for a tensor, and torch's random state is left as it was.
    """

    def count(choice: str) -> StepFlops:
        forwards = 2 if choice == "budgeted" else 1
        return count_step(build(choice), loss, blank_batch(image_shape), autocast=autocast, forwards=forwards)

    try:
        with fake_tensors():
            stored = count("stored")
            own = stored if activations == "stored" else count(activations)
    except UncountedError as error:
        return {}, dict.fromkeys(NAMES, str(error))
    except Exception as error:  # noqa: BLE001 - without contents a model may fail in any way; its trial may not
        reason = f"the model does not run on tensors without contents: {first_line(error)}"
        return {}, dict.fromkeys(NAMES, reason)
    recompute = own.forward + own.backward - stored.forward - stored.backward
    return dict(zip(NAMES, (own.forward, stored.backward, recompute), strict=True)), {}


def utilization(
    flops: Mapping[str, int | float | None], step_s: float, device_name: str, compute: str
) -> tuple[dict[str, float], dict[str, str]]:
    """Metrics, and why they are missing: fractions of the device's peak at this precision of compute.

        device_peak_flops_per_s  see `harness.measure.peaks`
        mfu                      model FLOPs utilization: by the operations of forward and gradients
        hfu                      hardware FLOPs utilization: by those and the recompute

    Source: Chowdhery et al. 2022, arXiv:2204.02311, appendix B.
    """
    peak = peak_flops_per_s(device_name, compute)
    if peak is None:
        reason = f"n/a: the peak of {device_name} at {compute} is not known"
        return {}, dict.fromkeys(("device_peak_flops_per_s", "mfu", "hfu"), reason)
    metrics, unmeasured = {"device_peak_flops_per_s": peak}, dict[str, str]()
    for name, parts in (("mfu", NAMES[:2]), ("hfu", NAMES)):
        counts = [flops.get(part) for part in parts]
        if None in counts:
            unmeasured[name] = f"it takes {' and '.join(parts)}, and one of them is not known"
        else:
            metrics[name] = sum(count for count in counts if count is not None) / step_s / peak
    return metrics, unmeasured

"""Drift by block and gradient parity of a model, as metrics and trace rows."""

import math
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from harness.record import TraceRow
from revnet_core import audit_gradients, audit_model_inverse

Metrics = dict[str, float | None]
DRIFT_METRICS = (
    *("drift_max_rel", "drift_max_abs", "drift_max_ulp"),
    *("gradient_rel", "gradient_angle_deg", "gradient_reference_angle_deg", "stored_reference_angle_deg"),
)


def largest(values: Sequence[float]) -> float:
    """NaN where one is; `max` would pass it over."""
    return math.nan if any(map(math.isnan, values)) else max(values)


def measure_drift(
    model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], batch: tuple[Tensor, Tensor]
) -> tuple[Metrics, list[TraceRow], dict[str, str]]:
    """Metrics, the drift table, and reasons for what this model does not have. The model stays as it is."""
    metrics: Metrics = {}
    unmeasured: dict[str, str] = {}
    blocks = audit_model_inverse(model, batch[0])
    for name in ("rel", "max_abs", "max_ulp"):
        if blocks:
            metrics[f"drift_max_{name.removeprefix('max_')}"] = largest([getattr(block, name) for block in blocks])
        else:
            unmeasured[f"drift_max_{name.removeprefix('max_')}"] = "the model has no reversible block"
    rows = [
        TraceRow("drift", block.block, name, getattr(block, name))
        for block in blocks
        for name in ("rel", "max_abs", "max_ulp")
    ]
    parity = audit_gradients(model, loss, batch)
    metrics |= {
        "gradient_rel": parity.rel,
        "gradient_angle_deg": parity.angle_deg,
        "gradient_reference_angle_deg": parity.reference_angle_deg,
        "stored_reference_angle_deg": parity.stored_reference_angle_deg,
    }
    if parity.reference_angle_deg is None:
        for name in ("gradient_reference_angle_deg", "stored_reference_angle_deg"):
            unmeasured[name] = "the model draws at random, and float64 draws differ"
    return metrics, rows, unmeasured

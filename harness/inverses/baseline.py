"""Baselines: the figures of each kind of machine, torch and precision, and what is worse than they allow."""

import math
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from harness.inverses.measurement import ERRORS, MARKS, Figures
from harness.inverses.precisions import FP64, compute_of


@dataclass(frozen=True)
class Change:
    """A figure that is worse than its limit; `block` is None for the gradient's."""

    precision: str
    block: str | None
    metric: str
    before: float | str
    now: float | str
    limit: float | str

    def __str__(self) -> str:
        where = "gradient" if self.block is None else f"block {self.block}"
        before, now, limit = (v if isinstance(v, str) else f"{v:.3g}" for v in (self.before, self.now, self.limit))
        if self.metric in MARKS:
            before, now = (v if isinstance(v, str) else f"{v:.9g}" for v in (self.before, self.now))
            limit = f"within {limit}"
        return f"{where}, {self.precision}: {self.metric} was {before}, is {now} (limit {limit})"


def machine_key(device: torch.device, precision: str) -> str:
    """What a baseline is of: kind of device, torch's minor version, precision."""
    if device.type == "cuda":
        kind = torch.cuda.get_device_name(device)
    else:
        kind = f"{device.type} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    minor = ".".join(torch.__version__.split("+")[0].split(".")[:2])
    return f"{kind}, torch {minor}, {precision}"


def as_json(figures: Figures) -> dict[str, Any]:
    """Errors with three digits; outputs with as many as float64 can be told apart by."""

    def rounded(values: Mapping[str, float]) -> dict[str, float]:
        return {name: float(f"{value:.12g}" if name in MARKS else f"{value:.3g}") for name, value in values.items()}

    blocks = [
        {"name": b.name, "weights": " ".join(b.weights), "calls": " ".join(b.calls), **rounded(b.figures)}
        for b in figures.blocks
    ]
    return {
        "inputs": figures.inputs,
        "outside": figures.outside,
        "blocks": blocks,
        "gradient": rounded(figures.gradient),
    }


def not_finite(figures: Figures) -> str | None:
    """The first figure that is no number, by its place; nothing can be compared with it."""
    # In the order in which one follows from another: a chain that is rebuilt passes on what one block did.
    for name in (*MARKS, *ERRORS):
        for block in figures.blocks:
            if not math.isfinite(block.figures[name]):
                return f"block {block.name}: {name} is {block.figures[name]}"
    return next((f"gradient: {k} is {v}" for k, v in figures.gradient.items() if not math.isfinite(v)), None)


def compare(
    before: Mapping[str, Any], figures: Figures, precision: str, tolerances: Mapping[str, float], *, exact: bool
) -> list[Change]:
    """What is worse than it may be, block by block. What only one of the two has is, too."""
    now = as_json(figures)
    changes: list[Change] = []
    if before["inputs"] != now["inputs"]:
        changes.append(Change(precision, None, "inputs", before["inputs"], now["inputs"], "equal"))
        return changes
    names = [block["name"] for block in before["blocks"]], [block["name"] for block in now["blocks"]]
    if names[0] != names[1]:
        return [Change(precision, None, "blocks", ", ".join(names[0]), ", ".join(names[1]), "equal")]
    for old, new in zip(before["blocks"], now["blocks"], strict=True):
        for metric in MARKS:
            limit = tolerances[f"output_change_{compute_of(precision)}"]
            scale = old["output_rms"] if metric == "output_rms" else 1.0
            if abs(old[metric] - new[metric]) > limit * scale:
                changes.append(Change(precision, old["name"], metric, old[metric], new[metric], limit * scale))
        for metric in ERRORS:
            changes += _risen(precision, old["name"], metric, old, new, tolerances[metric], exact)
    for metric, value in now["gradient"].items():
        if metric not in before["gradient"]:
            changes.append(Change(precision, None, metric, "not measured", value, "none"))
    for metric in before["gradient"]:
        changes += _risen(precision, None, metric, before["gradient"], now["gradient"], tolerances[metric], exact)
    return changes


def _risen(
    precision: str,
    block: str | None,
    metric: str,
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    times: float,
    exact: bool,
) -> list[Change]:
    # In another order of the same sums an error of nothing is one of a rounding.
    rounding = 0.0 if exact else torch.finfo(torch.float64 if compute_of(precision) == FP64 else torch.float32).eps
    limit = times * max(before[metric], rounding)
    if metric not in now:
        return [Change(precision, block, metric, before[metric], "not measured", limit)]
    return [Change(precision, block, metric, before[metric], now[metric], limit)] if now[metric] > limit else []

"""Baselines: a small JSON file for each test, with the figures of each kind of machine, torch and precision."""

import json
import math
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from harness.errors import HarnessError
from harness.inverses.measurement import ERRORS, MARKS, Figures
from harness.inverses.precisions import FP64, OUTPUT_CHANGE, compute_of

SCHEMA = 1
DEFAULT_TOLERANCES: dict[str, float] = {
    # Times the figure before.
    "inverse_rel": 3.0,
    "drift_rel": 3.0,
    "gradient_rel": 3.0,
    "gradient_angle_deg": 3.0,
    "gradient_reference_rel": 3.0,
    "gradient_difference_rel": 100.0,
    # Absolute, over the output's root mean square.
    **{f"output_change_{precision}": change for precision, change in OUTPUT_CHANGE.items()},
}


class BaselineError(HarnessError):
    """A baseline file that cannot be used."""


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
    """What is worse than it may be, block by block. What the baseline has and the figures have not is, too."""
    now = as_json(figures)
    changes: list[Change] = []
    if before["inputs"] != now["inputs"]:
        changes.append(Change(precision, None, "inputs", before["inputs"], now["inputs"], "equal"))
        return changes
    names = [block["name"] for block in before["blocks"]], [block["name"] for block in now["blocks"]]
    if names[0] != names[1]:
        return [Change(precision, None, "blocks", ", ".join(names[0]), ", ".join(names[1]), "equal")]
    allowed = DEFAULT_TOLERANCES | dict(tolerances)
    for old, new in zip(before["blocks"], now["blocks"], strict=True):
        for metric in MARKS:
            limit = allowed[f"output_change_{compute_of(precision)}"]
            scale = old["output_rms"] if metric == "output_rms" else 1.0
            if abs(old[metric] - new[metric]) > limit * scale:
                changes.append(Change(precision, old["name"], metric, old[metric], new[metric], limit * scale))
        for metric in ERRORS:
            changes += _risen(precision, old["name"], metric, old, new, allowed[metric], exact)
    for metric in before["gradient"]:
        changes += _risen(precision, None, metric, before["gradient"], now["gradient"], allowed[metric], exact)
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


def read(path: Path) -> dict[str, Any] | None:
    """The file's contents; None where there is none. Raises BaselineError for what is no baseline."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise BaselineError(f"{path}: not JSON ({error}). Restore it, or delete it to have it written anew.") from None
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise BaselineError(f"{path}: not a baseline of schema {SCHEMA}. Restore it, or delete it.")
    if place := _fault(found):
        raise BaselineError(f"{path}: {place} is missing, or not what belongs there. Restore the file, or delete it.")
    return found


def _fault(found: Mapping[str, Any]) -> str | None:
    """The first place that has not what a baseline has there."""
    if key := _without(found, {"test": str, "structure": dict, "tolerances": dict, "baselines": dict}):
        return key
    if key := _without(found["tolerances"], dict.fromkeys(DEFAULT_TOLERANCES, float)):
        return f"tolerances.{key}"
    for name, parts in found["structure"].items():
        if not (isinstance(parts, list) and all(isinstance(part, str) for part in parts)):
            return f"structure.{name}"
    for machine, baseline in found["baselines"].items():
        where = f"baselines[{machine!r}]"
        if not isinstance(baseline, dict):
            return where
        if key := _without(baseline, {"inputs": str, "outside": str, "blocks": list, "gradient": dict}):
            return f"{where}.{key}"
        if key := _without(baseline["gradient"], dict.fromkeys(baseline["gradient"], float)):
            return f"{where}.gradient.{key}"
        of_block = {"name": str, "weights": str, "calls": str, **dict.fromkeys((*MARKS, *ERRORS), float)}
        for index, block in enumerate(baseline["blocks"]):
            if not isinstance(block, dict):
                return f"{where}.blocks[{index}]"
            if key := _without(block, of_block):
                return f"{where}.blocks[{index}].{key}"
            if not all("=" in part for part in block["weights"].split()):
                return f"{where}.blocks[{index}].weights"
    return None


def _without(found: Mapping[str, Any], kinds: Mapping[str, type]) -> str | None:
    """The first key that has no value of its kind; a whole number is one of the numbers."""
    return next(
        (k for k, kind in kinds.items() if not isinstance(found.get(k), (int, float) if kind is float else kind)), None
    )


def write(path: Path, contents: Mapping[str, Any]) -> None:
    """Sorted, a line for each figure, and whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(contents, indent=1, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")
    temporary.replace(path)

"""The prediction of a step's memory against what the GPU's allocator counted, over a table of networks.

As `python -m studies.predictions` does on the CPU, for sizes that a GPU is used for. What is predicted knows nothing of
the workspaces that cuDNN takes for itself, and those are a part of the peak.
"""

import gc
import itertools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from harness.trials import DataSpec, TrialSpec
from revnet_core.networks import FAMILIES
from studies.gpu.place import free, set_compute
from studies.gpu.results import Result, Target, markdown, mib
from studies.predictions import compare

# Family and depths; batch sizes and pixels follow from the family.
NETWORKS = (
    ("revnet", (38, 110)),
    ("resnet", (32, 110)),
    ("gomez_revnet", (38,)),
    ("resnet_imagenet", (50,)),
    ("revnet_imagenet", (56,)),
)
SMALL_NETWORKS = (("revnet", (14,)),)
CIFAR, IMAGENET = (32, (32, 128)), (224, (8, 32))
SMALL_SIZES = (8, (2,))
BUDGET_BYTES = 256 * 2**20
# Of the measured figure.
LIMIT = 0.03


def specs(compute: str, *, small: bool) -> Iterator[TrialSpec]:
    for model, depths in SMALL_NETWORKS if small else NETWORKS:
        image_size, batch_sizes = SMALL_SIZES if small else IMAGENET if FAMILIES[model].size.units else CIFAR
        for depth, batch_size, activations in itertools.product(depths, batch_sizes, FAMILIES[model].activations):
            yield TrialSpec.model_validate(
                {
                    "model": model,
                    "depth": depth,
                    "batch_size": batch_size,
                    "data": DataSpec(name="synthetic", image_size=image_size),
                    "activations": activations,
                    "budget_bytes": BUDGET_BYTES if activations == "budgeted" else None,
                    "compute": compute,
                }
            )


def measure(device: torch.device, compute: str, *, small: bool, seconds: float) -> Result:
    set_compute(compute, device)
    result = Result(benchmark=f"predictions-{compute}", settings={"compute": compute, "device": device.type})
    start_s, left_out = time.perf_counter(), 0
    for spec in specs(compute, small=small):
        if time.perf_counter() - start_s > seconds:
            left_out += 1
            continue
        row: dict[str, Any] = {
            name: getattr(spec, name) for name in ("model", "depth", "batch_size", "activations", "compute")
        }
        result.rows.append(row)
        try:
            one = compare(spec, device)
        except torch.OutOfMemoryError as error:
            row["reason"] = f"out of memory: {(str(error).splitlines() or [''])[0]}"
        else:
            row |= {name: value for name, value in one._asdict().items() if name != "spec"}
            row |= {"saved_error": one.saved_error, "peak_error": one.peak_error}
        gc.collect()
        free(device)
    if left_out:
        result.unmeasured[f"{left_out} more networks"] = f"the {seconds:.0f} s were over"
    result.targets = [_target(result.rows, name) for name in ("saved", "peak")]
    return result


def as_text(result: Result) -> str:
    headings = ["network", "batch", "activations", "saved MiB", "predicted", "%", "peak MiB", "predicted", "%"]
    return "\n".join([markdown(headings, [_cells(row) for row in result.rows]), "", *result.closing_lines()])


def _cells(row: dict[str, Any]) -> Sequence[str]:
    name = [f"{row['model']}{row['depth']}", str(row["batch_size"]), row["activations"]]
    if "reason" in row:
        return [*name, row["reason"], *[""] * 5]
    figures: list[str] = []
    for what in ("saved", "peak"):
        figures += [mib(row[f"measured_{what}_bytes"]), mib(row[f"predicted_{what}_bytes"])]
        figures.append(f"{100 * row[f'{what}_error']:+.2f}")
    return [*name, *figures]


def _target(rows: list[dict[str, Any]], what: str) -> Target:
    measured = [row for row in rows if "reason" not in row]
    if not measured:
        return Target(what=f"largest error of {what}", most=LIMIT, reason="nothing was measured")
    worst = max(measured, key=lambda row: abs(row[f"{what}_error"]))
    where = f"{worst['model']}{worst['depth']} {worst['activations']}, batch {worst['batch_size']}"
    return Target(
        what=f"largest error of the predicted {what} in {len(measured)} steps ({where})",
        most=LIMIT,
        figure=abs(worst[f"{what}_error"]),
    )

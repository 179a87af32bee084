"""ResNet-101 against RevNet-104, the paper's own two networks for ImageNet, on images of noise.

Activation peak and saved activations as in a record (docs/measures.md); images per second of steps that update.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from harness.measure.memory import measure_memory
from harness.measure.timing import time_step
from harness.models import loss_of
from revnet_core import Precision, ReversibleError, create_model
from studies.gpu.place import NO_GRAPHS, free, set_compute
from studies.gpu.results import Result, Target, markdown, mib
from studies.gpu.runners import EAGER, GRAPH, step_of
from studies.peers.measure import quartiles

# Of activations, RevNet-104 over ResNet-101; Gomez et al. 2017, arXiv:1707.04585.
PUBLISHED_RATIO = 0.27
WARMUP_CALLS = 6


@dataclass(frozen=True, kw_only=True)
class ImageSizes:
    batch_size: int = 64
    image_size: int = 224
    classes: int = 1000
    # Of networks by name: family, depth, activations.
    networks: tuple[tuple[str, str, int, str], ...] = (
        ("ResNet-101", "gomez_resnet_imagenet", 101, "stored"),
        ("RevNet-104", "gomez_revnet_imagenet", 104, "reconstructed"),
    )


SMALL = ImageSizes(
    batch_size=2,
    image_size=16,
    classes=10,
    networks=(
        ("ResNet-11", "gomez_resnet_bottleneck", 11, "stored"),
        ("RevNet-20", "gomez_revnet_bottleneck", 20, "reconstructed"),
    ),
)


def measure(device: torch.device, sizes: ImageSizes, compute: str, measured: int) -> Result:
    set_compute(compute, device)
    settings = {**vars(sizes), "compute": compute, "measured_steps": measured, "device": device.type}
    result = Result(benchmark=f"imagenet-{compute}", settings=settings)
    for name, family, depth, activations in sizes.networks:
        row: dict[str, Any] = {"name": name, "activations": activations}
        result.rows.append(row)
        try:
            model = create_model(
                family,
                num_classes=sizes.classes,
                depth=depth,
                activations=activations,
                precision=Precision(compute),
            )
            _measure_one(model.to(device).train(), sizes, device, measured, row)
        except (ReversibleError, RuntimeError) as error:
            row["reason"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        free(device)
    if device.type == "cpu":
        result.unmeasured["graph"] = NO_GRAPHS
    result.targets = [_target(result.rows, what) for what in ("activation peak", "activations saved")]
    return result


def as_text(result: Result) -> str:
    headings = ["network", "peak MiB", "saved MiB", "images/s eager", "images/s graph"]
    cells = []
    for row in result.rows:
        speeds = [row.get(f"images_per_s_{how}") for how in (EAGER, GRAPH)]
        shown = ["" if speed is None else f"{speed:.1f}" for speed in speeds]
        memory = [mib(row.get("activation_peak_bytes")), mib(row.get("activation_saved_bytes"))]
        cells.append([f"{row['name']}, {row['activations']}", *memory, *shown])
    reasons = [f"{row['name']}: {row['reason']}" for row in result.rows if "reason" in row]
    return "\n".join([markdown(headings, cells), "", *reasons, *result.closing_lines()])


def _measure_one(model: nn.Module, sizes: ImageSizes, device: torch.device, measured: int, row: dict[str, Any]) -> None:
    size = sizes.image_size
    x = torch.randn(sizes.batch_size, 3, size, size, device=device)
    labels = torch.randint(sizes.classes, (sizes.batch_size,), device=device)
    loss_of(model(x), labels).backward()
    use = measure_memory(device, lambda: loss_of(model(x), labels), lambda loss: loss.backward())
    row |= {
        "activation_peak_bytes": use.activation_peak_bytes,
        "activation_saved_bytes": use.activation_saved_bytes,
        "allocated_peak_bytes": use.allocated_peak_bytes,
    }
    for how in (EAGER, GRAPH) if device.type == "cuda" else (EAGER,):
        free(device)
        step = step_of(model, (x, labels), graph=how == GRAPH)
        for _ in range(min(WARMUP_CALLS, measured + 1)):
            step((x, labels))
        step_s = [time_step(device, partial(_take, step, (x, labels))) for _ in range(measured)]
        q1, middle, q3 = quartiles(step_s)
        row |= {f"step_s_{how}": step_s, f"step_quartiles_s_{how}": (q1, middle, q3)}
        row[f"images_per_s_{how}"] = sizes.batch_size / middle


def _take(step: Any, batch: tuple[Tensor, Tensor]) -> None:
    step(batch)


def _target(rows: list[dict[str, Any]], what: str) -> Target:
    stored, rebuilt = rows
    asked = f"{what} of {rebuilt['name']} over {stored['name']} (the paper's {PUBLISHED_RATIO})"
    key = f"activation_{what.split()[-1]}_bytes"
    for row in rows:
        if key not in row:
            return Target(what=asked, most=PUBLISHED_RATIO, reason=f"{row['name']}: {row['reason']}")
    return Target(what=asked, most=PUBLISHED_RATIO, figure=rebuilt[key] / stored[key])

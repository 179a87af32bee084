"""Prediction against measurement: `python -m studies.predictions`, or `make predictions`.

Every family x what becomes of its activations x two depths x two batch sizes, each step run for real and read from the
allocator's own events, beside what `harness.predict` says of it. On the CPU (for a GPU: `python -m studies.gpu
predictions`) and outside an engine, whose own buffers tests/harness/test_predict.py looks at.
"""

import gc
import itertools
import sys
from collections.abc import Iterator
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from harness.measure.memory import measure_memory
from harness.models import create, loss_of
from harness.predict import Device, step_memory
from harness.trials import DataSpec, TrialSpec
from revnet_core.networks import FAMILIES

MIB = 2**20
# Units of each stage; of the ImageNet families the two networks that there are.
UNITS = (2, 4)
BATCH_SIZES = (4, 24)
IMAGENET_BATCH_SIZES = (2, 6)
IMAGENET_IMAGE_SIZE = 64
BUDGET_BYTES = 4 * MIB
CPU = torch.device("cpu")
# Of the measured figure.
SAVED_LIMIT, PEAK_LIMIT = 0.01, 0.05


class Compared(NamedTuple):
    spec: TrialSpec
    measured_saved_bytes: int
    measured_peak_bytes: int
    predicted_saved_bytes: int
    predicted_peak_bytes: int

    @property
    def saved_error(self) -> float:
        return self.predicted_saved_bytes / self.measured_saved_bytes - 1

    @property
    def peak_error(self) -> float:
        return self.predicted_peak_bytes / self.measured_peak_bytes - 1


def specs(compute: str = "fp32") -> Iterator[TrialSpec]:
    for model, family in FAMILIES.items():
        named = family.size.units
        depths = list(named) if named else [units * family.depth_step + 2 for units in UNITS]
        sizes = IMAGENET_BATCH_SIZES if named else BATCH_SIZES
        data = DataSpec(name="synthetic", image_size=IMAGENET_IMAGE_SIZE if named else 32)
        for activations, depth, batch_size in itertools.product(family.activations, depths, sizes):
            yield TrialSpec.model_validate(
                {
                    "model": model,
                    "depth": depth,
                    "batch_size": batch_size,
                    "data": data,
                    "activations": activations,
                    "budget_bytes": BUDGET_BYTES if activations == "budgeted" else None,
                    "compute": compute,
                }
            )


def compare(spec: TrialSpec, device: torch.device = CPU) -> Compared:
    """One step after a first one, with the gradients there before it, as in a trial."""
    model = create(spec).to(device)
    size = spec.data.image_size
    x = torch.randn(spec.batch_size, 3, size, size, device=device)
    labels = torch.zeros(spec.batch_size, dtype=torch.long, device=device)

    def forward() -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=spec.compute == "bf16"):
            logits = model(x)
        return loss_of(logits, labels)

    forward().backward()
    _collect(model)
    use = measure_memory(device, forward, lambda loss: loss.backward())
    step = step_memory(spec, Device("cuda" if device.type == "cuda" else "cpu", torch.get_num_threads()))
    return Compared(spec, use.activation_saved_bytes, use.activation_peak_bytes, step.saved_bytes, step.peak_bytes)


def _collect(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gc.collect()


def main() -> int:
    torch.set_num_threads(1)
    compute = sys.argv[1] if len(sys.argv) > 1 else "fp32"
    console = Console(width=None if Console().is_terminal else 160)
    table = Table("model", "depth", "batch", "activations", "saved MiB", "predicted", "%", "peak MiB", "predicted", "%")
    compared = []
    for spec in specs(compute):
        compared.append(one := compare(spec))
        table.add_row(
            *(spec.model, str(spec.depth), str(spec.batch_size), spec.activations),
            *(f"{one.measured_saved_bytes / MIB:.2f}", f"{one.predicted_saved_bytes / MIB:.2f}"),
            f"{100 * one.saved_error:+.3f}",
            *(f"{one.measured_peak_bytes / MIB:.2f}", f"{one.predicted_peak_bytes / MIB:.2f}"),
            f"{100 * one.peak_error:+.3f}",
        )
    console.print(table)
    saved, peak = (max(compared, key=lambda one: abs(getattr(one, name))) for name in ("saved_error", "peak_error"))
    for name, worst, error in (("saved", saved, saved.saved_error), ("peak", peak, peak.peak_error)):
        spec = worst.spec
        where = f"{spec.model}{spec.depth} {spec.activations}, batch {spec.batch_size}"
        console.print(
            f"{name}: at most {100 * abs(error):.3f} % off in {len(compared)} steps ({where})", highlight=False
        )
    return int(abs(saved.saved_error) > SAVED_LIMIT or abs(peak.peak_error) > PEAK_LIMIT)


if __name__ == "__main__":
    sys.exit(main())

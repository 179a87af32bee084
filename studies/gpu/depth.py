"""How deep a RevNet can be: 1,000 and 10,000 layers train a step, and where a given memory ends.

The deepest is first predicted - bytes are affine in depth, so two small networks foretell all - and then tried out with
the allocator held to that memory: less where it does not fit, more where it does, until one fits and one that is a
little deeper does not.
"""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import nn

from harness.errors import HarnessError
from harness.find import AT_MOST, step_down
from harness.measure.timing import time_step
from harness.predict import Device, step_memory
from harness.sizes import in_words, parse_memory
from harness.trials import DataSpec, TrialSpec
from harness.zero import divided, held_at_start
from revnet_core import create_model
from studies.gpu.place import free
from studies.gpu.results import Result, markdown, mib
from studies.gpu.runners import CLASSES, step_of

STEP, LEAST = 12, 14
# Units of each stage of the two networks that the others are foretold by.
SAMPLES = (3, 5)
# How much deeper the next try is, and how often at most.
UP, UPS = Fraction(3, 100), 4
# Of the gap between what fits and what does not.
HALVINGS = 2
NO_LIMIT = "on the CPU PyTorch holds nobody to a limit, so only the prediction's own depth is run"


@dataclass(frozen=True, kw_only=True)
class Question:
    """layers   of the networks that train a step, of the published widths
    channels  of the network that is to fill the memory: wide, so that few layers do
    """

    memory: str = "32GiB"
    layers: tuple[int, ...] = (1010, 10_010)
    layer_channels: tuple[int, ...] = (32, 64, 128)
    channels: tuple[int, ...] = (128, 256, 768)
    batch_size: int = 128
    image_size: int = 32


SMALL = Question(
    memory="24MiB", layers=(26, 38), layer_channels=(4, 8, 8), channels=(16, 64, 128), batch_size=2, image_size=8
)


def measure(device: torch.device, asked: Question, keep: Callable[[Result], None] = lambda result: None) -> Result:
    """keep: is given what there is after each row, in case the time ends before the last."""
    result = Result(benchmark="depth", settings={**vars(asked), "device": device.type})
    for depth in asked.layers:
        row = {"what": "one step", "activations": "reconstructed", "depth": depth}
        row |= _one_step(device, asked, "reconstructed", depth, asked.layer_channels)
        result.rows.append(row)
        keep(result)
    memory_bytes = parse_memory(asked.memory)
    if memory_bytes is None:
        raise HarnessError(f"--memory {asked.memory}: give an amount, such as 32GiB.")
    if device.type == "cuda":
        total_bytes = torch.cuda.get_device_properties(device).total_memory
        if memory_bytes > total_bytes:
            result.unmeasured[asked.memory] = f"the device has {in_words(total_bytes)}; that is the limit instead"
            memory_bytes = total_bytes
        torch.cuda.set_per_process_memory_fraction(memory_bytes / total_bytes, device)
    else:
        result.unmeasured["limit"] = NO_LIMIT
    try:
        for activations in ("stored", "reconstructed"):
            result.rows.append(_limit(device, asked, activations, memory_bytes))
            keep(result)
    finally:
        if device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0, device)
    return result


def as_text(result: Result) -> str:
    headings = ["what", "activations", "layers", "step s", "allocated peak MiB", "next try that did not fit"]
    cells = [
        [
            row["what"],
            row["activations"],
            str(row["depth"] or "none"),
            f"{row['step_s']:.3f}" if "step_s" in row else row.get("reason", ""),
            mib(row.get("allocated_peak_bytes")),
            str(row.get("too_deep") or ""),
        ]
        for row in result.rows
    ]
    return "\n".join([markdown(headings, cells), "", *result.closing_lines()])


def affine(device: torch.device, asked: Question, activations: str) -> Callable[[int], int]:
    """Bytes that a depth is predicted to need: what is allocated at the highest point of its step."""
    needed: list[int] = []
    for units in SAMPLES:
        spec = TrialSpec.model_validate(
            {
                "model": "revnet",
                "depth": STEP * units + 2,
                "channels": asked.channels,
                "batch_size": asked.batch_size,
                "data": DataSpec(name="synthetic", image_size=asked.image_size),
                "activations": activations,
            }
        )
        step = step_memory(spec, Device("cuda" if device.type == "cuda" else "cpu", torch.get_num_threads()))
        needed.append(step.peak_bytes + step.batch_bytes + held_at_start(divided(step.model, spec), 0))
    slope = Fraction(needed[1] - needed[0], SAMPLES[1] - SAMPLES[0])
    return lambda depth: int(needed[0] + slope * (Fraction(depth - 2, STEP) - SAMPLES[0]))


def deepest(
    depths: Sequence[int], needed_bytes: Callable[[int], int], limit_bytes: int, fits: Callable[[int], bool]
) -> tuple[int | None, int | None]:
    """The deepest that was seen to fit, and the least deep above it that was seen not to; None where there is none."""
    found, too_deep = None, None
    for depth in step_down(depths, needed_bytes, limit_bytes):
        if fits(depth):
            found = depth
            break
        too_deep = depth
    if found is None:
        return None, too_deep
    for _ in range(UPS if too_deep is None else 0):
        more = depths.index(found) + max(1, int(UP * depths.index(found)))
        if more >= len(depths):
            break
        if not fits(depths[more]):
            too_deep = depths[more]
            break
        found = depths[more]
    for _ in range(HALVINGS if too_deep is not None else 0):
        middle = (depths.index(found) + depths.index(too_deep)) // 2
        if depths[middle] == found:
            break
        if fits(depths[middle]):
            found = depths[middle]
        else:
            too_deep = depths[middle]
    return found, too_deep


def _limit(device: torch.device, asked: Question, activations: str, memory_bytes: int) -> dict[str, Any]:
    needed_bytes = affine(device, asked, activations)
    depths = range(LEAST, AT_MOST["depth"] + 1, STEP)
    figures: dict[int, dict[str, Any]] = {}

    def fits(depth: int) -> bool:
        # Of the CPU, whose allocator knows no limit, the prediction is taken for granted.
        if device.type == "cpu" and needed_bytes(depth) > memory_bytes:
            return False
        figures[depth] = _one_step(device, asked, activations, depth, asked.channels)
        return "step_s" in figures[depth]

    found, too_deep = deepest(depths, needed_bytes, memory_bytes, fits)
    row = {"what": f"fits {in_words(memory_bytes)}", "activations": activations, "depth": found, "too_deep": too_deep}
    if found is not None:
        row |= figures[found] | {"predicted_bytes": needed_bytes(found)}
    return row


def _one_step(
    device: torch.device, asked: Question, activations: str, depth: int, channels: Sequence[int]
) -> dict[str, Any]:
    """Of a step behind a first one; the reason where the memory does not do."""
    start_s = time.perf_counter()
    try:
        return _train(device, asked, activations, depth, channels) | {"whole_s": time.perf_counter() - start_s}
    except torch.OutOfMemoryError as error:
        return {"reason": f"out of memory: {(str(error).splitlines() or [''])[0]}"}
    finally:
        gc.collect()
        free(device)


def _train(
    device: torch.device, asked: Question, activations: str, depth: int, channels: Sequence[int]
) -> dict[str, Any]:
    # Thousands of layers are made where they are to be, not copied there.
    with torch.device(device):
        model: nn.Module = create_model(
            "revnet", num_classes=CLASSES, depth=depth, channels=channels, activations=activations
        ).train()
        x = torch.randn(asked.batch_size, 3, asked.image_size, asked.image_size)
        labels = torch.zeros(asked.batch_size, dtype=torch.long)
    step = step_of(model, (x, labels), graph=False)
    first_loss = step((x, labels)).item()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    figures: dict[str, Any] = {"first_loss": first_loss}
    figures["step_s"] = time_step(device, lambda: _take(step, (x, labels)))
    if device.type == "cuda":
        figures["allocated_peak_bytes"] = torch.cuda.max_memory_allocated(device)
        figures["reserved_peak_bytes"] = torch.cuda.max_memory_reserved(device)
    return figures


def _take(step: Any, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    step(batch)

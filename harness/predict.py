"""The memory of a trial before it runs: its own code, on fake tensors, which have shapes and no contents.

Needs no GPU and allocates nothing of what it predicts. What operations return is tracked as it comes and goes; what a
CPU's kernels take for themselves is modelled (harness/measure/kernels.py); what DeepSpeed keeps is reckoned.
"""

import contextlib
from dataclasses import asdict, dataclass, fields
from typing import Literal, NamedTuple

import torch

from harness.data import CHANNELS
from harness.errors import HarnessError, PredictionError
from harness.measure.fakes import blank_batch, fake_tensors, first_line, forward_loss
from harness.measure.kernels import CpuKernels
from harness.measure.live import LiveStorages, Phase
from harness.models import check_model, create, loss_of
from harness.modes import check_predictable
from harness.trials import TrialSpec
from harness.zero import (
    ModelSize,
    bucket_bytes,
    divided,
    flattened_bytes,
    gradients_pile_up,
    held_at_start,
    persistence_threshold,
)
from revnet_core import UnsupportedError
from revnet_core.offload import standing_for_a_device
from revnet_core.precision import AUTOCAST_DTYPES

# CUDA's caching allocator hands out multiples of it.
CUDA_GRANULARITY_BYTES = 512


@dataclass(frozen=True)
class Device:
    """What a prediction is for.

    threads  of a rank's process; on the CPU kernels depend on it
    """

    kind: Literal["cpu", "cuda"]
    threads: int = 1


class PlacePeak(NamedTuple):
    """The highest level in one part of the model, in one phase, and the operation that it is reached in."""

    phase: Phase
    place: str
    level_bytes: int
    operation: str


@dataclass(frozen=True)
class StepMemory:
    """Of one step of one rank, in bytes above the level at its start, before the engine's own buffers; and what was
    there before it; `peaks` are those of the parts of the model, in the order in which the step comes to them."""

    saved_bytes: int
    peaks: tuple[PlacePeak, ...]
    model: ModelSize
    batch_bytes: int
    blocks: int | None

    @property
    def peak_bytes(self) -> int:
        return max(peak.level_bytes for peak in self.peaks)


@dataclass(frozen=True)
class Prediction:
    """Of one rank; bytes, defined as in a record (docs/measures.md).

    peak_at  where the activation peak is
    """

    activation_saved_bytes: int
    activation_peak_bytes: int
    allocated_peak_bytes: int
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    buffer_bytes: int
    batch_bytes: int
    blocks: int | None
    peak_at: str

    def metrics(self) -> dict[str, int]:
        """As they stand in a record, beside the measured ones."""
        return {f"predicted_{name}": value for name, value in asdict(self).items() if name.endswith("_bytes")}


PREDICTED_METRICS = tuple(f"predicted_{field.name}" for field in fields(Prediction) if field.name.endswith("_bytes"))


def device_of(spec: TrialSpec) -> Device:
    """The one that the trial would run on, on this machine."""
    wanted = spec.resources.gpus_per_worker
    on_gpu = torch.cuda.is_available() if wanted is None else wanted > 0
    return Device("cuda" if on_gpu else "cpu", spec.resources.cpus_per_worker)


def predict(spec: TrialSpec, device: Device) -> Prediction:
    """What the trial's step would take on `device`; raises as `step_memory`."""
    return with_engine(spec, step_memory(spec, device))


def step_memory(spec: TrialSpec, device: Device) -> StepMemory:
    """A step of the trial's own code on fake tensors.

    Raises UnsupportedError for what the trial would be refused for, HarnessError for a model that cannot be built, and
    PredictionError for one that cannot run without contents, because it decides by values.
    """
    if device.kind == "cpu" and spec.compute in ("fp16", "tf32"):
        raise UnsupportedError(f"compute = {spec.compute!r}: not on a CPU. Use bf16 or fp32, or a GPU.")
    check_predictable(spec, device.kind)
    # Imported outside the mode: what a user's module makes at its import would be fake for good.
    check_model(spec.model, spec.depth, spec.channels, spec.log_scale_gain)
    standing_in = standing_for_a_device() if device.kind == "cuda" else contextlib.nullcontext()
    with fake_tensors(), standing_in:
        try:
            return _step_memory(spec, device)
        except (HarnessError, UnsupportedError):
            raise
        except Exception as error:
            raise PredictionError(
                f"{spec.model} cannot be predicted: {first_line(error)}. Its step has to run on tensors without "
                "contents (torch's FakeTensorMode): branch on shapes, not on values."
            ) from error


def with_engine(spec: TrialSpec, step: StepMemory) -> Prediction:
    """The step under the trial's engine, which has buffers of its own in the backward and divides the model's state."""
    state = divided(step.model, spec)
    buckets_bytes = bucket_bytes(spec, step.model)
    levels = [peak.level_bytes + buckets_bytes * (peak.phase == "backward") for peak in step.peaks]
    peak_bytes = max(levels)
    highest = step.peaks[levels.index(peak_bytes)]
    peak_at = f"{highest.operation} in the {highest.phase} of {highest.place}"
    # What is rebuilt or stored is gone by then, so the higher of the two is the peak.
    copied_bytes = flattened_bytes(spec.zero_stage, step.model)
    if copied_bytes > peak_bytes:
        peak_bytes, peak_at = copied_bytes, "DeepSpeed's copy of the gradients, after the backward"
    return Prediction(
        activation_saved_bytes=step.saved_bytes,
        activation_peak_bytes=peak_bytes,
        allocated_peak_bytes=peak_bytes + held_at_start(state, spec.zero_stage) + step.batch_bytes,
        parameter_bytes=state.parameter_bytes,
        gradient_bytes=state.gradient_bytes,
        optimizer_bytes=state.optimizer_bytes,
        buffer_bytes=state.buffer_bytes,
        batch_bytes=step.batch_bytes,
        blocks=step.blocks,
        peak_at=peak_at,
    )


def _step_memory(spec: TrialSpec, device: Device) -> StepMemory:
    model = create(spec)
    batch = blank_batch((spec.batch_size, CHANNELS, spec.data.image_size, spec.data.image_size))
    autocast = AUTOCAST_DTYPES[spec.compute]
    trained = [p for p in model.parameters() if p.requires_grad]
    if not gradients_pile_up(spec.zero_stage):
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
    # The first forward finds out what later ones rely on: a budget's blocks, which nets change their input.
    forward_loss(model, loss_of, batch, autocast)
    gradients = [p.grad for p in trained if p.grad is not None]
    on_gpu = device.kind == "cuda"
    live = LiveStorages(
        [*model.parameters(), *model.buffers(), *gradients, *batch],
        kernel_peak=None if on_gpu else CpuKernels.of_this_machine(device.threads),
        model=model,
        granularity_bytes=CUDA_GRANULARITY_BYTES if on_gpu else 1,
    )
    with live:
        loss = forward_loss(model, loss_of, batch, autocast)
        saved_bytes = live.end_forward()
        loss.backward()
    return StepMemory(
        saved_bytes=saved_bytes,
        peaks=tuple(PlacePeak(*where, peak.level_bytes, peak.operation) for where, peak in live.peaks.items()),
        model=ModelSize.of(model, persistence_threshold(spec)),
        batch_bytes=sum(tensor.nbytes for tensor in batch),
        blocks=getattr(model, "blocks", None),
    )

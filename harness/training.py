"""What one rank of a trial does: warm up, time steps, measure memory and communication, follow drift, audit."""

import gc
import math
import resource
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from harness.data import CHANNELS, load_data
from harness.engine import TrainingEngine, gather, join_ranks, leave_ranks, pick_device, set_compute
from harness.errors import PredictionError, ResourceError
from harness.exports import asked_exports
from harness.followed import follow_drift
from harness.footprint import Step, attribute_footprint, measure_footprint
from harness.guarded import TrialGuard
from harness.measure.causes import CAUSE_METRICS, measure_causes
from harness.measure.communication import (
    COMMUNICATION_METRICS,
    communication_rows,
    measure_communication,
    summarize_communication,
)
from harness.measure.drift import DRIFT_METRICS, measure_drift
from harness.measure.flops import measure_flops, utilization
from harness.measure.machine import device_name
from harness.measure.timing import summarize, time_step
from harness.models import check_model, create, loss_of
from harness.modes import CompiledSteps, check_compiler, check_modes, graphed
from harness.predict import PREDICTED_METRICS, Device, predict
from harness.record import TraceRow
from harness.sizes import in_words
from harness.trials import TrialSpec
from revnet_core import UnsupportedError
from revnet_core.precision import AUTOCAST_DTYPES

Batch = tuple[Tensor, Tensor]


class DivergedError(ArithmeticError):
    """The loss is no longer finite."""


@dataclass
class Result:
    """What has been found out so far; kept when the trial ends early."""

    metrics: dict[str, int | float | None] = field(default_factory=dict)
    unmeasured: dict[str, str] = field(default_factory=dict)
    trace: list[TraceRow] = field(default_factory=list)
    exports: dict[str, bytes] = field(default_factory=dict)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


def train(spec: TrialSpec, scratch: Path, result: Result) -> None:
    """Fill `result`; `scratch` is an empty directory of this rank's own.

    Raises what the trial raises, DivergedError for a loss that is not finite, DriftError where its guard stops it,
    UnsupportedError for what the model or the device does not have, and HarnessError for input that cannot be used.
    """
    result.device = device = pick_device(spec.resources.gpus_per_worker)
    if device.type == "cpu":
        torch.set_num_threads(spec.resources.cpus_per_worker)
    set_compute(spec.compute)
    check_modes(spec, "cuda" if device.type == "cuda" else "cpu")
    if spec.compile:
        check_compiler(device)
    # Imported before tensors without contents are about: what a user's module makes then would be fake for good.
    check_model(spec.model, spec.depth, spec.channels, spec.log_scale_gain)
    # Before the limit, and long before what is measured: what the counting leaves behind is a part of neither.
    counted, uncounted = count_flops(spec)
    result.metrics |= counted
    result.unmeasured |= uncounted
    _record_prediction(spec, device, result)
    _check_share(spec, device)
    limit_memory(device, spec.resources.memory_bytes)
    join_ranks(device, scratch)
    guard = TrialGuard(spec)
    try:
        _train_under_engine(spec, device, guard, result)
        # The limit is of a training step, and an audit needs more: it stores, in float64 too.
        limit_memory(device, None)
        metrics, rows, unmeasured = follow_drift(spec, device, guard)
        result.metrics |= metrics
        result.unmeasured |= unmeasured
        result.trace += rows
    finally:
        metrics, unmeasured = guard.metrics()
        result.metrics |= metrics
        result.unmeasured |= unmeasured
    # Not after an error: ranks that wait for this one would fail for want of it, and might leave their records first.
    leave_ranks()
    gc.collect()
    if spec.audit_batch_size == 0:
        result.unmeasured |= dict.fromkeys((*DRIFT_METRICS, *CAUSE_METRICS), "the study's audit_batch_size is 0")
        return
    # The engine's model is trained and, under ZeRO-3, in pieces; the audit is of the initial weights, whole.
    model = create(spec).to(device)
    x, labels = _batches(spec, 1, batch_size=spec.audit_batch_size)[0]
    audits = [measure_drift(model, loss_of, (x.to(device), labels.to(device)))]
    if spec.amplification:
        audits.append(measure_causes(model, x.to(device)))
    else:
        result.unmeasured |= dict.fromkeys(CAUSE_METRICS, "the study's amplification is off")
    for metrics, rows, unmeasured in audits:
        result.metrics |= metrics
        result.unmeasured |= unmeasured
        result.trace += rows


def _record_prediction(spec: TrialSpec, device: torch.device, result: Result) -> None:
    """What the plan said of this trial, beside what was measured."""
    try:
        prediction = predict(spec, Device("cuda" if device.type == "cuda" else "cpu", spec.resources.cpus_per_worker))
    except (PredictionError, UnsupportedError) as error:
        result.unmeasured |= dict.fromkeys(PREDICTED_METRICS, str(error))
    else:
        result.metrics |= prediction.metrics()


def _train_under_engine(spec: TrialSpec, device: torch.device, guard: TrialGuard, result: Result) -> None:
    model = create(spec).to(device)
    for name in ("blocks", "reversible_blocks"):
        result.metrics[name] = getattr(model, name, None)
        result.unmeasured[name] = "the model does not say"
    result.metrics["parameter_count"] = sum(p.numel() for p in model.parameters())
    engine = TrainingEngine(
        model,
        batch_size=spec.batch_size,
        compute=spec.compute,
        zero_stage=spec.zero_stage,
        learning_rate=spec.learning_rate,
        extra_config=spec.deepspeed,
        compiled=spec.compile,
    )
    compiled = CompiledSteps(spec)
    try:
        batches = _batches(spec, spec.warmup_steps + spec.measured_steps + 1)
        losses: list[Tensor] = []
        step_s: list[float] = []
        like_all = batches[0][0].to(device)
        with guard.over(model, result.trace), graphed(spec, model, like_all, result), compiled.tracing():
            for index, batch in enumerate(batches[:-1]):
                x, labels = (tensor.to(device) for tensor in batch)

                def train_step(x: Tensor = x, labels: Tensor = labels) -> None:
                    loss = loss_of(engine.forward(x), labels)
                    engine.backward(loss)
                    engine.step()
                    losses.append(loss.detach())

                seconds = time_step(device, train_step)
                compiled.took(index, seconds, measured=index >= spec.warmup_steps)
                if index >= spec.warmup_steps:
                    step_s.append(seconds)
        measured_losses = [loss.item() for loss in losses[spec.warmup_steps :]]
        _record_steps(spec, step_s, measured_losses, getattr(model, "tokens_per_sample", None), result)
        x, labels = (tensor.to(device) for tensor in batches[-1])
        step = Step(engine, device, (x, labels), lambda: loss_of(engine.forward(x), labels))
        if spec.cuda_graph:
            # What the first eager step makes for all later ones is no part of the one that is measured.
            step.take()
        _record_memory(step, result)
        # Last, since it trains on: the steps whose time and memory are told have been taken.
        _record_communication(spec, step, result)
    finally:
        result.metrics |= compiled.metrics
        result.unmeasured |= compiled.unmeasured
        engine.close()


def _record_steps(
    spec: TrialSpec, step_s: Sequence[float], losses: Sequence[float], tokens_per_sample: object, result: Result
) -> None:
    for index, (seconds, loss) in enumerate(zip(step_s, losses, strict=True)):
        result.trace += [TraceRow("step", index, "step_s", seconds), TraceRow("step", index, "loss", loss)]
    metrics, unmeasured = summarize(
        gather(list(step_s)),
        samples_per_step=spec.batch_size * spec.workers,
        tokens_per_sample=tokens_per_sample if isinstance(tokens_per_sample, int) else None,
    )
    result.metrics |= metrics
    result.unmeasured |= unmeasured
    shares, reasons = utilization(result.metrics, metrics["step_median_s"], device_name(result.device), spec.compute)
    result.metrics |= shares
    result.unmeasured |= reasons
    result.metrics["loss_last"] = losses[-1]
    if not all(map(math.isfinite, losses)):
        first = next(index for index, loss in enumerate(losses) if not math.isfinite(loss))
        raise DivergedError(f"the loss of measured step {first} is {losses[first]}")


def _record_memory(step: Step, result: Result) -> None:
    step_median_s = result.metrics["step_median_s"]
    assert step_median_s
    footprint, plain = measure_footprint(step, step_median_s)
    result.metrics |= footprint.metrics
    result.unmeasured |= footprint.unmeasured
    attributed = attribute_footprint(step, plain, asked_exports())
    result.metrics |= attributed.metrics
    result.unmeasured |= attributed.unmeasured
    result.trace += attributed.trace or footprint.trace
    result.exports |= attributed.exports


def _record_communication(spec: TrialSpec, step: Step, result: Result) -> None:
    if spec.workers == 1:
        result.unmeasured |= dict.fromkeys(COMMUNICATION_METRICS, "one rank has no other to communicate with")
        return
    if spec.compile:
        reason = "what ranks tell each other is counted under a dispatch mode, in which no compiled step runs"
        result.unmeasured |= dict.fromkeys(COMMUNICATION_METRICS, reason)
        return
    own = measure_communication(step.take, spec.measured_steps)
    metrics, unmeasured = summarize_communication(gather(own))
    result.metrics |= metrics
    result.unmeasured |= unmeasured
    result.trace += communication_rows(own)


def count_flops(spec: TrialSpec) -> tuple[dict[str, int], dict[str, str]]:
    """Operations of one step of one rank, and why they are missing; see `measure_flops`."""

    def build(activations: str) -> nn.Module:
        budget_bytes = spec.budget_bytes if activations == "budgeted" else None
        return create(spec.model_copy(update={"activations": activations, "budget_bytes": budget_bytes}))

    image_shape = spec.batch_size, CHANNELS, spec.data.image_size, spec.data.image_size
    return measure_flops(build, spec.activations, loss_of, image_shape, autocast=AUTOCAST_DTYPES[spec.compute])


def _check_share(spec: TrialSpec, device: torch.device) -> None:
    """Raises ResourceError where those that share a GPU could together want more than it has."""
    count, memory_bytes = spec.resources.trials_per_device, spec.resources.memory_bytes or 0
    if device.type == "cpu" or count == 1:
        return
    total_bytes = torch.cuda.get_device_properties(device).total_memory
    if count * memory_bytes > total_bytes:
        raise ResourceError(
            f"resources.trials_per_device = {count}; so many trials with resources.memory {in_words(memory_bytes)} "
            f"each do not fit the GPU's {in_words(total_bytes)}. Lower one of the two."
        )


def limit_memory(device: torch.device, memory_bytes: int | None) -> None:
    """Cap what this rank may allocate on its device; None is no cap, also after there was one.

    On CUDA the caching allocator's share. On the CPU the process's private data above what interpreter and
    libraries hold already, so that the figure means the same on both.
    """
    if device.type == "cuda":
        total_bytes = torch.cuda.get_device_properties(device).total_memory
        share = 1.0 if memory_bytes is None else min(1.0, memory_bytes / total_bytes)
        torch.cuda.set_per_process_memory_fraction(share, device)
        return
    _, most_bytes = resource.getrlimit(resource.RLIMIT_DATA)
    limit_bytes = most_bytes
    if memory_bytes is not None:
        with open("/proc/self/status") as status:
            held_kib = next(int(line.split()[1]) for line in status if line.startswith("VmData:"))
        limit_bytes = held_kib * 2**10 + memory_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, most_bytes))


def _batches(spec: TrialSpec, count: int, *, batch_size: int | None = None) -> list[Batch]:
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return load_data(
        spec.data.name,
        spec.data.path,
        spec.data.image_size,
        batch_size=batch_size or spec.batch_size,
        batches=count,
        seed=spec.seed,
        rank=rank,
        world_size=world_size,
    )

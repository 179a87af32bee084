"""The memory figures of a trial: a step with a meter gives them, and a further one says what the bytes are."""

import contextlib
import gc
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from harness.engine import TrainingEngine, gather
from harness.measure.attribution import HELD, Attribution, Held, attribute, held_storages
from harness.measure.events import HistoryRecorder, ProfilerRecorder, record_events
from harness.measure.live import LiveStorages
from harness.measure.memory import MemoryUse, measure_memory
from harness.measure.timeline import memory_rows, owner_rows, phase_rows
from harness.measure.viewers import perfetto_trace, pickled_snapshot, snapshot_of
from harness.record import TraceRow

ATTRIBUTED = (
    "attributed_peak_difference_bytes",
    "reconstruction_peak_bytes",
    "unattributed_peak_bytes",
    "unmatched_storage_bytes",
)


@dataclass(frozen=True)
class Step:
    """A training step that can be taken again; the batch is on the device, and `forward` returns its loss."""

    engine: TrainingEngine
    device: torch.device
    batch: tuple[Tensor, ...]
    forward: Callable[[], Tensor]

    def prepare(self) -> dict[str, list[Tensor]]:
        """Allocate what is no activation. Returns what is held before the step, by category."""
        self.engine.allocate_gradients()
        gc.collect()
        return self.held()

    def take(self) -> None:
        self.engine.backward(self.forward())
        self.engine.step()

    def held(self) -> dict[str, list[Tensor]]:
        return self.engine.held_tensors() | {"batch": list(self.batch)}


@dataclass
class Footprint:
    """What a step found out; `exports` by name.

    Of each figure the largest of the ranks, and how far they are apart where there are several; never a sum, since the
    peaks of ranks need not coincide.
    """

    metrics: dict[str, int | float | None] = field(default_factory=dict)
    unmeasured: dict[str, str] = field(default_factory=dict)
    trace: list[TraceRow] = field(default_factory=list)
    exports: dict[str, bytes] = field(default_factory=dict)


def measure_footprint(step: Step, step_median_s: float) -> tuple[Footprint, MemoryUse]:
    """Take the step with a meter. Returns this rank's own reading too.

    Raises MeasurementError rather than give a peak that is not the step's.
    """
    before = held_storages(step.prepare(), step.device)
    use = measure_memory(step.device, step.forward, step.engine.backward)
    held_bytes = _bytes_by_category(held_storages(step.held(), step.device))
    start_s = time.perf_counter()
    step.engine.step()
    if step.device.type == "cuda":
        torch.cuda.synchronize(step.device)
    measured_s = use.measured_s + time.perf_counter() - start_s
    allocated_peak_bytes = use.allocated_peak_bytes
    if allocated_peak_bytes is None:
        allocated_peak_bytes = _bytes_by_category(before).total() + use.activation_peak_bytes
    metrics = _over_ranks(
        {
            "activation_saved_bytes": use.activation_saved_bytes,
            "activation_peak_bytes": use.activation_peak_bytes,
            "allocated_peak_bytes": allocated_peak_bytes,
            "reserved_peak_bytes": use.reserved_peak_bytes,
            "device_used_bytes": use.device_used_bytes,
        }
        | {f"{category}_bytes": held_bytes[category] for category in HELD}
    )
    metrics["measuring_time_ratio"] = max(gather(measured_s)) / step_median_s
    unmeasured = {
        "reserved_peak_bytes": "the CPU's allocator reserves nothing",
        "device_used_bytes": "this system does not say what a process uses",
    }
    trace = []
    for index, (seconds, level) in enumerate(use.timeline):
        trace += [TraceRow("memory", index, "time_s", seconds), TraceRow("memory", index, "live_bytes", level)]
    return Footprint(metrics, unmeasured, trace), use


def attribute_footprint(step: Step, plain: MemoryUse, exports: Collection[str] = ()) -> Footprint:
    """Take the step again, and say what its bytes are. plain: this rank's reading without.

    Where that does not work the figures of the first step stand, and these are unmeasured; the trace is empty.
    """
    if step.engine.compiled:
        reason = "the step is compiled, and what happens within its graph belongs to no operation of the model"
        return Footprint(unmeasured=dict.fromkeys(ATTRIBUTED, reason))
    try:
        attribution, files = _attributed_step(step, exports)
    except Exception as error:
        # It needs more memory than a step, and may suit a model less. Of several ranks one alone cannot leave it out:
        # the others would wait for it.
        if dist.get_world_size() > 1:
            raise
        reason = f"the step that attributes memory failed: {type(error).__name__}: {error}".splitlines()[0]
        return Footprint(unmeasured=dict.fromkeys(ATTRIBUTED, reason))
    levels = attribution.levels()
    figures = {
        "attributed_peak_difference_bytes": attribution.history.peak_bytes - plain.activation_peak_bytes,
        "reconstruction_peak_bytes": max(levels["reconstruction"]),
        "unattributed_peak_bytes": max(levels["unattributed"]),
        "unmatched_storage_bytes": attribution.unmatched_storage_bytes,
    }
    trace = memory_rows(attribution) + phase_rows(attribution) + owner_rows(attribution)
    return Footprint(_over_ranks(figures), {}, trace, files)


def _attributed_step(step: Step, exports: Collection[str]) -> tuple[Attribution, dict[str, bytes]]:
    held = step.prepare()
    before = held_storages(held, step.device)
    recorder = record_events(step.device, stacks="snapshot" in exports)
    live = LiveStorages(
        [tensor for group in held.values() for tensor in group],
        model=step.engine.model,
        note_operation=recorder.note_operation,
    )
    with contextlib.ExitStack() as running:
        profile = None
        if isinstance(recorder, ProfilerRecorder):
            profile = recorder.profile
        elif "perfetto" in exports:
            profile = running.enter_context(torch.profiler.profile())
        with recorder, live:
            loss = step.forward()
            live.end_forward()
            recorder.end_forward()
            step.engine.backward(loss)
    attribution = attribute(
        recorder.history(),
        live.storages,
        device=step.device,
        before=before,
        after=held_storages(step.engine.held_tensors(), step.device),
        category_of=step.engine.category_of,
    )
    files = {}
    if "snapshot" in exports:
        snapshot = recorder.snapshot if isinstance(recorder, HistoryRecorder) else snapshot_of(attribution)
        files["snapshot"] = pickled_snapshot(snapshot)
    if "perfetto" in exports and profile is not None:
        files["perfetto"] = perfetto_trace(profile, attribution)
    return attribution, files


def _bytes_by_category(held: Sequence[Held]) -> Counter[str]:
    total: Counter[str] = Counter()
    for storage in held:
        total[storage.category] += storage.nbytes
    return total


def _over_ranks(figures: Mapping[str, int | None]) -> dict[str, int | float | None]:
    ranks: list[Mapping[str, int | None]] = gather(figures)
    merged: dict[str, int | float | None] = {}
    for name in figures:
        values = [value for rank in ranks if (value := rank[name]) is not None]
        merged[name] = max(values, key=abs, default=None)
        if values and len(ranks) > 1:
            merged[f"{name.removesuffix('_bytes')}_rank_spread_bytes"] = max(values) - min(values)
    return merged

"""How long trials take: from earlier records, or, where there are none, no less than by a roofline.

A roofline takes everything at the maker's own figures: products no faster than the device's peak and than its memory
delivers the operands, everything else no faster than its memory, a kernel no faster than it can be launched, and the
gradients no faster than the links carry them. So its times are the least that a step can take, not what it will.

Source: Williams et al. 2009, Roofline: An Insightful Visual Performance Model for Multicore Architectures.
"""

import json
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Mapping
from statistics import median
from typing import Literal, NamedTuple

from harness.cluster.description import NodeGroup
from harness.cluster.gpus import Gpu, gpu_of
from harness.errors import StudyError
from harness.measure.flops import NAMES as FLOPS
from harness.measure.peaks import peak_flops_per_s
from harness.measure.work import StepWork
from harness.record import Record
from harness.trials import TrialSpec

# From one kernel's launch to the next, when the host is never late.
LAUNCH_S = 2e-6
# SGD with momentum: reads parameter, gradient and momentum, writes parameter and momentum.
OPTIMIZER_PASSES = 5
# A NIC of 400 Gb/s for each GPU, one direction.
NIC_BYTES_PER_S = 50 * 10**9

How = Literal["records", "roofline"]


class Estimate(NamedTuple):
    """Of one trial on one kind of device.

    step_s    of a step
    beside_s  what the trial takes besides its steps, from the start of its process to its end
    """

    step_s: float
    beside_s: float
    how: How

    def trial_s(self, trial: TrialSpec) -> float:
        return self.beside_s + trial.steps * self.step_s


class Measured(NamedTuple):
    """One earlier trial."""

    flops: int
    step_s: float
    beside_s: float


# What two trials have in common of which one tells how long the other takes.
Family = tuple[object, ...]


class Earlier:
    """Records of trials that ran to their end, by what makes them alike."""

    def __init__(self, records: Iterable[Record]) -> None:
        samples: dict[Family, dict[int, list[Measured]]] = defaultdict(lambda: defaultdict(list))
        for record in records:
            found = _measured(record)
            if found is not None:
                family, measured = found
                samples[family][measured.flops].append(measured)
        # Repeats are one point.
        self._points: dict[Family, list[Measured]] = {
            family: [
                Measured(flops, median(one.step_s for one in same), median(one.beside_s for one in same))
                for flops, same in sorted(by_flops.items())
            ]
            for family, by_flops in samples.items()
        }

    def estimate(self, trial: TrialSpec, flops: int, device: str) -> Estimate | None:
        """Between two records along a line; beyond the outermost a step in proportion to its operations."""
        points = self._points.get(_family(trial, device))
        if not points:
            return None
        right = bisect_left([point.flops for point in points], flops)
        if right < len(points) and points[right].flops == flops:
            return Estimate(points[right].step_s, points[right].beside_s, "records")
        if 0 < right < len(points):
            low, high = points[right - 1], points[right]
            share = (flops - low.flops) / (high.flops - low.flops)
            step_s, beside_s = (
                a + (b - a) * share for a, b in ((low.step_s, high.step_s), (low.beside_s, high.beside_s))
            )
            return Estimate(step_s, beside_s, "records")
        nearest = points[min(right, len(points) - 1)]
        return Estimate(nearest.step_s * flops / nearest.flops, nearest.beside_s, "records")


def _measured(record: Record) -> tuple[Family, Measured] | None:
    flops = [record.metrics.get(name) for name in FLOPS]
    step_s = record.metrics.get("step_median_s")
    if record.status != "ok" or step_s is None or not record.attempts or None in flops:
        return None
    try:
        trial = TrialSpec.from_json(json.dumps(record.spec))
    except StudyError:
        return None  # of another version, whose trials may be others
    device = "CPU" if record.machine.get("device") == "cpu" else str(record.machine.get("device_name"))
    beside_s = max(0.0, record.attempts[-1].wall_s - trial.steps * step_s)
    return _family(trial, device), Measured(int(sum(count or 0 for count in flops)), float(step_s), beside_s)


def _family(trial: TrialSpec, device: str) -> Family:
    """CPUs are not told apart, but for how many cores a rank has."""
    cores = trial.resources.cpus_per_worker if device == "CPU" else None
    kind = trial.model, trial.activations, trial.compute, trial.reconstruction, trial.compile, trial.cuda_graph
    audits = trial.audit_batch_size, trial.amplification, trial.drift_steps, trial.drift_audits
    return (device, cores, *kind, trial.zero_stage, trial.workers, *audits)


class Durations:
    """beside_s: of trials without records, assumed."""

    def __init__(self, earlier: Earlier, works: Mapping[str, StepWork | str], beside_s: float) -> None:
        self._earlier, self._works, self._beside_s = earlier, works, beside_s

    def estimate(self, trial: TrialSpec, group: NodeGroup, *, spread: bool) -> Estimate | str:
        """On nodes of a group; or why it is not known. spread: whether its ranks are on several nodes."""
        work = self._works[trial.id]
        if isinstance(work, str):
            return work
        on_gpu = group.has_gpus and trial.resources.gpus_per_worker != 0
        gpu = gpu_of(group)
        device = "CPU" if not on_gpu else gpu.driver_name if gpu is not None else group.kind
        found = self._earlier.estimate(trial, work.product_flops, device)
        if found is not None:
            return _shared(trial, found)
        if not on_gpu:
            return "no earlier record of such a trial on a CPU, of which no roofline is known. Give one with --from."
        if gpu is None:
            return f"no earlier record of such a trial on a {device}, whose peaks are not known. Give one with --from."
        if trial.activations == "offloaded":
            return "no earlier record of such a trial, and no roofline of what goes over the bus. Give one with --from."
        if trial.compile or trial.cuda_graph:
            return "no earlier record of such a trial, and no roofline of a compiled or replayed step. Give --from."
        step_s = roofline_s(trial, work, gpu, spread=spread)
        if step_s is None:
            return f"a {gpu.driver_name} has no {trial.compute}"
        return _shared(trial, Estimate(step_s, self._beside_s, "roofline"))


def _shared(trial: TrialSpec, alone: Estimate) -> Estimate:
    """Of a trial that shares its device: as if all who do took turns."""
    times = trial.resources.trials_per_device
    return alone._replace(step_s=times * alone.step_s, beside_s=times * alone.beside_s)


def roofline_s(trial: TrialSpec, work: StepWork, gpu: Gpu, *, spread: bool) -> float | None:
    """The least that a step can take; None where the device does not compute so."""
    peak = peak_flops_per_s(gpu.driver_name, trial.compute)
    if peak is None:
        return None
    bandwidth = gpu.memory_bytes_per_s
    products_s = max(work.product_flops / peak, work.product_bytes / bandwidth)
    others_s = (work.other_bytes + OPTIMIZER_PASSES * work.trained_bytes) / bandwidth
    link = NIC_BYTES_PER_S if spread else gpu.link_bytes_per_s
    # In a ring each rank sends all but one share of the gradients, and then of their sums.
    gradients_s = 2 * work.trained_bytes * (trial.workers - 1) / trial.workers / link
    return max(products_s + others_s, work.kernels * LAUNCH_S) + gradients_s

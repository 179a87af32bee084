"""`revnet plan --cluster`: the study's trials with their memory on its devices, and what a sweep there takes."""

from collections.abc import Sequence

from harness.cluster.description import NodeGroup, parse_cluster
from harness.cluster.durations import Durations, Earlier
from harness.cluster.outlook import look_ahead
from harness.cluster.view import print_outlook
from harness.cluster.works import works_of
from harness.forecast import forecast
from harness.jobs import largest_first
from harness.placing import amounts_of_rank
from harness.plan_view import print_plan
from harness.predict import Device
from harness.store import RunStore
from harness.trials import TrialSpec

# A process with torch and DeepSpeed, the device's own start, the audit in float64, and the steps that are looked into.
BESIDE_S = 60.0


def plan_on(
    cluster: str, trials: Sequence[TrialSpec], store: RunStore, earlier: Sequence[RunStore], beside_s: float | None
) -> None:
    """Print it. Trials that are done in `store` are not counted, and their times serve.

    earlier   runs to take times from
    beside_s  what a trial takes besides its steps, where that was not measured; None: BESIDE_S

    Raises HarnessError for a cluster that cannot be read.
    """
    groups = parse_cluster(cluster)
    beside_s = BESIDE_S if beside_s is None else beside_s
    predictions = forecast(trials, lambda trial: _device(trial, groups))
    done = store.finished_ids()
    print_plan(trials, predictions, done, lambda trial: _memory_bytes(trial, groups))
    left = largest_first([trial for trial in trials if trial.id not in done])
    if left:
        records = [record for run in (store, *earlier) for record in run.read_records()]
        durations = Durations(Earlier(records), works_of(left), beside_s)
        print_outlook(look_ahead(left, groups, predictions, durations), beside_s)


def _device(trial: TrialSpec, groups: Sequence[NodeGroup]) -> Device:
    return Device("cuda" if _takes_gpu(trial, groups) else "cpu", trial.resources.cpus_per_worker)


def _memory_bytes(trial: TrialSpec, groups: Sequence[NodeGroup]) -> int | None:
    """Of the largest device that it may come to; None on the host of GPUs, whose memory nobody gave."""
    fitting = (group.memory_bytes for group in groups if group.has_gpus == _takes_gpu(trial, groups))
    return max(fitting, default=None)


def _takes_gpu(trial: TrialSpec, groups: Sequence[NodeGroup]) -> bool:
    return "GPU" in amounts_of_rank(trial, any(group.has_gpus for group in groups))

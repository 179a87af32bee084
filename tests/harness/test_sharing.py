"""A trial that shares its device is told from one that does not: its memory is the same, and it has no times."""

from pathlib import Path
from typing import Any

import pytest

from harness.errors import StudyError
from harness.expansion import expand
from harness.placing import place_of, times
from harness.study import check_trials, load_study
from harness.trials import TrialResources, TrialSpec
from tests.harness.conftest import Trial

STUDY = """\
name: shared
question: How much memory?
model: revnet
fixed: {{depth: 14, workers: {workers}}}
resources: {{{resources}}}
"""


def load(folder: Path, resources: str, workers: int = 1) -> list[TrialSpec]:
    (folder / "shared.yaml").write_text(STUDY.format(resources=resources, workers=workers))
    study = load_study(str(folder / "shared.yaml"))
    trials = expand(study)
    check_trials(study, trials)
    return trials


def of_times(names: Any) -> set[str]:
    return {name for name in names if name.endswith("_s") and name != "device_peak_flops_per_s"} | {
        name for name in names if name in ("mfu", "hfu", "measuring_time_ratio")
    }


def test_memory_and_drift_are_those_of_a_trial_by_itself_and_there_are_no_times(spec: TrialSpec, trial: Trial) -> None:
    alone = trial(spec)
    shared = trial(spec, resources=TrialResources(memory_bytes=2**31, trials_per_device=2))
    assert shared.record.status == "ok", shared.record.reason
    times_alone = of_times(alone.record.metrics)
    assert times_alone >= {"step_median_s", "samples_per_s", "measuring_time_ratio"}
    assert of_times(shared.record.metrics) == set()
    for name in times_alone:
        assert shared.record.unmeasured[name].startswith("resources.trials_per_device is 2: other trials may have run")
    for name in ("activation_peak_bytes", "activation_saved_bytes", "parameter_bytes", "drift_max_rel", "loss_last"):
        assert shared.record.metrics[name] == alone.record.metrics[name]
    assert any(row.name == "step_s" for row in alone.trace)
    assert not any(row.name == "step_s" for row in shared.trace)
    assert [row for row in shared.trace if row.name == "loss"] == [row for row in alone.trace if row.name == "loss"]
    assert "own_cores" not in shared.record.machine


def test_so_many_fit_where_one_would() -> None:
    nodes = [{"CPU": 2.0, "GPU": 1.0}]
    for trials_per_device in range(1, 65):
        resources = TrialResources(cpus_per_worker=2, memory_bytes=1, trials_per_device=trials_per_device)
        [bundle] = place_of(TrialSpec(model="revnet", resources=resources), nodes).bundles
        assert times(nodes[0], dict(bundle)) == trials_per_device


def test_a_trial_by_itself_keeps_the_id_that_it_had(spec: TrialSpec) -> None:
    assert "trials_per_device" not in spec.canonical_json()
    shared = spec.model_copy(update={"resources": TrialResources(memory_bytes=1, trials_per_device=2)})
    assert '"trials_per_device":2' in shared.canonical_json()
    assert TrialSpec.from_json(shared.canonical_json()) == shared


@pytest.mark.parametrize(
    ("resources", "workers", "says"),
    [
        ("trials_per_device: 4", 1, "each held to resources.memory. Give it, such as 8GiB."),
        ("trials_per_device: 4, memory: 1GiB, gpus_per_worker: 2", 1, "no more than one GPU"),
        ("trials_per_device: 0", 1, "trials per device are at least 1. Correct the value."),
        ("trials_per_device: 65, memory: 1GiB", 1, "trials per device are at most 64. Correct the value."),
        ("trials_per_device: 2, memory: 1GiB", 2, "some trials have several ranks"),
    ],
)
def test_what_cannot_be_shared_is_refused_at_its_line(tmp_path: Path, resources: str, workers: int, says: str) -> None:
    with pytest.raises(StudyError) as refused:
        load(tmp_path, resources, workers)
    assert "shared.yaml:5: resources.trials_per_device" in str(refused.value)
    assert says in str(refused.value)


def test_a_study_whose_trials_share_says_so_in_each(tmp_path: Path) -> None:
    [one] = load(tmp_path, "trials_per_device: 4, memory: 1GiB")
    assert one.resources == TrialResources(memory_bytes=2**30, trials_per_device=4)

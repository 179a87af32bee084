"""Which trials of two runs are the same, and what must agree of where they ran."""

from typing import Any

import pytest

from harness.record import Record
from reports.compare import EQUAL, INCOMPLETE, NOT_COMPARABLE, REGRESSION
from reports.compare_view import verdict
from tests.reports.conftest import PEAK, Compare, on, repeats, scaled, trial, with_spec

CPU_RULES = [
    ({"device": "xpu"}, {"memory", "numerics", "time"}),
    ({"torch": "2.14.0+cpu"}, {"memory", "numerics", "time"}),
    ({"torch": "2.13.1"}, set()),
    ({"deepspeed": "0.20.0"}, {"memory", "numerics", "time"}),
    ({"device_name": "Other CPU", "cpu": "Other CPU"}, {"numerics", "time"}),
    ({"threads": 2}, {"numerics", "time"}),
    ({"environment": {"OMP_WAIT_POLICY": "ACTIVE"}}, {"time"}),
    ({"hostname": "elsewhere", "load_average": 3.0, "memory_bytes": 1}, set()),
]
GPU = {"device": "cuda", "device_name": "A GPU", "cuda": "12.8", "cudnn": 91000, "cuda_driver": "580.95.05"}
GPU_RULES = [
    ({"device_name": "B GPU"}, {"memory", "numerics", "time"}),
    ({"cuda": "13.0"}, {"memory", "numerics", "time"}),
    ({"environment": {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}}, {"memory", "numerics", "time"}),
    ({"cuda_driver": "590.10"}, {"time"}),
    ({"cuda_driver": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun"}, set()),
    ({"power_limit_w": 300.0}, {"time"}),
    ({"cpu": "Other CPU"}, {"time"}),
]


@pytest.mark.parametrize(
    ("machine", "facts", "kinds"), [({}, *rule) for rule in CPU_RULES] + [(GPU, *rule) for rule in GPU_RULES]
)
def test_what_a_difference_of_machine_or_versions_keeps_from_being_compared(
    compared: Compare, machine: dict[str, Any], facts: dict[str, Any], kinds: set[str]
) -> None:
    base = [on(trial(n, depth=depth), **machine) for n, depth in enumerate((14, 26))]
    run = [on(base[0], **facts), base[1]]
    for metric, kind in ((PEAK, "memory"), ("drift_max_rel", "numerics"), ("step_median_s", "time")):
        found = compared(base, run, f"{metric}:+5%")
        assert found.exit_code == (NOT_COMPARABLE if kind in kinds else EQUAL), metric
        assert ("not comparable" in verdict(found)) == (kind in kinds)
        # The other trial is compared all the same, and a regression of it is proven.
        worse = compared(base, [run[0], scaled(base[1], **{metric: 1.5})], f"{metric}:+5%")
        assert worse.exit_code == REGRESSION
    assert compared(base, run).exit_code == (NOT_COMPARABLE if kinds else EQUAL)


def test_a_memory_limit_keeps_times_from_being_compared_and_excuses_an_oom(compared: Compare) -> None:
    limited = {"gpus_per_worker": None, "cpus_per_worker": 1, "memory_bytes": 2**30}
    assert compared([trial(1)], [trial(2, resources=limited)], f"{PEAK}:+0%").exit_code == EQUAL
    assert compared([trial(1)], [trial(2, resources=limited)], "step_median_s:+5%").exit_code == NOT_COMPARABLE
    oom = trial(2, resources=limited, status="oom", reason="over the limit")
    assert compared([trial(1)], [oom]).exit_code == NOT_COMPARABLE
    assert compared([trial(1, resources=limited)], [oom]).exit_code == REGRESSION


def test_seeds_are_repeats_and_one_that_is_gone_is_missing(compared: Compare) -> None:
    found = compared(repeats(3), repeats(2), f"{PEAK}:+0")
    assert (found.exit_code, found.cells, found.trials) == (INCOMPLETE, 1, 2)
    assert found.missing == ["revnet38 stored batch 32 seed 2"]
    assert compared(repeats(2), repeats(3), f"{PEAK}:+0").exit_code == EQUAL
    # Other seeds altogether are repeats of the same cell.
    other = compared([trial(1, seed=1)], [trial(2, seed=7)], f"{PEAK}:+0")
    assert (other.exit_code, other.trials) == (EQUAL, 1)


def test_a_field_that_one_version_did_not_know_does_not_part_trials(compared: Compare, sweep: list[Record]) -> None:
    newer = [with_spec(r, momentum=0.9) for r in sweep]
    assert compared(sweep, newer, f"{PEAK}:+0").trials == len(sweep)
    assert compared(newer, sweep, f"{PEAK}:+0").trials == len(sweep)
    null = [with_spec(r, budget_bytes=None) for r in sweep]
    assert compared(sweep, null).trials == len(sweep)
    # Of two that differ in it alone nobody knows which is the old one.
    both = [*newer, with_spec(sweep[0], momentum=0.5)]
    found = compared(sweep, both)
    assert (found.trials, len(found.missing), len(found.added)) == (len(sweep) - 1, 1, 2)


def test_where_the_data_lie_and_what_a_trial_was_given_do_not_part_trials_but_what_it_computes_does(
    compared: Compare,
) -> None:
    def data(path: str | None) -> dict[str, Any]:
        return {"name": "cifar10", "path": path, "image_size": 32}

    assert compared([trial(1, data=data("/a"))], [trial(2, data=data("/b"))]).trials == 1
    assert compared([trial(1, data=data("/a"))], [trial(2, data=data(None))]).trials == 0
    more = {"gpus_per_worker": None, "cpus_per_worker": 4, "memory_bytes": None}
    assert compared([trial(1)], [trial(2, resources=more)]).trials == 1
    assert compared([trial(1)], [trial(2, deepspeed={"communication_data_type": "fp16"})]).trials == 0
    assert compared([trial(1)], [trial(2, batch_size=33)]).trials == 0


@pytest.mark.parametrize("mode", ["compile", "cuda_graph"])
def test_a_step_that_is_executed_otherwise_is_another_cell_also_to_a_run_that_knows_of_none(
    compared: Compare, mode: str
) -> None:
    said: dict[str, Any] = {mode: True}
    denied: dict[str, Any] = {mode: False}
    plain, other = trial(1), trial(2, **said)
    alone = compared([plain], [other], f"{PEAK}:+0")
    assert (alone.exit_code, alone.cells) == (INCOMPLETE, 0)
    assert alone.missing == [f"revnet38 stored batch 32 {mode} false"]
    assert compared([plain, other], [plain, other], f"{PEAK}:+0").cells == 2
    # A record that says false and one that says nothing are the same.
    assert compared([plain], [trial(3, **denied)], f"{PEAK}:+0").exit_code == EQUAL

"""Times come from records of what is alike; else from a roofline where the device is known; else there is none."""

import re
from typing import Any

import pytest
from torch import Tensor, nn

from harness.cluster.description import parse_cluster
from harness.cluster.durations import LAUNCH_S, NIC_BYTES_PER_S, Durations, Earlier, Estimate, roofline_s
from harness.cluster.gpus import gpu_of
from harness.cluster.works import works_of
from harness.measure.work import StepWork, step_work
from harness.record import Attempt, Record, Status
from harness.training import count_flops
from harness.trials import TrialResources, TrialSpec

[GPUS] = parse_cluster("1x8xH200-141GB")
[UNKNOWN_GPUS] = parse_cluster("1x8xRTX-24GB")
[CORES] = parse_cluster("1x2xCPU-24GiB")
TRIAL = TrialSpec(model="revnet", depth=38, warmup_steps=1, measured_steps=3)
TERA = 10**12


def work(teraflops: float = 1.0, **others: int) -> StepWork:
    plain = {"product_bytes": 10**9, "other_bytes": 10**9, "kernels": 100, "trained_bytes": 10**6}
    return StepWork(product_flops=int(teraflops * TERA), **(plain | others))


def record(
    trial: TrialSpec,
    teraflops: float,
    step_s: float,
    wall_s: float,
    *,
    device: str = "cpu",
    status: Status = "ok",
) -> Record:
    flops = int(teraflops * TERA)
    return Record(
        id=trial.id,
        spec=trial.model_dump(mode="json"),
        status=status,
        attempts=[Attempt(status=status, started_at="2026-01-01", wall_s=wall_s, node="here")],
        metrics={"step_median_s": step_s, "flops_forward": flops, "flops_backward": 0, "flops_recompute": 0},
        machine={"device": device, "device_name": "NVIDIA H200" if device == "cuda" else "some CPU"},
    )


def estimate(records: list[Record], teraflops: float, trial: TrialSpec = TRIAL, group: Any = CORES) -> Estimate | str:
    return Durations(Earlier(records), {trial.id: work(teraflops)}, 60).estimate(trial, group, spread=False)


MEASURED = [record(TRIAL, 1, 2.0, 18.0), record(TRIAL.model_copy(update={"depth": 62}), 3, 4.0, 30.0)]


@pytest.mark.parametrize(
    ("teraflops", "step_s", "beside_s"),
    [(1, 2, 10), (3, 4, 14), (2, 3, 12), (1.5, 2.5, 11), (0.5, 1, 10), (6, 8, 14)],
    ids=["the first", "the last", "in the middle", "between", "below in proportion", "above in proportion"],
)
def test_from_records_a_time_goes_by_operations(teraflops: float, step_s: float, beside_s: float) -> None:
    assert estimate(MEASURED, teraflops) == Estimate(step_s, beside_s, "records")


def test_a_trial_takes_its_steps_and_what_is_beside_them() -> None:
    assert TRIAL.steps == 4
    assert Estimate(2.0, 10.0, "records").trial_s(TRIAL) == 18.0


def test_of_repeats_the_median_counts() -> None:
    repeats = [record(TRIAL.model_copy(update={"seed": n}), 1, step_s, 20.0) for n, step_s in enumerate((1.0, 1.5, 4))]
    assert estimate(repeats, 1) == Estimate(1.5, 14.0, "records")


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "resnet"},
        {"activations": "stored"},
        {"compute": "bf16"},
        {"reconstruction": "exact"},
        {"compile": True},
        {"cuda_graph": True},
        {"zero_stage": 1},
        {"workers": 2},
        {"audit_batch_size": 0},
        {"resources": TrialResources(cpus_per_worker=2)},
    ],
)
def test_what_is_not_alike_tells_nothing(changes: dict[str, Any]) -> None:
    found = estimate(MEASURED, 1, TRIAL.model_copy(update=changes))
    assert isinstance(found, str)
    assert "no earlier record of such a trial on a CPU" in found


def test_records_without_a_result_or_of_another_version_tell_nothing() -> None:
    of_another = record(TRIAL, 1, 2.0, 18.0).model_copy(update={"spec": {"modell": "revnet"}})
    for one in (record(TRIAL, 1, 2.0, 18.0, status="timeout"), of_another):
        assert isinstance(estimate([one], 1), str)


def test_a_cpu_s_times_are_none_of_a_gpu() -> None:
    assert estimate(MEASURED, 1, group=GPUS) != estimate(MEASURED, 1)
    assert estimate([record(TRIAL, 1, 0.5, 5.0, device="cuda")], 1, group=GPUS) == Estimate(0.5, 3.0, "records")
    assert isinstance(estimate([record(TRIAL, 1, 0.5, 5.0, device="cuda")], 1), str)


def test_a_roofline_is_the_most_of_its_parts() -> None:
    gpu = gpu_of(GPUS)
    assert gpu is not None

    def least(trial: TrialSpec = TRIAL, *, spread: bool = False, **others: int) -> float:
        found = roofline_s(trial, work(1.0, **others), gpu, spread=spread)
        assert found is not None
        return found

    assert least(other_bytes=0, trained_bytes=0) == pytest.approx(1 / 66.9)
    in_bf16 = TRIAL.model_copy(update={"compute": "bf16"})
    assert least(in_bf16, other_bytes=0, trained_bytes=0) == pytest.approx(1 / 989.4)
    assert least(product_bytes=4800 * 10**9, other_bytes=0, trained_bytes=0) == pytest.approx(1.0)
    assert least(other_bytes=4800 * 10**9, trained_bytes=0) == pytest.approx(1.0 + 1 / 66.9)
    assert least(kernels=10**6) == pytest.approx(10**6 * LAUNCH_S)
    # Two ranks send each gradient, and its sum, once.
    two = TRIAL.model_copy(update={"workers": 2})
    gradients_bytes = 45 * 10**9
    alone_s = least(trained_bytes=gradients_bytes)
    assert least(two, trained_bytes=gradients_bytes) - alone_s == pytest.approx(0.1)
    assert least(two, trained_bytes=gradients_bytes, spread=True) - alone_s == pytest.approx(
        gradients_bytes / NIC_BYTES_PER_S
    )


@pytest.mark.parametrize(
    ("changes", "group", "says"),
    [
        ({}, UNKNOWN_GPUS, "on a RTX, whose peaks are not known. Give one with --from"),
        ({"resources": TrialResources(gpus_per_worker=0)}, GPUS, "on a CPU, of which no roofline is known"),
        ({"activations": "offloaded"}, GPUS, "no roofline of what goes over the bus"),
        ({"compile": True}, GPUS, "no roofline of a compiled or replayed step"),
        ({"cuda_graph": True}, GPUS, "no roofline of a compiled or replayed step"),
        ({"compute": "bf16"}, parse_cluster("1x1xV100-SXM2-16GB")[0], "Tesla V100-SXM2-16GB has no bf16"),
    ],
)
def test_where_nothing_is_known_that_is_said(changes: dict[str, Any], group: Any, says: str) -> None:
    found = estimate([], 1, TRIAL.model_copy(update=changes), group)
    assert isinstance(found, str)
    assert says in found


class TwoProducts(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * 8 * 8, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(1))


def test_work_is_what_can_be_counted_by_hand() -> None:
    trial = TrialSpec.from_json(
        '{"model": "tests.harness.cluster.test_durations:TwoProducts", "depth": null, "activations": "stored", '
        '"batch_size": 4, "data": {"name": "synthetic", "image_size": 8}}'
    )
    found = step_work(trial)
    inputs, weights, outputs = 4 * 192, 192 * 10, 4 * 10
    # The forward, and the gradient of the weights: the images need none.
    assert found.product_flops == 2 * 2 * 4 * 192 * 10
    assert found.product_bytes == 4 * 2 * (inputs + weights + outputs)
    assert found.trained_bytes == 4 * weights
    # The product and the loss, which is two operations; ones to begin with; and their three backwards.
    assert found.kernels == 7


@pytest.mark.parametrize("activations", ["stored", "checkpointed", "reconstructed"])
def test_the_work_of_many_is_that_of_each(activations: Any) -> None:
    trials = [
        TrialSpec(model="revnet", depth=depth, channels=(8, 8, 8), batch_size=size, activations=activations)
        for depth in (26, 38, 50)
        for size in (2, 4, 8, 16)
    ]
    found = works_of(trials, processes=1)
    for trial in (trials[0], trials[5], trials[-1]):
        assert found[trial.id] == step_work(trial)
        flops, missing = count_flops(trial)
        assert not missing
        assert sum(flops.values()) == step_work(trial).product_flops


def test_of_a_model_that_cannot_be_counted_the_reason_is_kept() -> None:
    trial = TrialSpec(model="faulty_models:nowhere", depth=None, activations="stored")
    [reason] = works_of([trial], processes=1).values()
    assert isinstance(reason, str)
    assert re.search("cannot import the model", reason)

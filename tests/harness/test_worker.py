"""One trial as its own process: the record it leaves, alone, with several ranks, and when it goes wrong."""

import json
import os
import select
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from harness import ranks
from harness.record import Record, Status
from harness.store import RunStore
from harness.supervise import supervise
from harness.trials import TrialResources, TrialSpec
from harness.worker import run_trial
from tests.harness.conftest import Trial, environment

METRICS_OF_A_REVERSIBLE_TRIAL = {
    "activation_peak_bytes",
    "activation_saved_bytes",
    "step_median_s",
    "step_q1_s",
    "step_q3_s",
    "step_median_low_s",
    "step_median_high_s",
    "step_median_rank_spread_s",
    "samples_per_s",
    "flops_forward",
    "flops_backward",
    "flops_recompute",
    "loss_last",
    "parameter_count",
    "parameter_bytes",
    "blocks",
    "reversible_blocks",
    "drift_max_rel",
    "drift_max_abs",
    "drift_max_ulp",
    "gradient_rel",
    "gradient_angle_deg",
    "gradient_reference_angle_deg",
    "stored_reference_angle_deg",
}


def run_worker(spec: TrialSpec, tmp_path: Path, prelude: str = "") -> Record:
    path = tmp_path / "spec.json"
    path.write_text(spec.canonical_json())
    program = f"{prelude}\nimport runpy, sys\nsys.argv = ['worker', {str(path)!r}, {str(tmp_path / 'out')!r}]\n"
    program += "runpy.run_module('harness.worker', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, timeout=200
    )
    assert spec.id in RunStore(tmp_path / "out").finished_ids(), done.stderr
    return RunStore(tmp_path / "out").read_record(spec.id)


def test_a_trial_runs_without_ray_pandas_and_plotly(spec: TrialSpec, tmp_path: Path) -> None:
    blocked = ("ray", "pandas", "plotly", "pyarrow", "typer", "ruamel", "jinja2")
    spec = spec.model_copy(update={"measured_steps": 3})
    record = run_worker(spec, tmp_path, f"import sys\nfor name in {blocked}: sys.modules[name] = None")
    assert record.status == "ok", record.reason
    assert record.metrics.keys() >= METRICS_OF_A_REVERSIBLE_TRIAL
    assert record.spec == spec.model_dump(mode="json")
    assert record.versions["torch"] == torch.__version__
    assert not record.metrics.keys() & record.unmeasured.keys()
    assert record.machine.keys() >= {"device_name", "load_average", "environment"}
    if record.machine["device"] == "cpu":
        assert record.unmeasured["mfu"] == f"n/a: the peak of {record.machine['cpu']} at fp32 is not known"
    rows = RunStore(tmp_path / "out").read_trace_rows(spec.id)
    assert [row.index for row in rows if row.table == "step" and row.name == "step_s"] == [0, 1, 2]
    assert (
        len([row for row in rows if row.table == "drift" and row.name == "rel"]) == record.metrics["reversible_blocks"]
    )


# Depth 26, on the exact grid.
BETWEEN = [{"activations": "budgeted", "budget_bytes": 600_000}, {"activations": "offloaded"}]


@pytest.fixture
def exact(spec: TrialSpec) -> TrialSpec:
    return spec.model_copy(update={"depth": 26, "reconstruction": "exact"})


@pytest.mark.parametrize("update", [{"activations": "reconstructed"}, *BETWEEN], ids=str)
def test_the_same_seed_trains_the_same_whatever_becomes_of_the_activations(
    trial: Trial, exact: TrialSpec, update: dict[str, Any]
) -> None:
    losses = [trial(exact, **of).record.metrics["loss_last"] for of in ({"activations": "stored"}, update)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("update", BETWEEN, ids=str)
def test_activations_between_stored_and_reconstructed(trial: Trial, exact: TrialSpec, update: dict[str, Any]) -> None:
    stored_bytes, reconstructed_bytes, saved_bytes = (
        trial(exact, **of).record.metrics["activation_saved_bytes"]
        for of in ({"activations": "stored"}, {"activations": "reconstructed"}, update)
    )
    if "budget_bytes" in update:
        assert reconstructed_bytes < saved_bytes <= reconstructed_bytes + update["budget_bytes"]
    else:
        assert saved_bytes == stored_bytes  # on the CPU the host is where they are


def test_a_model_that_needs_contents_has_no_count_and_trains_all_the_same(trial: Trial, spec: TrialSpec) -> None:
    record = trial(spec, model="faulty_models:reads", depth=None, activations="stored").record
    assert record.status == "ok", record.reason
    assert "flops_forward" not in record.metrics
    assert record.unmeasured["flops_forward"].startswith("the model does not run on tensors without contents")


@pytest.mark.parametrize(
    ("of_user", "memory_bytes", "policy", "trim"),
    [
        (None, None, "PASSIVE", "4000000000"),
        (None, 2**33, "PASSIVE", "131072"),
        ("ACTIVE", None, "ACTIVE", "4000000000"),
    ],
    ids=["as it comes", "with a memory limit", "as the user says"],
)
def test_waiting_threads_sleep_and_memory_is_kept_unless_limited(
    spec: TrialSpec,
    monkeypatch: pytest.MonkeyPatch,
    of_user: str | None,
    memory_bytes: int | None,
    policy: str,
    trim: str,
) -> None:
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    for name in ("OMP_WAIT_POLICY", "MALLOC_TRIM_THRESHOLD_"):
        monkeypatch.delenv(name, raising=False)
    if of_user:
        monkeypatch.setenv("OMP_WAIT_POLICY", of_user)
    raising = spec.model_copy(
        update={
            "model": "faulty_models:raises",
            "depth": None,
            "activations": "stored",
            "resources": TrialResources(memory_bytes=memory_bytes),
        }
    )
    settings = supervise(raising, timeout_s=120).record.machine["environment"]
    assert settings["OMP_WAIT_POLICY"] == policy
    assert settings.get("MALLOC_TRIM_THRESHOLD_") == trim


def test_a_record_is_written_without_the_limit_that_the_trial_ran_out_of(
    spec: TrialSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    from harness import training

    limits: list[int | None] = []

    def run_out(spec: TrialSpec, *rest: object) -> None:
        training.limit_memory(torch.device("cpu"), spec.resources.memory_bytes)
        raise MemoryError

    monkeypatch.setattr(training, "limit_memory", lambda device, memory_bytes: limits.append(memory_bytes))
    monkeypatch.setattr(training, "train", run_out)
    limited = spec.model_copy(update={"resources": TrialResources(memory_bytes=2**20)})
    assert run_trial(limited).record.status == "oom"
    assert limits == [2**20, None]


@pytest.mark.parametrize("error", [None, MemoryError()], ids=["ends well", "fails"])
def test_a_rank_that_fails_keeps_its_place_so_that_its_record_is_the_first(
    spec: TrialSpec, monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    """The others fail for want of a rank that has left, and their records would say so."""
    from harness import training

    left: list[None] = []

    def end(*_: object) -> None:
        if error:
            raise error

    monkeypatch.setattr(training, "join_ranks", lambda *_: None)
    monkeypatch.setattr(training, "leave_ranks", lambda: left.append(None))
    monkeypatch.setattr(training, "_train_under_engine", end)
    run = run_trial(spec.model_copy(update={"audit_batch_size": 0}))
    assert run.record.status == ("oom" if error else "ok")
    assert left == ([] if error else [None])


@pytest.mark.parametrize(
    ("statuses", "reason"),
    [
        (("failed", "diverged"), "rank 1: planted"),
        (("failed", "ok"), "rank 0: planted"),
        (("failed",), "rank 0: planted"),
    ],
    ids=str,
)
def test_a_rank_with_a_result_explains_those_that_failed_before_it_ended(
    record: Record, spec: TrialSpec, monkeypatch: pytest.MonkeyPatch, statuses: Sequence[Status], reason: str
) -> None:
    """Rank 0 has ended; rank 1, which may have left its record, never does."""

    def start(rank: int, spec: TrialSpec, spec_path: Path, scratch: Path) -> "subprocess.Popen[bytes]":
        for status in statuses[rank : rank + 1]:
            changes = {"id": spec.id, "spec": spec.model_dump(mode="json"), "status": status, "reason": "planted"}
            left = record.model_copy(update=changes)
            RunStore(scratch / f"rank{rank}").write_trial(left, [])
        return subprocess.Popen(["sleep", "infinity"] if rank else ["false"])

    monkeypatch.setattr(ranks, "_start", start)
    assert ranks.run_ranks(spec.model_copy(update={"workers": 2})).record.reason == reason


def test_one_rank_that_fails_ends_the_others(spec: TrialSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    update = {"model": "faulty_models:killed", "depth": None, "activations": "stored", "workers": 2}
    done = supervise(spec.model_copy(update=update), timeout_s=120)
    assert done.record.status == "crashed"
    assert done.record.reason is not None
    assert "was ended by SIGKILL" in done.record.reason


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not JSON"), ('{"model": "revnet", "depht": 3}', "depht"), (None, "cannot be read")],
)
def test_bad_input_is_named_and_writes_nothing(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "spec.json"
    if text is not None:
        path.write_text(text)
    command = [sys.executable, "-m", "harness.worker", str(path), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "spec.json" in done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_worker_ends_with_its_supervisor(spec: TrialSpec, tmp_path: Path) -> None:
    """The supervisor is killed by SIGKILL, so that it can tidy nothing up itself."""
    hanging = spec.model_copy(update={"model": "faulty_models:hangs", "depth": None, "activations": "stored"})
    (tmp_path / "spec.json").write_text(hanging.canonical_json())
    arguments = ["-m", "harness.worker", str(tmp_path / "spec.json"), str(tmp_path / "out")]
    program = (
        "import os, subprocess, sys\n"
        "environment = os.environ | {'REVNET_PARENT_PID': str(os.getpid())}\n"
        f"worker = subprocess.Popen([sys.executable, *{arguments}], env=environment, stderr=subprocess.DEVNULL)\n"
        "print(worker.pid, flush=True)\n"
        "worker.wait()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], env=environment(), stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        worker_pid = int(json.loads(parent.stdout.readline()))
        alive = os.pidfd_open(worker_pid)
        parent.kill()
    assert select.select([alive], [], [], 60)[0], "the worker outlived its supervisor"
    os.close(alive)

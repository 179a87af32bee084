"""Whole sweeps through the command, under a real Ray: what runs, what is kept, and what becomes of faults."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.exports import EXPORTS
from harness.record import Record
from harness.store import RunStore
from tests.harness.conftest import Command, environment, eventually

FAULTS = """\
name: faults
question: What becomes of trials that go wrong?
grid:
  model:
    - faulty_models:fine
    - faulty_models:raises
    - faulty_models:killed
    - faulty_models:hangs
    - faulty_models:hungry
    - faulty_models:diverges
when:
  - if: {model: "faulty_models:fine"}
    grid: {compute: [fp32, fp16, bf16]}
fixed: {activations: stored, measured_steps: 1, warmup_steps: 0, batch_size: 4, depth: null}
resources: {timeout_s: 45, memory: 1GiB, max_attempts: 2}
"""

SWEEP = """\
name: sweep
question: Does it go on where it stopped?
model: revnet
grid: {batch_size: [2, 4], activations: [stored, checkpointed, reconstructed]}
fixed: {depth: 14, measured_steps: 2, warmup_steps: 0, audit_batch_size: 2}
"""
TRIALS = 6
SLOTS = len(os.sched_getaffinity(0))


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunStore, "subprocess.CompletedProcess[str]"]:
    folder = tmp_path_factory.mktemp("faults")
    (folder / "faults.yaml").write_text(FAULTS)
    command = [sys.executable, "-m", "harness.cli", "run", "faults.yaml", "--out", "run"]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=280)
    return RunStore(folder / "run"), done


def by_model(store: RunStore, compute: str = "fp32") -> dict[str, Record]:
    records = [record for record in store.read_records() if record.spec["compute"] == compute]
    return {record.spec["model"].split(":")[1]: record for record in records}


@pytest.mark.parametrize(
    ("model", "status", "reason"),
    [
        ("fine", "ok", None),
        ("raises", "failed", "ValueError: planted"),
        ("killed", "crashed", "the process was ended by SIGKILL"),
        ("hangs", "timeout", "still running after 45 s"),
        ("hungry", "oom", "over the limit of 1024 MiB"),
        ("diverges", "diverged", "the loss of measured step 0 is nan"),
    ],
)
def test_each_fault_is_a_record_with_a_reason_and_a_log(
    faults: tuple[RunStore, object], model: str, status: str, reason: str | None
) -> None:
    store, _ = faults
    record = by_model(store)[model]
    assert record.status == status
    assert (record.reason or "").startswith(reason or "")
    assert (record.reason is None) == (reason is None)
    # What was ended from outside is tried again, up to max_attempts times.
    assert [attempt.status for attempt in record.attempts] == [status] * (2 if model == "killed" else 1)
    assert store.read_log(record.id) is not None
    assert ("activation_peak_bytes" in record.metrics) == (status == "ok")


def test_what_hung_has_its_stack_in_the_log(faults: tuple[RunStore, object]) -> None:
    store, _ = faults
    log = store.read_log(by_model(store)["hangs"].id)
    assert log is not None
    assert "faulty_models.py" in log
    assert "in hangs" in log or "in <lambda>" in log


def test_what_the_device_does_not_have_is_unsupported_and_not_a_failure(faults: tuple[RunStore, object]) -> None:
    import torch

    if torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_fp16_supported():
        pytest.skip("this device supports fp16")
    record = by_model(faults[0], "fp16")["fine"]
    assert record.status == "unsupported"
    assert record.reason is not None
    assert "DeepSpeed does not support it on this device" in record.reason


def test_the_command_says_what_failed_and_exits_with_1(
    faults: tuple[RunStore, "subprocess.CompletedProcess[str]"],
) -> None:
    store, done = faults
    assert done.returncode == 1, done.stderr
    assert "8 of 8 trials done" in done.stdout
    assert "3 came to no result" in done.stdout
    assert done.stdout.splitlines()[-1] == "report: run/report.html"
    html = store.fs.cat_file(store.root + "/report.html").decode()
    for record in store.read_records():
        assert record.id in html
        assert record.status in html


def test_asking_for_one_again_keeps_its_first_attempt_and_exports_its_memory(
    faults: tuple[RunStore, object], tmp_path_factory: pytest.TempPathFactory
) -> None:
    store, _ = faults
    fine, folder = by_model(store)["fine"], Path(store.root).parent
    assert not (folder / "run" / "exports").exists()
    options = ["--out", "run", "--only", fine.id, "--snapshot", "--perfetto"]
    command = [sys.executable, "-m", "harness.cli", "run", "faults.yaml", *options]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=200)
    assert "1 run now" in done.stdout, done.stderr
    assert [attempt.status for attempt in store.read_record(fine.id).attempts] == ["ok", "ok"]
    for name, ending in EXPORTS.items():
        assert f"{name}: run/exports/{fine.id}.{ending}" in done.stdout
    files = sorted(path.name for path in (folder / "run" / "exports").iterdir())
    assert files == sorted(f"{fine.id}.{ending}" for ending in EXPORTS.values())


def finished_lines(process: "subprocess.Popen[str]") -> Iterator[str]:
    """The lines that a sweep prints for finished trials, as they come."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.split("/")[0].isdigit():
            yield line


def contents(store: RunStore) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(store.root, "trials").iterdir()}


def test_a_sweep_that_is_stopped_goes_on_where_it_stopped(revnet: Command, tmp_path: Path) -> None:
    """Killed in its first trials, asked to end in those that were left, and then let run to its end."""
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    command = [sys.executable, "-m", "harness.cli", "run", "sweep.yaml", "--out", "run"]
    store = RunStore(tmp_path / "run")
    kept: dict[str, bytes] = {}
    for how in (signal.SIGKILL, signal.SIGTERM):
        stopped = subprocess.Popen(command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, text=True)
        next(finished_lines(stopped))
        # Until the next has begun too: one that is about to end may leave its record yet, and nothing would be lost.
        assert eventually(lambda: len(store.claim_numbers()) >= min(2, SLOTS))
        stopped.send_signal(how)
        rest, _ = stopped.communicate(timeout=60)
        now = contents(store)
        assert {name: now[name] for name in kept} == kept
        assert len(kept) < len(now) < TRIALS
        kept = now
        if how == signal.SIGTERM:
            assert stopped.returncode == 4
            assert "Go on with: revnet run sweep.yaml --out run" in rest
            assert (tmp_path / "run" / "report.html").exists()

    resumed = revnet("run", "sweep.yaml", "--out", "run")
    assert resumed.returncode == 0, resumed.stderr
    assert f"{TRIALS - len(kept)} trials to run, {len(kept)} kept" in resumed.stdout
    assert f"{TRIALS - len(kept)} run now; {TRIALS} of {TRIALS} trials done: ok {TRIALS}" in resumed.stdout
    now = contents(store)
    assert {name: now[name] for name in kept} == kept
    attempts = [json.loads(data)["attempts"] for data in now.values()]
    assert [[one["status"] for one in each if not one["lost"]] for each in attempts] == [["ok"]] * TRIALS
    # Those that ran when the first driver was killed; of one that was given back no attempt is left.
    lost = [one for each in attempts for one in each if one["lost"]]
    assert 0 < len(lost) <= SLOTS
    assert all("supervising process was lost" in one["reason"] for one in lost)

    again = revnet("run", "sweep.yaml", "--out", "run")
    assert again.returncode == 0
    assert f"0 run now; {TRIALS} of {TRIALS} trials done" in again.stdout
    assert contents(store) == now


SEARCH = """\
name: search
question: How large a batch fits?
model: revnet
grid: {batch_size: [1, 2], activations: [stored, reconstructed]}
fixed: {depth: 14, channels: [8, 8, 8], seed: 3}
resources: {gpus_per_worker: 0, memory: 192MiB}
"""


def confirmed_rows(stdout: str) -> list[list[str]]:
    return [words for line in stdout.splitlines() if "confirmed" in (words := line.split())]


def test_the_largest_batch_that_fits_is_found_and_confirmed_under_the_limit(revnet: Command, tmp_path: Path) -> None:
    (tmp_path / "search.yaml").write_text(SEARCH)
    command = ["run", "search.yaml", "--find", "batch_size"]
    first = revnet(*command)
    assert first.returncode == 0, first.stdout + first.stderr
    store = RunStore(tmp_path / "runs" / "search-find-batch_size")
    ok = {record.spec["activations"]: record for record in store.read_records() if record.status == "ok"}
    assert ok["reconstructed"].spec["batch_size"] > ok["stored"].spec["batch_size"] > 2
    found = [[name, str(ok[name].spec["batch_size"])] for name in ("stored", "reconstructed")]
    assert [row[:2] for row in confirmed_rows(first.stdout)] == found
    for record in ok.values():
        assert record.spec["resources"]["memory_bytes"] == 192 * 2**20
        assert (record.spec["seed"], record.spec["measured_steps"], record.spec["audit_batch_size"]) == (3, 1, 0)
        assert record.metrics["allocated_peak_bytes"] <= 192 * 2**20

    kept = contents(store)
    second = revnet(*command)
    assert second.returncode == 0
    assert "trials to run" not in second.stdout
    assert confirmed_rows(second.stdout) == confirmed_rows(first.stdout)
    assert contents(store) == kept
    ordinary = revnet("run", str(Path(store.root, "study.yaml")), "--out", store.root)
    assert f"0 run now; {len(kept)} of {len(kept)} trials done" in ordinary.stdout, ordinary.stderr

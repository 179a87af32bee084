"""A sweep over a real cluster of hosts, while hosts, processes and drivers are lost: every trial ends with one record.

REVNET_SWEEP_TRIALS says how many trials; 18 if not set, enough for each fault to hit one.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from harness.record import Record
from harness.store import RunStore
from tests.harness.hosts import Process, needs_hosts
from tests.harness.ray_hosts import Hosts, RayHost, ray_hosts

pytestmark = [needs_hosts, pytest.mark.timeout(1500)]
WORKERS = ["w1", "w2", "w3"]
# Those that tests have taken away for good.
GONE: list[str] = []
TRIALS = int(os.environ.get("REVNET_SWEEP_TRIALS", "18"))
STEP_S = 600.0
STUDY = """\
name: faults
question: What becomes of trials whose hosts and drivers go away?
zip:
  - model: ["faulty_models:hangs_on_rank_1", "faulty_models:fine"{singles}]
    workers: [2, 2{ones}]
    batch_size: [16, 8{fours}]
    seed: [0, 0{seeds}]
fixed:
  depth: null
  activations: stored
  warmup_steps: 0
  measured_steps: 1
  audit_batch_size: 0
resources: {{timeout_s: 40, max_attempts: 4}}
"""


def study() -> str:
    """Two trials of two ranks each, which come first since they are larger, and the others."""
    count = TRIALS - 2
    return STUDY.format(
        singles=', "faulty_models:fine"' * count,
        ones=", 1" * count,
        fours=", 4" * count,
        seeds="".join(f", {seed}" for seed in range(count)),
    )


def await_that(condition: Callable[[], object], process: Process | None = None) -> None:
    deadline = time.monotonic() + STEP_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come to it"
        assert process is None or process.poll() is None, "the driver ended"
        time.sleep(0.05)


def workers_on(hosts: Hosts, *names: str) -> list[psutil.Process]:
    """Processes of trials on these hosts."""
    found = []
    for process in (process for name in names for process in hosts[name].processes()):
        with contextlib.suppress(psutil.Error):
            if "harness.worker" in process.cmdline():
                found.append(process)
    return found


def single_workers_on(hosts: Hosts, *names: str) -> list[psutil.Process]:
    """Those of trials of one rank."""
    found = []
    for process in workers_on(hosts, *names):
        with contextlib.suppress(psutil.Error):
            if "RANK" not in process.environ():
                found.append(process)
    return found


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with ray_hosts(workers=3, cpus=1) as hosts:
        for name in hosts.names:
            # So that a lost attempt is seen in 8 s.
            hosts[name].environment["REVNET_BEAT_S"] = "2"
        yield hosts


def test_the_doctor_looks_at_each_namespaced_host(hosts: Hosts, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "harness.cli", "doctor", "--address", hosts.address, "--storage"]

    def ask(storage: str) -> tuple[int, str]:
        process = hosts["head"].run([*command, storage], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        return process.wait(STEP_S), process.communicate()[0]

    code, printed = ask(str(tmp_path))
    assert code == 0, printed
    for name in hosts.names:
        assert f"ok    {name}: the versions of this machine; no GPU; 1 CPU for Ray" in printed
        assert f"ok    {name}: {tmp_path} can be written and read" in printed
    assert "ok    one trial with its ranks on " in printed
    assert list(tmp_path.iterdir()) == []
    # Each host has a folder of its own there.
    code, printed = ask("/tmp/ray/runs")
    assert code == 1
    assert "w1, w2, w3: /tmp/ray/runs is another place there than here" in printed


DETACHED = """\
name: detached
question: Does it go on by itself?
grid: {seed: [0, 1, 2, 3]}
model: "faulty_models:fine"
fixed: {depth: null, activations: stored, batch_size: 4, warmup_steps: 0, measured_steps: 1, audit_batch_size: 0}
"""


def drivers_of(hosts: Hosts) -> list[psutil.Process]:
    """Processes of drivers that live in the cluster."""
    found = []
    for process in (process for name in hosts.names for process in hosts[name].processes()):
        with contextlib.suppress(psutil.Error):
            if process.cmdline()[:1] and "_DriverInCluster" in process.cmdline()[0]:
                found.append(process)
    return found


def test_a_detached_driver_in_namespaced_hosts_goes_on_when_it_is_killed(hosts: Hosts, tmp_path: Path) -> None:
    (tmp_path / "detached.yaml").write_text(DETACHED)
    store = RunStore(tmp_path / "run")
    command = [sys.executable, "-m", "harness.cli", "run", "detached.yaml", "--out", "run", "--address", hosts.address]

    def revnet_run() -> tuple[int, str]:
        process = hosts["head"].run(
            [*command, "--detach"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        return process.wait(STEP_S), process.communicate()[0]

    code, printed = revnet_run()
    assert (code, "4 trials left to the driver" in printed) == (0, True), printed
    code, printed = revnet_run()
    assert (code, "a driver in this cluster has this run already" in printed) == (2, True), printed
    await_that(store.finished_ids)
    [driver] = drivers_of(hosts)
    driver.kill()
    await_that(lambda: len(store.finished_ids()) == 4)
    assert [record.status for record in store.read_records()] == ["ok"] * 4
    await_that(lambda: not drivers_of(hosts))
    code, printed = revnet_run()
    assert (code, "0 run now; 4 of 4 trials done: ok 4" in printed) == (0, True), printed


OUTSIDE = """\
name: outside
question: Does it run from outside?
grid: {workers: [1, 2]}
model: "faulty_models:fine"
fixed: {depth: null, activations: stored, batch_size: 4, warmup_steps: 0, measured_steps: 1, audit_batch_size: 0}
"""


def test_a_sweep_of_namespaced_hosts_from_outside_through_the_ray_client(hosts: Hosts, tmp_path: Path) -> None:
    (tmp_path / "outside.yaml").write_text(OUTSIDE)
    command = [sys.executable, "-m", "harness.cli", "run", "outside.yaml", "--address", hosts.client_address, "--out"]

    def revnet_run(out: str, **environment: str) -> tuple[int, str]:
        process = hosts["w1"].run(
            [*command, out], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        printed, _ = process.communicate(timeout=STEP_S)
        return process.returncode, printed

    code, printed = revnet_run("run", RAY_AUTH_TOKEN="another")
    assert (code, "this Ray cluster wants its token" in printed) == (2, True), printed
    # Each host has a folder of its own there.
    code, printed = revnet_run("/tmp/ray/run")
    assert (code, "head: another place there than here; w2: another" in printed) == (2, True), printed
    assert "w1: another" not in printed
    code, printed = revnet_run("run")
    assert (code, "2 run now; 2 of 2 trials done: ok 2" in printed) == (0, True), printed
    assert "report: run/report.html" in printed
    records = RunStore(tmp_path / "run").read_records()
    assert sorted(len(record.attempts[-1].node.split(", ")) for record in records) == [1, 2]
    assert not list((tmp_path / "run").glob("revnet-check-*"))


def test_namespaced_hosts_drivers_and_processes_are_lost_and_no_trial_is(hosts: Hosts, tmp_path: Path) -> None:
    (tmp_path / "faults.yaml").write_text(study())
    store = RunStore(tmp_path / "run")
    command = [sys.executable, "-m", "harness.cli", "run", "faults.yaml", "--out", "run", "--address", hosts.address]

    def drive() -> Process:
        with (tmp_path / "driver.log").open("a") as log:
            return hosts["head"].run(command, cwd=tmp_path, stdout=log, stderr=subprocess.STDOUT)

    def some_more() -> Callable[[], bool]:
        enough = len(store.finished_ids()) + max(1, TRIALS // 10)
        return lambda: len(store.finished_ids()) >= enough

    def take_away_one_at_work() -> RayHost:
        """Whichever has a trial of one rank; while the rank hangs, its trial has two of them."""
        at_work: list[str] = []

        def find() -> list[str]:
            at_work[:] = [name for name in WORKERS if name not in GONE and single_workers_on(hosts, name)]
            return at_work

        await_that(find, driver)
        GONE.append(at_work[0])
        return hosts[at_work[0]]

    driver = drive()
    await_that(some_more(), driver)
    # One trial's process is killed, by nobody knows whom.
    await_that(lambda: single_workers_on(hosts, *hosts.names), driver)
    single_workers_on(hosts, *hosts.names)[0].send_signal(signal.SIGKILL)
    # A host is cut off in the middle of a trial.
    take_away_one_at_work().cut()
    await_that(some_more(), driver)
    driver.kill()
    driver.wait()
    driver = drive()
    await_that(some_more(), driver)
    # A raylet dies, and the trial that it has with it.
    take_away_one_at_work().kill_raylet()
    await_that(some_more(), driver)
    driver.kill()
    driver.wait()
    driver = drive()
    assert driver.wait(STEP_S) == 1, (tmp_path / "driver.log").read_text()

    records = store.read_records()
    log = (tmp_path / "driver.log").read_text()
    assert len(records) == TRIALS, log
    assert f"{TRIALS} of {TRIALS} trials done" in log
    assert store.claim_numbers() == {}
    by_model = {record.spec["model"]: record for record in records if record.spec["workers"] == 2}
    slept = by_model["faulty_models:hangs_on_rank_1"]
    assert slept.status == "timeout", slept.reason
    stacks = store.read_log(slept.id) or ""
    of_rank_0, of_rank_1 = stacks.split("--- rank 1 on ")
    assert "in hang" in of_rank_1
    assert "most recent call first" in of_rank_0
    assert "torch/distributed" in of_rank_0
    others = [record for record in records if record is not slept]
    assert [(record.status, record.reason) for record in others] == [("ok", None)] * (TRIALS - 1)
    assert all(spread_over_two(record) for record in by_model.values())
    for record in others:
        ended = [attempt for attempt in record.attempts if not attempt.lost]
        assert [attempt.status for attempt in ended] == ["ok"]
    singles = [record for record in others if record.spec["workers"] == 1]
    # None is another's: the same bytes in all, and each seed's own loss.
    assert len({record.metrics["activation_saved_bytes"] for record in singles}) == 1
    assert len({record.metrics["loss_last"] for record in singles}) == len(singles)
    lost = [attempt for record in records for attempt in record.attempts if attempt.lost]
    assert any("SIGKILL" in (attempt.reason or "") for attempt in lost), lost
    assert any("was lost" in (attempt.reason or "") for attempt in lost), lost


def spread_over_two(record: Record) -> bool:
    return len(set(record.attempts[-1].node.split(", "))) == 2


SPREAD = """\
name: spread
question: What becomes of ranks that have no node any more?
model: "faulty_models:fine"
fixed: {depth: null, workers: 2, activations: stored, batch_size: 4, measured_steps: 1, audit_batch_size: 0}
"""


def test_ranks_that_fit_no_namespaced_hosts_any_more_wait_until_one_comes_back(hosts: Hosts, tmp_path: Path) -> None:
    """The last of this file, which takes all hosts away but two; the trial takes both."""
    *others, last = [name for name in WORKERS if name not in GONE]
    for name in others:
        hosts[name].kill_raylet()
    (tmp_path / "spread.yaml").write_text(SPREAD)
    log = tmp_path / "driver.log"
    command = [sys.executable, "-m", "harness.cli", "run", "spread.yaml", "--out", "run", "--address", hosts.address]
    hosts.await_alive(["head", last], STEP_S)
    with log.open("w") as file:
        driver = hosts["head"].run(command, cwd=tmp_path, stdout=file, stderr=subprocess.STDOUT)
    await_that(lambda: workers_on(hosts, last), driver)
    hosts[last].kill_raylet()
    await_that(lambda: "waiting for nodes: trial " in log.read_text(), driver)
    assert "each of its 2 ranks; the nodes have: 1 CPU, 0 GPU" in log.read_text()
    hosts.start(last)
    assert driver.wait(STEP_S) == 0, log.read_text()
    assert "there are nodes for all trials again" in log.read_text()
    [record] = RunStore(tmp_path / "run").read_records()
    assert (record.status, [attempt.lost for attempt in record.attempts]) == ("ok", [True, False])

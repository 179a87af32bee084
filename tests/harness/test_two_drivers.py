"""Two drivers at once on one run directory, on disk and on a server that speaks S3: each trial is run once."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import boto3
import fsspec
import pytest
from moto.server import ThreadedMotoServer

from harness.claims import Holder
from harness.store import RunStore
from tests.harness.conftest import Command, environment

STUDY = """\
name: shared
question: Does each trial run once?
grid: {seed: [0, 1, 2, 3]}
model: "faulty_models:fine"
fixed: {depth: null, activations: stored, batch_size: 4, warmup_steps: 0, measured_steps: 1, audit_batch_size: 0}
"""
TRIALS = 4
ID = "0123456789ab"


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "of-nobody")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        fsspec.core.url_to_fs("s3://bucket")[0].clear_instance_cache()
        boto3.client("s3").create_bucket(Bucket="bucket")
        yield "s3://bucket"
    server.stop()


@pytest.mark.parametrize("where", ["disk", "s3"])
def test_two_drivers_at_once_run_each_trial_once(where: str, tmp_path: Path, bucket: str, revnet_here: Command) -> None:
    (tmp_path / "shared.yaml").write_text(STUDY)
    out = str(tmp_path / "run") if where == "disk" else f"{bucket}/runs/shared"
    command = [sys.executable, "-m", "harness.cli", "run", "shared.yaml", "--out", out]
    drivers = [
        subprocess.Popen(
            command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for _ in range(2)
    ]
    printed = [driver.communicate(timeout=200)[0] for driver in drivers]
    assert [driver.returncode for driver in drivers] == [0, 0], printed
    assert all(f"{TRIALS} of {TRIALS} trials done: ok {TRIALS}" in output for output in printed), printed
    store = RunStore(out)
    records = store.read_records()
    assert [[attempt.status for attempt in record.attempts] for record in records] == [["ok"]] * TRIALS
    assert store.claim_numbers() == {}
    assert all(store.read_log(record.id) is not None and store.read_trace_rows(record.id) for record in records)
    status = revnet_here("status", out)
    assert status.stdout.splitlines() == [f"shared: {TRIALS} of {TRIALS} trials done", f"ok {TRIALS}"]


def test_a_claim_on_s3_has_one_holder(bucket: str) -> None:
    store, other = RunStore(f"{bucket}/claims"), RunStore(f"{bucket}/claims")
    holder = Holder.take(store, ID, 0)
    assert holder is not None
    assert Holder.take(other, ID, 0) is None
    assert other.claim_numbers() == {ID: [0]}
    holder.release()
    assert other.claim_numbers() == {}
    assert Holder.take(other, ID, 0) is not None

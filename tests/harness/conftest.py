"""What the harness tests share: the `revnet` command as a process, and models that go wrong on purpose."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.record import Record
from harness.trials import TrialSpec

Command = Callable[..., "subprocess.CompletedProcess[str]"]
HERE = Path(__file__).resolve().parent


def environment() -> dict[str, str]:
    """For a process of this checkout, wherever an installed harness lies."""
    path = os.pathsep.join(map(str, (HERE / "models_of_users", HERE.parent.parent)))
    return os.environ | {"PYTHONPATH": path, "COLUMNS": "200"}


@pytest.fixture
def revnet(tmp_path: Path) -> Command:
    """Run `revnet` in an empty directory; returns when it has ended."""

    def call(*arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", "harness.cli", *arguments],
            cwd=tmp_path,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=200,
        )

    return call


@pytest.fixture
def spec() -> TrialSpec:
    """The smallest trial that has everything a trial has."""
    return TrialSpec(model="revnet", depth=14, batch_size=2, warmup_steps=0, measured_steps=2, audit_batch_size=2)


@pytest.fixture
def record(spec: TrialSpec) -> Record:
    metrics = {"activation_peak_bytes": 2**20, "step_median_s": 0.5}
    return Record(id=spec.id, spec=spec.model_dump(mode="json"), status="ok", metrics=metrics)

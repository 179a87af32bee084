"""What the harness tests share: the `revnet` command, trials that several of them look at, and models that go wrong on
purpose."""

import functools
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.cli import main
from harness.record import Record
from harness.supervise import Supervised, supervise
from harness.trials import TrialSpec

Command = Callable[..., "subprocess.CompletedProcess[str]"]
# From a specification and changes of it.
Trial = Callable[..., Supervised]
HERE = Path(__file__).resolve().parent
POLL_S = 0.05


def environment() -> dict[str, str]:
    """For a process of this checkout, wherever an installed harness lies."""
    path = os.pathsep.join(map(str, (HERE / "models_of_users", HERE.parent.parent)))
    return os.environ | {"PYTHONPATH": path, "COLUMNS": "200"}


def eventually(condition: Callable[[], object], within_s: float = 20.0) -> bool:
    """Whether it comes to hold."""
    deadline = time.monotonic() + within_s
    while not (holds := bool(condition())) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    return holds


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
def revnet_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """The same in this process, for what ends before anything is started; five seconds quicker."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: str) -> "subprocess.CompletedProcess[str]":
        monkeypatch.setattr(sys, "argv", ["revnet", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        code = ended.value.code
        assert isinstance(code, int | None)
        return subprocess.CompletedProcess(arguments, code or 0, *capsys.readouterr())

    return call


@pytest.fixture
def spec() -> TrialSpec:
    """The smallest trial that has everything a trial has."""
    return TrialSpec(model="revnet", depth=14, batch_size=2, warmup_steps=0, measured_steps=2, audit_batch_size=2)


@pytest.fixture(scope="session")
def trial() -> Trial:
    """What a trial leaves, each run once however many tests look at it."""

    @functools.cache
    def run(canonical_json: str) -> Supervised:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
            return supervise(TrialSpec.from_json(canonical_json), timeout_s=200)

    def call(spec: TrialSpec, **changes: Any) -> Supervised:
        return run(spec.model_copy(update=changes).canonical_json())

    return call


@pytest.fixture
def record(spec: TrialSpec) -> Record:
    metrics = {"activation_peak_bytes": 2**20, "step_median_s": 0.5}
    return Record(id=spec.id, spec=spec.model_dump(mode="json"), status="ok", metrics=metrics)

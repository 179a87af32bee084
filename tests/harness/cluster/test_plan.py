"""`revnet plan --cluster`: what goes where, how long it takes, where that is from, and what is refused."""

import re
from pathlib import Path

import pytest

from harness.cluster.view import in_time
from harness.expansion import expand
from harness.record import Attempt, Record
from harness.store import RunStore
from harness.study import load_study
from harness.trials import TrialSpec
from tests.harness.conftest import Command

STUDY = """\
name: small
question: What goes where?
model: revnet
grid: {batch_size: [2, 4], activations: [stored, reconstructed], workers: [1, 3, 20]}
fixed: {depth: 14, channels: [8, 8, 8], warmup_steps: 1, measured_steps: 3}
"""
ON_GPUS = "2x2xH200-141GB"


@pytest.fixture
def study(tmp_path: Path) -> Path:
    (tmp_path / "small.yaml").write_text(STUDY)
    return tmp_path / "small.yaml"


def record_of(trial: TrialSpec, step_s: float, wall_s: float) -> Record:
    return Record(
        id=trial.id,
        spec=trial.model_dump(mode="json"),
        status="ok",
        attempts=[Attempt(status="ok", started_at="2026-01-01", wall_s=wall_s, node="here")],
        metrics={"step_median_s": step_s, "flops_forward": 10**6, "flops_backward": 0, "flops_recompute": 0},
        machine={"device": "cuda", "device_name": "NVIDIA H200"},
    )


def test_each_trial_is_packed_or_spread_or_fits_nowhere_and_has_a_time(study: Path, revnet_here: Command) -> None:
    done = revnet_here("plan", "small.yaml", "--cluster", ON_GPUS)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "cluster: 2 nodes of 2 H200 with 131.3 GiB each" in lines
    for strategy in ("stored", "reconstructed"):
        places = [
            line.split(maxsplit=2)[2] for line in lines if re.match(rf"{strategy} +\d+ +(1 GPU|3 ranks|nowh)", line)
        ]
        assert [place[:7] for place in places] == ["1 GPU o", "3 ranks", "nowhere"]
    assert (
        "4 trials fit nowhere, and the sweep would be refused: each needs 1 CPU and 1 GPU for each of its 20"
        in done.stdout
    )
    # All are 60.3 s long, but for milliseconds: always one of three ranks and one of one.
    assert "8 trials take 4 min 1 s and 0.27 GPU-hours; 100% of the 4 GPUs' time is used" in lines
    assert "times of 8 trials by a roofline, the least that a step can take" in done.stdout
    assert "is assumed to take 1 min 0 s (--beside)" in done.stdout


def test_records_tell_the_times_of_what_is_left(study: Path, revnet_here: Command, tmp_path: Path) -> None:
    trials = expand(load_study(str(study)))
    run = RunStore(tmp_path / "earlier")
    for trial in trials:
        if trial.workers < 20:
            run.write_trial(record_of(trial, 1000.0, 10_000.0))
    done = revnet_here("plan", "small.yaml", "--cluster", ON_GPUS, "--from", "earlier", "--beside", "5")
    assert "times of 8 trials from earlier records" in done.stdout, done.stdout + done.stderr
    assert "roofline" not in done.stdout
    # Of the same study what is done is left out, and serves as well.
    RunStore(tmp_path / "runs" / "small").write_trial(record_of(trials[0], 1000.0, 10_000.0))
    some = revnet_here("plan", "small.yaml", "--cluster", ON_GPUS)
    assert "7 trials take" in some.stdout
    assert "times of 1 trials from earlier records" in some.stdout
    assert "times of 6 trials by a roofline" in some.stdout


def test_what_does_not_fit_the_device_ends_early(study: Path, revnet_here: Command) -> None:
    done = revnet_here("plan", "small.yaml", "--cluster", "1x4xH200-0.0001GB+1x4xH200-141GB/64cores")
    assert "8 trials fit some of these devices and not others" in done.stdout
    none = revnet_here("plan", "small.yaml", "--cluster", "2x2xH200-0.0001GB", "--beside", "7")
    assert "12 predicted not to fit" in none.stdout
    assert "8 trials are left out, since their time is not known: no earlier record" in none.stdout


def test_a_trial_without_gpus_takes_no_gpu_hours_and_is_not_held_against_a_gpu(
    tmp_path: Path, revnet_here: Command
) -> None:
    (tmp_path / "small.yaml").write_text(STUDY.replace("[1, 3, 20]", "[1]") + "resources: {gpus_per_worker: 0}\n")
    run = RunStore(tmp_path / "earlier")
    for trial in expand(load_study(str(tmp_path / "small.yaml"))):
        record = record_of(trial, 0.001, 3600.0)
        run.write_trial(record.model_copy(update={"machine": {"device": "cpu", "device_name": "some CPU"}}))
    on = ("--cluster", "1x4xH200-0.0001GB/4cores", "--from", "earlier")
    done = revnet_here("plan", "small.yaml", *on)
    assert "4 trials take 1 h 0 min and 0.00 GPU-hours; 0% of the 4 GPUs' time is used" in done.stdout, done.stdout
    assert "predicted not to fit" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--cluster", "2x2xH200"], "--cluster 2x2xH200: '2x2xH200' is no group of nodes"),
        (["--cluster", ON_GPUS, "--memory", "2GiB"], "--memory 2GiB: --cluster says what it is. Leave it out."),
        (["--cluster", ON_GPUS, "--device", "cpu"], "--device cpu: --cluster says what it is"),
        (["--from", "runs/small"], "--from runs/small: it belongs to --cluster"),
        (["--beside", "5"], "--beside 5.0: it belongs to --cluster"),
        (["--cluster", ON_GPUS, "--from", "nowhere"], "nowhere: no run here"),
    ],
)
def test_what_cannot_be_planned_is_refused(study: Path, revnet_here: Command, arguments: list[str], says: str) -> None:
    done = revnet_here("plan", "small.yaml", *arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.5, "0.5 s"),
        (41.2, "41.2 s"),
        (59.7, "1 min 0 s"),
        (123, "2 min 3 s"),
        (15_000, "4 h 10 min"),
        (2e6, "23.1 days"),
    ],
)
def test_times_are_told_in_words(seconds: float, words: str) -> None:
    assert in_time(seconds) == words

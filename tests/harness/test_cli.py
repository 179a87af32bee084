"""The command: what it prints, its exit codes, and that bad input starts and writes nothing."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from harness.plan_file import Plan
from harness.store import RunStore
from tests.harness.conftest import Command
from tests.reports.conftest import trial

STUDY = """\
name: small
model: revnet
grid:
  depth: [14]
fixed: {batch_size: 2}
"""


@pytest.mark.parametrize(
    ("old", "new", "place", "message"),
    [
        ("grid:", "grdi:", "study.yaml:3", "grid"),
        ("[14]", "[]", "study.yaml:4", "depth"),
        ("[14]", "[14, 40]", "study.yaml:4: grid.depth[1] = 40", "nearest two are 38 and 50"),
        ("[14]", "[14]\n  channels: [[32, 63, 112]]", "study.yaml:5: grid.channels[0]", "channels[1] = 63"),
        ("model: revnet", "model: revnte", "study.yaml:2", "Did you mean revnet"),
        ("model: revnet", "model: no_such_package:factory", "study.yaml:2", "cannot import"),
        ("batch_size: 2", "batch_size: 0", "study.yaml:5", "batch_size"),
        ("fixed:", "data: {name: cifar01}\nfixed:", "study.yaml:5", "cifar10"),
        ("fixed:", "data: {path: nowhere}\nfixed:", "study.yaml:5", "nowhere"),
        ("fixed:", "deepspeed: {fp16: {enabled: true}}\nfixed:", "study.yaml:5", "fp16"),
    ],
)
def test_bad_studies_are_refused_with_their_place(
    revnet_here: Command, tmp_path: Path, old: str, new: str, place: str, message: str
) -> None:
    assert old in STUDY
    (tmp_path / "study.yaml").write_text(STUDY.replace(old, new))
    for command in ("plan", "run"):
        done = revnet_here(command, "study.yaml")
        assert done.returncode == 2, done.stdout
        assert place in done.stderr
        assert message in done.stderr
        assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["study.yaml"]


def test_a_plan_lists_every_trial_and_starts_nothing(revnet: Command, tmp_path: Path) -> None:
    done = revnet("plan", "quickstart")
    assert done.returncode == 0, done.stderr
    assert "36 trials, 0 done, 36 to run" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_plan_says_what_does_not_fit(revnet_here: Command, tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(STUDY)
    done = revnet_here("plan", "study.yaml", "--memory", "1MiB", "--device", "cuda")
    assert done.returncode == 0, done.stderr
    assert "1 predicted not to fit" in done.stdout
    wrong = revnet_here("plan", "study.yaml", "--memory", "80GB")
    assert wrong.returncode == 2
    assert "write 80GiB" in wrong.stderr


def test_a_run_directory_of_another_study_is_refused(revnet_here: Command, tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(STUDY)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "plan.json").write_bytes(Plan.of("other", ["a" * 12]).to_json())
    done = revnet_here("run", "study.yaml", "--out", "run")
    assert done.returncode == 2
    assert "run of another study: 'other'" in done.stderr
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["plan.json"]


def test_a_report_of_nothing_is_refused(revnet_here: Command, tmp_path: Path) -> None:
    done = revnet_here("report", "nowhere")
    assert done.returncode == 2
    assert "no run here" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_report_s_pictures_are_written_or_refused_before_anything_is(revnet_here: Command, tmp_path: Path) -> None:
    record = trial(0)
    RunStore(tmp_path / "run").write_trial(record)
    done = revnet_here("report", "run", "--png", "pictures")
    if "Install it with" in done.stderr or "Install one of" in done.stderr:
        assert done.returncode == 2
        assert not (tmp_path / "run" / "report.html").exists()
    else:
        assert done.returncode == 0, done.stderr
        written = done.stdout.splitlines()
        assert written == ["run/report.html", *(f"pictures/{name}.png" for name in ("peak", "saved", "time"))]
        assert all((tmp_path / path).stat().st_size > 1000 for path in written)


def test_what_cannot_be_placed_is_refused_before_it_starts(revnet: Command, tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(STUDY + "resources: {cpus_per_worker: 4096}\n")
    done = revnet("run", "study.yaml", "--out", "run")
    assert done.returncode == 2
    assert "needs 4096 CPU for each of its 1 ranks; the nodes have: " in done.stderr
    assert not (tmp_path / "run" / "trials").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--find", "depth"], "Give --memory"),
        (["--find", "width", "--memory", "1GiB"], "depth"),
        (["--find", "depth", "--memory", "1GB"], "--memory 1GB"),
        (["--find", "depth", "--memory", "1GiB", "--headroom", "5"], "Write 5% or 0.05"),
        (["--find", "depth", "--memory", "1GiB", "--at-most", "2"], "the smallest depth of revnet is 14"),
        (["--find", "depth", "--memory", "1GiB", "--only", "3f9a"], "--find chooses its trials itself"),
        (["--find", "depth", "--memory", "1GiB", "--snapshot"], "--snapshot: --find chooses"),
        (["--find", "depth", "--memory", "1GiB", "--retry", "tired"], "no status 'tired'"),
        (["--memory", "1GiB"], "belongs to --find"),
        (["--at-most", "3"], "belongs to --find"),
    ],
)
def test_a_search_that_asks_nothing_clear_is_refused(
    revnet_here: Command, tmp_path: Path, options: list[str], message: str
) -> None:
    if not options[2:] and torch.cuda.is_available():
        pytest.skip("this machine has a GPU, whose memory is the limit where none is given")
    (tmp_path / "study.yaml").write_text(STUDY)
    done = revnet_here("run", "study.yaml", *options)
    assert done.returncode == 2, done.stdout
    assert message in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["study.yaml"]


def test_where_nothing_fits_nothing_runs(revnet_here: Command, tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(STUDY)
    done = revnet_here("run", "study.yaml", "--find", "depth", "--memory", "1MiB")
    assert done.returncode == 0, done.stderr
    assert "not even depth 14 fits, which needs" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["study.yaml"]


def test_models_lists_the_families(revnet_here: Command) -> None:
    done = revnet_here("models")
    assert "resnet" in done.stdout
    assert "12n+2" in done.stdout


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys\nfrom harness.cli import app\ntry:\n    app(['--help'])\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'ray', 'deepspeed', 'pandas', 'plotly', 'pyarrow', 'numpy'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("http://127.0.0.1:8265", "not the address of a Ray cluster. On one of its nodes give HOST:PORT"),
        ("ray://127.0.0.1:1", "no server for Ray's clients answers there (UNAVAILABLE"),
        ("ray://127.0.0.1:http", "no server for Ray's clients answers there (UNAVAILABLE"),
        ("ray://127.0.0.1:99999999999", "no server for Ray's clients answers there (UNAVAILABLE"),
    ],
)
def test_an_address_of_no_cluster_is_refused(revnet_here: Command, address: str, said: str) -> None:
    refused = revnet_here("run", "quickstart", "--address", address)
    assert refused.returncode == 2
    assert f"--address {address}: {said}" in refused.stderr


def test_without_grpcio_it_is_said_that_the_client_needs_it(
    revnet_here: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused = revnet_here("run", "quickstart", "--address", "ray://127.0.0.1:1")
    assert refused.returncode == 2
    assert "pip install 'revnet-harness[client]'" in refused.stderr

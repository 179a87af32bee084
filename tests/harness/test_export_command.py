"""`revnet export`: what it prints, and what it refuses."""

from pathlib import Path

import pytest

from tests.harness.conftest import Command
from tests.harness.test_compare_command import write
from tests.reports.conftest import trial
from tests.reports.tracker_readers import TENSORBOARD, needs, seen


def test_it_says_what_it_did_and_does_it_once(revnet_here: Command, tmp_path: Path) -> None:
    needs(TENSORBOARD)
    write(tmp_path / "run", [trial(0)], planned=1)
    for said in ("1 written, 0 unchanged", "0 written, 1 unchanged"):
        done = revnet_here("export", "run", "--tensorboard", "tb", "--name", "mine")
        assert (done.returncode, done.stderr) == (0, "")
        first, second = done.stdout.splitlines()
        assert first.startswith(f"{said}: TensorBoard: {tmp_path}/tb/mine; ")
        assert second == "1 of 2 trials have a record; export again when the others have one."
        assert seen(TENSORBOARD, tmp_path / "tb", "mine").keys() == {trial(0).id}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run"], "Give --mlflow URI, --wandb DIR or --tensorboard DIR"),
        (["run", "--tensorboard", "tb", "--name", "../up"], "--name ../up: is no name of a folder"),
        (["nowhere", "--tensorboard", "tb"], "nowhere: no run here"),
    ],
)
def test_bad_input_is_refused(revnet_here: Command, tmp_path: Path, arguments: list[str], message: str) -> None:
    write(tmp_path / "run", [trial(0)])
    done = revnet_here("export", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["run"]

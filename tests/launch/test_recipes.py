"""Recipes for other people's schedulers: what they say is what the command, KubeRay and the shell understand."""

import copy
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer
from ruamel.yaml import YAML

from harness.cli import app
from harness.expansion import expand
from harness.study import Study

HERE = Path(__file__).parent
LAUNCH = HERE.parent.parent / "launch"
SCHEMA = YAML(typ="safe").load(HERE / "rayjob.schema.yaml")


def manifests() -> list[dict[str, Any]]:
    return list(YAML(typ="safe").load_all(LAUNCH / "rayjob.yaml"))


def commands() -> Iterator[tuple[str, list[str]]]:
    """Each call of `revnet` in the recipes, with its file; what a shell fills in stands as it is."""
    for path in sorted(LAUNCH.iterdir()):
        for line in path.read_text().splitlines():
            for call in re.findall(r"(?<![\w`/'-])revnet ((?:run|plan|status|logs|stop|doctor|pack)\b[^`&\n]*)", line):
                words = shlex.split(call.rstrip(")").replace("...", ""), comments=True)
                yield path.name, words


def parse(words: list[str]) -> None:
    """Raises what the command line raises, for a command or an option that is none."""
    group: Any = typer.main.get_command(app)
    command = group.get_command(group.make_context("revnet", list(words)), words[0])
    assert command is not None, f"No such command {words[0]}"
    command.make_context(words[0], words[1:])


def test_each_command_of_a_recipe_is_one() -> None:
    found = list(commands())
    assert {name for name, _ in found} >= {"slurm.sbatch", "rayjob.yaml", "README.md"}
    for _, words in found:
        parse(words)


@pytest.mark.parametrize("words", [["run", "depth", "--adress", "auto"], ["runn", "depth"], ["run"]])
def test_a_misspelt_command_is_none(words: list[str]) -> None:
    with pytest.raises(Exception, match=r"No such option|No such command|Missing parameter"):
        parse(words)


def test_the_manifest_is_a_rayjob_with_its_study() -> None:
    study, job = manifests()
    jsonschema.validate(job, SCHEMA)
    trials = expand(Study.from_yaml(study["data"]["study.yaml"], "study.yaml"))
    [workers] = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    [container] = workers["template"]["spec"]["containers"]
    given = container["resources"]["limits"]
    # Each trial fits a node, and all GPUs of one can be used at once.
    gpus, cores = int(given["nvidia.com/gpu"]), int(given["cpu"])
    assert all(trial.workers <= gpus and gpus * trial.resources.cpus_per_worker <= cores for trial in trials)


def test_whoever_joins_needs_the_token_and_nobody_is_root() -> None:
    cluster = manifests()[1]["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"]
        assert all(not one["securityContext"]["allowPrivilegeEscalation"] for one in pod["containers"])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda spec: spec.update(entrypont=spec.pop("entrypoint")),
        lambda spec: spec.update(backoffLimit="2"),
        lambda spec: spec["rayClusterSpec"]["authOptions"].update(mode="tokens"),
        lambda spec: spec["rayClusterSpec"]["workerGroupSpecs"][0].update(replicas="2"),
        lambda spec: spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0].update(imge="x"),
        lambda spec: spec["rayClusterSpec"]["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}),
    ],
)
def test_a_manifest_with_a_slip_is_none(spoil: Callable[[dict[str, Any]], object]) -> None:
    job = copy.deepcopy(manifests()[1])
    spoil(job["spec"])
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(job, SCHEMA)


def test_the_shell_reads_the_script(tmp_path: Path) -> None:
    script = LAUNCH / "slurm.sbatch"
    assert subprocess.run(["bash", "-n", script], capture_output=True).returncode == 0
    broken = tmp_path / "broken.sbatch"
    broken.write_text(script.read_text() + "\nif true; then\n")
    assert subprocess.run(["bash", "-n", broken], capture_output=True).returncode != 0


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck on this machine")
def test_shellcheck_finds_nothing_in_it() -> None:
    done = subprocess.run(["shellcheck", LAUNCH / "slurm.sbatch"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_token_is_on_no_command_line_and_readable_by_nobody_else() -> None:
    script = (LAUNCH / "slurm.sbatch").read_text()
    assert "umask 077" in script
    assert "RAY_AUTH_MODE=token" in script
    assert not re.search(r"RAY_AUTH_TOKEN=", script)

"""The plugin in a package outside this repository, in an environment that has torch, pytest and this project only."""

import os
import re
import subprocess
import sys
import venv
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PROJECT = """\
[project]
name = "someones-net"
version = "1"

[tool.setuptools]
packages = ["someones_net"]
"""
NET = """\
from revnet_core import AdditiveCoupling, ReversibleSequence
from torch import nn


def net():
    return ReversibleSequence(AdditiveCoupling(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(2))
"""
TEST = """\
import torch
from someones_net import net


def test_net(inverse_check):
    torch.manual_seed(0)
    subject, x = net(), torch.randn(3, 4)
    inverse_check(subject, x)
"""
FAULT = "    subject.couplings[1].f.bias.data += 1\n"


def with_needs(name: str, found: set[str]) -> set[str]:
    """Names of the distributions that one needs, itself among them."""
    key = re.sub(r"[-_.]+", "-", name).lower()
    if key in found:
        return found
    try:
        needed = distribution(key).requires or []
    except PackageNotFoundError:
        return found
    found.add(key)
    for line in needed:
        match = re.match(r"[\w.-]+", line)
        if match and "extra ==" not in line:
            with_needs(match[0], found)
    return found


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The environment's interpreter, and the package's folder."""
    folder = tmp_path_factory.mktemp("elsewhere")
    venv.create(folder / "env", with_pip=False)
    python = folder / "env" / "bin" / "python"
    (site,) = (folder / "env").glob("lib/python*/site-packages")
    # What is installed here already, and not a gigabyte of it again.
    for name in with_needs("pytest", with_needs("torch", set())):
        files = distribution(name).files or []
        for top in {file.parts[0] for file in files} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(distribution(name).locate_file(top))))
    package = folder / "someones"
    for path, text in (
        ("pyproject.toml", PROJECT),
        ("someones_net/__init__.py", NET),
        ("tests/test_net.py", TEST),
    ):
        (package / path).parent.mkdir(parents=True, exist_ok=True)
        (package / path).write_text(text)
    # A copy, since a build writes into the folder.
    checkout = folder / "checkout"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(checkout)], check=True)
    for source in (checkout, package):
        pip = [sys.executable, "-m", "pip"] if _has_pip(sys.executable) else ["python3", "-m", "pip"]
        command = [*pip, "--python", str(python), "install", "--quiet", "--no-deps", str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"pip cannot install here: {done.stderr.strip().splitlines()[-1]}")
    return python, package


def _has_pip(python: str) -> bool:
    return not subprocess.run([python, "-m", "pip", "--version"], capture_output=True).returncode


def test_a_user_s_package_gets_its_baseline_and_holds_it(elsewhere: tuple[Path, Path]) -> None:
    python, package = elsewhere
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTEST_ADDOPTS")}

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        options = {"cwd": package, "env": environment, "capture_output": True, "text": True}
        return subprocess.run([str(python), *command], **options)  # pyright: ignore[reportCallIssue, reportArgumentType]

    absent = run(
        "-c", "import importlib.util as u; print([n for n in ('deepspeed', 'ray', 'pandas') if u.find_spec(n)])"
    )
    assert absent.stdout.strip() == "[]"
    assert str(ROOT) not in run("-c", "import harness; print(harness.__path__)").stdout
    first = run("-m", "pytest", "-q", "tests")
    assert first.returncode == 1, first.stdout + first.stderr
    assert "no baseline: written to" in first.stdout
    assert [path.name for path in (package / "tests" / "inverse_baselines" / "test_net").iterdir()] == ["test_net.json"]
    second = run("-m", "pytest", "-q", "tests")
    assert second.returncode == 0, second.stdout + second.stderr

    (package / "tests" / "test_net.py").write_text(TEST.replace("    inverse_check", FAULT + "    inverse_check"))
    third = run("-m", "pytest", "-q", "tests")
    assert third.returncode == 1
    assert "likely cause: block 1 AdditiveCoupling: the weights of f are others" in third.stdout

"""The plugin, driven as a user drives it: tests are written, run, changed and run again."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Before the first inner run, after which pytester forgets what was imported in it: torch cannot be imported twice.
from harness.inverses.check import check_inverse  # noqa: F401  # pyright: ignore[reportUnusedImport]

BLOCK = """\
import torch
from torch import nn


class Shift(nn.Module):
    EPSILON = 1e-5
    FACTOR = 1.0

    def __init__(self):
        super().__init__()
        self.f = nn.Sequential(nn.BatchNorm1d(3, eps=self.EPSILON), nn.Linear(3, 3))

    def forward(self, x1, x2):
        return x1 + self.f(x2), x2

    def inverse(self, y1, y2):
        return (y1 - self.f(y2)) * self.FACTOR, y2
"""
TEST = """\
import pytest
import torch
from blocks import Shift


@pytest.mark.parametrize("width", [2, 3])
def test_shift(inverse_check, width):
    torch.manual_seed(0)
    inverse_check(nn_chain(width), torch.randn(8, 3), torch.randn(8, 3))


def nn_chain(width):
    return torch.nn.Sequential(*(Shift() for _ in range(width)))
"""
Run = Callable[..., pytest.RunResult]


@pytest.fixture
def project(pytester: pytest.Pytester) -> pytest.Pytester:
    """A package of somebody's with one test of two cases."""
    pytester.makepyfile(blocks=BLOCK, test_blocks=TEST)
    return pytester


@pytest.fixture
def run(project: pytest.Pytester) -> Run:
    def call(*options: str) -> pytest.RunResult:
        return project.runpytest("-p", "no:cacheprovider", "-p", "no:xdist", "-q", "-rfs", *options)

    return call


def change(project: pytest.Pytester, old: str, new: str, file: str = "blocks.py") -> None:
    path = project.path / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    # The next import reads the file, even within the same second and with the same length.
    for cached in project.path.rglob("*.pyc"):
        cached.unlink()


def baselines(project: pytest.Pytester) -> dict[str, dict[str, Any]]:
    folder = project.path / "inverse_baselines"
    return {path.relative_to(folder).as_posix(): json.loads(path.read_text()) for path in folder.rglob("*.json")}


def first_of(project: pytest.Pytester) -> Path:
    return min((project.path / "inverse_baselines").rglob("*.json"))


def outcomes(result: pytest.RunResult) -> dict[str, int]:
    found = result.parseoutcomes()
    found.pop("seconds", None)
    return {name: count for name, count in found.items() if name in ("passed", "failed", "skipped", "errors")}


def test_create_pass_change_fail_update_pass(project: pytest.Pytester, run: Run) -> None:
    first = run()
    assert outcomes(first) == {"failed": 2}
    first.stdout.fnmatch_lines(["*no baseline: written to *inverse_baselines*test_blocks*"])
    assert len(baselines(project)) == 2
    assert outcomes(run()) == {"passed": 2}

    change(project, "FACTOR = 1.0", "FACTOR = 1.001")
    worse = run()
    assert outcomes(worse) == {"failed": 2}
    worse.stdout.fnmatch_lines(
        ["*block ? Shift*stream 1 comes back 1.001 times what it was*", "*inverse_rel was*limit*"]
    )
    before = baselines(project)

    assert outcomes(run("--inverse-update")) == {"failed": 2}
    assert baselines(project) != before
    assert outcomes(run("--inverse-update")) == {"passed": 2}
    assert outcomes(run()) == {"passed": 2}


def test_a_change_in_forward_and_inverse_alike_is_seen(project: pytest.Pytester, run: Run) -> None:
    run()
    change(project, "EPSILON = 1e-5", "EPSILON = 1e-3")
    changed = run()
    assert outcomes(changed) == {"failed": 2}
    changed.stdout.fnmatch_lines(["*block 0 Shift is made otherwise: it was f.0 BatchNorm1d(3, eps=1e-05*"])


def test_nothing_absent_or_foreign_passes(project: pytest.Pytester, run: Run) -> None:
    required = run("--inverse-require")
    assert outcomes(required) == {"failed": 2}
    assert not baselines(project)
    run()
    for path in (project.path / "inverse_baselines").rglob("*.json"):
        foreign = re.sub(r'"\w[^"]*, torch [\d.]+, ', '"NVIDIA H100, torch 2.9, ', path.read_text())
        path.write_text(foreign)
    skipped = run()
    assert outcomes(skipped) == {"skipped": 2}
    skipped.stdout.fnmatch_lines(["*not comparable: the baseline is of NVIDIA H100, torch 2.9, fp*; this is *"])
    assert outcomes(run("--inverse-require")) == {"failed": 2}

    assert outcomes(run("--inverse-update")) == {"failed": 2}
    assert outcomes(run("--inverse-require")) == {"passed": 2}
    assert all(len(found["baselines"]) == 4 for found in baselines(project).values())


def test_another_precision_is_written_beside_the_others(project: pytest.Pytester, run: Run) -> None:
    run()
    change(project, "torch.randn(8, 3))", "torch.randn(8, 3), precisions=('fp32', 'fp64', 'bf16'))", "test_blocks.py")
    assert outcomes(run()) == {"failed": 2}
    assert outcomes(run()) == {"passed": 2}
    assert all(len(found["baselines"]) == 3 for found in baselines(project).values())


def test_a_tolerance_is_the_file_s_own(project: pytest.Pytester, run: Run) -> None:
    run()
    change(project, "FACTOR = 1.0", "FACTOR = 1.001")
    assert outcomes(run()) == {"failed": 2}
    for path in (project.path / "inverse_baselines").rglob("*.json"):
        stored = json.loads(path.read_text())
        stored["tolerances"] |= dict.fromkeys(("inverse_rel", "drift_rel"), 1e15)
        path.write_text(json.dumps(stored))
    assert outcomes(run()) == {"passed": 2}
    change(project, "FACTOR = 1.001", "FACTOR = 1.0")
    run("--inverse-update")
    assert all(found["tolerances"]["inverse_rel"] == 1e15 for found in baselines(project).values())


def test_a_renamed_or_moved_test_is_asked_for_its_baseline(project: pytest.Pytester, run: Run) -> None:
    run()
    change(project, "def test_shift", "def test_shifts", "test_blocks.py")
    renamed = run()
    assert outcomes(renamed) == {"failed": 2}
    renamed.stdout.fnmatch_lines(["*stale inverse baselines*", "*test_shift-2-*.json: no test has it*"])
    (project.path / "test_blocks.py").rename(project.path / "test_moved.py")
    moved = run()
    assert outcomes(moved) == {"failed": 2}
    assert len(re.findall("no test has it", moved.stdout.str())) == 4


def test_a_baseline_in_a_folder_that_its_last_test_left_is_stale(project: pytest.Pytester, run: Run) -> None:
    run()
    for name in ("old", "new"):
        (project.path / name).mkdir()
    (project.path / "inverse_baselines").rename(project.path / "old" / "inverse_baselines")
    (project.path / "test_blocks.py").rename(project.path / "old" / "test_blocks.py")
    python = ("-o", "pythonpath=.")
    in_place = run(*python)
    assert outcomes(in_place) == {"passed": 2}
    assert "no test has it" not in in_place.stdout.str()
    (project.path / "old" / "test_blocks.py").rename(project.path / "new" / "test_blocks.py")
    moved = run(*python)
    assert outcomes(moved) == {"failed": 2}
    assert len(re.findall(r"old.*no test has it", moved.stdout.str())) == 2
    # What was not asked for may have its tests.
    assert "no test has it" not in run(*python, "new").stdout.str()


def test_what_was_not_asked_for_is_not_stale(project: pytest.Pytester, run: Run) -> None:
    run()
    for options in (["-k", "2"], ["test_blocks.py::test_shift[2]"], ["--collect-only"]):
        assert "no test has it" not in run(*options).stdout.str()
    project.makepyfile(test_other="def test_nothing(): pass")
    assert "no test has it" not in run("test_other.py").stdout.str()


def test_it_works_under_xdist(project: pytest.Pytester, run: Run) -> None:
    def distributed(*options: str) -> pytest.RunResult:
        return project.runpytest_subprocess("-q", "-n", "2", *options)

    assert outcomes(distributed()) == {"failed": 2}
    assert outcomes(distributed()) == {"passed": 2}
    change(project, "def test_shift", "def test_shifts", "test_blocks.py")
    assert len(re.findall("no test has it", distributed().stdout.str())) == 2


@pytest.mark.parametrize("options", [(), ("test_blocks.py::test_two",)], ids=str)
def test_the_baseline_of_a_call_that_is_gone_is_stale(
    project: pytest.Pytester, run: Run, options: tuple[str, ...]
) -> None:
    calls = [f"    inverse_check(Shift(), torch.randn(8, 3), torch.randn(8, 3), name={name!r})" for name in ("a", "b")]
    lines = ["import torch", "from blocks import Shift", "def test_two(inverse_check):", "    torch.manual_seed(0)"]

    def write(*more: str) -> None:
        (project.path / "test_blocks.py").write_text("\n".join([*lines, *more]) + "\n")

    write(*calls)
    run(*options)
    run(*options)
    assert "no test has it" not in run(*options).stdout.str()
    # A test that failed before its second call says nothing of it.
    write(calls[0], "    assert False", calls[1])
    assert "no test has it" not in run(*options).stdout.str()
    write(calls[0])
    assert len(re.findall(r"test_two-b-.*no test has it", run(*options).stdout.str())) == 1


def test_two_calls_in_one_test_take_names(project: pytest.Pytester, run: Run) -> None:
    call = "inverse_check(Shift(), torch.randn(8, 3), torch.randn(8, 3){})"
    lines = ["import torch", "from blocks import Shift", "def test_two(inverse_check):", "    torch.manual_seed(0)"]

    def write(*names: str) -> None:
        calls = [f"    {call.format(name)}" for name in names]
        (project.path / "test_blocks.py").write_text("\n".join([*lines, *calls]) + "\n")

    write("", "")
    run()
    run().stdout.fnmatch_lines(["*a second call in one test takes a name of its own*"])
    write("", ", name='other'")
    assert outcomes(run()) == {"failed": 1}
    named = run()
    assert outcomes(named) == {"passed": 1}
    assert len(baselines(project)) == 2
    assert "no test has it" not in named.stdout.str()


@pytest.mark.parametrize(
    ("text", "message"), [("{", "not JSON"), ('{"schema": 99}', "not a baseline of schema 1"), ("[]", "not a baseline")]
)
def test_a_damaged_baseline_is_named_and_kept(project: pytest.Pytester, run: Run, text: str, message: str) -> None:
    run()
    damaged = first_of(project)
    damaged.write_text(text)
    result = run()
    assert outcomes(result) == {"failed": 1, "passed": 1}
    result.stdout.fnmatch_lines([f"*{damaged.name}: {message}*"])
    assert damaged.read_text() == text


@pytest.mark.parametrize("option", ["--inverse-update", "--inverse-require"])
def test_a_baseline_that_lacks_something_is_named_and_kept(project: pytest.Pytester, run: Run, option: str) -> None:
    run()
    damaged = first_of(project)
    whole = damaged.read_text()
    found = json.loads(whole)
    del found["tolerances"]["drift_rel"]
    damaged.write_text(json.dumps(found))
    message = (
        "*tolerances.drift_rel is missing; a finite number, at least 0, belongs there. Restore the file, or delete it"
    )
    for options in ((), (option,)):
        result = run(*options)
        assert outcomes(result) == {"failed": 1, "passed": 1}
        result.stdout.fnmatch_lines([f"E *inverse_check: *{damaged.name}: {message}*"])
        # The line of the test, and nothing of what is behind the fixture.
        result.stdout.fnmatch_lines([">*inverse_check(nn_chain(width)*"])
        assert "_fault" not in result.stdout.str()
        assert damaged.read_text() == json.dumps(found)
    damaged.write_text(whole)
    assert outcomes(run()) == {"passed": 2}


@pytest.mark.parametrize("metric", ["gradient_reference_rel", "gradient_difference_rel"])
def test_a_figure_that_the_baseline_lacks_is_no_pass(project: pytest.Pytester, run: Run, metric: str) -> None:
    run()
    lacking = first_of(project)
    found = json.loads(lacking.read_text())
    assert any(baseline["gradient"].pop(metric, None) is not None for baseline in found["baselines"].values())
    lacking.write_text(json.dumps(found))
    result = run()
    assert outcomes(result) == {"failed": 1, "passed": 1}
    result.stdout.fnmatch_lines([f"*gradient, fp*: {metric} was not measured, is *"])


def test_a_limit_that_is_given_with_the_call_is_of_a_new_baseline(project: pytest.Pytester, run: Run) -> None:
    change(project, "torch.randn(8, 3))", "torch.randn(8, 3), tolerances={'drift_rel': 7})", "test_blocks.py")
    run()
    assert all(found["tolerances"]["drift_rel"] == 7 for found in baselines(project).values())
    edited = first_of(project)
    edited.write_text(edited.read_text().replace('"drift_rel": 7', '"drift_rel": 9'))
    assert outcomes(run("--inverse-update")) == {"passed": 2}
    assert sorted(found["tolerances"]["drift_rel"] for found in baselines(project).values()) == [7, 9]

    for wrong, message in (("'drift_rel': float('nan')", "drift_rel is NaN"), ("'drift': 1", "drift is not known")):
        change(project, "'drift_rel': 7", wrong, "test_blocks.py")
        run().stdout.fnmatch_lines([f"*tolerances: {message}*"])
        change(project, wrong, "'drift_rel': 7", "test_blocks.py")


def test_a_module_without_an_inverse_is_refused(project: pytest.Pytester, run: Run) -> None:
    change(project, "def inverse(", "def undo(")
    run().stdout.fnmatch_lines(["*Shift has no inverse: neither a method `inverse` nor an argument `rev`*"])


def test_the_plugin_imports_no_torch_until_it_is_asked() -> None:
    program = "import sys, harness.pytest_plugin; print(sorted({'torch', 'deepspeed', 'ray'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

"""Who may import whom. Reads the import statements, also those inside functions, and runs nothing."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("revnet_core", "harness", "reports", "studies", "tests")
STUDIES_IMPORT = ("torch", "rich", "typer", "playwright", "revnet_core", "harness", "studies")
# Each library's importers: files whose path begins so.
OWN_ADAPTER = {"ray": "harness/schedule/", "deepspeed": "harness/engine.py"}
# They stand on top, and alone in harness may import reports: the command, in two files, and the run in a notebook.
# Nobody imports them, but the command its own second file, and harness itself, when it is asked for it, the notebook.
ON_TOP = ("harness/cli.py", "harness/cli_results.py", "harness/notebook.py")
# Files that a machine without torch, Ray or DeepSpeed must be able to import, and what they may not pull in.
TORCH_FREE = ("harness/record.py", "harness/store.py", "harness/study.py", "harness/trials.py", "harness/expansion.py")
TORCH_FREE += ("harness/__init__.py", "harness/notebook.py")


def imported(source: str) -> Iterator[str]:
    """Every module that the source imports, by its full dotted name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module
            yield node.module


def violations(file: str, source: str) -> list[str]:
    """The imports of `file` (relative to the root) that the architecture forbids."""
    room = file.split("/")[0]
    return [f"{file} imports {module}" for module in imported(source) if not _allowed(file, room, module)]


def _allowed(file: str, room: str, module: str) -> bool:
    top = module.split(".")[0]
    if top in sys.stdlib_module_names:
        return True
    if room == "revnet_core":
        return top in ("torch", "revnet_core")
    if room == "studies":
        return top in STUDIES_IMPORT and not _is_on_top(module)
    if top in ("studies", "tests"):
        return False
    if top in OWN_ADAPTER:
        return file.startswith(OWN_ADAPTER[top])
    if room == "reports":
        if top == "harness":
            return module in ("harness.store", "harness.record", "harness.errors")
        return top not in ("torch", "revnet_core")
    if _is_on_top(module):
        return (file, module) in (
            ("harness/__init__.py", "harness.notebook"),
            ("harness/cli.py", "harness.cli_results"),
        )
    if top == "reports":
        return file in ON_TOP
    return not (file in TORCH_FREE and top == "torch")


def _is_on_top(module: str) -> bool:
    return f"{module.replace('.', '/')}.py" in ON_TOP


def sources() -> list[tuple[str, str]]:
    files = [path for room in ROOMS[:4] for path in (ROOT / room).rglob("*.py")]
    return [(path.relative_to(ROOT).as_posix(), path.read_text()) for path in files]


def test_every_import_is_allowed() -> None:
    found = sources()
    assert len(found) > 20
    assert [violation for file, source in found for violation in violations(file, source)] == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("harness/worker.py", "import ray"),
        ("harness/worker.py", "def f():\n    from ray.util import placement_group"),
        ("harness/training.py", "import deepspeed"),
        ("harness/schedule/sweep.py", "import reports.page"),
        ("harness/store.py", "import torch"),
        ("harness/worker.py", "from harness.cli import run"),
        ("harness/worker.py", "from harness.notebook import open_run"),
        ("harness/worker.py", "from harness.cli_results import write_report"),
        ("harness/__init__.py", "import harness.cli"),
        ("harness/__init__.py", "def f():\n    import reports.frames"),
        ("harness/notebook.py", "import torch"),
        ("reports/pictures.py", "import harness.notebook"),
        ("studies/peers/measure.py", "from harness.notebook import open_run"),
        ("revnet_core/sequence.py", "import numpy"),
        ("revnet_core/audit.py", "from harness.record import Record"),
        ("reports/page.py", "import torch"),
        ("reports/page.py", "from harness.study import load_study"),
        ("harness/cli.py", "import studies"),
        ("revnet_core/audit.py", "import studies.peers"),
        ("studies/peers/measure.py", "import reports.page"),
        ("studies/peers/measure.py", "import tests.core.nets"),
        ("studies/peers/contenders.py", "import ray"),
    ],
)
def test_a_forbidden_import_is_found(file: str, line: str) -> None:
    assert (ROOT / file).exists()
    assert len(violations(file, f"{line}\n")) == 1


@pytest.mark.parametrize("room", ROOMS)
def test_the_rooms_are_there(room: str) -> None:
    assert (ROOT / room).is_dir()

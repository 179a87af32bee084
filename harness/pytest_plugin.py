"""A pytest fixture that holds the inverses of reversible modules against baselines, kept beside the tests.

    def test_my_block(inverse_check):
        torch.manual_seed(0)
        inverse_check(MyBlock(), torch.randn(4, 16, 8, 8))

Loaded by pytest wherever this package is installed, so it imports torch only when a test asks for the fixture.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

FOLDER = "inverse_baselines"
STALE = "revnet_stale_inverse_baselines"
Collected = dict[Path, set[str]]
COLLECTED = pytest.StashKey[Collected]()
FOLDERS = pytest.StashKey[set[Path]]()
USED = pytest.StashKey[set[str]]()
FOUND_STALE = pytest.StashKey[set[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("inverse", "baselines of inverses (revnet-harness)")
    group.addoption(
        "--inverse-update",
        action="store_true",
        help="rewrite the baselines of inverse_check with what is measured; a test whose baseline changes fails once",
    )
    group.addoption(
        "--inverse-require",
        action="store_true",
        help="fail inverse_check where no baseline of this kind of machine is there, instead of writing or skipping",
    )


@pytest.fixture
def inverse_check(request: pytest.FixtureRequest) -> "InverseCheck":
    """Call it with a module that has an inverse, and its inputs; see `InverseCheck.__call__`."""
    check = InverseCheck(request.node, request.config)
    request.node.stash[USED] = check.used
    return check


class InverseCheck:
    def __init__(self, item: pytest.Item, config: pytest.Config) -> None:
        self._item = item
        self._update = bool(config.getoption("--inverse-update"))
        self._require = bool(config.getoption("--inverse-require"))
        # The tests, by their names in the baselines, that were checked.
        self.used: set[str] = set()

    def __call__(
        self,
        module: Any,
        *inputs: Any,
        precisions: Sequence[str] | None = None,
        tolerances: dict[str, float] | None = None,
        name: str = "",
    ) -> Any:
        """Measure inverse error by block and gradient parity, and compare with this test's baseline.

        module      a ReversibleSequence or a network with one; or a module with `forward` and `inverse`, or FrEIA's
                    with `rev`, or an nn.Sequential of such; anything else in harness.inverses.Invertible
        inputs      floating-point tensors; module and inputs from a fixed seed
        precisions  e.g. ("fp32", "bf16", "fp64"), of ours also "bf16/exact"; default: its own and fp64
        tolerances  limits of a new baseline that are not the default ones, by metric; those of a file stand in the file
        name        tells this call from others in the same test

        Returns the figures by precision. Fails the test where a figure is worse than its limit, and where there was no
        baseline, which is written; skips it where the baseline is of other hardware or of another torch.
        """
        # Of what cannot be used a reader wants the line of the test and the message.
        __tracebackhide__ = True
        # Here, not above: pytest loads this file in every project.
        from harness.errors import HarnessError
        from harness.inverses.check import check_inverse
        from revnet_core import PrecisionError

        test = _test_of(self._item) + (f" {name}" if name else "")
        if test in self.used:
            pytest.fail("inverse_check: a second call in one test takes a name of its own: name='...'", pytrace=False)
        self.used.add(test)
        try:
            verdict = check_inverse(
                module,
                *inputs,
                path=baseline_path(self._item.path, test),
                test=test,
                precisions=precisions,
                tolerances=tolerances,
                update=self._update,
                require=self._require,
            )
        except (HarnessError, PrecisionError) as error:
            raise pytest.fail.Exception(f"inverse_check: {error}") from None
        if verdict.outcome == "failed":
            pytest.fail(f"inverse_check: {verdict.message}", pytrace=False)
        if verdict.outcome == "not comparable":
            pytest.skip(f"inverse_check: {verdict.message}")
        return verdict.figures


def baseline_path(module: Path, test: str) -> Path:
    """Beside the test's module; of a name that no file may have, a readable part and a hash."""
    safe = re.sub(r"[^\w.=-]+", "-", test).strip("-.")[:80]
    if safe != test:
        safe += f"-{hashlib.sha256(test.encode()).hexdigest()[:6]}"
    return module.parent / FOLDER / module.stem / f"{safe}.json"


# Baselines whose tests are gone


@pytest.hookimpl(tryfirst=True)
def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> None:
    """Also where the last test of a folder has moved away."""
    if collection_path.name == FOLDER:
        config.stash.setdefault(FOLDERS, set()).add(collection_path)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What there is, before -k and -m take something away."""
    collected: Collected = {}
    for item in items:
        collected.setdefault(item.path, set()).add(_test_of(item))
    config.stash[COLLECTED] = collected


def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    # One that failed or skipped may not have come to all of its calls.
    if call.when == "call" and call.excinfo is None and (used := item.stash.get(USED, None)):
        folder = item.path.parent / FOLDER / item.path.stem
        found = [
            file for file in folder.glob("*.json") if _belongs(file, _test_of(item)) and _test_in(file) not in used
        ]
        item.config.stash.setdefault(FOUND_STALE, set()).update(map(str, found))


def pytest_sessionfinish(session: pytest.Session) -> None:
    config = session.config
    # A single test that was asked for by name says nothing of its neighbours.
    if not any("::" in argument for argument in config.args) and not config.getoption("collectonly", default=False):
        found = stale_baselines(config.stash.get(COLLECTED, {}), config.stash.get(FOLDERS, set()))
        config.stash.setdefault(FOUND_STALE, set()).update(str(path) for path in found)
    output = getattr(config, "workeroutput", None)
    if output is not None:
        output[STALE] = sorted(config.stash.get(FOUND_STALE, set()))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Under xdist the workers collect and this process reports."""
    node.config.stash.setdefault(FOUND_STALE, set()).update(getattr(node, "workeroutput", {}).get(STALE, ()))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    stale = sorted(config.stash.get(FOUND_STALE, set()))
    if stale:
        terminalreporter.section("stale inverse baselines")
        for path in stale:
            terminalreporter.line(f"{path}: no test has it. Move it where its test went, or delete it.")


def stale_baselines(collected: Collected, folders: Iterable[Path]) -> list[Path]:
    """Files of modules that were collected and do not have the test any more, and of modules that are gone.

    folders  of baselines that collecting came by, beside those of the collected modules
    """
    stale = []
    for folder in {*folders, *(path.parent / FOLDER for path in collected)}:
        for file in sorted(folder.glob("*/*.json")):
            module = folder.parent / f"{file.parent.name}.py"
            if module not in collected and module.exists():
                continue
            expected = {name for name in collected.get(module, set()) if _belongs(file, name)}
            if not expected:
                stale.append(file)
    return stale


def _belongs(file: Path, test: str) -> bool:
    """Whether it is of this test, or of a call in it that has a name."""
    recorded = _test_in(file)
    return recorded is not None and (recorded == test or recorded.startswith(f"{test} "))


def _test_in(file: Path) -> str | None:
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["test"])
    except (ValueError, KeyError, TypeError):
        return None


def _test_of(item: pytest.Item) -> str:
    """Its class, name and parameters, without the module, which may move."""
    return item.nodeid.split("::", 1)[-1]

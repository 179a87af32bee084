"""A run in a notebook: the report's own frame and figures, and a package that stays light until it is asked."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import harness
from harness.errors import HarnessError, StoreError
from harness.record import Record, TraceRow
from harness.store import RunStore
from reports.frames import trials_frame
from reports.pictures import report_figures
from tests.reports.conftest import STUDY, trial

DOCS = Path(__file__).resolve().parent.parent.parent / "docs"
STEPS = [TraceRow("step", 0, "step_s", 0.25), TraceRow("drift", 3, "rel", 1e-7)]


@pytest.fixture
def records() -> list[Record]:
    """Two depths, stored and reconstructed, and a trial that ran out of memory."""
    done = [trial(0, depth=d, activations=a) for d in (14, 26) for a in ("stored", "reconstructed")]
    return [*done, trial(0, depth=38, status="oom", reason="too large")]


@pytest.fixture
def store(tmp_path: Path, records: list[Record]) -> RunStore:
    """Of them all; one more trial has no record, and that of 38 layers no trace."""
    store = RunStore(tmp_path / "runs" / "quickstart")
    store.open_for(STUDY, [*(record.id for record in records), "f" * 12])
    for record in records:
        store.write_trial(record, STEPS if record.status == "ok" else ())
    return store


def test_frame_and_figures_are_the_report_s(store: RunStore) -> None:
    run = harness.open_run(store.uri)
    pd.testing.assert_frame_equal(run.frame(), trials_frame(store))
    figures = run.figures()
    assert list(figures) == ["peak", "saved", "time", "drift", "angle"]
    assert {name: figure.to_json() for name, figure in figures.items()} == {
        name: figure.to_json() for name, figure in report_figures(store).items()
    }


def test_each_call_reads_the_run_again(store: RunStore, records: list[Record]) -> None:
    run = harness.open_run(Path(store.uri))
    assert repr(run).endswith("quickstart': 5 of 6 trials finished)")
    store.write_trial(records[0].model_copy(update={"metrics": {"activation_peak_bytes": 7}}))
    assert run.frame().set_index("id").loc[records[0].id, "activation_peak_bytes"] == 7


def test_a_trace_is_found_by_the_beginning_of_an_id(store: RunStore, records: list[Record]) -> None:
    run = harness.open_run(store.uri)
    expected = pd.DataFrame(STEPS, columns=list(TraceRow._fields))
    for name in (records[0].id, records[0].id[:8]):
        pd.testing.assert_frame_equal(run.trace(name), expected, check_dtype=False)
    empty = run.trace(records[-1].id)
    assert (len(empty), list(empty)) == (0, list(TraceRow._fields))


@pytest.mark.parametrize(("name", "message"), [("no such id", "has such an id"), ("", "these begin so")])
def test_a_trial_that_is_not_there_is_refused(store: RunStore, name: str, message: str) -> None:
    with pytest.raises(HarnessError, match=message):
        harness.open_run(store.uri).trace(name)


def test_where_there_is_no_run_none_is_opened(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"nothing: no run here .* Give the directory of `revnet run`"):
        harness.open_run(tmp_path / "nothing")
    assert list(tmp_path.iterdir()) == []


def test_the_package_has_nothing_else() -> None:
    assert harness.Run.__module__ == "harness.notebook"
    with pytest.raises(AttributeError, match="'harness' has no attribute 'open_runs'"):
        harness.open_runs  # pyright: ignore[reportAttributeAccessIssue] # noqa: B018


@pytest.mark.parametrize(
    ("line", "heavy"),
    [
        ("import harness.record, harness.store", []),
        ("harness.open_run", []),
        ("harness.open_run(sys.argv[1]).figures()", ["pandas", "plotly"]),
    ],
)
def test_only_what_is_asked_for_is_imported(store: RunStore, line: str, heavy: list[str]) -> None:
    program = f"import sys\nimport harness\n{line}\nheavy = {{'torch', 'ray', 'deepspeed', 'pandas', 'plotly'}}\n"
    program += "print(sorted(heavy & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", program, store.uri], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(heavy)


def test_the_documented_example_runs(
    store: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", (DOCS / "notebook.md").read_text(), re.DOTALL):
        exec(compile(block, "notebook.md", "exec"), names)
    assert "revnet · reconstructed" in capsys.readouterr().out
    assert {"deepest", "trace", "figure"} <= names.keys()

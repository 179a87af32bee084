"""A report of a run whose texts are made to harm, in a real browser: all of it is text, and nothing of it runs."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from harness.store import RunStore
from reports.compare_markdown import escaped
from reports.frames import laws, trials_frame
from reports.page import build_report
from tests.reports.conftest import Make, trial, with_spec

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
# Each would say so in the document's title.
EVIL = [
    "<script>document.title='pwned'</script>",
    "</script><script>document.title='pwned'</script>",
    "<img src=x onerror=\"document.title='pwned'\">",
    '"><svg onload="document.title=\'pwned\'">',
    "<!--<script>document.title='pwned'//",
    "{{ 7 * 7 }}{% raise %}",
    "javascript:document.title='pwned'",
]


def evil_run(make_run: Make) -> RunStore:
    text = " ".join(EVIL)
    records = [trial(n, depth=depth) for n, depth in enumerate((14, 26, 38))]
    records += [trial(n, depth=depth, activations="reconstructed") for n, depth in enumerate((14, 26, 38), start=3)]
    records += [trial(9, seed=9, status="failed", reason=text), trial(10, seed=10, status="oom", reason=text)]
    records = [with_spec(record, data={"name": "cifar10", "path": text, "image_size": 32}) for record in records]
    changed: dict[str, Any] = {
        "machine": records[0].machine | {"device_name": text, "cpu": text, text: text},
        "versions": {"torch": text, text: text},
        "git": {"commit": text, "dirty": text},
        "unmeasured": {"parameter_count": text, text: text},
    }
    records = [record.model_copy(update=changed) for record in records]
    return make_run(records, study={"name": EVIL[0], "question": text, "predict": text})


def test_each_text_is_escaped_wherever_it_stands(make_run: Make) -> None:
    html = build_report(evil_run(make_run))
    for evil in EVIL[:5]:
        assert evil not in html
    assert "{{ 7 * 7 }}" in html
    assert html.count("&lt;img src=x onerror=") >= 5


def test_half_a_character_keeps_no_report_from_being_written(make_run: Make) -> None:
    odd = trial(1, status="failed", reason="no \udc80 file").model_copy(update={"machine": {"device_name": "\ud83d"}})
    store = make_run([odd, trial(2, seed=2)])
    assert "no \ufffd file" in Path(store.write_report(build_report(store))).read_text()


@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome on this machine")
def test_nothing_of_it_runs_in_a_browser(make_run: Make, tmp_path: Path) -> None:
    store = evil_run(make_run)
    page = Path(store.write_report(build_report(store)))

    def dumped(path: Path) -> str:
        assert BROWSER is not None
        command = [
            *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"),
            *("--disable-background-networking", f"--user-data-dir={tmp_path / 'profile'}"),
            *("--virtual-time-budget=8000", "--dump-dom", path.resolve().as_uri()),
        ]
        return subprocess.run(command, capture_output=True, text=True, timeout=120).stdout

    dom = dumped(page)
    assert "<title>pwned" not in dom
    assert "main-svg" in dom
    # Negative control: the same text where it is markup.
    raw = tmp_path / "raw.html"
    raw.write_text(f"<title>quiet</title>{EVIL[0]}")
    assert "<title>pwned" in dumped(raw)


def test_a_table_for_spreadsheets_holds_no_formula(make_run: Make) -> None:
    csv = laws(trials_frame(evil_run(make_run))).to_csv(index=False)
    assert len(csv.splitlines()) > 1
    for line in csv.splitlines():
        assert not any(cell.startswith(("=", "+", "@", "\t")) for cell in line.split(","))


def test_markdown_shows_it_and_calls_nobody() -> None:
    shown = escaped("| `x` <b> @octocat [a](javascript:b) \n# h")
    assert "@octocat" not in shown
    assert "<b>" not in shown
    assert "\n" not in shown
    assert r"\|" in shown
    assert r"\[a\]" in shown

"""`revnet compare`: its exit codes, each beside a run that does not provoke it, and where its output goes."""

import json
from pathlib import Path

import pytest

from harness.record import Record
from harness.store import RunStore
from tests.harness.conftest import Command
from tests.reports.conftest import STUDY, on, scaled, trial

LIMIT = ("--fail", "activation_peak_bytes:+2%")


def write(name: str | Path, records: list[Record], *, planned: int = 0) -> None:
    store = RunStore(name)
    store.open_for(STUDY, [record.id for record in records] + [f"f{number:011x}" for number in range(planned)])
    for record in records:
        store.write_trial(record)


@pytest.fixture
def base() -> list[Record]:
    return [trial(n, depth=depth) for n, depth in enumerate((14, 26, 38))]


def test_each_exit_code_is_given_for_its_reason_and_regressions_go_first(
    revnet_here: Command, tmp_path: Path, base: list[Record]
) -> None:
    worse = [*base[:2], scaled(base[2], activation_peak_bytes=1.03)]
    other = [on(base[0], torch="2.14.0+cpu"), *base[1:]]
    runs = {
        "same": (base, 0),
        "allowed": ([*base[:2], scaled(base[2], activation_peak_bytes=1.01)], 0),
        "worse": (worse, 1),
        "oom": ([*base[:2], trial(2, status="oom", reason="too large", depth=38)], 1),
        "other": (other, 3),
        "gone": (base[:2], 4),
        "other-and-worse": ([other[0], *worse[1:]], 1),
        "gone-and-worse": (worse[1:], 1),
        "other-and-gone": (other[:2], 3),
    }
    write(tmp_path / "base", base)
    for name, (records, code) in runs.items():
        write(tmp_path / name, records)
        done = revnet_here("compare", "base", name, *LIMIT)
        assert done.returncode == code, (name, done.stdout, done.stderr)
        assert done.stderr == ""
    write(tmp_path / "partial", base, planned=1)
    assert revnet_here("compare", "base", "partial", *LIMIT).returncode == 4
    assert revnet_here("compare", "partial", "base", *LIMIT).returncode == 4


def test_the_verdict_is_the_first_line_and_a_regression_has_one_of_its_own(
    revnet_here: Command, tmp_path: Path, base: list[Record]
) -> None:
    write(tmp_path / "base", base)
    write(tmp_path / "run", [*base[:2], scaled(base[2], activation_peak_bytes=1.5)])
    done = revnet_here("compare", "base", "run", *LIMIT, "--fail", "drift_max_rel:+10%")
    first, *rest = done.stdout.splitlines()
    assert first == "regression: 1 figure worse than allowed"
    assert "commit 0123456789ab and uncommitted changes" in rest[0]
    assert (
        "  revnet38 stored batch 32: activation_peak_bytes 96.50 MiB -> 144.75 MiB, +48.25 MiB (+50 %), limit +2%"
        in rest
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["base", "nowhere"], "nowhere: no run here"),
        (["nowhere", "base"], "nowhere: no run here"),
        (["base", "nosuch://run"], "nosuch"),
        (["base", "base", "--fail", "activation_peak_bytes"], "METRIC:+LIMIT"),
        (["base", "base", "--fail", "activation_peak_bytes:+2MB"], "no unit 'MB'"),
        (["base", "base", "--fail", "activation_peek_bytes:+2%"], "Did you mean activation_peak_bytes"),
        (["base", "base", "--fail", "parameter_count:+2%"], "nobody counted"),
        (["base", "base", "--markdown", "no/such/folder.md"], "--markdown no/such/folder.md: cannot be written"),
        (["base", "base", "--markdown", "-", "--json", "-"], "stdout takes one of them"),
        (["base", "base", "--html", "no/such/page.html"], "--html no/such/page.html: cannot be written"),
        (["base", "base", "--html", "-", "--json", "-"], "--json -, --html -: stdout takes one of them"),
        (["base", "base", "--allow-different"], "No such option"),
        (["base"], "Missing argument 'RUN'"),
    ],
)
def test_bad_input_is_refused_in_words(
    revnet_here: Command, tmp_path: Path, base: list[Record], arguments: list[str], message: str
) -> None:
    write(tmp_path / "base", base)
    done = revnet_here("compare", *arguments)
    assert done.returncode == 2, done.stdout
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_record_of_an_unknown_schema_is_bad_input(revnet_here: Command, tmp_path: Path, base: list[Record]) -> None:
    write(tmp_path / "base", base)
    path = tmp_path / "base" / "trials" / f"{base[0].id}.json"
    path.write_text(path.read_text().replace('"schema": 1', '"schema": 9'))
    done = revnet_here("compare", "base", "base")
    assert done.returncode == 2
    assert "schema = 9" in done.stderr


def test_files_are_written_and_stdout_takes_the_place_of_the_text(
    revnet_here: Command, tmp_path: Path, base: list[Record]
) -> None:
    write("memory://compared", base)
    write(tmp_path / "base", base)
    done = revnet_here("compare", "base", "memory://compared", "--markdown", "c.md", "--json", "c.json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("no status worse, and no limit given (--fail) in 3 trials\n")
    assert (tmp_path / "c.md").read_text().startswith("### revnet compare: no status worse")
    assert json.loads((tmp_path / "c.json").read_text())["exit_code"] == 0
    assert revnet_here("compare", "base", "base", "--markdown", "-").stdout.startswith("### revnet compare")
    assert json.loads(revnet_here("compare", "base", "base", "--json", "-").stdout)["regressions"] == []


@pytest.mark.parametrize("code", [0, 1, 3, 4])
def test_a_page_is_written_whatever_the_verdict_and_changes_nothing_of_it(
    revnet_here: Command, tmp_path: Path, base: list[Record], code: int
) -> None:
    runs = {
        0: base,
        1: [*base[:2], scaled(base[2], activation_peak_bytes=1.03)],
        3: [on(base[0], torch="2.14.0+cpu"), *base[1:]],
        4: base[:2],
    }
    write(tmp_path / "base", base)
    write(tmp_path / "run", runs[code])
    plain = revnet_here("compare", "base", "run", *LIMIT)
    done = revnet_here("compare", "base", "run", *LIMIT, "--html", "c.html", "--json", "c.json")
    assert (done.returncode, done.stdout) == (plain.returncode, plain.stdout) == (code, plain.stdout)
    page = (tmp_path / "c.html").read_text()
    data = json.loads((tmp_path / "c.json").read_text())
    assert data["exit_code"] == code
    assert f'<b id="exit-code">{code}</b>' in page
    assert data["verdict"] in page
    assert revnet_here("compare", "base", "run", *LIMIT, "--html", "-").stdout.startswith("<!doctype html>")


def test_half_a_character_does_not_keep_a_page_from_being_written(
    revnet_here: Command, tmp_path: Path, base: list[Record]
) -> None:
    write(tmp_path / "base", base)
    path = tmp_path / "base" / "trials" / f"{base[0].id}.json"
    path.write_text(path.read_text().replace('"PASSIVE"', '"PASS\\ud800IVE"'))
    done = revnet_here("compare", "base", "base", "--html", "c.html")
    assert done.returncode == 0, done.stderr
    assert "PASS\ufffdIVE" in (tmp_path / "c.html").read_text()

"""A report that is watched: written when trials finish, read again by an open page, and for good at the end."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.cli_results import report
from harness.errors import HarnessError
from harness.record import Record
from harness.store import RunStore
from tests.reports.conftest import STUDY, Make

REFRESH = '<meta http-equiv="refresh"'


def test_the_page_follows_the_trials_until_none_is_missing(
    tmp_path: Path, sweep: list[Record], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, *others = sweep[:3]
    store = RunStore(tmp_path / "run")
    store.open_for(STUDY, [record.id for record in sweep[:3]])
    store.write_trial(first, [], b"log")
    page = Path(store.root, "report.html")
    seen: list[tuple[bool, float]] = []

    def finishing() -> Iterator[None]:
        for record in others:
            # Looked at twice before anything has changed.
            seen.append((REFRESH in page.read_text(), page.stat().st_mtime_ns))
            yield
            seen.append((REFRESH in page.read_text(), page.stat().st_mtime_ns))
            store.write_trial(record, [], b"log")
            yield

    looks = finishing()
    monkeypatch.setattr(time, "sleep", lambda seconds: next(looks))
    report(store.uri, watch=True)
    assert [refreshes for refreshes, _ in seen] == [True] * 4
    assert seen[0] == seen[1] != seen[2] == seen[3]
    assert REFRESH not in page.read_text()
    assert "All 3 trials have a record" in page.read_text()
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in printed[:2]] == ["1 trials, 2 missing", "2 trials, 1 missing"]
    assert len(printed) == 3


def test_who_stops_watching_keeps_a_page_that_does_not_reload(
    make_run: Make, sweep: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_run(sweep[:1], missing=2)

    def stop(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", stop)
    report(store.uri, watch=True)
    page = Path(store.root, "report.html").read_text()
    assert REFRESH not in page
    assert "Partial run: 1 of 3 trials have a record" in page


def test_pictures_are_not_watched(make_run: Make, sweep: list[Record]) -> None:
    with pytest.raises(HarnessError, match="Leave --png out"):
        report(make_run(sweep[:1]).uri, png="pictures", watch=True)

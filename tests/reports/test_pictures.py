"""Figures as PNG files: the report's, not blank, and a remedy where they cannot be drawn."""

import importlib.util
import re
import struct
import sys
import zlib
from pathlib import Path

import plotly.graph_objects as go
import pytest

from harness.errors import HarnessError
from harness.record import Record
from harness.store import RunStore
from reports.page import build_report
from reports.pictures import SCALE, WIDTH_PX, find_browser, report_figures, write_pictures
from tests.reports.conftest import Make, predicted, trial

NAMES = ["peak", "saved", "peak-batch", "saved-batch", "time", "predicted", "drift", "angle"]


def browser_or_reason() -> tuple[str, str]:
    try:
        return find_browser(), ""
    except HarnessError as error:
        return "", str(error)


BROWSER, REASON = browser_or_reason()
needs_kaleido = pytest.mark.skipif(importlib.util.find_spec("kaleido") is None, reason="kaleido is not installed")
needs_browser = pytest.mark.skipif(not BROWSER, reason=REASON)


def opened(png: bytes) -> tuple[int, int, list[bytes]]:
    """Width, height and the rows of a PNG file that is not interlaced."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    chunks: list[tuple[bytes, bytes]] = []
    at = 8
    while at < len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        chunks.append((png[at + 4 : at + 8], png[at + 8 : at + 8 + length]))
        at += length + 12
    width, height = struct.unpack(">II", chunks[0][1][:8])
    raw = zlib.decompress(b"".join(data for kind, data in chunks if kind == b"IDAT"))
    row = len(raw) // height
    return width, height, [raw[start : start + row] for start in range(0, len(raw), row)]


def is_blank(rows: list[bytes]) -> bool:
    """Rows are stored as differences from the row above or the pixel before: in an empty picture few are different."""
    return len(set(rows)) < 10


@needs_browser
def test_each_figure_is_a_picture_that_is_not_blank(make_run: Make, sweep: list[Record], tmp_path: Path) -> None:
    figures = report_figures(make_run([predicted(record) for record in sweep]))
    paths = write_pictures(figures, tmp_path / "new" / "pictures", BROWSER)
    assert [path.name for path in paths] == [f"{name}.png" for name in NAMES]
    for path, figure in zip(paths, figures.values(), strict=True):
        width, height, rows = opened(path.read_bytes())
        assert (width, height) == (SCALE * WIDTH_PX, SCALE * figure.to_dict()["layout"]["height"])
        assert not is_blank(rows)
    # What is there is written over.
    (again,) = write_pictures({"peak": figures["drift"]}, tmp_path / "new" / "pictures", BROWSER)
    assert again.read_bytes() == paths[NAMES.index("drift")].read_bytes()


@needs_browser
def test_a_blank_picture_would_be_seen(tmp_path: Path) -> None:
    empty = go.Figure().update_xaxes(visible=False).update_yaxes(visible=False).update_layout(template="none")
    (path,) = write_pictures({"empty": empty}, tmp_path, BROWSER)
    assert is_blank(opened(path.read_bytes())[2])


def test_the_pictures_are_the_figures_of_the_report(make_run: Make, sweep: list[Record]) -> None:
    store = make_run([predicted(record) for record in sweep])
    in_the_page = re.findall(r'id="figure-([\w-]+)"', build_report(store))
    assert [name for name in in_the_page if name in report_figures(store)] == list(report_figures(store))


@pytest.mark.parametrize("finished", [True, False])
def test_of_what_was_not_measured_there_is_no_picture(make_run: Make, finished: bool, tmp_path: Path) -> None:
    records = [trial(1, depth=38, status="oom", reason="too large")] if finished else []
    figures = report_figures(make_run(records, missing=2))
    assert figures == {}
    assert report_figures(RunStore(tmp_path / "nothing")) == {}


@needs_kaleido
def test_without_a_figure_nothing_is_written(tmp_path: Path) -> None:
    assert write_pictures({}, tmp_path / "pictures", "no browser is asked") == []
    assert list(tmp_path.iterdir()) == []


def test_without_kaleido_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kaleido", None)
    with pytest.raises(HarnessError, match=r"pip install 'revnet-harness\[png\]'"):
        find_browser()


@needs_kaleido
def test_without_a_browser_the_names_that_were_looked_for_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from choreographer.browsers.chromium import Chromium  # pyright: ignore[reportMissingImports]

    monkeypatch.setattr(Chromium, "find_browser", lambda **_: None)
    with pytest.raises(HarnessError, match=r"google-chrome, .*chromium, .*set BROWSER_PATH"):
        find_browser()


@needs_kaleido
def test_a_browser_path_that_is_no_file_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BROWSER_PATH", str(tmp_path / "absent"))
    with pytest.raises(HarnessError, match=r"BROWSER_PATH is .*absent, which is no file"):
        find_browser()


@needs_kaleido
def test_a_browser_that_draws_nothing_is_named(tmp_path: Path) -> None:
    browser = tmp_path / "browser"
    browser.write_text("#!/bin/sh\n")
    browser.chmod(0o755)
    with pytest.raises(HarnessError, match=r"browser: did not draw the figures: .* BROWSER_PATH") as raised:
        write_pictures({"peak": go.Figure()}, tmp_path / "pictures", str(browser))
    assert len(str(raised.value)) < 300


@needs_kaleido
def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HarnessError, match="file/pictures: cannot be written"):
        write_pictures({"peak": go.Figure()}, tmp_path / "file" / "pictures", "no browser is asked")

"""The rows of a page's tables: in which order they stand, and what a spreadsheet gets of them."""

import csv
import io
from pathlib import Path

import pytest

from harness.record import Record
from harness.store import RunStore
from reports.compare_page import as_html
from reports.frames import laws, trials_frame
from reports.page import build_report
from tests.reports.browser import Opened, needs_browser
from tests.reports.conftest import PEAK, STUDY, Compare, scaled, trial, with_metrics, without

pytestmark = needs_browser


def opened_report(session: Opened, records: list[Record], folder: Path) -> RunStore:
    store = RunStore(folder)
    store.open_for(STUDY, [record.id for record in records])
    for record in records:
        store.write_trial(record, [], b"log")
    session.complaints.clear()
    session.open(Path(store.write_report(build_report(store))))
    return store


def column(page: Opened, heading: str) -> list[str]:
    """The cells under a heading, as they stand."""
    heads = [head.strip() for head in page.page.locator("#table thead th").all_inner_texts()]
    place = next(place for place, head in enumerate(heads) if head.split(" ↑")[0].split(" ↓")[0] == heading)
    return page.page.locator(f"#table tbody tr > :nth-child({place + 1})").all_inner_texts()


def sort_by(page: Opened, heading: str) -> None:
    """Until it is done, which the table does in a task of its own."""
    head = page.page.locator("#table thead th").filter(has_text=heading).first
    before = head.get_attribute("aria-sort")
    head.click()
    page.page.wait_for_function(
        "([head, before]) => head.getAttribute('aria-sort') !== before", arg=[head.element_handle(), before]
    )


def test_what_was_not_measured_is_last_either_way(session: Opened, tmp_path: Path) -> None:
    drifts = (2e-6, 0.0, 1e-6, 3e-6)
    records = [with_metrics(trial(n, seed=n, depth=14 + 12 * n), drift_max_rel=drift) for n, drift in enumerate(drifts)]
    records.insert(2, trial(9, depth=None, status="oom", reason="too large"))
    opened_report(session, records, tmp_path / "run")
    numbers, depths = ["0", "1.00e-06", "2.00e-06", "3.00e-06"], ["14", "26", "38", "50"]
    for heading, values, none in (("largest relative drift", numbers, "n/a"), ("depth", depths, "–")):
        sort_by(session, heading)
        assert column(session, heading) == [*values, none]
        sort_by(session, heading)
        assert column(session, heading) == [*reversed(values), none]
    assert session.complaints == []


@pytest.mark.parametrize("ascending", [True, False])
def test_what_is_not_finite_stands_between_numbers_and_what_there_is_not(opened: Opened, ascending: bool) -> None:
    shown = opened.page.evaluate(
        "up => [3, NaN, -1, null, Infinity, 0, null, -Infinity].sort(inOrder(up)).map(String)", ascending
    )
    assert shown[:3] == (["-1", "0", "3"] if ascending else ["3", "0", "-1"])
    assert sorted(shown[3:6]) == ["-Infinity", "Infinity", "NaN"]
    assert shown[6:] == ["null", "null"]
    words = opened.page.evaluate("up => ['revnet110', 'revnet26', null, 'Resnet'].sort(inOrder(up))", ascending)
    assert words == [*(["Resnet", "revnet26", "revnet110"][:: 1 if ascending else -1]), None]


def test_a_comparison_is_sorted_the_same_way(session: Opened, compared: Compare, tmp_path: Path) -> None:
    base = [trial(n, depth=depth) for n, depth in enumerate((14, 26, 110))]
    run = [scaled(base[0], **{PEAK: 1.5}), without(base[1], PEAK, "the audit was off"), scaled(base[2], **{PEAK: 2})]
    page = tmp_path / "changes.html"
    page.write_text(as_html(compared(base, run, f"{PEAK}:+2%")))
    session.complaints.clear()
    session.open(page)
    session.page.fill("#filter", PEAK)
    rows = "[...document.querySelectorAll('#table tbody tr:not([hidden])')].map((row) => row.cells[{}].innerText)"
    for wanted in (["+50 %", "+100 %", "n/a"], ["+100 %", "+50 %", "n/a"]):
        session.page.click("#table thead th:nth-child(7) button")
        shown = session.page.evaluate(rows.format(6))
        assert [text.split("(")[-1].rstrip(")") for text in shown] == wanted
    session.page.click("#table thead th:nth-child(1) button")
    assert [text.split()[0] for text in session.page.evaluate(rows.format(0))] == ["revnet14", "revnet26", "revnet110"]
    assert session.complaints == []


def test_the_csv_has_what_is_the_same_in_all_too(opened: Opened, records: list[Record], tmp_path: Path) -> None:
    assert "compute" not in column_heads(opened)
    with opened.page.expect_download() as awaited:
        opened.page.click("#trials .csv")
    awaited.value.save_as(tmp_path / "trials.csv")
    rows = list(csv.DictReader((tmp_path / "trials.csv").open(newline="")))
    assert {row["compute"] for row in rows} == {"fp32"}
    assert {row["data.name"] for row in rows} == {"cifar10"}
    assert {row["parameter_count"] for row in rows} == {""}
    named = {name for record in records for name in (*record.metrics, *record.unmeasured)}
    assert named <= set(rows[0])


def column_heads(opened: Opened) -> list[str]:
    return [head.strip() for head in opened.page.locator("#table thead th").all_inner_texts()]


@pytest.mark.parametrize("metric", ["device_use", "mfu"])
def test_a_metric_that_is_the_same_in_all_is_a_column_with_its_value(
    session: Opened, metric: str, tmp_path: Path
) -> None:
    records = [with_metrics(trial(n, depth=depth), **{metric: 0.25}) for n, depth in enumerate((14, 26))]
    opened_report(session, records, tmp_path / "run")
    with session.page.expect_download() as awaited:
        session.page.click("#trials .csv")
    rows = list(csv.DictReader(io.StringIO(Path(awaited.value.path()).read_text())))
    assert [row[metric] for row in rows] == ["0.25", "0.25"]


def test_what_a_spreadsheet_would_run_is_text_and_a_number_stays_one(opened: Opened) -> None:
    rows = [["-5", "-1e-3", "+2", -0.5, None, "-Infinity"], ["=cmd()", "-cmd", "+1+cmd", "@x", "-", "\tx"]]
    [numbers, texts] = csv.reader(io.StringIO(opened.page.evaluate("rows => csvOf(rows)", rows)))
    assert numbers == ["-5", "-1e-3", "+2", "-0.5", "", "-Infinity"]
    assert texts == ["'=cmd()", "'-cmd", "'+1+cmd", "'@x", "'-", "'\tx"]


def test_the_lines_are_in_the_page_and_nothing_links_to_a_file_beside_it(
    session: Opened, records: list[Record], tmp_path: Path
) -> None:
    failed = trial(98, depth=62, status="failed", reason="why")
    store = opened_report(session, [*records, failed], tmp_path / "run")
    with session.page.expect_download() as awaited:
        session.page.click("#laws")
    assert awaited.value.suggested_filename == "laws.csv"
    assert Path(awaited.value.path()).read_text() == laws(trials_frame(store)).to_csv(index=False)
    session.page.select_option(".dt-length select", "-1")
    hrefs = session.page.evaluate("[...document.querySelectorAll('[href], [src]')].map((e) => e.getAttribute('href'))")
    assert [href for href in hrefs if href and not href.startswith("#")] == []

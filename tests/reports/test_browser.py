"""The report in a real browser, from disk and without a network: drawn, filtered, reached by keyboard, printed."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe

from harness.record import Record
from harness.store import RunStore
from reports.compare_page import as_html
from reports.page import build_report
from tests.reports.browser import Opened, needs_browser
from tests.reports.conftest import STUDY, Compare, drift_rows, repeats, scaled

pytestmark = needs_browser
SHOWN = ["peak", "time", "predicted", "drift"]
VIEWS = ("peak", "saved", "peak-batch", "saved-batch", "time", "predicted", "drift", "angle")


def shown_lines(heat_map: dict[str, Any]) -> int:
    return sum(any(value is not None for value in line) for line in heat_map["z"])


def test_every_figure_is_drawn_without_a_complaint_and_without_a_network(opened: Opened) -> None:
    opened.walk()
    for radio in opened.page.query_selector_all(".views input"):
        radio.check()
        opened.walk()
    drawn = opened.page.evaluate("[...document.querySelectorAll('.plot .main-svg')].map(e => e.closest('.plot').id)")
    steps = {name for name in drawn if name.startswith("figure-step-")}
    assert len(steps) == 2
    assert {f"figure-{anchor}" for anchor in VIEWS} == set(drawn) - steps
    assert opened.complaints == []


def test_a_complaint_of_a_page_is_heard(session: Opened, tmp_path: Path) -> None:
    """Negative control of the test above."""
    session.complaints.clear()
    page = tmp_path / "page.html"
    script = "fetch('https://127.0.0.1:1/x').catch(() => 0); console.warn('w'); throw Error('thrown')"
    page.write_text(f"<html data-ready><script>{script}</script>")
    session.open(page)
    session.page.wait_for_timeout(200)
    assert {complaint.split(":")[0] for complaint in session.complaints} >= {"request", "warning", "error"}


def test_one_filter_acts_on_all_figures_and_on_the_table_and_stays_in_the_address(opened: Opened, report: Path) -> None:
    opened.walk()
    before = {anchor: len(opened.drawn(anchor)) for anchor in ("peak", "time", "predicted")}
    opened.narrow("batch_size", "16")
    opened.narrow("strategy", "revnet · stored", "revnet · reconstructed")
    assert opened.page.inner_text("#shown") == "6 of 25 trials"
    assert opened.page.inner_text("#hint").startswith("Sentences and summary are of all trials")
    opened.walk()

    def check() -> None:
        assert {t["name"] for t in opened.drawn("predicted") if t["mode"] == "markers"} == {
            "revnet · stored",
            "revnet · reconstructed",
        }
        assert sum(len(t["x"]) for t in opened.drawn("time") if " · " in t.get("name", "")) == 6
        points = [t for t in opened.drawn("peak") if t["mode"] == "markers"]
        assert sorted(len(t["x"]) for t in points) == [3, 3]
        assert max(shown_lines(t) for t in opened.drawn("drift")) == 3
        assert opened.page.locator("#table tbody tr").count() == 6
        assert opened.page.inner_text("#shown") == "6 of 25 trials"

    check()
    assert all(len(opened.drawn(anchor)) < count for anchor, count in before.items())
    fragment = "#" + opened.page.url.split("#")[1]
    opened.page.goto("about:blank")
    opened.open(report, fragment)
    opened.walk()
    check()
    opened.page.click("#reset")
    assert opened.page.inner_text("#shown") == "25 of 25 trials"
    assert "#" not in opened.page.url
    assert not opened.page.is_visible("#hint")
    assert opened.complaints == []


def test_any_two_trials_stand_side_by_side_on_one_scale(opened: Opened, records: list[Record]) -> None:
    page = opened.page
    opened.walk()
    plots = page.locator("#step .plot")
    tops = [page.evaluate("e => e.layout.yaxis.range[1]", plot) for plot in plots.element_handles()]
    assert tops[0] == tops[1]
    peaks = [max(page.evaluate("e => e.data[0].y", plot)) for plot in plots.element_handles()]
    assert peaks == [8.5 * 9, 6.0] or peaks[0] > peaks[1]
    page.select_option("#step .view:first-child select", label="revnet38 · checkpointed, batch 16")
    page.wait_for_function("document.querySelector('#step .plot').layout.title.text.includes('checkpointed, batch 16')")
    [record] = [
        r for r in records if (r.spec["depth"], r.spec["activations"], r.spec["batch_size"]) == (38, "checkpointed", 16)
    ]
    shown = page.evaluate("document.querySelector('#step .plot').data[0].y")
    assert max(shown) == pytest.approx(record.metrics["activation_peak_bytes"] / 2**20, abs=1e-3)
    assert "checkpointed, batch 16" in (page.get_attribute("#step .figure", "aria-label") or "")
    opened.narrow("batch_size", "32")
    assert "batch 32" in page.locator("#step select").first.locator("option:checked").inner_text()
    assert opened.complaints == []


def test_a_filter_in_passing_loses_no_choice_of_trials_and_an_empty_figure_says_why(opened: Opened) -> None:
    page = opened.page
    opened.walk()
    chosen = "[...document.querySelectorAll('#step select')].map((select) => select.value)"
    before = page.evaluate(chosen)
    page.fill("#filter", "checkpointed")
    during = page.evaluate(chosen)
    assert len({*during}) == 2
    assert not {*during} & {*before}
    page.fill("#filter", "nothing has this")
    page.wait_for_function("document.querySelector('#step .plot').data.length === 0")
    assert page.inner_text("#shown") == "0 of 25 trials"
    hidden = "document.querySelector('#step .plot').layout.annotations[0].text"
    assert page.evaluate(hidden) == "The filter hides all trials that this figure draws."
    page.click("#reset")
    page.wait_for_function("document.querySelector('#step .plot').data.length > 0")
    assert page.evaluate(chosen) == before
    assert opened.complaints == []


def test_what_is_the_same_in_all_is_found_and_an_address_of_elsewhere_says_so(opened: Opened, report: Path) -> None:
    opened.page.fill("#filter", "cifar10")
    assert opened.page.inner_text("#shown") == "25 of 25 trials"
    assert opened.page.is_visible("#reset")
    opened.page.goto("about:blank")
    opened.open(report, "#strategy=of+another")
    assert opened.page.inner_text("#shown") == "25 of 25 trials; not in this report: of another"


def test_words_search_the_trials_and_their_reasons(opened: Opened) -> None:
    opened.page.fill("#filter", "exact 16")
    assert opened.page.inner_text("#shown") == "3 of 25 trials"
    opened.page.fill("#filter", "too large")
    assert opened.page.inner_text("#shown") == "1 of 25 trials"


def test_each_control_is_reached_by_keyboard_and_works_by_it(opened: Opened) -> None:
    page = opened.page
    opened.walk()
    wanted = page.evaluate("""
        [...document.querySelectorAll('button, input, summary, a, [tabindex="0"]')].filter((e) =>
            e.checkVisibility({ visibilityProperty: true }) && !e.disabled && e.tabIndex >= 0
            && !e.closest('.js-plotly-plot') && (e.type !== 'radio' || e.checked)).map((e) => {
                e.dataset.wanted = 'yes'; return e.outerHTML.slice(0, 60); })
    """)
    assert len(wanted) > 30
    page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
    for _ in range(2 * len(wanted)):
        page.keyboard.press("Tab")
        page.evaluate("delete document.activeElement?.dataset.wanted")
    assert page.evaluate("[...document.querySelectorAll('[data-wanted]')].map((e) => e.outerHTML.slice(0, 80))") == []
    page.focus("[data-facet=batch_size] summary")
    for key in ("Enter", "Tab", "Space", "Escape"):
        page.keyboard.press(key)
    assert page.inner_text("#shown") == "12 of 25 trials"
    assert page.evaluate("document.activeElement.textContent") == "batch: 16"
    page.focus("#memory .views input:checked")
    page.keyboard.press("ArrowDown")
    assert page.is_visible("[data-anchor=saved]")
    assert not page.is_visible("[data-anchor=peak]")
    page.focus("[data-anchor=saved] .behind summary")
    page.keyboard.press("Enter")
    page.wait_for_selector("[data-anchor=saved] .behind tbody tr:nth-child(6)")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_serious_fault(opened: Opened, scheme: Any) -> None:
    opened.page.emulate_media(color_scheme=scheme)
    opened.walk()
    assert serious_faults(opened) == {}


def serious_faults(opened: Opened) -> dict[str, list[str]]:
    found = Axe().run(opened.page).response["violations"]
    serious = [fault for fault in found if fault["impact"] in ("serious", "critical")]
    return {fault["id"]: [node["html"][:90] for node in fault["nodes"]][:4] for fault in serious}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_none_in_a_comparison_either(session: Opened, compared: Compare, scheme: Any, tmp_path: Path) -> None:
    base = repeats(depth=14) + repeats(depth=26)
    page = tmp_path / "changes.html"
    run = [scaled(record, activation_peak_bytes=1.1) for record in base]
    page.write_text(as_html(compared(base, run, "activation_peak_bytes:+2%")))
    session.complaints.clear()
    session.page.emulate_media(media="screen", color_scheme=scheme)
    session.open(page)
    assert serious_faults(session) == {}
    assert session.complaints == []


def test_axe_finds_a_fault_that_is_planted(opened: Opened) -> None:
    """Negative control of the test above."""
    opened.page.evaluate(
        "document.querySelector('#filter').closest('label').replaceWith(document.querySelector('#filter'))"
    )
    opened.page.evaluate("document.querySelector('#filter').removeAttribute('placeholder')")
    assert any(fault["impact"] == "critical" for fault in Axe().run(opened.page).response["violations"])


def test_the_print_view_has_every_table_and_every_trial(opened: Opened, records: list[Record]) -> None:
    opened.page.emulate_media(media="print")
    opened.page.wait_for_selector("html[data-whole]", state="attached")
    for anchor in VIEWS:
        assert opened.page.locator(f"[data-anchor={anchor}] .behind tbody tr").count() > 2, anchor
        assert opened.page.is_visible(f"[data-anchor={anchor}] .behind table")
    printed = opened.page.inner_text("#table")
    assert all(record.id in printed for record in records)
    assert not opened.page.is_visible("#choose")
    # And back to what the reader had.
    opened.page.emulate_media(media="screen")
    opened.page.wait_for_selector("html:not([data-whole])", state="attached")
    assert [anchor for anchor in VIEWS if opened.page.is_visible(f"[data-anchor={anchor}]")] == SHOWN
    assert opened.page.locator(".behind[open]").count() == 0
    assert opened.page.locator("#table tbody tr").count() == 25


def test_numbers_of_the_page_are_those_of_the_records(opened: Opened, records: list[Record], tmp_path: Path) -> None:
    columns = opened.page.evaluate("unpacked('data').then((text) => JSON.parse(text).columns)")
    by_id = {record.id: record for record in records}
    assert sorted(columns["ids"]) == sorted(by_id)
    for column in columns["metrics"]:
        for trial_id, value in zip(columns["ids"], column["values"], strict=True):
            assert value == by_id[trial_id].metrics.get(column["name"]), column["name"]
    opened.page.select_option(".dt-length select", "-1")
    heads = opened.page.locator("#table thead th").all_inner_texts()
    place = [head.strip() for head in heads].index("activation peak (MiB)")
    for row in opened.page.locator("#table tbody tr").all():
        cells = row.locator("td").all_inner_texts()
        value = by_id[cells[0]].metrics.get("activation_peak_bytes")
        assert cells[place] == ("n/a" if value is None else f"{value / 2**20:.2f}")

    with opened.page.expect_download() as awaited:
        opened.page.click("#trials .csv")
    awaited.value.save_as(tmp_path / "trials.csv")
    rows = list(csv.DictReader((tmp_path / "trials.csv").open(newline="")))
    assert len(rows) == len(records)
    for row in rows:
        metrics = by_id[row["id"]].metrics
        assert {name: float(row[name]) for name in metrics} == pytest.approx(metrics, rel=1e-15, abs=0)
    assert next(row["reason"] for row in rows if "oom" in row["status"]) == "too large: <b>1 GiB</b>, =cmd()"


def test_a_figure_s_table_and_its_csv_hold_what_is_drawn(opened: Opened, records: list[Record], tmp_path: Path) -> None:
    opened.walk()
    with opened.page.expect_download() as awaited:
        opened.page.click("[data-anchor=predicted] .csv")
    awaited.value.save_as(tmp_path / "predicted.csv")
    heads, *rows = csv.reader((tmp_path / "predicted.csv").open(newline=""))
    assert heads == ["series", "panel", "measured (MiB)", "predicted (MiB)", "depth", "batch", "trials"]
    names = ("activation_peak_bytes", "predicted_activation_peak_bytes")
    wanted = sorted([float(record.metrics[name]) / 2**20 for name in names] for record in records if record.metrics)
    found = sorted([float(row[2]), float(row[3])] for row in rows if row[1] == "activation peak")
    assert len(found) == len(wanted) > 10
    assert np.allclose(found, wanted, rtol=1e-12, atol=0)
    with opened.page.expect_download() as awaited:
        opened.page.click("[data-anchor=predicted] .svg")
    awaited.value.save_as(tmp_path / "predicted.svg")
    assert (tmp_path / "predicted.svg").read_text().lstrip().startswith("<svg")


def csv_of(opened: Opened, anchor: str, path: Path) -> list[dict[str, str]]:
    with opened.page.expect_download() as awaited:
        opened.page.click(f"[data-anchor={anchor}] .csv")
    awaited.value.save_as(path)
    return list(csv.DictReader(path.open(newline="")))


def test_the_csv_of_times_says_whose_they_are_and_that_of_drift_has_every_digit(
    opened: Opened, records: list[Record], tmp_path: Path
) -> None:
    opened.narrow("batch_size", "16")
    opened.walk()
    by_id = {record.id: record for record in records}
    rows = csv_of(opened, "time", tmp_path / "time.csv")
    assert len(rows) == 12
    for row in rows:
        spec, metrics = by_id[row["trials"]].spec, by_id[row["trials"]].metrics
        assert (row["depth"], row["batch"]) == (str(spec["depth"]), "16")
        ends = [float(row[f"bar {end} (ms)"]) for end in ("from", "to")]
        assert ends == pytest.approx([1e3 * metrics["step_q1_s"], 1e3 * metrics["step_q3_s"]], rel=1e-12)
        assert row["bar is"] == "quartiles of the steps"
        assert row["on the Pareto front"] in ("yes", "no")
    errors = csv_of(opened, "drift", tmp_path / "drift.csv")
    found = [float(row["relative error"]) for row in errors if row["network · precision"] == "revnet38 · fp32"]
    assert found == [3e-7 / (block + 1) for block in range(9)]


@pytest.mark.parametrize("count", [0, 1])
def test_a_page_of_one_trial_or_of_none_makes_sense(
    session: Opened, records: list[Record], count: int, tmp_path: Path
) -> None:
    store = RunStore(tmp_path / "run")
    store.open_for(STUDY, [record.id for record in records])
    for record in records[:count]:
        store.write_trial(record, list(drift_rows(record)), b"log")
    session.complaints.clear()
    session.open(Path(store.write_report(build_report(store))))
    session.walk()
    assert f"Partial run: {count} of 25 trials have a record" in session.page.inner_text(".verdict")
    assert session.page.locator("#table tbody tr").count() == count
    assert session.complaints == []

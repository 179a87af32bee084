"""The page: it answers with numbers, hides nothing, loads nothing, and runs nothing that a record says."""

import re

import pytest

from harness.record import Record, Status
from reports.fidelity import guard_sentences
from reports.frames import trials_frame
from reports.page import build_report
from reports.tails import LINES, TRIALS, tails
from tests.reports.conftest import Make, predicted, trial, with_metrics
from tests.reports.packed import packed_in


def own_html(html: str) -> str:
    """The page without plotly.js, which mentions many addresses that it never loads."""
    start = html.index("<script>")
    return html[:start] + html[html.index("</script>", start) :]


def test_the_verdict_answers_with_numbers(make_run: Make, sweep: list[Record]) -> None:
    html = build_report(make_run(sweep))
    assert "Does memory grow?" in html
    assert "All 24 trials have a record: ok 24." in html
    assert (
        "batch 32: the growth of the activation peak per block (from 3 depths, ± half the 95 % interval): 8.50" in html
    )
    assert "8.50 ± 0 MiB with stored" in html
    assert "0.125 ± 0 MiB with reconstructed" in html
    assert "The last is 1.5 % of the first." in html
    assert "a step takes 1.35 times as long reconstructed as stored (median of 6 cells, 1.35 to 1.35)" in html
    assert "the relative drift is 0: every rebuilt input equals the original bit for bit" in html
    assert "and uncommitted changes" in html


def test_the_prediction_stands_right_above_what_was_measured(make_run: Make, sweep: list[Record]) -> None:
    html = build_report(make_run(sweep))
    verdict = html[html.index('aria-label="Verdict"') :]
    places = [verdict.index(text) for text in ("reconstructed stays flat", "to hold against it", "8.50 ± 0 MiB with")]
    assert places == sorted(places)
    without = build_report(make_run(sweep, study={"name": "x"}, name="without"))
    assert "prediction:" not in own_html(without)
    assert "to hold against it" not in without
    assert "What was measured:" in without


def test_the_law_says_how_straight_it_is(make_run: Make, sweep: list[Record]) -> None:
    html = build_report(make_run(sweep))
    assert "8.50 ± 0" in html
    assert html.count("Every point is on its line to the byte.") == 2
    assert 'data-name="laws.csv"' in html
    assert packed_in(html)["laws"].startswith("model,strategy,batch_size,metric,slope_bytes")
    peak = int(sweep[0].metrics["activation_peak_bytes"])
    bent = [with_metrics(sweep[0], activation_peak_bytes=peak + 3 * 2**20), *sweep[1:]]
    html = build_report(make_run(bent))
    assert "8.0 ± 3.7 (3 depths)" in html
    assert "The point farthest off its line: 1.00 MiB (revnet · stored, batch 16, 3 depths)." in html


def test_of_two_depths_no_line_is_claimed(make_run: Make, sweep: list[Record]) -> None:
    html = build_report(make_run([record for record in sweep if record.spec["depth"] < 38]))
    assert html.count("Two depths are always in line; 3 would show whether it is one.") == 2
    assert "8.50 ±" not in html
    assert "8.50" in html


def test_predictions_have_a_section_where_there_are_any(make_run: Make, sweep: list[Record]) -> None:
    assert 'id="predicted"' not in build_report(make_run(sweep))
    html = build_report(make_run([predicted(record) for record in sweep]))
    assert 'id="figure-predicted"' in html
    assert "24 trials, predicted against measured: saved activations to the byte in all" in html


def test_the_page_says_what_the_bars_of_step_times_are(make_run: Make, sweep: list[Record]) -> None:
    assert "Bars: from the first to the third quartile of the steps." in build_report(make_run(sweep))
    new = [with_metrics(record, step_median_low_s=0.5, step_median_high_s=9.0) for record in sweep]
    html = build_report(make_run(new))
    assert "Bars: the 95 % interval of the median" in html
    assert "quartile" not in own_html(html)
    assert "of 4 trials with fewer steps or older records, the quartiles" in build_report(make_run(new[4:] + sweep[:4]))


def test_a_partial_run_says_so_and_names_what_is_missing(make_run: Make, sweep: list[Record]) -> None:
    html = build_report(make_run(sweep[:5], missing=3))
    assert "Partial run: 5 of 8 trials have a record (ok 5); 3 are missing." in html
    assert "f00000000002" in html


@pytest.mark.parametrize("status", ["oom", "diverged", "unsupported", "timeout", "crashed", "failed"])
def test_every_status_is_there_with_its_reason_and_log(make_run: Make, status: Status) -> None:
    record = trial(7, status=status, reason=f"because of {status}")
    html = build_report(make_run([trial(1), record]))
    assert f"because of {status}" in html
    is_no_result = status in ("timeout", "crashed", "failed")
    assert ("came to no result" in html) == is_no_result
    assert ("<pre>log</pre>" in html) == is_no_result
    assert re.search(r"<code>revnet logs \S+/run ID</code>", html)


def test_of_a_log_the_end_is_in_the_page_as_text_and_of_many_trials_the_first(make_run: Make) -> None:
    failed = [trial(n, seed=n, status="failed", reason="x") for n in range(TRIALS + 1)]
    store = make_run(failed)
    store.write_log(
        failed[0].id, "\n".join(["early", *["line"] * LINES, "<b>last</b> \udc80"]).encode("utf8", "replace")
    )
    store.write_log(failed[1].id, b" \n")
    found = tails(store, [trial(99, status="oom"), *failed])
    assert list(found) == [record.id for record in failed[:TRIALS] if record is not failed[1]]
    assert found[failed[0].id] == "\n".join([*["line"] * (LINES - 1), "<b>last</b> ?"])
    html = build_report(store)
    assert "&lt;b&gt;last&lt;/b&gt; ?" in html
    assert "early" not in own_html(html)


def test_what_was_not_measured_has_its_reason(make_run: Make) -> None:
    html = build_report(make_run([trial(1)]))
    [column] = [column for column in packed_in(html)["columns"]["metrics"] if column["name"] == "parameter_count"]
    assert (column["values"], column["texts"]["words"], column["whys"]["words"]) == (
        [None],
        ["n/a"],
        ["nobody counted"],
    )


def test_text_of_a_record_or_a_study_is_only_text(make_run: Make) -> None:
    evil = "<script>alert(1)</script>"
    html = build_report(
        make_run([trial(1, status="failed", reason=evil)], study={"name": "x", "question": evil, "predict": evil})
    )
    assert evil not in html
    assert html.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 3


def test_the_page_loads_nothing(make_run: Make, sweep: list[Record]) -> None:
    html = own_html(build_report(make_run(sweep)))
    assert not re.search(r"""(src|href)\s*=\s*["']?\s*(https?:)?//""", html)
    assert "@import" not in html
    assert not re.search(r"""url\((?!["']?data:)""", html)


@pytest.mark.parametrize("records", [[], [trial(1)], [trial(1, status="crashed", reason="x")], [trial(1, depth=None)]])
def test_a_small_run_has_a_page_too(make_run: Make, records: list[Record]) -> None:
    for study in ({"name": "small"}, None):
        if records or study:
            assert "All trials" in build_report(make_run(records, study=study))


def test_a_share_too_small_to_mean_anything_is_not_spelled_out(make_run: Make) -> None:
    flat = [trial(n, depth=depth, activations="reconstructed") for n, depth in enumerate((14, 26, 38))]
    flat = [
        record.model_copy(update={"metrics": record.metrics | {"activation_peak_bytes": 2**24 + n}})
        for n, record in enumerate(flat)
    ]
    html = build_report(make_run([*flat, *(trial(10 + n, depth=depth) for n, depth in enumerate((14, 26, 38)))]))
    assert "The last is less than 0.1 % of the first." in html


def test_a_trial_stands_beside_the_stored_one_of_its_own_image_size(make_run: Make) -> None:
    records = []
    for number, size in enumerate((32, 64)):
        for activations, peak_mib in (("stored", 30), ("reconstructed", 10)):
            data = {"name": "synthetic", "path": None, "image_size": size}
            record = trial(2 * number + (activations == "stored"), activations=activations, data=data)
            peak = {"activation_peak_bytes": peak_mib * size * 2**20}
            records.append(record.model_copy(update={"metrics": record.metrics | peak}))
    html = build_report(make_run(records))
    assert "the peak is 320.0 MiB reconstructed and 960.0 MiB stored" in html
    assert "the peak is 640.0 MiB reconstructed · 64 px and 1920.0 MiB stored" in html
    assert "data.image size" in [column["heading"] for column in packed_in(html)["columns"]["spec"]]


def test_what_guards_found_is_said_by_strategy_and_nothing_where_there_was_none(make_run: Make) -> None:
    guard = {"activations": "reconstructed", "guard_every": 50, "guard_tolerance": 1e-3, "guard_action": "store"}
    sound = with_metrics(trial(1, **guard), guard_checks=4, guard_rel_max=3e-6)
    drifting = with_metrics(trial(2, seed=1, **guard), guard_checks=2, guard_rel_max=0.25, guard_stored_step=51)
    stopped = trial(3, status="diverged", **(guard | {"guard_action": "stop"}))
    stopped = with_metrics(stopped, guard_checks=1)
    store = make_run([trial(0), sound, drifting, stopped])
    sentences = guard_sentences(trials_frame(store))
    assert sentences == [
        "revnet · reconstructed · guard every 50: in training a guard compared 1 rebuilt input and found an error that "
        "is not finite; 1 of 1 trials diverged.",
        "revnet · reconstructed · guard every 50 · guard stores: in training a guard compared 6 rebuilt inputs and "
        "found a relative error of at most 0.25; 1 of 2 trials stored activations after step 51.",
    ]
    assert sentences[1] in build_report(store)
    assert guard_sentences(trials_frame(make_run([trial(0)], name="plain"))) == []

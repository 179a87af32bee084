"""The table of all trials: every metric is in it, and what all trials have in common is said once."""

import pytest

from harness.record import Record
from reports.frames import frame_of, trials_frame
from reports.table import Table, trials_table
from tests.reports.conftest import MIB, Make, trial, with_metrics


def table_of(make_run: Make, records: list[Record]) -> Table:
    store = make_run(records)
    return trials_table(trials_frame(store), store.read_records())


@pytest.mark.parametrize(
    ("name", "value", "heading", "text"),
    [
        ("allocated_peak_bytes", 3 * MIB // 2, "allocated peak (MiB)", "1.50"),
        ("buffer_bytes", 12, "buffer (MiB)", "<0.01"),
        ("step_median_rank_spread_s", 0.0123, "step median rank spread (ms)", "12.3"),
        ("tokens_per_s", 12345.6, "tokens/s", "12,346"),
        ("device_peak_flops_per_s", 989.4e12, "device peak flops/s", "9.894e+14"),
        ("flops_recompute", 284295168, "flops recompute (GFLOP)", "0.2843"),
        ("mfu", 0.412, "MFU (%)", "41.2"),
        ("an_angle_deg", 2e-5, "an angle (°)", "2.00e-05"),
        ("a_metric_of_tomorrow", 2.5, "a metric of tomorrow", "2.5"),
    ],
)
def test_a_metric_that_is_no_main_one_has_a_column_with_its_unit(
    make_run: Make, name: str, value: float, heading: str, text: str
) -> None:
    table = table_of(make_run, [with_metrics(trial(1, depth=14), **{name: value}), trial(2, depth=26)])
    place = [column.name for column in table.metrics].index(name)
    assert table.metrics[place].heading == heading
    assert table.metrics[place].more
    assert [row.metrics[place].text for row in table.rows] == [text, "n/a"]
    assert table.rows[1].metrics[place].why == "not recorded"


def test_what_is_the_same_in_all_is_said_once_and_what_differs_is_not(make_run: Make) -> None:
    records = [
        with_metrics(trial(n, depth=depth), predicted_batch_bytes=MIB, flops_forward=depth * 10**9)
        for n, depth in enumerate((14, 26))
    ]
    table = table_of(make_run, records)
    assert "predicted batch (MiB) 1.00" in table.same
    assert "compute fp32" in table.same
    assert "compute" not in table.spec
    assert "flops_forward" in {column.name for column in table.metrics}

    store = make_run([trial(3, compute="bf16")], study=None)
    other = trials_table(trials_frame(store), store.read_records())
    assert "compute" in other.spec
    assert "predicted_batch_bytes" in {column.name for column in other.metrics}


def test_what_no_trial_measured_is_said_once_with_its_reason(make_run: Make) -> None:
    why = {"mfu": "n/a: the peak is not known", "hfu": "n/a: the peak is not known"}
    records = [trial(n, depth=depth).model_copy(update={"unmeasured": why}) for n, depth in enumerate((14, 26))]
    assert "MFU (%), HFU (%): n/a, the peak is not known" in table_of(make_run, records).same


def test_of_one_trial_nothing_is_left_out(make_run: Make) -> None:
    table = table_of(make_run, [with_metrics(trial(1), mfu=0.5)])
    assert table.same == []
    assert "seed" in table.spec
    assert "MFU (%)" in {column.heading for column in table.metrics}


def test_a_step_has_its_bar_in_brackets_and_is_sorted_by_its_median(make_run: Make) -> None:
    record = with_metrics(trial(1), step_median_s=0.5, step_median_low_s=0.375, step_median_high_s=0.75)
    table = table_of(make_run, [record])
    step = table.rows[0].metrics[[column.name for column in table.metrics].index("step_median_s")]
    assert (step.text, step.value) == ("500 (375 to 750)", 0.5)


def test_a_guard_is_in_the_table_where_a_trial_has_one(make_run: Make) -> None:
    off, on = trial(1, depth=14), trial(2, depth=26, guard_every=50, guard_tolerance=1e-3, guard_action="warn")
    table = table_of(make_run, [off, with_metrics(on, guard_rel_max=3e-6)])
    cells = dict(zip(table.spec, zip(*(row.spec for row in table.rows), strict=True), strict=True))
    assert cells["guard every"] == ("–", "50")
    assert cells["guard action"] == ("–", "warn")
    largest = [column.heading for column in table.metrics].index("largest error that a guard found, relative")
    assert [row.metrics[largest].text for row in table.rows] == ["n/a", "3.00e-06"]
    plain = make_run([off], name="plain")
    assert not any("guard" in name for name in trials_table(trials_frame(plain), plain.read_records()).spec)


def test_communication_has_its_columns_where_ranks_communicate_and_its_reason_where_not(make_run: Make) -> None:
    headings = ["communication (MiB)", "communication (ms)"]
    records = [
        with_metrics(trial(n, depth=depth), communication_bytes=depth * MIB, communication_s=depth / 1000)
        for n, depth in enumerate((14, 26))
    ]
    table = table_of(make_run, records)
    columns = [[column.heading for column in table.metrics].index(heading) for heading in headings]
    assert [[row.metrics[column].text for column in columns] for row in table.rows] == [
        ["14.00", "14.0"],
        ["26.00", "26.0"],
    ]

    why = dict.fromkeys(("communication_bytes", "communication_s"), "one rank has no other to communicate with")
    alone = [trial(n, depth=depth).model_copy(update={"unmeasured": why}) for n, depth in enumerate((14, 26))]
    assert f"{', '.join(headings)}: n/a, {why['communication_s']}" in table_of(make_run, alone).same


def test_how_a_step_is_executed_is_a_column_where_any_is_not_as_written(make_run: Make) -> None:
    plain, compiled = trial(1, depth=14), trial(2, depth=14, compile=True)
    table = table_of(make_run, [plain, compiled])
    texts = [row.spec[table.spec.index("compile")] for row in table.rows]
    assert sorted(texts) == ["False", "True"]
    assert "cuda graph" not in table.spec
    others = [plain, trial(3, depth=26)]
    assert "compile" not in trials_table(frame_of(others), others).spec

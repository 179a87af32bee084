"""The summary: slopes with their margins, measured beside predicted, and no column that is empty."""

import pandas as pd
import pytest

from harness.record import Record
from reports.frames import trials_frame
from reports.summary import headings_of, slope_text, summary
from tests.reports.conftest import MIB, Make, predicted, trial


def law(slope_mib: float, margin_mib: float) -> pd.Series:
    low, high = slope_mib - margin_mib, slope_mib + margin_mib
    columns = {"slope_bytes": slope_mib * MIB, "slope_low_bytes": low * MIB, "slope_high_bytes": high * MIB}
    return pd.Series(columns)


@pytest.mark.parametrize(
    ("slope_mib", "margin_mib", "text"),
    [
        (8.5, 0.25, "8.50 ± 0.25"),
        (8.5, 0, "8.50 ± 0"),
        (8.5, float("nan"), "8.50"),
        (0.125, 0.001, "0.125 ± 0.001"),
        (0.0001, 0, "0.0001 ± 0"),
        (0.000009, 0.00004, "0.000009 ± 0.000040"),
        (8.5, 0.0000001, "8.50 ± <0.01"),
        (0.928, 1.752, "0.9 ± 1.8"),
        (4.667, 123.0, "5 ± 123"),
        (0.002, 1.5, "0.0 ± 1.5"),
        (0, 0, "0 ± 0"),
    ],
)
def test_a_slope_has_its_margin_and_is_never_rounded_to_nothing(slope_mib: float, margin_mib: float, text: str) -> None:
    assert slope_text(law(slope_mib, margin_mib), margin=True) == text


def test_the_predicted_slope_stands_beside_the_measured_one(make_run: Make, sweep: list[Record]) -> None:
    rows = summary(trials_frame(make_run([predicted(record, peak_off=0.5) for record in sweep])))
    stored = next(row for row in rows if row.strategy == "revnet · stored")
    assert (stored.peak_per_block, stored.predicted_peak_per_block) == ("8.50 ± 0", "12.75 ± 0")


def test_a_column_that_no_row_fills_is_left_out(make_run: Make, sweep: list[Record]) -> None:
    filled = headings_of(summary(trials_frame(make_run(sweep))))
    assert "predicted_peak_per_block" not in filled
    assert {"peak_per_block", "time_ratio", "drift"} <= filled.keys()
    assert "peak_per_block" not in headings_of(summary(trials_frame(make_run([trial(1)], study=None)).iloc[:1]))

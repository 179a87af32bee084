"""Limits that cannot be used are refused, with what is allowed."""

import pytest

from harness.errors import HarnessError
from reports.limits import parse_limit
from tests.reports.conftest import PEAK, Compare, trial


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ("activation_peak_byte:+2%", "Did you mean activation_peak_bytes"),
        ("zzzz:+2%", "There are: activation_peak_bytes, "),
        ("depth:+2%", "no trial of either run has such a metric"),
        ("parameter_count:+2%", "no trial of either run has it: nobody counted"),
    ],
)
def test_a_limit_on_what_no_trial_has_is_refused(compared: Compare, limit: str, message: str) -> None:
    with pytest.raises(HarnessError, match="--fail") as refused:
        compared([trial(1)], [trial(1)], limit)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (PEAK, "METRIC:\\+LIMIT for a rise"),
        (f"{PEAK}:2%", "METRIC:\\+LIMIT for a rise"),
        (f"{PEAK}:+", "METRIC:\\+LIMIT for a rise"),
        (f"{PEAK}:+-2%", "METRIC:\\+LIMIT for a rise"),
        (f"{PEAK}:+nan", "METRIC:\\+LIMIT for a rise"),
        (f"{PEAK}:+1MB", "no unit 'MB' for activation_peak_bytes; allowed: %, KiB, MiB, GiB, TiB, or none for bytes"),
        ("step_median_s:+1MiB", "allowed: %, s, ms, us, or none for seconds"),
        ("drift_max_rel:+1s", "allowed: %, or none"),
        ("samples_per_s:-100%", "nothing falls by more than 100 %"),
    ],
)
def test_a_limit_that_says_nothing_clear_is_refused(text: str, message: str) -> None:
    with pytest.raises(HarnessError, match=message):
        parse_limit(text)

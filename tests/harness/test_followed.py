"""Drift over training: what is audited when, and that the two runs beside each other are those of the trial."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harness.followed import FOLLOWED_METRICS, HELD_OUT_METRIC, audit_steps, follow_drift
from harness.guarded import TrialGuard
from harness.trials import TrialSpec
from tests.harness.conftest import Trial

KINDS = ("train", "random")
FOLLOWED = {"drift_steps": 3, "drift_audits": 2}


@given(st.integers(1, 1000), st.integers(2, 40))
def test_audits_are_spread_from_before_the_first_step_to_after_the_last(steps: int, audits: int) -> None:
    at = audit_steps(steps, audits)
    assert (at[0], at[-1]) == (0, steps)
    assert len(at) == min(audits, steps + 1)
    gaps = [b - a for a, b in itertools.pairwise(at)]
    assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("reconstruction", ["exact", "bf16"])
def test_exact_streams_follow_the_stored_twin_and_narrow_ones_do_not(
    trial: Trial, spec: TrialSpec, reconstruction: str
) -> None:
    done = trial(spec, reconstruction=reconstruction, measured_steps=3, **FOLLOWED)
    assert done.record.status == "ok", done.record.reason
    values = {(row.index, row.name): row.value for row in done.trace if row.table == "followed"}
    angles = [values[step, f"{kind} gradient_angle_deg"] for step in (0, 3) for kind in KINDS]
    losses = [[values[step, name] for step in range(3)] for name in ("loss", "stored_loss")]
    exact = reconstruction == "exact"
    assert all((angle == 0) == exact for angle in angles)
    assert (losses[0] == losses[1]) == exact
    assert done.record.metrics["followed_gradient_angle_max_deg"] == max(angles)
    assert (done.record.metrics["followed_drift_max_rel"] == 0) == exact
    # The same initial weights, batches and steps as those that were timed.
    timed = [row.value for row in done.trace if (row.table, row.name) == ("step", "loss")]
    assert losses[0] == timed
    # The shipped sample is one set of images.
    assert not any(name.startswith("held_out") for _, name in values)
    assert "give data.path" in done.record.unmeasured[HELD_OUT_METRIC]
    assert ("followed_parted_step" in done.record.metrics) != ("followed_parted_step" in done.record.unmeasured)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, "drift_steps is 0"),
        ({"drift_steps": 5, "workers": 2}, "on one rank"),
        ({"drift_steps": 5, "zero_stage": 3}, "on one rank"),
        ({"drift_steps": 5, "audit_batch_size": 0}, "audit_batch_size is 0"),
    ],
)
def test_what_is_not_followed_says_why(spec: TrialSpec, changes: dict[str, int], reason: str) -> None:
    metrics, rows, unmeasured = follow_drift(spec.model_copy(update=changes), torch.device("cpu"), TrialGuard(spec))
    assert (metrics, rows) == ({}, [])
    assert unmeasured.keys() == {*FOLLOWED_METRICS, HELD_OUT_METRIC}
    assert all(reason in text for text in unmeasured.values())

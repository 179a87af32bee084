"""The guard of a trial: what it compared is in the record, and what else is measured is as without it."""

import math
from typing import Any, get_args

import pytest
from torch import nn

from harness import guarded
from harness.guarded import GUARD_METRICS, TrialGuard
from harness.record import TraceRow
from harness.supervise import Supervised, supervise
from harness.trials import GuardAction, TrialSpec
from revnet_core import GUARD_ACTIONS, DriftError, DriftReport
from tests.core.guard_cases import set_steps, steps, wavering
from tests.harness.conftest import Trial, environment


def test_a_rank_that_its_guard_stops_is_the_answer_of_the_trial(
    spec: TrialSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    update = {"model": "faulty_models:wavers_on_rank_1", "depth": None, "workers": 2, "guard_every": 1}
    done = supervise(spec.model_copy(update=update), timeout_s=120)
    assert done.record.status == "diverged"
    assert (done.record.reason or "").startswith("rank 1: 1.couplings[0]: at step 1 its rebuilt input was off by")
    assert done.record.metrics["guard_checks"] == 1
    assert done.record.metrics["guard_rel_max"] > 1e-3
    (row,) = done.trace
    assert row == TraceRow("guard", 1, "1.couplings[0]", done.record.metrics["guard_rel_max"])


def test_a_guard_that_finds_nothing_changes_no_loss_and_no_byte(trial: Trial, spec: TrialSpec) -> None:
    changes = {"warmup_steps": 1, "drift_steps": 2, "drift_audits": 2}
    plain, done = trial(spec, **changes), trial(spec, **changes, guard_every=3, guard_action="store")
    assert done.record.status == "ok", done.record.reason

    assert sizes(done) == sizes(plain)
    assert "activation_peak_bytes" in sizes(plain)
    assert losses(done) == losses(plain)
    # In step 4, which a guard would look at, the memory is measured.
    block = "stages.0.0.couplings[0]"
    compared = [(row.index, row.name) for row in done.trace if row.table == "guard"]
    assert compared == [(1, block)]
    followed = [(row.index, row.name) for row in done.trace if row.name.startswith("guard")]
    assert followed == [(0, f"guard {block}")]
    assert done.record.metrics["guard_checks"] == 2
    assert 0 < done.record.metrics["guard_rel_max"] < 1e-5
    assert done.record.unmeasured["guard_stored_step"] == "no error was above the tolerance"
    assert {plain.record.unmeasured[name] for name in GUARD_METRICS} == {"the study's guard_every is 0"}


@pytest.mark.parametrize("stage", range(4))
def test_two_ranks_are_guarded_at_every_stage_and_learn_the_same(trial: Trial, spec: TrialSpec, stage: int) -> None:
    changes = {"workers": 2, "measured_steps": 3}
    done = trial(spec, **changes, zero_stage=stage, guard_every=2)
    assert done.record.status == "ok", done.record.reason
    assert losses(done) == losses(trial(spec, **changes))
    assert [row.index for row in done.trace if row.table == "guard"] == [1, 3]
    assert done.record.metrics["guard_checks"] == 2
    assert 0 < done.record.metrics["guard_rel_max"] < 1e-5


ON_RANK_1 = {"model": "faulty_models:wavers_on_rank_1", "depth": None, "workers": 2, "measured_steps": 3}


@pytest.mark.parametrize(("action", "checks", "stored_step"), [("store", 1, 1), ("warn", 3, None)])
def test_what_one_of_two_ranks_finds_is_the_trial_s(
    trial: Trial, spec: TrialSpec, action: str, checks: int, stored_step: int | None
) -> None:
    done = trial(spec, **ON_RANK_1, guard_every=1, guard_action=action)
    assert done.record.status == "ok", done.record.reason
    # Rank 0 goes on rebuilding, and its comparisons count where rank 1 has none any more.
    compared = [row for row in done.trace if row.table == "guard"]
    assert [row.index for row in compared] == [1, 2, 3]
    assert sum(row.value > 1e-3 for row in compared) == checks
    assert done.record.metrics["guard_rel_max"] == max(row.value for row in compared)
    assert done.record.metrics.get("guard_stored_step") == stored_step


@pytest.mark.parametrize("stage", [1, 3])
def test_a_guard_that_stores_is_refused_where_ranks_have_to_agree(trial: Trial, spec: TrialSpec, stage: int) -> None:
    done = trial(spec, workers=2, zero_stage=stage, guard_every=1, guard_action="store")
    assert done.record.status == "unsupported", done.record.reason
    assert "action='store' is decided by each rank for itself" in (done.record.reason or "")


def sizes(found: Supervised) -> dict[str, float]:
    # The system's own figure is of the process.
    metrics = found.record.metrics.items()
    return {name: value for name, value in metrics if name.endswith("_bytes") and name != "device_used_bytes"}


def losses(found: Supervised) -> list[float]:
    return [row.value for row in found.trace if row.name.endswith("loss")]


@pytest.fixture
def guarded_spec(spec: TrialSpec) -> TrialSpec:
    return spec.model_copy(update={"guard_every": 1, "guard_action": "store"})


@pytest.fixture
def of_other_ranks(monkeypatch: pytest.MonkeyPatch) -> list[DriftReport]:
    """What a second rank compared."""
    reports: list[DriftReport] = []
    monkeypatch.setattr(guarded, "gather", lambda own: [own, tuple(reports)])
    return reports


def test_a_model_that_stored_on_the_way_is_measured_as_it_was_asked_for(
    guarded_spec: TrialSpec, of_other_ranks: list[DriftReport]
) -> None:
    model, guard = wavering(0, 0), TrialGuard(guarded_spec)
    trace: list[TraceRow] = []
    with guard.over(model, trace):
        steps(model, 1)
        set_steps(model, 0.5, 0)
        with pytest.warns(RuntimeWarning, match="stores its activations"):
            steps(model, 3)
        assert model.activations == "stored"
    assert model.activations == "reconstructed"
    steps(model, 1)
    # The second comparison is of block 1, which is sound.
    assert guard.metrics() == ({"guard_checks": 3, "guard_rel_max": trace[2].value, "guard_stored_step": 3}, {})
    assert [row.index for row in trace] == [1, 2, 3]


def test_of_all_ranks_the_largest_error_counts(guarded_spec: TrialSpec, of_other_ranks: list[DriftReport]) -> None:
    of_other_ranks += [DriftReport(1, "", 0, 0.5), DriftReport(2, "", 1, math.nan)]
    model, guard = wavering(0, 0), TrialGuard(guarded_spec)
    trace: list[TraceRow] = []
    with guard.over(model, trace):
        steps(model, 3)
    assert [(row.index, row.name) for row in trace] == [(1, "couplings[0]"), (2, "couplings[1]"), (3, "couplings[0]")]
    assert trace[0].value == 0.5
    assert math.isnan(trace[1].value)
    assert 0 <= trace[2].value < 1e-10
    metrics, _ = guard.metrics()
    assert math.isnan(metrics["guard_rel_max"] or 0)
    assert metrics["guard_stored_step"] == 1


def test_what_stopped_a_training_is_kept_without_asking_other_ranks(
    guarded_spec: TrialSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guarded, "gather", lambda own: pytest.fail("the other ranks are asked"))
    model = wavering(0.5)
    trace: list[TraceRow] = []
    guard = TrialGuard(guarded_spec.model_copy(update={"guard_action": "stop"}))
    with pytest.raises(DriftError), guard.over(model, trace):
        steps(model, 2)
    metrics, unmeasured = guard.metrics()
    assert metrics == {"guard_checks": 1, "guard_rel_max": trace[0].value}
    assert unmeasured == {"guard_stored_step": "the study's guard_action is 'stop'"}


@pytest.mark.parametrize(
    ("changes", "model", "reason"),
    [
        ({"guard_every": 0}, wavering(0), "guard_every is 0"),
        ({"activations": "stored"}, wavering(0), "with stored activations nothing is rebuilt"),
        ({}, nn.Linear(1, 1), "the model has no reversible block"),
    ],
)
def test_a_trial_without_a_guard_says_why(
    guarded_spec: TrialSpec, changes: dict[str, Any], model: nn.Module, reason: str
) -> None:
    guard = TrialGuard(guarded_spec.model_copy(update=changes))
    trace: list[TraceRow] = []
    with guard.over(model, trace):
        pass
    metrics, unmeasured = guard.metrics()
    assert (metrics, trace) == ({}, [])
    assert all(reason in unmeasured[name] for name in GUARD_METRICS)


def test_a_study_has_the_actions_of_the_core() -> None:
    assert get_args(GuardAction) == GUARD_ACTIONS


def test_a_training_that_was_not_come_to_is_no_training_without_errors(guarded_spec: TrialSpec) -> None:
    metrics, unmeasured = TrialGuard(guarded_spec).metrics()
    assert metrics == {}
    assert set(unmeasured.values()) == {"the trial did not come to its training"}

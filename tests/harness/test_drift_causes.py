"""The causes of drift in a trial: what the core's audit says of each block, and a reason where it says nothing."""

import pytest
import torch
from torch import Tensor, nn

from harness.expansion import expand
from harness.measure.causes import CAUSE_METRICS, TABLE, measure_causes
from harness.models import create
from harness.record import TraceRow
from harness.study import Study, StudyError, check_trials
from harness.trials import TrialSpec
from revnet_core import AdditiveCoupling, ReversibleSequence, audit_amplification
from tests.harness.conftest import Trial


def table(rows: list[TraceRow], name: str) -> list[float]:
    return [row.value for row in rows if (row.table, row.name) == (TABLE, name)]


class TwoChains(nn.Module):
    """Two chains, the second of which sees twice what the first gives."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (
            ReversibleSequence([AdditiveCoupling(*(nn.Linear(3, 3) for _ in "fg")) for _ in range(count)], split_dim=-1)
            for count in (2, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.second(2 * self.first(x))


def test_rows_and_metrics_are_those_of_the_audit_by_hand() -> None:
    torch.manual_seed(0)
    model, x = TwoChains(), torch.randn(4, 6)
    metrics, rows, unmeasured = measure_causes(model, x)
    with torch.no_grad():
        expected = audit_amplification(model.first, x) + audit_amplification(model.second, 2 * model.first(x))
    assert unmeasured == {}
    assert table(rows, "chain") == [0, 0, 1]
    for name in ("largest", "smallest", "noise_gain", "predicted_rel", "bound_rel"):
        assert table(rows, name) == pytest.approx([getattr(block, name) for block in expected], rel=1e-5)
    assert metrics["inverse_bound_max"] == 1 / min(table(rows, "smallest"))
    assert metrics["noise_gain_max"] == max(table(rows, "noise_gain"))
    assert metrics["predicted_drift_max_rel"] == max(table(rows, "predicted_rel"))


def test_a_model_without_reversible_blocks_says_so() -> None:
    metrics, rows, unmeasured = measure_causes(nn.Linear(3, 3), torch.randn(2, 3))
    assert (metrics, rows) == ({}, [])
    assert unmeasured == dict.fromkeys(CAUSE_METRICS, "the model has no reversible block")


class NoDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x * x

    @staticmethod
    def backward(ctx: object, *d_y: Tensor) -> Tensor:
        raise RuntimeError("nobody wrote it\nat all")


class Square(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return NoDerivative.apply(x)  # pyright: ignore[reportReturnType]


def test_blocks_without_jacobians_have_a_reason() -> None:
    model = nn.Sequential(ReversibleSequence([AdditiveCoupling(Square(), Square())], split_dim=-1))
    reason = "the blocks' Jacobians cannot be computed: nobody wrote it"
    assert measure_causes(model, torch.randn(2, 6)) == ({}, [], dict.fromkeys(CAUSE_METRICS, reason))


def test_a_trial_that_asks_has_them_and_one_that_does_not_says_so(trial: Trial, spec: TrialSpec) -> None:
    asked = trial(spec, depth=26, amplification=True, measured_steps=1)
    assert asked.record.status == "ok", asked.record.reason
    assert asked.record.metrics.keys() >= set(CAUSE_METRICS)
    rows = asked.trace
    assert len(table(rows, "predicted_rel")) == asked.record.metrics["reversible_blocks"]
    plain = trial(spec).record
    assert not plain.metrics.keys() & set(CAUSE_METRICS)
    assert {plain.unmeasured[name] for name in CAUSE_METRICS} == {"the study's amplification is off"}


def study(model: str, gain: str) -> Study:
    return Study.from_yaml(
        f"name: a\nquestion: b?\npredict: c\nmodel: {model}\ngrid:\n  log_scale_gain: [{gain}]\n", "s.yaml"
    )


def test_the_log_scales_of_a_family_that_has_none_are_refused_at_their_line() -> None:
    ours = study("revnet", "0.1")
    with pytest.raises(StudyError, match=r"s\.yaml:6: grid\.log_scale_gain\[0\] = 0\.1; revnet has no log-scales"):
        check_trials(ours, expand(ours))
    with pytest.raises(StudyError, match=r"s\.yaml:6: grid\.log_scale_gain\[0\]"):
        study("revnet_affine", "-1.0")


def test_log_scales_begin_as_large_as_asked() -> None:
    gains = [0.0, 0.1, 1.0]
    ours = study("revnet_affine", ", ".join(map(str, gains)))
    sizes: list[float] = []
    for one in expand(ours):
        last = create(one).state_dict()["stages.0.0.couplings.0.f.3.weight"]
        sizes.append(last.chunk(2)[0].abs().max().item())
    assert sizes == pytest.approx([gain * sizes[-1] for gain in gains])
    plain = create(TrialSpec(model="revnet_affine", depth=38)).state_dict()
    assert plain["stages.0.0.couplings.0.f.3.weight"].chunk(2)[0].abs().max().item() == pytest.approx(sizes[1])

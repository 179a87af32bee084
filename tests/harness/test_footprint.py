"""The memory figures of real trials: each category by arithmetic, and the attribution beside the plain reading."""

from pathlib import Path

import pytest

from harness.measure.attribution import CATEGORIES
from harness.models import create
from harness.record import TraceRow
from harness.store import RunStore
from harness.supervise import supervise
from harness.trials import TrialSpec
from tests.harness.conftest import Trial, environment

FLOAT = 4
# The state of the random generator, which blocks keep to replay their draws, and which no operation returns.
RANDOM_STATES_BYTES = 16 * 2**10


def peak_row(trace: list[TraceRow]) -> dict[str, float]:
    rows = [row for row in trace if row.table == "memory"]
    peak = max((row for row in rows if row.name == "live_bytes"), key=lambda row: row.value)
    return {row.name: row.value for row in rows if row.index == peak.index}


@pytest.mark.parametrize("activations", ["stored", "checkpointed", "reconstructed"])
def test_reconstruction_buffers_are_where_something_is_rebuilt(trial: Trial, spec: TrialSpec, activations: str) -> None:
    record, trace = trial(spec, activations=activations)[:2]
    assert record.status == "ok", record.reason
    metrics = record.metrics
    assert (metrics["reconstruction_peak_bytes"] > 0) == (activations != "stored")
    assert metrics["unattributed_peak_bytes"] <= RANDOM_STATES_BYTES < metrics["activation_peak_bytes"] / 50
    assert metrics["unmatched_storage_bytes"] == 0
    assert abs(metrics["attributed_peak_difference_bytes"]) <= metrics["activation_peak_bytes"] / 100
    assert metrics["measuring_time_ratio"] > 0

    peak = peak_row(trace)
    attributed_peak_bytes = metrics["activation_peak_bytes"] + metrics["attributed_peak_difference_bytes"]
    assert peak["live_bytes"] == attributed_peak_bytes
    held_bytes = metrics["allocated_peak_bytes"] - metrics["activation_peak_bytes"]
    assert sum(peak[f"{category}_bytes"] for category in CATEGORIES) == held_bytes + attributed_peak_bytes
    assert sum(row.value for row in trace if row.table == "owners") == attributed_peak_bytes


def test_one_rank_holds_the_model_its_gradients_and_its_momentum(trial: Trial, spec: TrialSpec) -> None:
    record = trial(spec).record
    model, metrics = create(spec), record.metrics
    parameters = sum(p.numel() for p in model.parameters()) * FLOAT
    held = {name: metrics[f"{name}_bytes"] for name in ("parameter", "gradient", "optimizer", "buffer", "batch")}
    assert held == {
        "parameter": parameters,
        "gradient": parameters,
        "optimizer": parameters,
        "buffer": sum(b.nbytes for b in model.buffers()),
        "batch": spec.batch_size * (3 * 32 * 32 * FLOAT + 8),
    }
    assert metrics["allocated_peak_bytes"] == metrics["activation_peak_bytes"] + sum(held.values())
    assert record.unmeasured["reserved_peak_bytes"] == "the CPU's allocator reserves nothing"
    assert metrics["device_used_bytes"] > metrics["allocated_peak_bytes"]
    assert not [name for name in metrics if name.endswith("_rank_spread_bytes")]


def test_a_model_that_cannot_be_attributed_keeps_its_figures(trial: Trial, spec: TrialSpec) -> None:
    record, trace = trial(spec, model="faulty_models:refuses_dispatch_modes", depth=None, activations="stored")[:2]
    assert record.status == "ok", record.reason
    assert record.metrics["activation_peak_bytes"] > 0
    assert "planted: not under a dispatch mode" in record.unmeasured["attributed_peak_difference_bytes"]
    assert {row.name for row in trace if row.table == "memory"} == {"time_s", "live_bytes"}
    assert not [row for row in trace if row.table == "owners"]


def test_a_peak_that_would_be_wrong_fails_the_trial(trial: Trial, spec: TrialSpec) -> None:
    record = trial(spec, model="faulty_models:profiles_itself", depth=None, activations="stored").record
    assert record.status == "failed"
    assert "MeasurementError: the profiler that measures memory was ended during the step" in (record.reason or "")
    assert "step_median_s" in record.metrics
    assert "activation_peak_bytes" not in record.metrics


def test_two_ranks_end_in_one_record_with_the_exports_that_were_asked_for(
    spec: TrialSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    done = supervise(spec.model_copy(update={"workers": 2}), timeout_s=200, exports=["perfetto"])
    assert done.record.status == "ok", done.record.reason
    assert done.record.metrics["activation_peak_bytes"] > 0
    assert "activation_peak_rank_spread_bytes" in done.record.metrics
    assert done.exports.keys() == {"perfetto"}
    store = RunStore(tmp_path)
    store.write_trial(done.record, done.trace, done.log, done.exports)
    assert store.read_exports(spec.id) == {}
    assert store.read_exports(done.record.id).keys() == {"perfetto"}

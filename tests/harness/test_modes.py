"""A step that is compiled or replayed as a CUDA graph is measured as such, or is said not to be."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import revnet_core
from harness.errors import HarnessError, MeasurementError, PredictionError
from harness.find import cells_of
from harness.footprint import ATTRIBUTED
from harness.forecast import Unpredicted, forecast
from harness.modes import COMPILE_METRICS, CompiledSteps, check_compiler, check_modes, check_predictable, graphed
from harness.predict import PREDICTED_METRICS, Device, Prediction, predict
from harness.record import Record
from harness.training import Result
from harness.trials import TrialResources, TrialSpec
from revnet_core import AdditiveCoupling, Precision, ReversibleSequence, UnsupportedError
from tests.harness.conftest import Trial

SMALL = {"model": "small_models:reversible", "depth": None, "warmup_steps": 1}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def forget_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def losses(trace: Any) -> list[float]:
    return [row.value for row in trace if row.name == "loss"]


def test_a_compiled_trial_is_measured_and_what_cannot_be_seen_says_so(trial: Trial, spec: TrialSpec) -> None:
    try:
        check_compiler(CPU)
    except UnsupportedError as error:
        pytest.skip(str(error))
    plain, done = trial(spec, **SMALL), trial(spec, **SMALL, compile=True)
    assert done.record.status == plain.record.status == "ok", done.record.reason
    assert done.record.spec["compile"] is True
    metrics, unmeasured = done.record.metrics, done.record.unmeasured
    # It holds the compilation, which no step that is measured does.
    assert metrics["compile_s"] > 10 * metrics["step_median_s"]
    assert metrics["compile_cache_hits"] >= 0
    assert losses(done.trace) == pytest.approx(losses(plain.trace), rel=1e-5)
    for name in ("activation_saved_bytes", "activation_peak_bytes", "flops_forward", "gradient_angle_deg"):
        assert metrics[name] >= 0
    for names, reason in ((PREDICTED_METRICS, "uncompiled step"), (ATTRIBUTED, "the step is compiled")):
        assert all(reason in unmeasured[name] for name in names)
        assert not {*names} & metrics.keys()
    assert any(row.table == "memory" for row in done.trace)
    assert {plain.record.unmeasured[name] for name in COMPILE_METRICS} == {"the study's compile is off"}
    assert PREDICTED_METRICS[0] in plain.record.metrics


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_graph_on_a_cpu_is_not_supported(trial: Trial, spec: TrialSpec) -> None:
    record: Record = trial(spec, cuda_graph=True).record
    assert record.status == "unsupported"
    assert "a CUDA graph needs a CUDA device; this device is a CPU" in (record.reason or "")
    assert not record.metrics


MODES: list[tuple[dict[str, Any], Device, str]] = [
    ({"cuda_graph": True}, Device("cpu"), "needs a CUDA device"),
    ({"cuda_graph": True, "zero_stage": 3}, Device("cuda"), "under ZeRO-3"),
    ({"cuda_graph": True, "activations": "offloaded"}, Device("cuda"), "offloaded activations"),
    ({"cuda_graph": True, "guard_every": 5}, Device("cuda"), "with a guard"),
    ({"cuda_graph": True, "compile": True}, Device("cuda"), "has one of the two"),
    ({"compile": True, "zero_stage": 3}, Device("cuda"), "under ZeRO-3"),
    ({"compile": True, "resources": TrialResources(memory_bytes=2**30)}, Device("cpu"), "resources.memory on a CPU"),
]


@pytest.mark.parametrize(("changes", "device", "says"), MODES)
def test_what_cannot_be_is_said_before_anything_runs(
    spec: TrialSpec, changes: dict[str, Any], device: Device, says: str
) -> None:
    asked = spec.model_copy(update=changes)
    for check in (check_modes, check_predictable):
        with pytest.raises(UnsupportedError, match=says):
            check(asked, device.kind)
    found = forecast([spec, asked], lambda _: device, processes=1)
    why = found[asked.id]
    assert isinstance(why, Unpredicted)
    assert why.kind == "unsupported"
    assert says in why.reason
    assert isinstance(found[spec.id], Prediction)


@pytest.mark.parametrize(
    ("changes", "device"),
    [
        ({}, Device("cpu")),
        ({"compile": True}, Device("cpu")),
        ({"compile": True, "resources": TrialResources(memory_bytes=2**30)}, Device("cuda")),
        ({"cuda_graph": True, "zero_stage": 2}, Device("cuda")),
    ],
)
def test_what_can_be_is_let_through(spec: TrialSpec, changes: dict[str, Any], device: Device) -> None:
    check_modes(spec.model_copy(update=changes), device.kind)


def test_a_prediction_is_of_the_eager_step(spec: TrialSpec) -> None:
    compiled, graph = (spec.model_copy(update={name: True}) for name in ("compile", "cuda_graph"))
    device = Device("cuda")
    found = forecast([compiled, graph, spec], lambda _: device, processes=1)
    why = found[compiled.id]
    assert isinstance(why, Unpredicted)
    assert why.kind == "unknown"
    assert found[graph.id] == found[spec.id] == predict(spec, device)
    with pytest.raises(PredictionError, match="uncompiled step"):
        predict(compiled, device)


@pytest.mark.parametrize("mode", ["compile", "cuda_graph"])
def test_no_limit_is_searched_for_on_predictions_of_another_step(spec: TrialSpec, mode: str) -> None:
    with pytest.raises(HarnessError, match=f"--find: some trials have {mode} true"):
        cells_of([spec, spec.model_copy(update={mode: True})], "depth", 2**30)
    assert len(cells_of([spec], "depth", 2**30)) == 1


def test_a_machine_without_a_compiler_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config

    # None stands for the compiler that torch would download.
    monkeypatch.setattr(config.cpp, "cxx", (None, "/no/such/compiler"))
    with pytest.raises(UnsupportedError, match=r"this machine has no C\+\+ compiler that works"):
        check_compiler(CPU)


class Breaking(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (
            ReversibleSequence([AdditiveCoupling(nn.Tanh(), nn.Tanh())], precision=Precision(reconstruction="exact")),
            "^exact reconstruction cannot be part of a compiled graph. .* a floating reconstruction.$",
        ),
        (
            ReversibleSequence([AdditiveCoupling(nn.Tanh(), nn.Tanh())], activations="offloaded"),
            "^activations = 'offloaded' cannot be part of a compiled graph. .* a floating reconstruction.$",
        ),
        (Breaking(), r"^compile = true: the model cannot be one compiled graph \(Unsupported: Call to"),
    ],
)
def test_what_is_no_graph_is_told_in_the_words_of_who_refused(spec: TrialSpec, model: nn.Module, says: str) -> None:
    x = torch.randn(2, 4, requires_grad=True)
    steps = CompiledSteps(spec.model_copy(update={"compile": True}))
    model.forward = torch.compile(model.forward, fullgraph=True, backend="eager")
    with pytest.raises(UnsupportedError, match=says), steps.tracing():
        model(x)


def test_a_measured_step_that_compiles_again_has_no_time(spec: TrialSpec) -> None:
    steps = CompiledSteps(spec.model_copy(update={"compile": True}))
    double = torch.compile(lambda x: 2 * x, backend="eager", dynamic=False)
    for index, size in enumerate((1, 2, 2, 1)):
        double(torch.ones(size))
        steps.took(index, float(index + 1), measured=index > 1)
    assert steps.metrics["compile_s"] == 1.0
    double(torch.ones(3))
    with pytest.raises(MeasurementError, match="compiled again in step 4"):
        steps.took(4, 5.0, measured=True)


class Graph:
    pool_bytes = 4096


class CannotCaptureError(Exception):
    pass


def test_steps_within_a_graph_are_captured_as_the_engine_s_forward_runs(
    spec: TrialSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What CUDA does not need to be there for: which call is made, when, and what becomes of its answer."""
    seen: list[object] = []

    @contextlib.contextmanager
    def graph_model(model: nn.Module, x: Tensor) -> Iterator[Graph]:
        if math.isnan(x.sum().item()):
            raise CannotCaptureError("item() in F")
        if math.isinf(x.sum().item()):
            raise CannotCaptureError("the step could not be captured") from torch.OutOfMemoryError("CUDA out of memory")
        seen.append((model, torch.get_autocast_dtype("cpu"), torch.is_autocast_enabled("cpu")))
        yield Graph()
        seen.append("as before")

    monkeypatch.setattr(revnet_core, "graph_model", graph_model, raising=False)
    monkeypatch.setattr(revnet_core, "CaptureError", CannotCaptureError, raising=False)
    model, result = nn.Linear(2, 2), Result()
    asked = spec.model_copy(update={"cuda_graph": True, "compute": "bf16"})
    with graphed(asked, model, torch.ones(1, 2), result):
        assert not torch.is_autocast_enabled("cpu")
        assert seen == [(model, torch.bfloat16, True)]
    assert seen[1:] == ["as before"]
    assert result.metrics == {"graph_pool_bytes": 4096}
    refused = graphed(asked, model, torch.full((1, 2), math.nan), Result())
    with pytest.raises(UnsupportedError, match=r"^item\(\) in F$"), refused:
        pass
    too_large = graphed(asked, model, torch.full((1, 2), math.inf), Result())
    with pytest.raises(torch.OutOfMemoryError, match=r"^CUDA out of memory$"), too_large:
        pass
    without = Result()
    with graphed(spec, model, torch.ones(1, 2), without):
        pass
    assert without.unmeasured == {"graph_pool_bytes": "the study's cuda_graph is off"}
    assert len(seen) == 2

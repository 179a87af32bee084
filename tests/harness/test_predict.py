"""Predictions against the allocator's events, and under engines against whole trials."""

from pathlib import Path
from typing import Any

import pytest
import torch

from harness.errors import PredictionError
from harness.models import create
from harness.predict import Device, Prediction, device_of, predict, step_memory
from harness.trials import TrialSpec
from revnet_core import UnsupportedError
from revnet_core.networks import FAMILIES
from studies.predictions import PEAK_LIMIT, SAVED_LIMIT, compare, specs
from tests.harness.conftest import Trial

# Every mode of three families, two of the others, at the cheapest step; `make predictions` runs all of them.
IN_ALL_MODES = ("resnet", "revnet", "irevnet")
SMALLEST = [
    spec
    for spec in {(spec.model, spec.activations): spec for spec in reversed(list(specs()))}.values()
    if spec.model in IN_ALL_MODES or spec.activations in ("stored", "reconstructed")
]
CPU = Device("cpu")


def check(one: Any) -> None:
    assert abs(one.saved_error) <= SAVED_LIMIT, one
    assert abs(one.peak_error) <= PEAK_LIMIT, one


@pytest.mark.parametrize("spec", SMALLEST, ids=lambda spec: f"{spec.model}-{spec.activations}")
def test_a_step_takes_what_was_predicted(spec: TrialSpec) -> None:
    if "imagenet" in spec.model and not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        pytest.skip("oneDNN's scratch for wide strided 1x1 convolutions is known with AVX-512 only")
    check(compare(spec))


def test_every_family_and_mode_is_compared() -> None:
    assert {(s.model, s.activations) for s in specs()} == {(m, a) for m, f in FAMILIES.items() for a in f.activations}
    assert {s.model for s in SMALLEST} == set(FAMILIES)


@pytest.mark.parametrize("activations", ["stored", "checkpointed", "reconstructed"])
@pytest.mark.parametrize(
    "changes",
    [{"compute": "bf16"}, {"reconstruction": "exact"}, {"reconstruction": "fp64"}, {"batch_size": 1}],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_a_step_in_another_precision_takes_what_was_predicted(activations: str, changes: dict[str, Any]) -> None:
    check(compare(TrialSpec.model_validate({"model": "revnet", "depth": 26, "activations": activations} | changes)))


def test_a_misprediction_is_noticed() -> None:
    """The comparison's negative control: a prediction for another batch size."""
    spec = SMALLEST[0]
    right = compare(spec)
    other = step_memory(spec.model_copy(update={"batch_size": spec.batch_size + 1}), CPU)
    wrong = right._replace(predicted_peak_bytes=other.peak_bytes)
    with pytest.raises(AssertionError):
        check(wrong)


# Under an engine


@pytest.mark.parametrize(
    "changes",
    [
        {"depth": 26, "reconstruction": "exact"},
        # More bytes of gradients than of activations.
        {"batch_size": 1, "channels": (8, 8, 256)},
        {"workers": 2, "zero_stage": 1, "measured_steps": 4},
        {"workers": 2, "zero_stage": 2, "compute": "bf16"},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_a_trial_has_its_prediction_beside_the_measurement(
    trial: Trial, spec: TrialSpec, changes: dict[str, Any]
) -> None:
    record = trial(spec, **changes).record
    assert record.status == "ok", record.reason
    metrics = record.metrics
    for name, limit in (("activation_saved", SAVED_LIMIT), ("activation_peak", PEAK_LIMIT), ("allocated_peak", 0.05)):
        assert metrics[f"predicted_{name}_bytes"] == pytest.approx(metrics[f"{name}_bytes"], rel=limit), name
    for name in ("parameter", "optimizer", "buffer", "batch"):
        assert metrics[f"predicted_{name}_bytes"] == metrics[f"{name}_bytes"], name
    # Under ZeRO a gradient that two ranks have a part in is whole on both.
    largest_bytes = max(p.nbytes for p in create(TrialSpec.model_validate(record.spec)).parameters())
    unknown_bytes = largest_bytes if "workers" in changes else 0
    assert 0 <= metrics["predicted_gradient_bytes"] - metrics["gradient_bytes"] <= unknown_bytes


# Without a device, and what cannot be


def test_a_gpu_s_step_is_predicted_without_one() -> None:
    found: dict[str, Prediction] = {
        activations: predict(
            TrialSpec.model_validate({"model": "revnet", "depth": 38, "activations": activations, "compute": "fp16"}),
            Device("cuda"),
        )
        for activations in ("stored", "offloaded", "reconstructed")
    }
    assert all(p.activation_peak_bytes % 512 == 0 for p in found.values())  # the caching allocator's granules
    saved = {name: p.activation_saved_bytes for name, p in found.items()}
    assert saved["offloaded"] < saved["reconstructed"] < saved["stored"] / 2
    # On the CPU what is saved is on the host already, and stays.
    on_cpu = predict(TrialSpec(model="revnet", depth=38, activations="offloaded"), CPU)
    assert on_cpu == predict(TrialSpec(model="revnet", depth=38, activations="stored"), CPU)


def test_a_prediction_allocates_nothing_of_what_it_predicts() -> None:
    huge = TrialSpec(model="resnet", depth=32, batch_size=1_000_000, activations="stored")
    assert predict(huge, CPU).activation_peak_bytes > 2 * 2**40


def test_predicting_leaves_the_random_generator_and_the_threads_alone() -> None:
    before = torch.get_rng_state()
    predict(TrialSpec(model="revnet", depth=14), CPU)
    assert torch.equal(before, torch.get_rng_state())


def test_what_a_trial_would_be_refused_for_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="not on a CPU"):
        predict(TrialSpec(model="revnet", depth=14, compute="fp16"), CPU)
    with pytest.raises(UnsupportedError, match="not reversible"):
        predict(TrialSpec(model="resnet", depth=14, activations="reconstructed"), CPU)


def test_a_model_that_decides_by_values_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "models_of_users"))
    with pytest.raises(PredictionError, match=r"cannot be predicted: .* branch on shapes, not on values"):
        predict(TrialSpec(model="faulty_models:decides_by_values", depth=None, activations="stored"), CPU)


def test_a_constant_from_elsewhere_is_no_hindrance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "models_of_users"))
    spec = TrialSpec(model="faulty_models:centred", depth=None, batch_size=4, activations="stored")
    assert predict(spec, CPU).activation_saved_bytes >= 4 * 3 * 32 * 32 * 4
    import faulty_models  # pyright: ignore[reportMissingImports]

    assert type(faulty_models.MEAN) is torch.Tensor  # and not a fake one, of an import under the mode


def test_the_device_is_the_one_that_the_trial_would_run_on() -> None:
    asks = TrialSpec.from_json('{"model": "revnet", "resources": {"gpus_per_worker": 1, "cpus_per_worker": 3}}')
    refuses = TrialSpec.from_json('{"model": "revnet", "resources": {"gpus_per_worker": 0}}')
    assert device_of(asks) == Device("cuda", 3)
    assert device_of(refuses) == Device("cpu", 1)

"""Many predictions from few: interpolated ones are those of the trial itself."""

from collections.abc import Callable

import pytest
from pydantic import JsonValue

from harness import forecast
from harness.forecast import Unpredicted
from harness.predict import Device, Prediction, predict
from harness.surface import TOLERANCE, Figures, Surface
from harness.trials import DataSpec, TrialSpec

CPU, GPU = Device("cpu"), Device("cuda")
FORM = (("forward", "tail"),)


def trials(activations: str, depths: list[int], sizes: list[int], model: str = "revnet") -> list[TrialSpec]:
    budget_bytes = 2**18 if activations == "budgeted" else None
    return [
        TrialSpec(
            model=model,
            depth=depth,
            channels=(8, 8, 16),
            data=DataSpec(name="synthetic", image_size=16),
            batch_size=size,
            activations=activations,  # pyright: ignore[reportArgumentType]
            budget_bytes=budget_bytes,
        )
        for depth in depths
        for size in sizes
    ]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int | None, int]]:
    """The depths and batch sizes that were predicted one by one."""
    made: list[tuple[int | None, int]] = []
    step_memory = forecast.step_memory

    def noted(spec: TrialSpec, device: Device) -> object:
        made.append((spec.depth, spec.batch_size))
        return step_memory(spec, device)

    monkeypatch.setattr(forecast, "step_memory", noted)
    return made


@pytest.mark.parametrize("activations", ["stored", "checkpointed", "reconstructed"])
@pytest.mark.parametrize("device", [CPU, GPU])
def test_what_is_interpolated_is_what_the_trial_itself_predicts(
    activations: str, device: Device, counted: list[tuple[int | None, int]]
) -> None:
    wanted = trials(activations, [26, 38, 50, 62, 74], [16, 24, 32, 48])
    found = forecast.forecast(wanted, lambda trial: device, processes=1)
    assert len(counted) < len(wanted) / 2
    for trial in wanted[::3]:
        itself, told = predict(trial, device), found[trial.id]
        assert isinstance(told, Prediction)
        rounding = 0 if device == CPU else TOLERANCE  # a GPU's allocations come in granules
        assert told.activation_saved_bytes == pytest.approx(itself.activation_saved_bytes, rel=rounding)
        assert told.activation_peak_bytes == pytest.approx(itself.activation_peak_bytes, rel=TOLERANCE)
        assert told.parameter_bytes == itself.parameter_bytes
        assert told.blocks == itself.blocks


def test_a_budget_holds_whole_blocks_so_nothing_is_interpolated(counted: list[tuple[int | None, int]]) -> None:
    wanted = trials("budgeted", [26, 38, 50], [16, 24, 32])
    forecast.forecast(wanted, lambda trial: CPU, processes=1)
    assert len(counted) == len(wanted)


def test_trials_that_differ_in_nothing_that_takes_memory_share_one(counted: list[tuple[int | None, int]]) -> None:
    base = trials("stored", [26], [4])[0]
    seeds = [base.model_copy(update={"seed": seed, "learning_rate": rate}) for seed in range(5) for rate in (0.1, 0.2)]
    stages = [base.model_copy(update={"zero_stage": stage}) for stage in (0, 2, 3)]
    found = forecast.forecast([*seeds, *stages], lambda trial: CPU, processes=1)
    assert len(counted) == 1
    assert len(found) == len(seeds) - 1 + len(stages)  # one of the stages is among the seeds' own


def test_two_processes_say_the_same_as_one() -> None:
    wanted = [t for kind in ("stored", "reconstructed", "checkpointed") for t in trials(kind, [14, 26, 38], [2, 4])]
    one = forecast.forecast(wanted, lambda trial: CPU, processes=1)
    assert forecast.forecast(wanted, lambda trial: CPU, processes=2) == one


def test_what_cannot_be_predicted_says_why_and_holds_up_no_other() -> None:
    good = trials("stored", [26], [4])[0]
    half = good.model_copy(update={"compute": "fp16"})
    wrong = good.model_copy(update={"model": "resnet", "activations": "reconstructed"})
    found = forecast.forecast([half, good, wrong], lambda trial: CPU, processes=1)
    assert isinstance(found[good.id], Prediction)
    for trial, reason in ((half, "not on a CPU"), (wrong, "not reversible")):
        told = found[trial.id]
        assert isinstance(told, Unpredicted)
        assert told.kind == "unsupported"
        assert reason in told.reason


def surface(function: Callable[[int, int], int]) -> tuple[Surface, list[tuple[int, int]]]:
    asked: list[tuple[int, int]] = []

    def at(point: tuple[int, int]) -> Figures:
        asked.append(point)
        return Figures(FORM, (function(*point),))  # pyright: ignore[reportArgumentType]

    return Surface(at), asked


DEPTHS, SIZES = list(range(2, 30, 3)), list(range(16, 129, 16))


@pytest.mark.parametrize(
    ("function", "at_most"),
    [
        (lambda depth, size: 7 + 3 * depth + 5 * size + 2 * depth * size, 5),
        (lambda depth, size: max(9_000 + 30 * depth, 100 * depth + 50 * size), 80),
        (lambda depth, size: max(1_000 * size, 90 * depth * size), 80),
        (lambda depth, size: depth**2 * 1_000 + size**2, 80),
    ],
)
def test_a_surface_is_right_at_every_point(function: Callable[[int, int], int], at_most: int) -> None:
    found, asked = surface(function)
    found.fill(DEPTHS, SIZES)
    assert len(asked) <= at_most
    for depth in DEPTHS:
        for size in SIZES:
            exact = function(depth, size)
            assert exact <= found.known[depth, size].numbers[0] + 1  # what is convex lies below, but for rounding
            assert found.known[depth, size].numbers[0] == pytest.approx(exact, rel=0.02)


def test_a_single_point_and_lines_of_two_are_predicted_themselves() -> None:
    for depths, sizes in (([5], [16]), ([5, 8], [16]), ([5, 8], [16, 32]), ([5], [16, 32, 48])):
        found, asked = surface(lambda depth, size: depth * size)
        found.fill(depths, sizes)
        assert set(found.known) == {(depth, size) for depth in depths for size in sizes}
        assert len(asked) == len(set(asked))


def test_trials_that_leave_other_parameters_whole_share_no_prediction() -> None:
    whole = TrialSpec(model="revnet", depth=14, workers=2, zero_stage=3)
    options: dict[str, JsonValue] = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    divided = whole.model_copy(update={"deepspeed": options})
    found = forecast.forecast([whole, divided], lambda trial: CPU, processes=1)
    assert [found[trial.id] for trial in (whole, divided)] == [predict(whole, CPU), predict(divided, CPU)]
    assert predict(divided, CPU).parameter_bytes < predict(whole, CPU).parameter_bytes / 2

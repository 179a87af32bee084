"""What `revnet plan` prints of predictions: columns for what differs, what does not fit and why, and a summary."""

from collections.abc import Callable

import pytest

from harness.forecast import Unpredicted
from harness.plan_view import Fit, print_plan
from harness.predict import Prediction
from harness.trials import DataSpec, TrialSpec

MIB = 2**20
Printed = Callable[..., list[str]]


def prediction(saved_mib: int, peak_mib: int, *, parameters_mib: int = 1, blocks: int = 3) -> Prediction:
    state_bytes = parameters_mib * MIB
    return Prediction(
        activation_saved_bytes=saved_mib * MIB,
        activation_peak_bytes=peak_mib * MIB,
        allocated_peak_bytes=peak_mib * MIB + 3 * state_bytes,
        parameter_bytes=state_bytes,
        gradient_bytes=state_bytes,
        optimizer_bytes=state_bytes,
        buffer_bytes=0,
        batch_bytes=0,
        blocks=blocks,
        peak_at="",
    )


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Printed:
    def call(
        trials: list[TrialSpec], predictions: list[Prediction | Unpredicted], memory_bytes: int | None = None
    ) -> list[str]:
        print_plan(
            trials, {t.id: p for t, p in zip(trials, predictions, strict=True)}, [trials[0].id], lambda _: memory_bytes
        )
        return capsys.readouterr().out.splitlines()

    return call


def test_there_is_a_column_for_what_differs_and_the_rest_is_named_once(printed: Printed) -> None:
    sizes = [TrialSpec(model="revnet", data=DataSpec(name="synthetic", image_size=size)) for size in (32, 64)]
    head, *rows = printed(sizes, [prediction(10, 20), prediction(40, 80)])
    assert head.split() == ["id", "data.image_size", "saved", "MiB", "peak", "MiB", "total", "MiB", "state"]
    assert rows[0].split()[1:] == ["32", "10.0", "20.0", "23.0", "done"]
    assert rows[1].split()[1:] == ["64", "40.0", "80.0", "83.0", "to", "run"]
    assert "data.name synthetic, batch_size 32" in rows[2]
    assert "None" not in rows[2]


def test_what_does_not_fit_is_marked_with_its_reason(printed: Printed) -> None:
    trials = [TrialSpec(model="revnet", depth=depth) for depth in (14, 26, 38)]
    lines = printed(trials, [prediction(10, 20), prediction(60, 94), prediction(90, 120)], 100 * MIB)
    assert "yes" in lines[1]
    assert "tight" in lines[2]
    assert "no: 123.0 MiB, 90.0 MiB of it saved activations" in lines[3]
    assert lines[-1] == "3 trials, 1 done, 2 to run, 1 predicted not to fit"


def test_the_limit_of_the_study_holds_where_none_is_given(printed: Printed) -> None:
    limited = TrialSpec.from_json('{"model": "revnet", "resources": {"memory_bytes": 1048576}}')
    assert "no: 23.0 MiB" in printed([limited], [prediction(10, 20)])[1]
    assert "fits" not in printed([TrialSpec(model="revnet")], [prediction(10, 20)])[0]


@pytest.mark.parametrize(
    ("made", "memory_mib", "word", "why"),
    [
        (prediction(10, 20), 23, "tight", ""),
        (prediction(10, 20), 25, "yes", ""),
        (prediction(5, 20), 22, "no", "other activations and temporaries"),
        (prediction(1, 2, parameters_mib=50), 100, "no", "parameters"),
    ],
)
def test_a_fit(made: Prediction, memory_mib: int, word: str, why: str) -> None:
    fit = Fit.of(made, memory_mib * MIB)
    assert fit.word == word
    assert why in fit.why


def test_the_summary_has_the_slope_of_the_peak_at_the_largest_batch(printed: Printed) -> None:
    trials = [
        TrialSpec(model="revnet", depth=depth, batch_size=size, activations=activations)
        for activations in ("stored", "reconstructed")
        for size in (16, 32)
        for depth in (14, 38)
    ]
    stored = [prediction(1, peak, blocks=blocks) for peak, blocks in ((4, 3), (7, 9), (8, 3), (14, 9))]
    rebuilt = [prediction(1, 8, blocks=blocks) for blocks in (3, 9, 3, 9)]
    lines = printed(trials, [*stored, *rebuilt])
    assert lines[-3].split() == ["stored", "4", "1.000", "14.0", "17.0"]
    assert lines[-2].split() == ["reconstructed", "4", "0.000", "8.0", "11.0"]


def test_what_has_no_prediction_says_why_once(printed: Printed) -> None:
    trials = [TrialSpec(model="revnet", seed=seed) for seed in (0, 1, 2)]
    lines = printed(trials, [prediction(1, 2), *[Unpredicted("unsupported", "no such mode")] * 2])
    assert lines[2].split()[-3:] == ["unsupported", "to", "run"]
    assert lines[-2] == "2 trials without a prediction: no such mode"

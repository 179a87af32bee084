"""The search for the largest value that fits, on functions and on networks; its cells, and what confirms it."""

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness import find
from harness.confirm import as_study, confirm, search_name
from harness.errors import HarnessError, StoreError
from harness.expansion import expand
from harness.find import Cell, Limit, Search, cells_of, largest_fitting, parse_headroom, search_id, step_down
from harness.find_view import outcome
from harness.predict import Device, predict
from harness.record import Record, Status
from harness.store import RunStore
from harness.study import Study, load_study
from harness.trials import DataSpec, TrialSpec

MIB = 2**20
CPU = Device("cpu")
SMALL = TrialSpec(model="revnet", depth=14, channels=(4, 4, 4), batch_size=2, data=DataSpec(image_size=8))


class Counted:
    """A function that counts how often it is asked something new."""

    def __init__(self, needed_bytes: Callable[[int], int]) -> None:
        self.known: dict[int, int] = {}
        self._needed_bytes = needed_bytes

    def __call__(self, value: int) -> int:
        return self.known.setdefault(value, self._needed_bytes(value))


# The search


@given(
    steps=st.lists(st.integers(1, 50), min_size=1, max_size=60),
    limit_bytes=st.integers(0, 1500),
    values=st.sampled_from([range(1, 61), range(14, 734, 12)]),
)
def test_the_largest_that_fits_is_found_where_bytes_rise(
    steps: list[int], limit_bytes: int, values: Sequence[int]
) -> None:
    needed = dict(zip(values, [sum(steps[: i + 1]) for i in range(len(steps))], strict=False))
    fitting = [value for value, size_bytes in needed.items() if size_bytes <= limit_bytes]
    found = largest_fitting(values[: len(needed)], needed.__getitem__, limit_bytes)
    assert found == max(fitting, default=None)


@given(needed=st.lists(st.integers(0, 9), min_size=1, max_size=40), limit_bytes=st.integers(0, 9))
def test_what_is_found_fits_and_the_next_does_not_whatever_the_function(needed: list[int], limit_bytes: int) -> None:
    found = largest_fitting(range(len(needed)), needed.__getitem__, limit_bytes)
    if found is None:
        assert needed[0] > limit_bytes
    else:
        assert needed[found] <= limit_bytes
        assert found == len(needed) - 1 or needed[found + 1] > limit_bytes


@pytest.mark.parametrize(
    ("needed_bytes", "most"),
    [
        (lambda value: 1000 + 977 * value, 20),
        (lambda value: 1000 + max(50_000, 977 * value) + 31 * value, 24),
        (lambda value: 1000 + value**2, 36),
    ],
    ids=["affine", "a bend", "a parabola"],
)
def test_few_predictions_are_needed_and_none_far_beyond_the_limit(
    needed_bytes: Callable[[int], int], most: int
) -> None:
    counted = Counted(needed_bytes)
    found = largest_fitting(range(1, 65537), counted, 10**7)
    assert found is not None
    assert needed_bytes(found) <= 10**7 < needed_bytes(found + 1)
    assert len(counted.known) <= most
    assert max(counted.known) <= 2 * found + 1


@pytest.mark.parametrize("activations", ["stored", "checkpointed", "reconstructed"])
@pytest.mark.parametrize("axis", ["depth", "batch_size"])
def test_on_networks_it_agrees_with_trying_all(axis: find.Axis, activations: str) -> None:
    (cell,) = cells_of(
        [SMALL.model_copy(update={"activations": activations})], axis, MIB, 98 if axis == "depth" else 20
    )
    needed = {value: predict(cell.at(value), CPU).allocated_peak_bytes for value in cell.values}
    for limit_bytes in sorted(needed.values())[::3]:
        for of_limit in (limit_bytes - 1, limit_bytes):
            found = largest_fitting(cell.values, needed.__getitem__, of_limit)
            if found is None:
                assert needed[cell.values[0]] > of_limit
                continue
            later = cell.values[cell.values.index(found) + 1 :]
            assert needed[found] <= of_limit
            assert not later or needed[later[0]] > of_limit


def test_each_step_down_is_smaller_and_there_are_four() -> None:
    assert list(step_down(range(1, 101), lambda value: value, 100)) == [100, 95, 90, 85, 81]
    # Where 5 % is less than one value.
    assert list(step_down(range(1, 8), lambda value: value, 7)) == [7, 6, 5, 4, 3]
    assert list(step_down([50, 101], lambda value: value, 101)) == [101, 50]


@pytest.mark.parametrize(("text", "share"), [("5%", "1/20"), ("0.05", "1/20"), ("12.5 %", "1/8"), ("0", "0")])
def test_a_headroom_is_a_percentage_or_a_share(text: str, share: str) -> None:
    assert parse_headroom(text) == Fraction(share)


@pytest.mark.parametrize("text", ["5", "1", "100%", "-5%", "5 percent", "", "%", "5%%", "1e-2"])
def test_any_other_headroom_is_refused(text: str) -> None:
    with pytest.raises(HarnessError, match=r"--headroom .* Write 5% or 0\.05"):
        parse_headroom(text)


def test_a_prediction_has_to_fit_into_what_headroom_and_process_leave() -> None:
    assert Limit(1000, Fraction(1, 20)).budget_bytes == 950
    assert Limit(1000, Fraction(1, 20), 100).budget_bytes == 850


# The cells


def study_of(**sections: object) -> Study:
    return Study.model_validate({"name": "s", "model": "revnet"} | sections)


def test_trials_that_differ_in_the_axis_alone_are_one_cell() -> None:
    axes = {"depth": [14, 26], "activations": ["stored", "reconstructed"], "guard_every": [0, 50]}
    study = study_of(grid=axes, repeats=2)
    cells = cells_of(expand(study), "depth", MIB)
    assert [(cell.base.activations, cell.base.seed) for cell in cells] == [
        ("stored", 0),
        ("stored", 1),
        ("reconstructed", 0),
        ("reconstructed", 1),
    ]
    for cell in cells:
        trial = cell.at(26)
        assert (trial.depth, trial.warmup_steps, trial.measured_steps, trial.audit_batch_size) == (26, 0, 1, 0)
        assert trial.guard_every == 0
        assert trial.resources.memory_bytes == MIB


@pytest.mark.parametrize(
    ("model", "depth", "smallest", "largest"),
    [
        ("revnet", 38, [14, 26], 98),
        ("resnet", 38, [8, 14], 98),
        ("irevnet", 38, [20, 38], 92),
        ("resnet_imagenet", 50, [50], 50),
        ("package.module:net", 3, [1, 2], 100),
    ],
)
def test_the_depths_are_those_that_the_model_has(model: str, depth: int, smallest: list[int], largest: int) -> None:
    trial = SMALL.model_copy(update={"model": model, "depth": depth, "channels": None})
    (cell,) = cells_of([trial], "depth", MIB, 100)
    assert list(cell.values[:2]) == smallest
    assert cell.values[-1] == largest


def test_a_factory_without_depth_and_a_bound_below_the_smallest_are_refused() -> None:
    with pytest.raises(HarnessError, match=r"package\.module:net .*activations reconstructed.* has depth null"):
        cells_of([SMALL.model_copy(update={"model": "package.module:net", "depth": None})], "depth", MIB)
    with pytest.raises(HarnessError, match="--at-most 13: the smallest depth of revnet is 14"):
        cells_of([SMALL], "depth", MIB, 13)


def test_the_end_of_a_family_is_not_the_bound_of_the_search() -> None:
    named = SMALL.model_copy(update={"model": "resnet_imagenet", "channels": None})
    assert cells_of([named], "depth", MIB)[0].has_no_more
    assert not cells_of([named], "depth", MIB, 60)[0].has_no_more
    assert not cells_of([SMALL], "depth", MIB)[0].has_no_more


# Confirming

LIMIT = Limit(100, Fraction(0))
STUDY = study_of(
    predict="it does",
    data={"name": "synthetic", "image_size": 16},
    zip=[{"activations": ["stored", "reconstructed"], "channels": [[4, 4, 4], None]}],
    fixed={"learning_rate": 0.01},
    deepspeed={"steps_per_print": 7},
    resources={"timeout_s": 77},
)


class Runner:
    """In place of Ray: gives every trial a record at once, `oom` to those above `fits`."""

    def __init__(self, store: RunStore, fits: int, otherwise: Status = "oom") -> None:
        self.store, self.fits = store, fits
        self.otherwise: Status = otherwise
        self.ran: list[int] = []

    def __call__(self, trials: list[TrialSpec]) -> bool:
        for trial in trials:
            self.ran.append(trial.batch_size)
            status: Status = "ok" if trial.batch_size <= self.fits else self.otherwise
            self.store.write_trial(Record(id=trial.id, spec=trial.model_dump(mode="json"), status=status))
        return False


def searches_of(trials: Sequence[TrialSpec], limit: Limit = LIMIT) -> list[Search]:
    cells = cells_of(trials, "batch_size", limit.memory_bytes, 1000)
    return [Search(cell, limit, lambda trial: trial.batch_size) for cell in cells]


def confirmed(searches: list[Search], runner: Runner, retry: Sequence[str] = ()) -> list[str]:
    asked = search_id([search.cell for search in searches], LIMIT.headroom)

    def write_plan(trials: list[TrialSpec]) -> None:
        study = as_study(STUDY, trials, "batch_size", LIMIT)
        runner.store.open_for(study.resolved(), [trial.id for trial in trials], search=asked)

    assert not confirm(searches, runner.store, runner, write_plan=write_plan, retry=retry)
    return [outcome(search, runner.store) for search in searches]


def test_less_is_tried_after_oom_and_what_was_tried_is_kept(tmp_path: Path) -> None:
    runner = Runner(RunStore(tmp_path / "run"), fits=92)
    (search,) = searches_of([SMALL])
    assert confirmed([search], runner) == ["confirmed"]
    assert runner.ran == list(search.tried) == [100, 95, 90]
    plan = runner.store.read_plan()
    assert plan is not None
    assert set(plan.trials) == runner.store.finished_ids()
    assert len(plan.trials) == 3

    again = Runner(runner.store, fits=0)
    assert confirmed(searches_of([SMALL]), again) == ["confirmed"]
    assert again.ran == []
    assert runner.store.read_plan() == plan


def test_it_gives_up_after_four_steps_down(tmp_path: Path) -> None:
    runner = Runner(RunStore(tmp_path / "run"), fits=0)
    assert confirmed(searches_of([SMALL]), runner) == ["oom"]
    assert runner.ran == [100, 95, 90, 85, 81]


@pytest.mark.parametrize("status", ["failed", "crashed", "timeout", "unsupported"])
def test_nothing_less_is_tried_after_what_is_not_a_lack_of_memory(tmp_path: Path, status: Status) -> None:
    runner = Runner(RunStore(tmp_path / "run"), fits=0, otherwise=status)
    assert confirmed(searches_of([SMALL]), runner) == [status]
    assert runner.ran == [100]
    mended = Runner(runner.store, fits=1000)
    assert confirmed(searches_of([SMALL]), mended) == [status]
    assert confirmed(searches_of([SMALL]), mended, retry=[status]) == ["confirmed"]
    assert mended.ran == [100]


def test_a_cell_of_which_nothing_fits_runs_nothing(tmp_path: Path) -> None:
    cells = cells_of([SMALL], "batch_size", 100)
    searches = [Search(cell, LIMIT, lambda trial: 101 + trial.batch_size) for cell in cells]
    runner = Runner(RunStore(tmp_path / "run"), fits=1000)
    assert confirmed(searches, runner) == ["none"]
    assert searches[0].smallest_bytes == 102
    assert runner.ran == []
    assert not (tmp_path / "run").exists()


def test_the_study_that_is_written_has_exactly_the_trials_that_ran(tmp_path: Path) -> None:
    runner = Runner(RunStore(tmp_path / "run"), fits=92)
    searches = searches_of(expand(STUDY))
    confirmed(searches, runner)
    written = load_study(tmp_path / "run" / "study.yaml")
    assert written.name == "s-find-batch_size"
    assert written.question == "What is the largest batch_size that fits 100 bytes (0 % headroom)?"
    assert (written.predict, written.resources.timeout_s) == ("it does", 77)
    trials = expand(written)
    assert sorted(trial.id for trial in trials) == sorted(runner.store.finished_ids())
    assert len(trials) == 6
    # It can be run like any other, in the same directory.
    runner.store.open_for(written.resolved(), [trial.id for trial in trials])
    confirmed(searches_of(expand(STUDY)), runner)


def test_a_directory_of_another_search_or_of_no_search_is_refused(tmp_path: Path) -> None:
    searches = searches_of([SMALL])
    runner = Runner(RunStore(tmp_path / "run"), fits=92)
    confirmed(searches, runner)
    cells = [search.cell for search in searches]
    for other in (search_id(cells, Fraction(1, 10)), search_id(cells_of([SMALL], "batch_size", 99), LIMIT.headroom)):
        with pytest.raises(StoreError, match="a search that asks something else"):
            runner.store.check_search(other)
    runner.store.check_search(search_id(cells, LIMIT.headroom))
    ordinary = RunStore(tmp_path / "ordinary")
    ordinary.open_for({"name": "s"}, ["a" * 12])
    with pytest.raises(StoreError, match="a run that is no search"):
        ordinary.check_search(search_id(cells, LIMIT.headroom))


def test_what_memory_does_not_depend_on_is_predicted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[TrialSpec] = []

    def counted(trial: TrialSpec, device: Device) -> object:
        asked.append(trial)
        return predict(trial, device)

    monkeypatch.setattr(find, "predict", counted)
    predictions = find.Predictions(lambda trial: CPU)
    seeds = [SMALL.model_copy(update={"seed": seed, "learning_rate": 0.1 / (1 + seed)}) for seed in range(3)]
    assert len({predictions(trial) for trial in seeds}) == len(asked) == 1
    assert predictions(SMALL.model_copy(update={"batch_size": 4})) > predictions(SMALL)
    assert len(asked) == 2


def test_the_name_of_a_search_is_that_of_a_directory() -> None:
    assert search_name(study_of(name="x" * 64), "batch_size") == "x" * 48 + "-find-batch_size"


def test_cells_are_the_same_search_in_any_order() -> None:
    cells: list[Cell] = cells_of(expand(STUDY), "batch_size", 100)
    assert search_id(cells, Fraction(0)) == search_id(cells[::-1], Fraction(0))
    assert search_id(cells, Fraction(0)) != search_id(cells[:1], Fraction(0))

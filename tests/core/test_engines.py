"""Under parallel engines, training with reconstructed activations ends where training with stored ones does.

Two ranks take three steps on different data; `engine_cases` has the engines and networks, `engine_ranks` the training.
"""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch.multiprocessing.spawn import ProcessContext, ProcessException

from tests.core.engine_cases import (
    ALONE,
    COMPARED_RUNS,
    DRIFTING_CASES,
    FLAWED_RUNS,
    HEALTHY_CASES,
    NOT_STORING_CASES,
    RUNS,
    STORING_CASES,
    TOLERATED,
    Case,
)
from tests.core.engine_ranks import RANKS, STEPS, Changes, key, run_rank

TIME_LIMIT_S = 150
LOG_TAIL = 3000
# Relative to the norm of each tensor's own change over the three steps. float32 rounds by 6e-8 at every addition of a
# stream, which comes to 3e-6 at the worst tensor of these networks; float64 to 1e-14. A gradient that is wrong by 1 %
# in one net comes to 6e-2.
TOLERANCES = {"fp64": 1e-10, "fp32": 2e-5, "exact": 0.0}

STOPPED = "guard_stops_rank_1"

Results = list[dict[str, Changes | str]]


def run_ranks(runs: Sequence[tuple[Case, str]], folder: Path) -> Results:
    """What each rank saved; fails with the ranks' own words when one died or took too long."""
    ranks = torch.multiprocessing.spawn(run_rank, (runs, str(folder)), nprocs=RANKS, join=False)
    assert ranks is not None
    if failure := failure_of(ranks):
        logs = "\n".join(f"{log.name}: ...{log.read_text()[-LOG_TAIL:]}" for log in sorted(folder.glob("*.log")))
        pytest.fail(f"{failure}\n{logs}", pytrace=False)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(RANKS)]


def failure_of(ranks: ProcessContext) -> str | None:
    """Wait for all ranks, or until the first fails or the time is over; none is left running."""
    deadline = time.monotonic() + TIME_LIMIT_S
    try:
        while not ranks.join(timeout=max(0.0, deadline - time.monotonic()), grace_period=1):
            if time.monotonic() > deadline:
                return f"the ranks did not end in {TIME_LIMIT_S} s."
    except ProcessException as error:
        return str(error)
    finally:
        for process in ranks.processes:
            assert process is not None
            process.kill()
    return None


def runs_of(family: str) -> list[tuple[Case, str]]:
    return [(case, run) for case, run in RUNS if case.family == family]


@pytest.fixture(scope="module")
def ddp(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run_ranks(runs_of("ddp"), tmp_path_factory.mktemp("ddp"))


@pytest.fixture(scope="module")
def zero(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run_ranks(runs_of("zero"), tmp_path_factory.mktemp("zero"))


@pytest.fixture
def results(case: Case, request: pytest.FixtureRequest) -> Results:
    return request.getfixturevalue(case.family)


def changes_of(results: Results, case: Case, run: str) -> list[Changes]:
    """By rank."""
    changes = []
    for rank, of_rank in enumerate(results):
        result = of_rank[key(case, run)]
        if isinstance(result, str):
            pytest.fail(f"rank {rank}, {run}: {result}", pytrace=False)
        changes.append(result)
    return changes


class Difference(NamedTuple):
    """A tensor whose change is not the expected one. error: relative; infinite where none was expected."""

    error: float
    kind: str
    name: str


def differences(actual: list[Changes], expected: list[Changes], tolerance: float) -> list[Difference]:
    """Those over the tolerance on any rank, the largest first; a tensor that stays as it was is one of them."""
    found = []
    for actual_of_rank, expected_of_rank in zip(actual, expected, strict=True):
        for kind, tensors in expected_of_rank.items():
            assert actual_of_rank[kind].keys() == tensors.keys()
            for name, tensor in tensors.items():
                norm = tensor.norm().item()
                error = (actual_of_rank[kind][name] - tensor).norm().item() / norm if norm else math.inf
                if not error <= tolerance:
                    found.append(Difference(error, kind, name))
    return sorted(found, reverse=True)


def differences_from_stored(results: Results, case: Case, run: str) -> list[Difference]:
    stored = changes_of(results, case, "stored")
    return differences(changes_of(results, case, run), stored, TOLERANCES[case.reconstruction])


@pytest.mark.parametrize(("case", "run"), COMPARED_RUNS, ids=str)
def test_every_parameter_and_buffer_changes_as_with_stored_activations(case: Case, run: str, results: Results) -> None:
    assert differences_from_stored(results, case, run) == []


@pytest.mark.parametrize(("case", "flaw"), FLAWED_RUNS, ids=str)
def test_the_comparison_finds_a_flaw(case: Case, flaw: str, results: Results) -> None:
    kinds = {difference.kind for difference in differences_from_stored(results, case, flaw)}
    assert kinds == ({"buffers"} if flaw == "count_twice" else {"parameters", "buffers"})


@pytest.mark.parametrize(
    ("actual", "expected"),
    [([0.0, 0.0], [1.0, 2.0]), ([1.0, math.nan], [1.0, 2.0]), ([1.0, 2.001], [1.0, 2.0]), ([0.0, 0.0], [0.0, 0.0])],
    ids=["untrained", "nan", "other", "stored_untrained"],
)
def test_the_comparison_finds_a_tensor(actual: list[float], expected: list[float]) -> None:
    changes: list[Changes] = [{"parameters": {"weight": torch.tensor(change)}} for change in (actual, expected)]
    assert [found.name for found in differences(changes[:1], changes[1:], 1e-5)] == ["weight"]


def parameters_agree(changes: list[Changes]) -> bool:
    first, *others = (of_rank["parameters"] for of_rank in changes)
    return all(torch.equal(tensor, other[name]) for other in others for name, tensor in first.items())


@pytest.mark.parametrize(("case", "run"), [run for run in RUNS if run[1] == "reconstructed"], ids=str)
def test_ranks_end_with_the_same_parameters(case: Case, run: str, results: Results) -> None:
    assert parameters_agree(changes_of(results, case, run))


@pytest.mark.parametrize("case", [ALONE], ids=str)
def test_ranks_that_nothing_connects_end_with_different_parameters(case: Case, results: Results) -> None:
    assert not parameters_agree(changes_of(results, case, "stored"))


@pytest.mark.parametrize("case", HEALTHY_CASES, ids=str)
def test_a_guard_that_finds_nothing_changes_no_bit(case: Case, results: Results) -> None:
    guarded = changes_of(results, case, "guarded")
    assert differences(guarded, changes_of(results, case, "reconstructed"), 0.0) == []
    for of_rank in guarded:
        assert len(of_rank["checks"]) == STEPS * case.accumulation
        assert all(rel <= TOLERATED for rel in of_rank["checks"].values())
        assert of_rank["warnings"] == {}


@pytest.mark.parametrize("case", DRIFTING_CASES, ids=str)
def test_a_guard_that_stops_does_so_in_the_first_backward(case: Case, results: Results) -> None:
    for of_rank in results:
        raised = of_rank[key(case, "guard_stops")]
        assert isinstance(raised, str)
        assert "DriftError: sequences.0.couplings[0]: at step 1 its rebuilt input was off by" in raised


@pytest.mark.parametrize("case", [Case("ddp", "plain", "fp64"), Case("zero3", "plain", "fp32")], ids=str)
def test_a_rank_that_is_stopped_alone_ends_the_other_when_it_leaves(case: Case, tmp_path: Path) -> None:
    waiting, stopped = (of_rank[key(case, STOPPED)] for of_rank in run_ranks([(case, STOPPED)], tmp_path))
    assert "DriftError: sequences.0.couplings[0]: at step 1" in str(stopped)
    assert isinstance(waiting, str)
    assert "DriftError" not in waiting
    assert "onnection" in waiting


@pytest.mark.parametrize("case", DRIFTING_CASES, ids=str)
def test_a_guard_that_warns_does_so_on_the_rank_that_drifts_and_goes_on(case: Case, results: Results) -> None:
    guarded = changes_of(results, case, "guard_warns")
    assert differences(guarded, changes_of(results, case, "drifts"), 0.0) == []
    healthy, drifting = guarded
    assert healthy["warnings"] == {}
    assert all(rel <= TOLERATED for rel in healthy["checks"].values())
    assert all(rel > TOLERATED for rel in drifting["checks"].values())
    # Once a block, of which it comes to the first and two others.
    assert len(drifting["checks"]) == STEPS * case.accumulation
    assert 2 <= len(drifting["warnings"]) <= 3


@pytest.mark.parametrize("case", STORING_CASES, ids=str)
def test_a_guard_that_stores_on_one_rank_alone_ends_the_drift_there(case: Case, results: Results) -> None:
    guarded, tolerance = changes_of(results, case, "guard_stores"), TOLERANCES[case.reconstruction]
    assert differences(guarded, changes_of(results, case, "drifts_once"), tolerance) == []
    assert differences(guarded, changes_of(results, case, "drifts"), tolerance)
    assert parameters_agree(guarded)
    healthy, drifting = guarded
    assert (len(healthy["warnings"]), len(drifting["warnings"])) == (0, 1)
    assert len(healthy["checks"]) == STEPS * case.accumulation
    assert len(drifting["checks"]) == 1


@pytest.mark.parametrize("case", NOT_STORING_CASES, ids=str)
def test_storing_is_refused_where_ranks_have_to_go_alike(case: Case, results: Results) -> None:
    for of_rank in results:
        raised = of_rank[key(case, "guard_stores")]
        assert isinstance(raised, str)
        assert "UnsupportedError: action='store' is decided by each rank for itself" in raised

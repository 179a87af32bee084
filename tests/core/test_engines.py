"""Under parallel engines, training with reconstructed activations ends where training with stored ones does.

Two ranks take three steps on different data; `engine_cases` has the engines and networks, `engine_ranks` the training.
"""

import math
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch.multiprocessing.spawn import ProcessContext, ProcessException

from tests.core.engine_cases import ALONE, COMPARED_RUNS, FLAWED_RUNS, RUNS, Case
from tests.core.engine_ranks import RANKS, Changes, key, run_rank

TIME_LIMIT_S = 150
LOG_TAIL = 3000
# Relative to the norm of each tensor's own change over the three steps. float32 rounds by 6e-8 at every addition of a
# stream, which comes to 3e-6 at the worst tensor of these networks; float64 to 1e-14. A gradient that is wrong by 1 %
# in one net comes to 6e-2.
TOLERANCES = {"fp64": 1e-10, "fp32": 2e-5, "exact": 0.0}

Results = list[dict[str, Changes | str]]


def run_ranks(family: str, folder: Path) -> Results:
    """What each rank saved; fails with the ranks' own words when one died or took too long."""
    ranks = torch.multiprocessing.spawn(run_rank, (family, str(folder)), nprocs=RANKS, join=False)
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


@pytest.fixture(scope="module")
def ddp(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run_ranks("ddp", tmp_path_factory.mktemp("ddp"))


@pytest.fixture(scope="module")
def zero(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run_ranks("zero", tmp_path_factory.mktemp("zero"))


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

"""What counts as handed to a collective and how times add up, on one process and on a fake group of several ranks."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from harness.measure import communication
from harness.measure.communication import (
    Collectives,
    Communication,
    Handed,
    covered_ns,
    measure_communication,
    summarize_communication,
)

RANKS = 4
FLOAT = 4


@pytest.fixture
def ranks() -> Iterator[None]:
    """Collectives that move nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    yield
    dist.destroy_process_group()


def reduce_ten_floats() -> None:
    dist.all_reduce(torch.zeros(10))


@pytest.mark.usefixtures("ranks")
def test_of_each_collective_what_goes_in_is_counted() -> None:
    part, whole = torch.zeros(10), torch.zeros(10 * RANKS)
    with Collectives() as collectives:
        dist.all_reduce(whole)
        dist.all_reduce(part, async_op=True)
        dist.all_gather_into_tensor(whole, part)
        dist.all_gather([torch.zeros(10) for _ in range(RANKS)], part)
        dist.reduce_scatter_tensor(part, whole)
        dist.reduce(part, 0)
        dist.broadcast(part, 0)
        dist.all_to_all_single(torch.zeros_like(whole), whole)
    assert collectives.handed == {
        "all_reduce": Handed(2, FLOAT * 10 * (RANKS + 1)),
        "all_gather": Handed(2, FLOAT * 10 * 2),
        "reduce_scatter": Handed(1, FLOAT * 10 * RANKS),
        "reduce": Handed(1, FLOAT * 10),
        "broadcast": Handed(1, FLOAT * 10),
        "all_to_all": Handed(1, FLOAT * 10 * RANKS),
    }


@pytest.mark.usefixtures("ranks")
def test_what_is_no_collective_or_has_no_payload_is_not_counted() -> None:
    with Collectives() as collectives:
        (torch.zeros(10) + 1).sum()
        dist.barrier()
    assert collectives.handed == {}


@pytest.mark.usefixtures("ranks")
def test_bytes_are_those_of_the_dtype() -> None:
    with Collectives() as collectives:
        dist.all_reduce(torch.zeros(10, dtype=torch.bfloat16))
    assert collectives.handed["all_reduce"].nbytes == 20


@pytest.mark.usefixtures("ranks")
def test_a_backend_whose_collectives_the_profiler_does_not_see_has_bytes_and_no_times() -> None:
    found = measure_communication(reduce_ten_floats, timed_steps=2)
    assert found.nbytes == 40
    metrics, unmeasured = summarize_communication([found])
    assert metrics == {"communication_bytes": 40, "communication_rank_spread_bytes": 0}
    assert unmeasured == {"communication_s": "the profiler recorded no collective of the backend fake"}


@pytest.mark.usefixtures("ranks")
def test_on_cuda_bytes_are_counted_and_times_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(communication.dist, "get_backend", lambda: "nccl")
    found = measure_communication(reduce_ten_floats, timed_steps=2)
    assert found.nbytes == 40
    assert "on the device" in summarize_communication([found])[1]["communication_s"]


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        ([], 0),
        ([(0, 10), (20, 25)], 15),
        ([(20, 25), (0, 10)], 15),
        ([(0, 10), (5, 12)], 12),
        ([(0, 10), (2, 3), (4, 12)], 12),
    ],
    ids=["none", "apart", "out of order", "overlapping", "one within another"],
)
def test_what_overlaps_counts_once(spans: list[tuple[int, int]], expected: int) -> None:
    # Far from 0, as a clock is.
    start_ns = 10**18
    assert covered_ns([(start_ns + begin, start_ns + end) for begin, end in spans]) == expected


def test_of_several_ranks_the_largest_and_how_far_they_are_apart() -> None:
    ranks = [
        Communication({"all_reduce": Handed(1, 8)}, [1.0, 5.0, 1.0]),
        Communication({"all_reduce": Handed(1, 8), "broadcast": Handed(2, 4)}, [2.0, 2.0, 4.0]),
    ]
    metrics, unmeasured = summarize_communication(ranks)
    assert metrics == {
        "communication_bytes": 12,
        "communication_rank_spread_bytes": 4,
        "communication_s": 4.0,  # of 2, 5, 4
        "communication_rank_spread_s": 1.0,  # of the medians 1 and 2
    }
    assert isinstance(metrics["communication_bytes"], int)
    assert unmeasured == {}

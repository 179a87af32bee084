"""Two ranks under ZeRO 0 to 3: what each holds, what it hands to collectives, and what the two learn.

By the formulas of Rajbhandari et al. 2020 (ZeRO, arXiv:1910.02054), and to the byte by what DeepSpeed does beyond them.
"""

from collections.abc import Iterable
from math import ceil
from typing import Any, NamedTuple

import pytest
import torch

from harness.data import load_data
from harness.models import create, loss_of
from harness.record import Record
from harness.supervise import Supervised
from harness.trials import TrialSpec
from revnet_core import ReversibleSequence
from tests.harness.conftest import Trial

FLOAT, DOUBLE = 4, 8
WORKERS = 2
# The first is that of the initial weights, so that the last is that of three steps.
LOSSES = 4
STAGES = (0, 1, 2, 3)
# DeepSpeed's own default, and one that divides every parameter.
PERSISTENCE_THRESHOLD, NONE_PERSISTENT = 100_000, 0
RANDOM_STATES_BYTES = 16 * 2**10


class Size(NamedTuple):
    """Of a parameter, in elements; `reversible`: of a block that is computed again in the backward."""

    numel: int
    reversible: bool


def sizes_of(spec: TrialSpec) -> list[Size]:
    model = create(spec)
    sequences = [module for module in model.modules() if isinstance(module, ReversibleSequence)]
    reversible = {parameter for sequence in sequences for parameter in sequence.parameters()}
    return [Size(parameter.numel(), parameter in reversible) for parameter in model.parameters()]


def elements(sizes: Iterable[Size]) -> int:
    return sum(size.numel for size in sizes)


@pytest.fixture
def done(trial: Trial, spec: TrialSpec) -> Any:
    """From a stage, and a threshold of parameters that stage 3 leaves whole, to the trial of two ranks."""

    def of(stage: int, threshold: int = PERSISTENCE_THRESHOLD) -> Supervised:
        zero = {} if threshold == PERSISTENCE_THRESHOLD else {"stage3_param_persistence_threshold": threshold}
        changes: dict[str, Any] = {"deepspeed": {"zero_optimization": zero}} if zero else {}
        found = trial(spec, workers=WORKERS, zero_stage=stage, measured_steps=LOSSES, **changes)
        assert found.record.status == "ok", found.record.reason
        return found

    return of


# What a rank holds


def by_the_formulas(psi: int, stage: int) -> dict[str, int]:
    """Bytes for `psi` parameters in fp32 under SGD with momentum, between the backward and the optimizer's step.

    From stage 1 on the optimizer has master weights beside the momentum, though parameters are in fp32 already. In
    stage 1 gradients are whole while the backward runs, and DeepSpeed lets go of the other rank's at its end.
    """
    whole, half = FLOAT * psi, FLOAT * psi // WORKERS
    return {
        "parameter": half if stage == 3 else whole,
        "gradient": whole if stage == 0 else half,
        "optimizer": whole if stage == 0 else 2 * half,
    }


def beyond_the_formulas(sizes: list[Size], stage: int) -> dict[str, int]:
    """The most that DeepSpeed holds besides: padding, and of gradients what cannot be parted or is not yet."""
    if stage == 0:
        return {"parameter": 0, "gradient": 0, "optimizer": 0}
    if stage == 3:
        # One element of each odd parameter; and the bucket in which gradients are reduced, as large as the model.
        padding = FLOAT * len(sizes)
        return {"parameter": padding, "gradient": padding + FLOAT * elements(sizes), "optimizer": 2 * padding}
    # Each rank's part begins at a multiple of two elements; a parameter in both parts has its whole gradient on both.
    padding = FLOAT * 2 * WORKERS
    largest = FLOAT * max(size.numel for size in sizes)
    return {"parameter": padding, "gradient": padding + largest, "optimizer": 2 * padding}


def fits(record: Record, sizes: list[Size], stage: int) -> bool:
    beyond = beyond_the_formulas(sizes, stage)
    return all(
        formula <= record.metrics[f"{name}_bytes"] <= formula + beyond[name]
        for name, formula in by_the_formulas(elements(sizes), stage).items()
    )


@pytest.mark.parametrize("stage", STAGES)
def test_a_rank_holds_what_the_formulas_say(done: Any, spec: TrialSpec, stage: int) -> None:
    assert fits(done(stage, NONE_PERSISTENT if stage == 3 else PERSISTENCE_THRESHOLD).record, sizes_of(spec), stage)


@pytest.mark.parametrize(("stage", "other"), [(0, 1), (1, 0), (2, 0), (2, 3), (3, 2)])
def test_the_formulas_of_another_stage_do_not_fit(done: Any, spec: TrialSpec, stage: int, other: int) -> None:
    threshold = NONE_PERSISTENT if stage == 3 else PERSISTENCE_THRESHOLD
    assert not fits(done(stage, threshold).record, sizes_of(spec), other)


def held_by_each_of_two(sizes: list[int], stage: int, threshold: int) -> list[dict[str, int]]:
    """Elements by arithmetic; `sizes` of the parameters."""
    whole = sum(sizes)
    if stage == 0:
        rank = {"parameter": whole, "gradient": whole, "optimizer": whole}
        return [rank, rank]
    if stage == 3:
        # Each parameter is divided, and padded to equal parts; those below DeepSpeed's threshold stay whole too.
        partition = sum(ceil(size / WORKERS) for size in sizes)
        persistent = sum(size for size in sizes if size <= threshold)
        # Beside its gradients a rank keeps the bucket, which the harness makes as large as the model.
        rank = {"parameter": partition + persistent, "gradient": partition + whole, "optimizer": 2 * partition}
        return [rank, rank]
    # All parameters end to end, padded so that each rank's part begins at a multiple of two elements.
    padded = ceil(whole / (2 * WORKERS)) * 2 * WORKERS
    partition = padded // WORKERS
    ranks = []
    for rank in range(WORKERS):
        low, high = rank * partition, (rank + 1) * partition
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        # A parameter that lies in both parts has its whole gradient on both ranks.
        gradient = sum(size for size, end in zip(sizes, ends, strict=True) if end > low and end - size < high)
        padding = padded - whole if rank == WORKERS - 1 else 0
        # Master weights and momentum.
        ranks.append({"parameter": padded, "gradient": gradient + padding, "optimizer": 2 * partition})
    return ranks


CASES = [*((stage, PERSISTENCE_THRESHOLD) for stage in STAGES), (3, NONE_PERSISTENT)]


@pytest.mark.parametrize(("stage", "threshold"), CASES)
def test_two_ranks_hold_what_zero_leaves_them(done: Any, spec: TrialSpec, stage: int, threshold: int) -> None:
    metrics = done(stage, threshold).record.metrics
    ranks = held_by_each_of_two([size.numel for size in sizes_of(spec)], stage, threshold)
    for category in ("parameter", "gradient", "optimizer"):
        of_ranks = [rank[category] * FLOAT for rank in ranks]
        assert metrics[f"{category}_bytes"] == max(of_ranks), category
        assert metrics[f"{category}_rank_spread_bytes"] == max(of_ranks) - min(of_ranks), category
    assert metrics["predicted_parameter_bytes"] == metrics["parameter_bytes"]
    assert metrics["predicted_optimizer_bytes"] == metrics["optimizer_bytes"]
    assert metrics["unattributed_peak_bytes"] <= RANDOM_STATES_BYTES
    assert metrics["unmatched_storage_bytes"] == 0


# What a rank hands to collectives


def handed_over(sizes: list[Size], stage: int, threshold: int) -> dict[str, int]:
    """Bytes in one step, by what goes into a collective: into a gather this rank's half."""
    psi = elements(sizes)
    if stage == 0:
        return {"all_reduce": FLOAT * psi}
    if stage < 3:
        # Gradients whole, where the paper would scatter them, and the square of their norm; parameters when updated.
        padded = ceil(psi / (2 * WORKERS)) * 2 * WORKERS
        return {"all_reduce": FLOAT * psi + FLOAT, "all_gather": FLOAT * padded // WORKERS}
    # Divided parameters before the forward and before the backward, and reversible ones for the recompute; those that
    # are kept whole once, when updated.
    gathered = sum(ceil(size.numel / WORKERS) * gathers(size, threshold) for size in sizes)
    return {"reduce_scatter": FLOAT * psi, "all_gather": FLOAT * gathered, "all_reduce": DOUBLE}


def gathers(size: Size, threshold: int) -> int:
    return 1 if size.numel <= threshold else 3 if size.reversible else 2


def told(done: Supervised) -> dict[str, int]:
    rows = {row.name: int(row.value) for row in done.trace if row.table == "communication"}
    return {name.removesuffix("_bytes"): value for name, value in rows.items() if name.endswith("_bytes")}


@pytest.mark.parametrize(("stage", "threshold"), CASES)
def test_a_rank_hands_over_what_the_stage_asks_for(done: Any, spec: TrialSpec, stage: int, threshold: int) -> None:
    found = done(stage, threshold)
    expected = handed_over(sizes_of(spec), stage, threshold)
    assert told(found) == expected
    assert found.record.metrics["communication_bytes"] == sum(expected.values())
    assert found.record.metrics["communication_rank_spread_bytes"] == 0
    assert found.record.metrics["communication_s"] > 0
    times = [row for row in found.trace if (row.table, row.name) == ("communication", "communication_s")]
    assert [row.index for row in times] == list(range(LOSSES))


def test_only_what_is_computed_again_is_gathered_again(done: Any, spec: TrialSpec) -> None:
    without_recompute = [size._replace(reversible=False) for size in sizes_of(spec)]
    gathered = told(done(3, NONE_PERSISTENT))["all_gather"]
    again = elements(size for size in sizes_of(spec) if size.reversible)
    assert again > 0
    assert gathered - handed_over(without_recompute, 3, NONE_PERSISTENT)["all_gather"] == FLOAT * again // WORKERS


def test_one_rank_communicates_with_nobody(trial: Trial, spec: TrialSpec) -> None:
    record = trial(spec).record
    assert not [name for name in record.metrics if name.startswith("communication")]
    for name in ("communication_bytes", "communication_s"):
        assert record.unmeasured[name] == "one rank has no other to communicate with"


# What they learn


def losses_without_an_engine(spec: TrialSpec, *, share: float) -> list[float]:
    """Rank 0's, of one process that takes both ranks' batches in turn and adds `share` of each one's gradient."""
    ranks = [
        load_data(
            *(spec.data.name, spec.data.path, spec.data.image_size),
            batch_size=spec.batch_size,
            batches=LOSSES,
            seed=spec.seed,
            rank=rank,
            world_size=WORKERS,
        )
        for rank in range(WORKERS)
    ]
    model = create(spec)
    optimizer = torch.optim.SGD(model.parameters(), lr=spec.learning_rate, momentum=0.9)
    losses = []
    for batches in zip(*ranks, strict=True):
        optimizer.zero_grad()
        of_ranks = [loss_of(model(x), labels) for x, labels in batches]
        for loss in of_ranks:
            (share * loss).backward()
        optimizer.step()
        losses.append(of_ranks[0].item())
    return losses


def losses_of(done: Supervised) -> list[float]:
    return [row.value for row in done.trace if (row.table, row.name) == ("step", "loss")]


@pytest.mark.parametrize(("stage", "threshold"), CASES[1:])
def test_every_stage_learns_the_same_to_the_bit(done: Any, stage: int, threshold: int) -> None:
    """A sum of two has no order, and half of it rounds nothing."""
    losses = losses_of(done(0))
    assert len(set(losses)) == LOSSES
    assert losses_of(done(stage, threshold)) == losses


def test_two_ranks_learn_what_one_process_learns_from_both_batches(done: Any, spec: TrialSpec) -> None:
    losses = losses_of(done(0))
    # Gradients of the two batches add up in another order within a parameter's gradient.
    assert losses_without_an_engine(spec, share=1 / WORKERS) == pytest.approx(losses, rel=1e-5)
    # Gradients that are added and not averaged.
    assert losses_without_an_engine(spec, share=1) != pytest.approx(losses, rel=1e-2)

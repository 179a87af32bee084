"""The memory meter, calibrated on tensors of known size. 4 bytes an element."""

import pytest
import torch
from torch import Tensor

from harness.errors import MeasurementError
from harness.measure.memory import MemoryUse, measure_memory

MIB = 2**20
ELEMENTS_PER_MIB = MIB // 4


class Twice(torch.autograd.Function):
    """y = 2x; saves `saved_mib` for backward, uses `scratch_mib` for a moment in the backward."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, saved_mib: int, scratch_mib: int) -> Tensor:
        ctx.saved = torch.ones(saved_mib * ELEMENTS_PER_MIB)  # pyright: ignore[reportAttributeAccessIssue]
        ctx.scratch_mib = scratch_mib  # pyright: ignore[reportAttributeAccessIssue]
        return x * 2

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor, None, None]:
        torch.ones(ctx.scratch_mib * ELEMENTS_PER_MIB)  # pyright: ignore[reportAttributeAccessIssue]
        return grads[0] * 2, None, None


def measured(saved_mib: int, scratch_mib: int, kept: list[Tensor] | None = None) -> MemoryUse:
    weight = torch.ones((), requires_grad=True)
    weight.grad = torch.zeros_like(weight)

    def forward() -> Tensor:
        if kept is not None:
            kept.append(torch.ones(ELEMENTS_PER_MIB))
        return Twice.apply(weight, saved_mib, scratch_mib)  # pyright: ignore[reportReturnType]

    return measure_memory(torch.device("cpu"), forward, lambda loss: loss.backward())


@pytest.mark.parametrize(("saved_mib", "scratch_mib"), [(1, 1), (8, 1), (3, 20)])
def test_known_tensors_are_counted_to_the_kilobyte(saved_mib: int, scratch_mib: int) -> None:
    use = measured(saved_mib, scratch_mib)
    scalars_bytes = 1024
    assert 0 <= use.activation_saved_bytes - saved_mib * MIB < scalars_bytes
    assert 0 <= use.activation_peak_bytes - (saved_mib + scratch_mib) * MIB < scalars_bytes


def test_an_activation_that_is_kept_is_caught() -> None:
    kept: list[Tensor] = []
    extra_bytes = measured(4, 1, kept).activation_saved_bytes - measured(4, 1).activation_saved_bytes
    assert len(kept) == 1
    assert extra_bytes == MIB


def test_what_was_allocated_before_does_not_count_nor_its_release() -> None:
    before = [torch.ones(50 * ELEMENTS_PER_MIB)]
    weight = torch.ones((), requires_grad=True)

    def forward() -> Tensor:
        before.clear()
        return Twice.apply(weight, 2, 1)  # pyright: ignore[reportReturnType]

    use = measure_memory(torch.device("cpu"), forward, lambda loss: loss.backward())
    assert use.activation_saved_bytes // MIB == 2
    assert use.activation_peak_bytes // MIB == 3


def test_a_release_of_what_an_earlier_measurement_saw_does_not_count() -> None:
    kept: list[Tensor] = []
    first = measured(4, 1, kept)

    def forward() -> Tensor:
        kept.clear()
        return Twice.apply(torch.ones((), requires_grad=True), 4, 1)  # pyright: ignore[reportReturnType]

    second = measure_memory(torch.device("cpu"), forward, lambda loss: loss.backward())
    assert first.activation_saved_bytes // MIB == 5
    assert second.activation_saved_bytes // MIB == 4
    assert second.activation_peak_bytes // MIB == 5


@pytest.mark.parametrize("nested", [torch.profiler.profile, torch.autograd.profiler.profile])
def test_a_profiler_within_the_step_is_refused(nested: type[torch.profiler.profile]) -> None:
    """It ends the one that measures, which then sees a part of the step or nothing."""

    def forward() -> Tensor:
        with nested():
            return Twice.apply(torch.ones((), requires_grad=True), 1, 1)  # pyright: ignore[reportReturnType]

    with pytest.raises(MeasurementError, match="started a profiler of its own"):
        measure_memory(torch.device("cpu"), forward, lambda loss: loss.backward())


def test_a_profiler_around_the_step_changes_nothing() -> None:
    alone = measured(3, 2)
    with torch.profiler.profile():
        within = measured(3, 2)
    assert within.activation_peak_bytes == alone.activation_peak_bytes
    assert within.activation_saved_bytes == alone.activation_saved_bytes


def test_the_timeline_holds_the_peak_and_is_in_order() -> None:
    use = measured(8, 4)
    seconds, levels = zip(*use.timeline, strict=True)
    assert list(seconds) == sorted(seconds)
    assert max(levels) == use.activation_peak_bytes

"""A comparison finds what was planted, however backward is called, and the steps between cost nothing."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from revnet_core import (
    Budgeted,
    DriftError,
    DriftReport,
    Guard,
    Precision,
    ReversibleSequence,
)
from revnet_core.probe import Finding
from tests.core.guard_cases import HEALTHY, KINDS, blocks_of, image, set_steps, step, wavering
from tests.core.nets import (
    FP64,
    IMAGE_NCHW,
    assert_same,
    input_of,
    sequence_of,
    side_of,
    training_step,
    twin_of,
    weighted_sum,
)

OF_TWO_STREAMS = math.prod(IMAGE_NCHW) * 8
SYNCHRONIZING = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal.", "_to_copy")


def test_what_it_finds_is_what_was_planted() -> None:
    """The second call gives 0.5 more than the first, on each element of one stream."""
    model = wavering(0.5)
    guard = Guard(every=1, tolerance=1.0).attach(model)
    step(model)
    s2 = image().chunk(2, 1)[1]
    # F sees the stream that is off, so that its own is off, too.
    off = torch.tanh(s2 - 0.5) - torch.tanh(s2)
    error = torch.cat([off, torch.full_like(s2, 0.5)], 1).norm() / image().norm()
    assert guard.history == (DriftReport(1, "", 0, pytest.approx(error.item())),)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("at", range(3))
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_found_wherever_it_arises(value: float, at: int) -> None:
    for block in range(3):
        model = wavering(0, 0, 0)
        guard = Guard(every=1, tolerance=1e6).attach(model)
        for _ in range({0: 0, 1: 1, 2: 3}[block]):
            step(model)
        set_steps(model, *(value if index == at else 0.0 for index in range(3)))
        with pytest.raises(DriftError, match=rf"couplings\[{block}\]: .*not a number"):
            step(model)
        assert math.isnan(guard.history[-1].rel)


@pytest.mark.parametrize(
    ("norms", "rel"),
    [
        ((3.0, 4.0, 30.0, 40.0), 0.1),
        ((0.0, 0.0, 0.0, 0.0), 0.0),
        ((0.0, 1.0, 0.0, 0.0), math.inf),
        ((0.0, math.inf, 1.0, 0.0), math.inf),
        # A norm that overflowed says nothing, however small the error.
        ((1.0, 1.0, math.inf, 1.0), math.nan),
        ((1.0, 1.0, math.nan, 1.0), math.nan),
    ],
)
def test_the_relative_error_of_both_streams(norms: tuple[float, ...], rel: float) -> None:
    assert Finding(0, torch.tensor(norms, dtype=torch.float64)).rel() == pytest.approx(rel, nan_ok=True)


def narrow(reconstruction: str) -> ReversibleSequence:
    sequence = sequence_of("conv_bn", 20, precision=Precision(reconstruction=reconstruction))
    return sequence.float()


@pytest.mark.parametrize(
    ("reconstruction", "least", "most"),
    [("bf16", 1e-3, 1.0), ("fp16", 1e-4, 1e-1), ("fp32", 1e-9, 1e-5), ("exact", 0.0, 0.0)],
)
def test_each_precision_drifts_as_its_width_says(reconstruction: str, least: float, most: float) -> None:
    model = narrow(reconstruction)
    guard = Guard(every=1, tolerance=most).attach(model)
    for _ in range(4):
        training_step(model, input_of("conv_bn", torch.float32))
    assert least <= guard.history[0].rel <= most
    if least:
        guard.tolerance = least / 10
        with pytest.raises(DriftError, match=r"couplings\[0\]"):
            training_step(model, input_of("conv_bn", torch.float32))


def test_a_pair_of_streams() -> None:
    model = wavering(0, 0.5)
    model.split_dim = None
    Guard(every=1).attach(model)
    y1, y2 = model(tuple(image().chunk(2, 1)))
    with pytest.raises(DriftError, match=r"couplings\[0\]"):
        weighted_sum(y1 + y2).backward()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", [FP64, Precision(reconstruction="exact", grid_bits=32)])
def test_gradients_are_bit_equal_with_a_guard(kind: str, precision: Precision) -> None:
    plain, guarded = (sequence_of(kind, 3, precision=precision).double() for _ in range(2))
    Guard(every=1, tolerance=HEALTHY).attach(guarded)
    for _ in range(4):
        expected = training_step(plain, input_of(kind), side_of(kind))
        assert_same(training_step(guarded, input_of(kind), side_of(kind)), expected, bits=True)


class Operations(TorchDispatchMode):
    """Every operation in order, and the most bytes of results that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.peak_bytes = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.names.append(str(func))
        self._alive = {key: alive for key, alive in self._alive.items() if not alive[0].expired()}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, sum(size_bytes for _, size_bytes in self._alive.values()))
        return out


def operations_of_a_step(model: nn.Module) -> Operations:
    x = image()
    with Operations() as seen:
        weighted_sum(model(x)).backward()
    return seen


@pytest.fixture
def nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Findings are as on a device that is never ready, and reading one fails."""

    def refuse(self: Finding) -> float:
        raise AssertionError("the host waited")

    monkeypatch.setattr(Finding, "rel", refuse)
    monkeypatch.setattr(Finding, "on_host", False)
    monkeypatch.setattr(Finding, "is_ready", lambda self: False)


@pytest.mark.usefixtures("nothing_is_read")
def test_a_step_between_is_the_same_operations_and_memory_as_without_a_guard() -> None:
    plain, guarded = sequence_of("conv_bn", 5), sequence_of("conv_bn", 5)
    Guard(every=3, tolerance=HEALTHY).attach(guarded)
    for index in range(9):
        expected, seen = operations_of_a_step(plain), operations_of_a_step(guarded)
        more = Counter(seen.names) - Counter(expected.names)
        assert not [name for name in more if any(s in name for s in SYNCHRONIZING)]
        if index % 3:
            assert seen.names == expected.names
            assert seen.peak_bytes == expected.peak_bytes
        else:
            # Of each stream a copy and its norm, and the difference and its norm.
            assert more.pop("aten.clone.default") == 2
            assert more.pop("aten.sub_.Tensor") == 2
            assert more.pop("aten.linalg_vector_norm.default") == 4
            assert more.keys() <= {"aten.stack.default", "aten.cat.default", "aten.unsqueeze.default"}
            assert expected.peak_bytes < seen.peak_bytes <= expected.peak_bytes + OF_TWO_STREAMS + 1024


def test_the_counts_above_notice_a_read_and_a_kept_tensor() -> None:
    with Operations() as seen:
        torch.ones(3).sum().item()
    assert any("_local_scalar_dense" in name for name in seen.names)
    with Operations() as kept:
        a = torch.ones(1000, dtype=torch.float64)
        b = a + 1
        del a
        c = b + 1
    assert kept.peak_bytes == 16_000
    assert len(c) == 1000


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_nothing_waits() -> None:
    model = sequence_of("conv_bn", 3).cuda()
    guard = Guard(every=2).attach(model)
    x, weight = image().cuda(), torch.ones((), device="cuda", dtype=torch.float64)
    (model(x) * weight).sum().backward()
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(6):
            (model(x) * weight).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert [report.step for report in guard.history] == [1, 3, 5, 7]
    assert all(report.rel <= HEALTHY for report in guard.history)


def test_several_forwards_before_their_backwards() -> None:
    model = wavering(0, 0, 0)
    guard = Guard(every=1, tolerance=HEALTHY).attach(model)
    outputs = [model(image() * scale) for scale in (1, 2, 3)]
    for y in outputs:
        weighted_sum(y).backward()
    assert [(report.step, report.block) for report in guard.history] == [(1, 0), (2, 1), (3, 0)]


def test_a_graph_that_is_retained_is_compared_once() -> None:
    model = wavering(0, 0)
    guard = Guard(every=1, tolerance=HEALTHY).attach(model)
    loss = weighted_sum(model(image()))
    loss.backward(retain_graph=True)
    loss.backward()
    assert blocks_of(guard) == [0]


def test_in_front_of_frozen_blocks_the_first_that_is_walked_is_compared() -> None:
    model = wavering(0, 0, 0)
    model.couplings[0].requires_grad_(False)
    guard = Guard(every=1, tolerance=HEALTHY).attach(model)
    for _ in range(4):
        weighted_sum(model(image(requires_grad=False))).backward()
    assert blocks_of(guard) == [1, 1, 1, 2]


def test_blocks_that_the_backward_does_not_come_to_are_not_compared() -> None:
    model = wavering(0, 0, 0)
    guard = Guard(every=1).attach(model)
    for _ in range(4):
        torch.autograd.grad(weighted_sum(model(image())), list(model.couplings[-1].parameters()))
    assert blocks_of(guard) == [2]


@pytest.mark.parametrize("activations", ["stored", "checkpointed", "offloaded"])
def test_what_is_not_rebuilt_is_not_compared(activations: str) -> None:
    model = twin_of(wavering(0, 0.5), activations)
    guard = Guard(every=1).attach(model)
    step(model)
    assert not guard.history


def test_of_a_budget_the_rebuilt_blocks_are_compared() -> None:
    model = sequence_of("conv_bn", 5)
    model.activations = Budgeted(2**20)  # all of them, but for the first forward, which measures
    guard = Guard(every=1, tolerance=HEALTHY).attach(model)
    training_step(model, input_of("conv_bn"))
    assert blocks_of(guard) == [0]
    training_step(model, input_of("conv_bn"))
    assert blocks_of(guard) == [0]
    model.activations = Budgeted(40_000)  # two of them
    training_step(model, input_of("conv_bn"))
    measured = len(guard.history)
    for _ in range(12):
        training_step(model, input_of("conv_bn"))
    assert set(blocks_of(guard)[measured:]) == {0, 1, 2}


def test_on_meta_there_is_nothing_to_compare() -> None:
    model = sequence_of("conv_bn", 2).to("meta")
    guard = Guard(every=1).attach(model)
    model(torch.empty(IMAGE_NCHW, dtype=torch.float64, device="meta")).sum().backward()
    assert not guard.history

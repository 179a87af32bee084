"""Attribution on tensors of known size: each category to the byte, on the CPU's own allocator."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.measure.attribution import CATEGORIES, Attribution, Block, Held, attribute, held_storages
from harness.measure.events import AllocatorEvent, AllocatorHistory, ProfilerRecorder
from harness.measure.live import LiveStorages, Storage
from harness.measure.memory import measure_memory
from harness.measure.timeline import memory_rows, owner_rows, phase_rows, thin

CPU = torch.device("cpu")
KIB = 2**10
FLOAT = 4


class Rebuild(torch.autograd.Function):
    """y = x + w; keeps no input, and in the backward rebuilds it by Python code of its own."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, weight: Tensor) -> Tensor:
        y = x + weight
        ctx.save_for_backward(y, weight)
        return y

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor, Tensor]:
        y, weight = ctx.saved_tensors  # pyright: ignore[reportAttributeAccessIssue]
        rebuilt = y - weight
        return grads[0] * rebuilt, grads[0].sum(0)


class Net(nn.Module):
    """N samples of C floats; two parameters and a buffer of C. Sigmoid saves its output, and so does Rebuild.

    kept  what is deliberately left alive
    """

    def __init__(self, channels: int, kept: list[Tensor] | None = None) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels))
        self.shift = nn.Parameter(torch.ones(channels))
        self.register_buffer("statistic", torch.zeros(channels))
        self.sigmoid = nn.Sigmoid()
        self.leaky = Leaky(kept)

    def forward(self, x: Tensor) -> Tensor:
        return Rebuild.apply(self.leaky(self.sigmoid(x * self.scale)), self.shift)  # pyright: ignore[reportReturnType]


class Leaky(nn.Module):
    def __init__(self, kept: list[Tensor] | None) -> None:
        super().__init__()
        self.kept = kept

    def forward(self, x: Tensor) -> Tensor:
        if self.kept is not None:
            self.kept.append(x.clone())
        return x


class Trained:
    """A net with its gradients, a momentum for each parameter, and a batch; `step` attributes one step."""

    def __init__(self, samples: int, channels: int, kept: list[Tensor] | None = None) -> None:
        self.net = Net(channels, kept)
        for parameter in self.net.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.momentum = [torch.zeros_like(p) for p in self.net.parameters()]
        self.batch = [torch.zeros(samples, channels)]

    def held(self) -> list[Held]:
        parameters = list(self.net.parameters())
        tensors = {
            "parameter": parameters,
            "gradient": [p.grad for p in parameters if p.grad is not None],
            "optimizer": self.momentum,
            "buffer": list(self.net.buffers()),
            "batch": self.batch,
        }
        return held_storages(tensors, CPU)

    def step(self) -> Attribution:
        existing = [*self.net.parameters(), *self.momentum, *self.net.buffers(), *self.batch]
        existing += [p.grad for p in self.net.parameters() if p.grad is not None]
        before, recorder = self.held(), ProfilerRecorder()
        with recorder, LiveStorages(existing, model=self.net) as live:
            loss = self.net(self.batch[0]).sum()
            live.end_forward()
            recorder.end_forward()
            loss.backward()
        return attribute(recorder.history(), live.storages, device=CPU, before=before, after=self.held())


@pytest.mark.parametrize(("samples", "channels"), [(16, 1024), (3, 4096)])
def test_each_category_is_right_to_the_byte(samples: int, channels: int) -> None:
    attribution = Trained(samples, channels).step()
    vector, activation, scalar = channels * FLOAT, samples * channels * FLOAT, FLOAT
    levels, forward_end = attribution.levels(), attribution.history.forward_end
    start = {category: of_category[0] for category, of_category in levels.items()}
    assert start == dict.fromkeys(CATEGORIES, 0) | {
        "parameter": 2 * vector,
        "gradient": 2 * vector,
        "optimizer": 2 * vector,
        "buffer": vector,
        "batch": activation,
    }
    between = {category: of_category[forward_end] for category, of_category in levels.items()}
    # The sigmoid's and the Rebuild's output, and the loss.
    assert between == start | {"saved": 2 * activation + scalar}
    # The rebuilt input, and the two gradients that the same code makes.
    assert max(levels["reconstruction"]) == 2 * activation + vector
    # x * scale until its sigmoid is there; the gradient by the sigmoid's input, that times x, the sum of it, and the
    # gradient by the loss.
    assert max(levels["temporary"][: forward_end + 1]) == activation
    assert max(levels["temporary"][forward_end:]) == 2 * activation + vector + scalar
    assert max(levels["unattributed"]) == 0
    assert attribution.unmatched_storage_bytes == 0
    assert levels["gradient"] == [2 * vector] * len(levels["gradient"])


def test_at_each_moment_the_categories_sum_to_the_allocator_s_level() -> None:
    attribution = Trained(4, 512).step()
    levels, total = attribution.levels(), attribution.history.levels
    held_bytes = sum(held.nbytes for held in attribution.held)
    assert [sum(moment) for moment in zip(*levels.values(), strict=True)] == [held_bytes + level for level in total]
    assert sum(owner.nbytes for owner in attribution.owners(most=3)) == attribution.history.peak_bytes


def test_an_activation_that_is_kept_is_caught_and_named() -> None:
    kept: list[Tensor] = []
    leaky, clean = Trained(4, 512, kept).step(), Trained(4, 512).step()
    nbytes = 4 * 512 * FLOAT
    assert len(kept) == 1
    ends = [attribution.levels()["saved"][-1] for attribution in (leaky, clean)]
    # The loss is still alive in both.
    assert ends[0] - ends[1] == nbytes
    named = {(owner.category, owner.name): owner.nbytes for owner in leaky.owners(20)}
    assert named["saved", "leaky"] == nbytes
    assert not [owner for owner in clean.owners(20) if owner.name == "leaky"]


def test_owners_come_with_the_largest_first_and_the_rest_as_one() -> None:
    attribution = Trained(4, 512).step()
    every, two = attribution.owners(100), attribution.owners(2)
    assert [o.nbytes for o in every] == sorted((o.nbytes for o in every), reverse=True)
    assert two[:2] == every[:2]
    assert (two[2].name, two[2].nbytes) == ("others", sum(o.nbytes for o in every[2:]))


def test_a_gradient_that_the_step_makes_is_one_from_its_birth() -> None:
    trained = Trained(4, 512)
    for parameter in trained.net.parameters():
        parameter.grad = None
    levels = trained.step().levels()["gradient"]
    assert (levels[0], levels[-1]) == (0, 2 * 512 * FLOAT)


def test_what_a_kernel_takes_for_itself_is_a_temporary() -> None:
    x = torch.zeros(1, 8, 32, 32)
    convolution = nn.Conv2d(8, 8, 3, padding=1, bias=False)
    recorder = ProfilerRecorder()
    with recorder, LiveStorages([x, convolution.weight]) as live:
        y = convolution(x)
        recorder.end_forward()
        live.end_forward()
    attribution = attribute(recorder.history(), live.storages, device=CPU, before=[], after=[])
    assert attribution.levels()["saved"][-1] == y.nbytes
    assert max(attribution.levels()["unattributed"]) == 0
    scratch = [block for block in attribution.blocks if block.category == "temporary"]
    assert all(block.operation == "aten::conv2d" and block.owner == "" for block in scratch)


def test_gradients_that_meet_take_a_new_storage_under_the_tracker() -> None:
    """Which is why the attributed step's peak is not the one that is recorded."""

    def forward(x: Tensor) -> Tensor:
        y = x.exp()
        return (y * 2).sum() + (y * 3).sum() + (y * 4).sum()

    x = torch.zeros(KIB, requires_grad=True)
    x.grad = torch.zeros_like(x)
    plain = measure_memory(CPU, lambda: forward(x), lambda loss: loss.backward())
    recorder = ProfilerRecorder()
    with recorder, LiveStorages([x, x.grad]):
        loss = forward(x)
        recorder.end_forward()
        loss.backward()
    scalars_bytes = 64  # that a factor becomes within a kernel
    assert abs(recorder.history().peak_bytes - plain.activation_peak_bytes - x.nbytes) < scalars_bytes
    assert recorder.history().saved_bytes == plain.activation_saved_bytes


# On events of our own making


def history(*events: tuple[int, int, int, int], forward_end: int = 0) -> AllocatorHistory:
    """Of (time, address, bytes, call)."""
    return AllocatorHistory([AllocatorEvent(t, a, n, "op", c) for t, a, n, c in events], forward_end, 0, 1000)


def storage(address: int, born_ns: int, **fields: object) -> Storage:
    defaults = {"nbytes": 1, "phase": "forward", "operation": "aten.add.Tensor", "owner": "", "by_engine": False}
    return Storage(address=address, born_ns=born_ns, **(defaults | {"device": "cpu"} | fields))  # pyright: ignore[reportArgumentType]


def attribution(
    history: AllocatorHistory,
    storages: list[Storage],
    after: tuple[Held, ...] = (),
    category_of: Callable[[Storage], str | None] = lambda storage: None,
) -> Attribution:
    return attribute(history, storages, device=CPU, before=[], after=after, category_of=category_of)


def test_one_address_at_two_times_is_two_allocations() -> None:
    twice = history((10, 7, 100, 0), (20, 7, -100, 0), (30, 7, 60, 0), (40, 7, -60, 0))
    assert categories(twice, [storage(7, 35, saved=True)]) == ["unattributed", "saved"]


@pytest.mark.parametrize("born_ns", [5, 25, 45])
def test_a_storage_without_an_allocation_is_counted_and_changes_nothing(born_ns: int) -> None:
    found = attribution(history((10, 7, 100, 0), (20, 7, -100, 0)), [storage(7, born_ns, nbytes=11)])
    assert found.unmatched_storage_bytes == 11
    assert [block.category for block in found.blocks] == ["unattributed"]


@pytest.mark.parametrize("fields", [{"device": "meta"}, {"device": "cuda"}, {"address": 0}], ids=str)
def test_a_storage_elsewhere_is_none_of_this_device_s(fields: dict[str, object]) -> None:
    elsewhere = storage(7, 15)
    for name, value in fields.items():
        setattr(elsewhere, name, value)
    found = attribution(history((10, 7, 100, 0)), [elsewhere])
    assert found.unmatched_storage_bytes == 0
    assert found.blocks[0].category == "unattributed"


@pytest.mark.parametrize(
    ("calls", "category"), [((3, 3), "temporary"), ((3, 4), "unattributed"), ((0, 0), "unattributed")]
)
def test_scratch_lives_within_one_call_of_an_operation(calls: tuple[int, int], category: str) -> None:
    assert categories(history((10, 7, 100, calls[0]), (20, 7, -100, calls[1])), []) == [category]


@pytest.mark.parametrize("operation", ["c10d::_reduce_scatter_base_", "gloo:all_gather"])
def test_a_collective_s_own_buffer_may_outlive_its_call(operation: str) -> None:
    events = AllocatorHistory([AllocatorEvent(10, 7, 100, operation, 3)], 0, 0, 1000)
    assert categories(events, []) == ["temporary"]


def test_scratch_that_outlives_its_operation_is_unattributed() -> None:
    assert categories(history((10, 7, 100, 3)), []) == ["unattributed"]


@pytest.mark.parametrize(
    ("fields", "category"),
    [
        ({"saved": True}, "saved"),
        ({}, "temporary"),
        ({"phase": "backward", "in_engine": True, "by_engine": True}, "temporary"),
        ({"phase": "backward", "in_engine": True}, "reconstruction"),
        ({"phase": "backward", "in_engine": True, "operation": "aten.threshold_backward.default"}, "temporary"),
        ({"phase": "backward"}, "temporary"),
    ],
    ids=str,
)
def test_what_a_storage_is(fields: dict[str, object], category: str) -> None:
    assert categories(history((10, 7, 100, 0)), [storage(7, 15, **fields)]) == [category]


def test_what_is_kept_at_the_end_and_what_the_engine_made_go_before() -> None:
    events = history((10, 7, 100, 0), (11, 8, 100, 0), (12, 8, -100, 0))
    storages = [storage(7, 10, saved=True), storage(8, 11, caller="engine", saved=True)]
    after = (Held("gradient", 7, 100), Held("gradient", 8, 100))

    def category_of(storage: Storage) -> str | None:
        return "parameter" if storage.caller else None

    assert categories(events, storages, after, category_of) == ["gradient", "parameter"]


def test_one_storage_under_two_tensors_is_held_once() -> None:
    flat = torch.zeros(8)
    held = held_storages({"parameter": [flat[:4], flat[4:]], "gradient": [flat], "buffer": [torch.zeros(0)]}, CPU)
    assert held == [Held("parameter", flat.data_ptr(), 32)]
    assert held_storages({"parameter": [torch.zeros(4, device="meta")]}, CPU) == []


def categories(*args: Any) -> list[str]:
    return [block.category for block in attribution(*args).blocks]


# As rows of the trace


def test_few_points_keep_the_extremes_and_what_is_asked_for() -> None:
    levels = list(itertools.chain(*([i % 7, i] for i in range(5000)), [1]))
    positions = thin(levels, keep=(0, 4321, len(levels) - 1))
    assert len(positions) <= 2 * 400 + 3
    assert positions == sorted(set(positions))
    assert {0, 4321, len(levels) - 1, levels.index(max(levels))} <= set(positions)


def test_the_rows_hold_start_forward_end_and_peak_and_sum_to_the_level() -> None:
    attribution = Trained(4, 512).step()
    points: dict[int, dict[str, float]] = {}
    for row in memory_rows(attribution):
        points.setdefault(row.index, {})[row.name] = row.value
    by_time = list(points.values())
    live = [point["live_bytes"] for point in by_time]
    assert live[0] == by_time[0]["time_s"] == 0
    assert max(live) == attribution.history.peak_bytes
    assert attribution.history.saved_bytes in live
    assert [p["time_s"] for p in by_time] == sorted(p["time_s"] for p in by_time)
    held_bytes = sum(held.nbytes for held in attribution.held)
    for point in by_time:
        assert sum(point[f"{category}_bytes"] for category in CATEGORIES) == held_bytes + point["live_bytes"]


def test_the_phases_say_where_among_the_points_the_backward_begins() -> None:
    attribution = Trained(4, 512).step()
    backward, end = phase_rows(attribution)
    assert (backward.name, end.name) == ("backward_s", "end_s")
    levels = {row.index: row.value for row in memory_rows(attribution) if row.name == "live_bytes"}
    times = {row.index: row.value for row in memory_rows(attribution) if row.name == "time_s"}
    at = [index for index, seconds in times.items() if seconds == backward.value]
    assert attribution.history.saved_bytes in [levels[index] for index in at]
    assert 0 < backward.value < max(times.values()) <= end.value


def test_owner_rows_are_named_by_category_and_owner() -> None:
    blocks = [
        Block(1, 8, 0, None, "aten.exp", "saved", "stage.0"),
        Block(2, 4, 1, None, "aten::conv2d", "temporary"),
        Block(3, 2, 2, None, ""),
    ]
    events = history((10, 1, 8, 0), (11, 2, 4, 0), (12, 3, 2, 0))
    rows = owner_rows(Attribution(events, blocks, [], 0))
    assert [(row.index, row.name, row.value) for row in rows] == [
        (0, "saved: stage.0", 8),
        (1, "temporary: aten::conv2d", 4),
        (2, "unattributed: unknown", 2),
    ]

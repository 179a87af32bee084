"""The allocator's events: read from a profile and from a snapshot, and joined into allocations by their addresses."""

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._C._profiler import RecordScope, _EventType

from harness.errors import MeasurementError
from harness.measure import events as events_module
from harness.measure.events import (
    END,
    FORWARD_END,
    START,
    AllocatorEvent,
    HistoryRecorder,
    ProfilerRecorder,
    history_from_snapshot,
    history_from_tree,
    record_events,
)

KIB = 2**10


def operation(name: str, number: int, *children: Any, scope: RecordScope = RecordScope.FUNCTION) -> Any:
    fields = SimpleNamespace(scope=scope)
    return SimpleNamespace(
        tag=_EventType.TorchOp, name=name, id=number, start_time_ns=number, children=children, extra_fields=fields
    )


def allocation(time_ns: int, address: int, nbytes: int, device: str = "cpu") -> Any:
    fields = SimpleNamespace(ptr=address, alloc_size=nbytes, device=torch.device(device))
    return SimpleNamespace(
        tag=_EventType.Allocation, name="[memory]", start_time_ns=time_ns, children=(), extra_fields=fields
    )


def marks(start_ns: int = 0, forward_end_ns: int = 100, end_ns: int = 200) -> list[Any]:
    return [operation(name, time) for name, time in ((START, start_ns), (FORWARD_END, forward_end_ns), (END, end_ns))]


def test_a_release_of_what_nobody_allocated_in_the_step_is_no_event() -> None:
    history = history_from_tree([*marks(), allocation(10, 1, -7), allocation(20, 2, 5), allocation(30, 2, -5)])
    assert [(e.address, e.nbytes) for e in history.events] == [(2, 5), (2, -5)]
    assert history.levels == [0, 5, 0]


def test_an_address_handed_out_again_was_freed_before() -> None:
    history = history_from_tree([*marks(), allocation(10, 1, 5), allocation(20, 1, 7), allocation(30, 1, -7)])
    assert [(e.time_ns, e.nbytes) for e in history.events] == [(10, 5), (20, -5), (20, 7), (30, -7)]
    assert history.peak_bytes == 7


def test_events_come_in_order_and_are_parted_at_the_forward_s_end() -> None:
    history = history_from_tree([allocation(150, 3, 4), allocation(50, 1, 16), *marks(), allocation(60, 2, 32)])
    assert [e.nbytes for e in history.events] == [16, 32, 4]
    assert history.forward_end == 2
    assert history.saved_bytes == 48
    assert history.peak_bytes == 52


def test_the_operation_is_the_outermost_one() -> None:
    inner = operation("aten::empty", 4, allocation(10, 1, 8))
    convolution = operation("aten::conv2d", 3, operation("aten::mkldnn_convolution", 5, inner, allocation(20, 1, -8)))
    region = operation("a user's", 2, convolution, scope=RecordScope.USER_SCOPE)
    events = history_from_tree([*marks(), region]).events
    assert [(e.operation, e.call) for e in events] == [("aten::conv2d", 3)] * 2


def test_a_collective_is_an_operation() -> None:
    inner = operation("aten::empty", 8, allocation(10, 1, 8))
    (event,) = history_from_tree(
        [*marks(), operation("gloo:all_gather", 9, inner, scope=RecordScope.USER_SCOPE)]
    ).events
    assert (event.operation, event.call) == ("gloo:all_gather", 9)


@pytest.mark.parametrize(
    ("name", "scope"),
    [
        ("autograd::engine::evaluate_function: MmBackward0", RecordScope.FUNCTION),
        ("MmBackward0", RecordScope.BACKWARD_FUNCTION),
        ("MyFunction", RecordScope.FUNCTION),
        ("my::region", RecordScope.USER_SCOPE),
    ],
)
def test_what_spans_several_operations_is_none(name: str, scope: RecordScope) -> None:
    (event,) = history_from_tree([*marks(), operation(name, 9, allocation(10, 1, 8), scope=scope)]).events
    assert (event.operation, event.call) == (name, 0)


def test_another_device_s_memory_does_not_count() -> None:
    history = history_from_tree([*marks(), allocation(10, 1, 8), allocation(20, 2, 8, device="cuda:0")])
    assert history.peak_bytes == 8


@pytest.mark.parametrize("missing", [START, FORWARD_END, END])
def test_a_profile_that_misses_a_part_of_the_step_is_refused(missing: str) -> None:
    nodes = [node for node in marks() if node.name != missing]
    with pytest.raises(MeasurementError, match="ended during the step"):
        history_from_tree([*nodes, allocation(10, 1, 8)])


def test_a_profile_without_any_allocation_is_refused() -> None:
    with pytest.raises(MeasurementError, match="recorded no allocation"):
        history_from_tree(marks())


def test_the_profiler_s_events_are_those_of_known_tensors() -> None:
    recorder = ProfilerRecorder()
    with recorder:
        first = torch.empty(KIB, dtype=torch.uint8)
        recorder.end_forward()
        second = torch.empty(3 * KIB, dtype=torch.uint8)
        addresses = [first.data_ptr(), second.data_ptr()]
        del first
    history = recorder.history()
    assert [(e.address, e.nbytes, e.operation) for e in history.events] == [
        (addresses[0], KIB, "aten::empty"),
        (addresses[1], 3 * KIB, "aten::empty"),
        (addresses[0], -KIB, ""),
    ]
    assert (history.forward_end, history.saved_bytes, history.peak_bytes) == (1, KIB, 4 * KIB)
    times_ns = [history.start_ns, *(e.time_ns for e in history.events), history.end_ns]
    assert times_ns == sorted(times_ns)


def snapshot(*entries: tuple[str, int, int, int, str]) -> dict[str, Any]:
    """Of device 1, as `torch.cuda.memory._snapshot` returns it: action, address, bytes, microseconds, metadata."""
    trace = [
        {"action": action, "addr": addr, "size": size, "stream": 0, "time_us": time_us, "user_metadata": text}
        for action, addr, size, time_us, text in entries
    ]
    return {"segments": [], "device_traces": [[{"action": "alloc", "addr": 99, "size": 99, "time_us": 1}], trace]}


def test_a_snapshot_s_events_are_the_device_s_allocations_and_completed_releases() -> None:
    history = history_from_snapshot(
        snapshot(
            ("segment_alloc", 1, 2 << 20, 10, ""),
            ("alloc", 1, 512, 10, "7 aten.mm.default"),
            ("alloc", 600, 40, 11, "7 aten.mm.default"),
            ("free_requested", 600, 40, 12, "7 aten.mm.default"),
            ("free_completed", 600, 40, 12, "7 aten.mm.default"),
            ("free_completed", 5000, 8, 25, ""),
            ("alloc", 5000, 16, 30, ""),
        ),
        1,
        start_ns=5_000,
        forward_end_ns=20_000,
        end_ns=40_000,
    )
    assert history.events == [
        AllocatorEvent(10_000, 1, 512, "aten.mm.default", 7),
        AllocatorEvent(11_000, 600, 40, "aten.mm.default", 7),
        AllocatorEvent(12_000, 600, -40, "aten.mm.default", 7),
        AllocatorEvent(30_000, 5000, 16, "", 0),
    ]
    assert (history.forward_end, history.saved_bytes, history.peak_bytes) == (3, 512, 552)


def test_a_snapshot_without_names_of_operations_has_the_same_sums() -> None:
    bare = snapshot(("alloc", 1, 512, 10, ""))
    del bare["device_traces"][1][0]["user_metadata"]
    history = history_from_snapshot(bare, 1, start_ns=0, forward_end_ns=20_000, end_ns=30_000)
    assert history.events == [AllocatorEvent(10_000, 1, 512, "", 0)]


def test_a_snapshot_that_may_have_lost_events_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events_module, "MAX_ENTRIES", 2)
    one, two = ("alloc", 1, 8, 1, ""), ("alloc", 2, 8, 2, "")
    times_ns = {"start_ns": 0, "forward_end_ns": 5_000, "end_ns": 9_000}
    assert history_from_snapshot(snapshot(one), 1, **times_ns).peak_bytes == 8
    with pytest.raises(MeasurementError, match="more than 2 allocator events"):
        history_from_snapshot(snapshot(one, two), 1, **times_ns)


@pytest.mark.parametrize("stacks", [True, False])
def test_the_history_of_a_gpu_is_recorded_within_the_step_only(monkeypatch: pytest.MonkeyPatch, stacks: bool) -> None:
    """On an allocator that only notes what it is asked for."""
    asked: list[tuple[Any, ...]] = []
    entry = {"action": "alloc", "addr": 1, "size": 8, "time_us": time.time_ns() // 1000}
    memory = torch.cuda.memory
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: asked.append(("synchronize", device)))
    monkeypatch.setattr(memory, "_record_memory_history", lambda on, **how: asked.append((on, how.get("context"))))
    monkeypatch.setattr(memory, "_snapshot", lambda: {"device_traces": [[], [entry]]})
    monkeypatch.setattr(memory, "_set_memory_metadata", lambda text: asked.append(("note", text)), raising=False)
    recorder = HistoryRecorder(torch.device("cuda", 1), stacks=stacks)
    with recorder:
        recorder.note_operation("1 aten.mm.default")
        recorder.end_forward()
    assert asked == [
        ("synchronize", 1),
        ("all", "alloc" if stacks else None),
        ("note", "1 aten.mm.default"),
        ("synchronize", 1),
        ("note", ""),
        (None, None),
    ]
    history = recorder.history()
    assert history.peak_bytes == 8
    assert history.start_ns <= history.end_ns


def test_each_device_has_its_recorder() -> None:
    assert isinstance(record_events(torch.device("cpu")), ProfilerRecorder)
    assert isinstance(record_events(torch.device("cuda", 0)), HistoryRecorder)

"""The allocator's own events over one step: what was allocated, at which address, when, and when it was freed.

On the CPU from PyTorch's profiler, which sees the scratch of kernels too; on CUDA from the caching allocator's history.
What was allocated before the step is no event, nor is its release.
"""

import time
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import torch
from torch._C._profiler import RecordScope, _EventType

from harness.errors import MeasurementError

START, FORWARD_END, END = "revnet_step_start", "revnet_forward_end", "revnet_step_end"
# An entry takes some KB of host memory when it has a stack; a step that needs more of them is refused, not cut short.
MAX_ENTRIES = 200_000


class AllocatorEvent(NamedTuple):
    """One allocation, or one release of it.

    time_ns    as of `time.time_ns()`; on CUDA in steps of a microsecond
    nbytes     negative when it was freed; on CUDA as asked for, which the allocator rounds up
    operation  the outermost operation that was running, or else the node of autograd's graph; "" outside both
    call       which call of the operation it was, so that two events with the same number (0 is none) are of one call
    """

    time_ns: int
    address: int
    nbytes: int
    operation: str
    call: int = 0


class AllocatorHistory(NamedTuple):
    """The events of a step in order; the first `forward_end` of them happened before the backward."""

    events: list[AllocatorEvent]
    forward_end: int
    start_ns: int
    end_ns: int

    @property
    def levels(self) -> list[int]:
        """Bytes above the level at the start: first at the start, then after each event."""
        return list(accumulate((event.nbytes for event in self.events), initial=0))

    def seconds(self, position: int) -> float:
        """From the start to the moment that the level of this position began."""
        return (self.events[position - 1].time_ns - self.start_ns) / 1e9 if position else 0.0

    @property
    def saved_bytes(self) -> int:
        """Between forward and backward."""
        return sum(event.nbytes for event in self.events[: self.forward_end])

    @property
    def peak_bytes(self) -> int:
        return max(self.levels)


class Recorder(Protocol):
    """Use as a context around one step, and call `end_forward` between forward and backward.

    `note_operation` may be told before each operation which one it is, as "number name", and "" after it.
    """

    def __enter__(self) -> "Recorder": ...
    def __exit__(self, *error: object) -> None: ...
    def end_forward(self) -> None: ...
    def note_operation(self, operation: str) -> None: ...
    def history(self) -> AllocatorHistory:
        """Once the context has ended. Raises MeasurementError when events are missing."""
        ...


class ProfilerRecorder:
    """The CPU allocator's events."""

    def __init__(self) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        self.profile = torch.profiler.profile(activities=activities, profile_memory=True)

    def __enter__(self) -> "ProfilerRecorder":
        self.profile.__enter__()
        _mark(START)
        return self

    def __exit__(self, *error: object) -> None:
        _mark(END)
        self.profile.__exit__(None, None, None)

    def end_forward(self) -> None:
        _mark(FORWARD_END)

    def note_operation(self, operation: str) -> None:
        """The profiler knows."""

    def history(self) -> AllocatorHistory:
        profiler = self.profile.profiler
        results = None if profiler is None else profiler.kineto_results
        return history_from_tree([] if results is None else results.experimental_event_tree())


class HistoryRecorder:
    """The events of the CUDA caching allocator; `snapshot` is what PyTorch's memory viewer reads."""

    def __init__(self, device: torch.device, *, stacks: bool = False) -> None:
        self._device_index = torch.cuda.current_device() if device.index is None else device.index
        self._context = "alloc" if stacks else None
        # Not in every version of PyTorch; without it operations have no names.
        self._note = getattr(torch.cuda.memory, "_set_memory_metadata", lambda text: None)
        self.snapshot: dict[str, Any] = {}
        self._times_ns: list[int] = []

    def __enter__(self) -> "HistoryRecorder":
        torch.cuda.synchronize(self._device_index)
        torch.cuda.memory._record_memory_history(
            "all", context=self._context, stacks="python", max_entries=MAX_ENTRIES, clear_history=True
        )
        self._times_ns.append(time.time_ns())
        return self

    def __exit__(self, *error: object) -> None:
        torch.cuda.synchronize(self._device_index)
        self._times_ns.append(time.time_ns())
        self.note_operation("")
        try:
            self.snapshot = torch.cuda.memory._snapshot()
        finally:
            torch.cuda.memory._record_memory_history(None)

    def end_forward(self) -> None:
        self._times_ns.append(time.time_ns())

    def note_operation(self, operation: str) -> None:
        self._note(operation)

    def history(self) -> AllocatorHistory:
        start_ns, forward_end_ns, end_ns = self._times_ns
        return history_from_snapshot(
            self.snapshot, self._device_index, start_ns=start_ns, forward_end_ns=forward_end_ns, end_ns=end_ns
        )


def record_events(device: torch.device, *, stacks: bool = False) -> Recorder:
    """stacks: whether a snapshot on CUDA is to hold the Python stack of each allocation."""
    return HistoryRecorder(device, stacks=stacks) if device.type == "cuda" else ProfilerRecorder()


def history_from_tree(roots: Iterable[Any]) -> AllocatorHistory:
    """The events in a tree of the profiler's (`experimental_event_tree`).

    Raises MeasurementError when the profiler was not on for the whole step or this build of PyTorch tells it nothing.
    """
    raw, times_ns = [], {}
    for node, operation, call in _walk(roots, "", 0):
        if node.tag == _EventType.Allocation:
            fields = node.extra_fields
            if fields.device.type == "cpu":
                raw.append(AllocatorEvent(node.start_time_ns, fields.ptr, fields.alloc_size, operation, call))
        elif node.name in (START, FORWARD_END, END):
            times_ns[node.name] = node.start_time_ns
    if len(times_ns) < 3:
        raise MeasurementError(
            "the profiler that measures memory was ended during the step: something else started a profiler of its "
            "own. Remove that from the model."
        )
    if not raw:
        raise MeasurementError(
            "the profiler recorded no allocation, so that memory cannot be measured with this build of PyTorch. "
            "Install one of PyTorch's own wheels."
        )
    return _history(raw, times_ns[START], times_ns[FORWARD_END], times_ns[END])


def history_from_snapshot(
    snapshot: Mapping[str, Any], device_index: int, *, start_ns: int, forward_end_ns: int, end_ns: int
) -> AllocatorHistory:
    """The events in a snapshot (`torch.cuda.memory._snapshot`).

    Raises MeasurementError when there were more events than the allocator was asked to keep.
    """
    entries = snapshot["device_traces"][device_index]
    if len(entries) >= MAX_ENTRIES:
        raise MeasurementError(
            f"the step has more than {MAX_ENTRIES} allocator events, and the first ones are lost. Attribute a smaller "
            "network or batch."
        )
    raw = []
    for entry in entries:
        if entry["action"] in ("alloc", "free_completed"):
            sign = 1 if entry["action"] == "alloc" else -1
            number, _, operation = entry.get("user_metadata", "").partition(" ")
            call = int(number) if number.isdecimal() else 0
            raw.append(AllocatorEvent(entry["time_us"] * 1000, entry["addr"], sign * entry["size"], operation, call))
    return _history(raw, start_ns, forward_end_ns, end_ns)


def _history(raw: list[AllocatorEvent], start_ns: int, forward_end_ns: int, end_ns: int) -> AllocatorHistory:
    raw.sort(key=lambda event: event.time_ns)
    events = list(_of_the_step(raw))
    forward_end = bisect_right(events, forward_end_ns, key=lambda event: event.time_ns)
    return AllocatorHistory(events, forward_end, start_ns, end_ns)


def _of_the_step(raw: Iterable[AllocatorEvent]) -> Iterator[AllocatorEvent]:
    """Each allocation and its release, told apart by the address.

    An earlier profile in the same process makes the release of what was allocated within it an event of this one. And
    an address that is handed out again has been freed, if by a thread that tells nobody.
    """
    live: dict[int, AllocatorEvent] = {}
    for event in raw:
        earlier = live.pop(event.address, None)
        if earlier is not None:
            time_ns, freed_by, call = event.time_ns, event.operation, event.call
            if event.nbytes > 0:
                freed_by, call = "", 0
            yield AllocatorEvent(time_ns, event.address, -earlier.nbytes, freed_by, call)
        if event.nbytes > 0:
            live[event.address] = event
            yield event


def _walk(nodes: Iterable[Any], operation: str, call: int) -> Iterator[tuple[Any, str, int]]:
    """Every node with the outermost operation around it, or else the innermost other name, and that operation's id."""
    todo = [(node, operation, call) for node in nodes]
    while todo:
        node, operation, call = todo.pop()
        yield node, operation, call
        if not call:
            operation, call = node.name, node.id if _is_operation(node) else 0
        todo += [(child, operation, call) for child in node.children]


def _is_operation(node: Any) -> bool:
    # A region that the user named, an autograd.Function and the engine's evaluation of a node span several operations.
    is_function = node.tag == _EventType.TorchOp and node.extra_fields.scope == RecordScope.FUNCTION
    is_collective = node.name.startswith(("gloo:", "nccl:"))
    return is_collective or (is_function and "::" in node.name and not node.name.startswith("autograd::"))


def _mark(name: str) -> None:
    with torch.profiler.record_function(name):
        pass

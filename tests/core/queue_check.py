"""Who waits for whom, checked on the CPU: queues that run nothing, and a watch over what operations read and write.

Each queue counts its operations and knows how far it has waited for the others (a vector clock). An operation may read
what its queue knows to be written, and overwrite what it knows to be read and written. Memory that a queue made and
that has died goes to the next tensor that this queue makes, as a caching allocator might hand it out: by then it has to
know all that was done with it. Tensors that are there at the start were made by the queue "own", before everything.
"""

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from revnet_core import lanes
from tests.core.tape import tensors_of, written

Clock = dict[str, int]


@dataclass
class _Memory:
    """home  the queue that made it; uses: of each queue the last one; write: the last one"""

    alive: StorageWeakRef
    home: str
    write: tuple[str, int]
    uses: Clock = field(default_factory=dict)


class CheckedQueue:
    def __init__(self, name: str, check: "QueueCheck") -> None:
        self.name = name
        self.clock: Clock = defaultdict(int)
        self._check = check

    def record_event(self) -> Clock:
        self._check.bury()
        return dict(self.clock)

    def wait_event(self, event: Clock) -> None:
        self._check.bury()
        self._check.waits += 1
        if self._check.waits - 1 == self._check.left_out:
            return
        for name, time in event.items():
            self.clock[name] = max(self.clock[name], time)

    def knows(self, name: str, time: int) -> bool:
        return self.clock[name] >= time


class QueueCheck(TorchDispatchMode):
    """Use as a context around steps. What it finds wrong is in `faults`.

    left_out  the number of a wait that is not made
    operations  how many each queue was given
    """

    def __init__(self, left_out: int | None = None) -> None:
        super().__init__()
        self.left_out = left_out
        self.waits = 0
        self.faults: list[str] = []
        self.queues = {name: CheckedQueue(name, self) for name in ("own", "even", "odd")}
        self.now = self.queues["own"]
        self.given_away = 0
        self._memory: dict[int, _Memory] = {}
        self._free: dict[str, list[Clock]] = defaultdict(list)

    @property
    def operations(self) -> Mapping[str, int]:
        return {name: queue.clock[name] for name, queue in self.queues.items()}

    def current(self) -> CheckedQueue:
        return self.now

    def pair(self) -> tuple[CheckedQueue, CheckedQueue]:
        return self.queues["even"], self.queues["odd"]

    @contextlib.contextmanager
    def within(self, queue: CheckedQueue) -> Iterator[None]:
        before, self.now = self.now, queue
        try:
            yield
        finally:
            self.now = before

    def keep_for(self, queue: CheckedQueue, tensor: Tensor) -> None:
        # As within a capture: it has to be right without.
        self.given_away += 1

    def bury(self) -> None:
        """To be called before a clock moves, since what has died did so before."""
        for key in [key for key, memory in self._memory.items() if memory.alive.expired()]:
            memory = self._memory.pop(key)
            self._free[memory.home].append(memory.uses)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.bury()
        if func.is_view or func is torch.ops.aten.detach.default:
            return func(*args, **kwargs)
        queue = self.now
        queue.clock[queue.name] += 1
        overwritten = {_key(t) for t in written(func, args, kwargs)}
        for tensor in tensors_of((args, kwargs)):
            self._use(func, queue, tensor, writes=_key(tensor) in overwritten)
        out = func(*args, **kwargs)
        for tensor in tensors_of(out):
            if _key(tensor) not in self._memory:
                self._reuse(func, queue)
                self._note(tensor, queue.name, queue.clock[queue.name])
        return out

    def _use(self, func: Any, queue: CheckedQueue, tensor: Tensor, *, writes: bool) -> None:
        memory = self._memory.get(_key(tensor)) or self._note(tensor, "own", 0)
        name, time = memory.write
        if not queue.knows(name, time):
            self._fault(f"{func} on {queue.name} {'overwrites' if writes else 'reads'} what {name} wrote")
        if writes:
            for name, time in memory.uses.items():
                if not queue.knows(name, time):
                    self._fault(f"{func} on {queue.name} overwrites what {name} uses")
            memory.write = queue.name, queue.clock[queue.name]
        memory.uses[queue.name] = queue.clock[queue.name]

    def _reuse(self, func: Any, queue: CheckedQueue) -> None:
        for uses in self._free.pop(queue.name, ()):
            for name, time in uses.items():
                if not queue.knows(name, time):
                    self._fault(f"{func} on {queue.name} gets memory that {name} uses")

    def _note(self, tensor: Tensor, home: str, time: int) -> _Memory:
        memory = _Memory(StorageWeakRef(tensor.untyped_storage()), home, (home, time), {home: time})
        self._memory[_key(tensor)] = memory
        return memory

    def _fault(self, what: str) -> None:
        self.faults.append(what)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def checked(
    monkeypatch: pytest.MonkeyPatch, step: Callable[[QueueCheck], None], left_out: int | None = None
) -> QueueCheck:
    """Take the step on checked queues."""
    check = QueueCheck(left_out)
    monkeypatch.setitem(lanes.QUEUES, "cpu", lambda device: check)
    with check:
        step(check)
    monkeypatch.delitem(lanes.QUEUES, "cpu")
    return check

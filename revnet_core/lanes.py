"""Two more queues for a device's work, beside the one that a backward is given to, and who waits for whom.

A queue works in its own order. The memory of a tensor belongs to the queue that was current when it was made: once the
tensor dies, the next one of that queue may get it, whatever other queues still do with it. So what a queue reads or
writes has to be waited for twice: before, by that queue, and behind, by the queue whose memory it is.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from revnet_core.pending import is_blank, is_stream_captured


class Queue(Protocol):
    """A CUDA stream is one."""

    def record_event(self) -> Any:
        """A mark behind all that the queue has been given."""
        ...

    def wait_event(self, event: Any) -> None:
        """What the queue is given from here on runs behind the mark. The host does not wait."""
        ...


class Queues(Protocol):
    """What a device offers."""

    def current(self) -> Queue: ...

    def pair(self) -> tuple[Queue, Queue]:
        """The same two at each call: a step is captured on the queues that it was warmed up on."""
        ...

    def within(self, queue: Queue) -> AbstractContextManager[Any]:
        """Makes it the current one."""
        ...

    def keep_for(self, queue: Queue, tensor: Tensor) -> None:
        """Memory of the tensor is not given to another one before `queue` has come to where it is when it dies."""
        ...


class CudaQueues:
    """CUDA streams of one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def current(self) -> Queue:
        return torch.cuda.current_stream(self._device)

    def pair(self) -> tuple[Queue, Queue]:
        return _streams(torch.cuda.current_device() if self._device.index is None else self._device.index)

    def within(self, queue: Queue) -> AbstractContextManager[Any]:
        assert isinstance(queue, torch.cuda.Stream)
        return torch.cuda.stream(queue)

    def keep_for(self, queue: Queue, tensor: Tensor) -> None:
        # Within a capture such memory would be lost to the whole rest of it. There the pool is the graph's own, and
        # the lanes take from it behind all that the backward's queue has done.
        if not is_stream_captured():
            assert isinstance(queue, torch.cuda.Stream)
            tensor.record_stream(queue)


@functools.cache
def _streams(index: int) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    return torch.cuda.Stream(index), torch.cuda.Stream(index)


QUEUES: dict[str, Callable[[torch.device], Queues]] = {"cuda": CudaQueues}


class Lanes:
    """For one backward: block i has lane i mod 2, and the backward its own queue, the one current at the outset.

    Off CUDA, and for tensors without contents, there is one queue: everything is run at once.
    """

    def __init__(self, example: Tensor) -> None:
        make = None if is_blank(example) else QUEUES.get(example.device.type)
        self._queues = make(example.device) if make else None
        if self._queues:
            self._own = self._queues.current()
            self._pair = self._queues.pair()
        # Those with work that the own queue has not waited for.
        self._busy: set[int] = set()

    def on(self, block: int) -> AbstractContextManager[Any]:
        """Within, work is given to the lane of that block."""
        if not self._queues:
            return contextlib.nullcontext()
        self._busy.add(block % 2)
        return self._queues.within(self._pair[block % 2])

    def begin(self, block: int) -> None:
        """What the block's lane is given from here on runs behind all that the own queue was given."""
        if self._queues:
            self._pair[block % 2].wait_event(self._own.record_event())

    def hand_over(self, block: int) -> None:
        """The reverse."""
        if self._queues:
            self._own.wait_event(self._pair[block % 2].record_event())
            self._busy.discard(block % 2)

    def give_away(self, tensors: Iterable[Tensor]) -> None:
        """They leave the backward, and where they were made is no longer known."""
        if self._queues:
            for tensor in tensors:
                self._queues.keep_for(self._own, tensor)

    def join(self) -> None:
        """Hand over what is left, also where an error has ended the backward."""
        for lane in sorted(self._busy):
            # A capture that an error has broken takes no more marks; and it runs nothing.
            with contextlib.suppress(RuntimeError):
                self.hand_over(lane)
        self._busy.clear()


@contextlib.contextmanager
def accumulation_elsewhere() -> Iterator[None]:
    """Torch warns once where gradients by parameters arrive from another stream than the parameters' own graph is of,
    which is meant here."""
    warns = torch._C._warn_on_accumulate_grad_stream_mismatch()  # pyright: ignore[reportAttributeAccessIssue]
    torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
    try:
        yield
    finally:
        torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(warns)

"""Which storages a step's operations allocate, which module owns them, and when they die: live-storage tracking.

Works on every device, also on `meta`, where nothing is allocated. It sees what operations return, not what a kernel
takes for itself meanwhile; a model of that can be given.
"""

import contextlib
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Phase = Literal["forward", "backward"]
# Bytes that a kernel holds at its own peak, what it returns included, above the level before it.
KernelPeak = Callable[[Any, tuple[Any, ...], Any], int]
# The function of torch.autograd in which the engine runs; operations called from it are the engine's own.
_ENGINE = "_engine_run_backward"
# Between an operation's caller and a dispatch mode.
_WRAPPERS = ("torch._compile", "torch._dynamo.eval_frame")


@dataclass(slots=True)
class Storage:
    """One allocation that an operation returned.

    owner       dotted path of the innermost module that was running; "" outside all of them
    by_engine   whether autograd's engine called the operation: a gradient. In the backward the others are
                recomputed activations, rebuilt streams, and what else Python code of a backward makes
    saved       alive between forward and backward
    address     of its first byte; 0 on `meta` and of a fake tensor
    born_ns     `time.time_ns()` when the operation had returned
    device      type of the device that it lies on
    in_engine   whether autograd's engine was running
    caller      module whose code called the operation, the innermost outside torch and within the engine's run; "" if
                there is none
    """

    nbytes: int
    phase: Phase
    operation: str
    owner: str
    by_engine: bool
    address: int
    born_ns: int
    saved: bool = False
    device: str = ""
    in_engine: bool = False
    caller: str = ""


class Peak(NamedTuple):
    """The highest level: `level_bytes` in all, when `changes` of the tracker's changes had happened, in `operation`,
    of which `kernel_bytes` are not in any storage: a kernel's own scratch."""

    level_bytes: int
    changes: int
    operation: str
    kernel_bytes: int


class LiveStorages(TorchDispatchMode):
    """Use as a context around one step, and call `end_forward` between forward and backward.

    existing     what is not to be counted: parameters, gradients, buffers, the batch
    model        whose modules' names owners are told by
    kernel_peak  model of what a kernel needs meanwhile: operation, arguments, output -> bytes
    granularity_bytes  an allocation takes a multiple of it
    note_operation  told before each operation its number and name, and "" after it

    storages     in order of birth
    changes      (index of a storage, its bytes, negative when it died), in order
    level_bytes  alive now, above the level at the start
    peaks        of each phase in each part of the model, which has the same parts whatever its depth: the first two
                 names of a module's path, and whether it is the first within. In the backward what the forward has
                 saved tells, as it is freed, where the step is
    """

    def __init__(
        self,
        existing: Iterable[Tensor],
        *,
        model: nn.Module | None = None,
        kernel_peak: KernelPeak | None = None,
        granularity_bytes: int = 1,
        note_operation: Callable[[str], None] = lambda operation: None,
    ) -> None:
        super().__init__()
        self.storages: list[Storage] = []
        self.changes: list[tuple[int, int]] = []
        self.level_bytes = 0
        self.forward_end: int | None = None
        self.peaks: dict[tuple[Phase, str], Peak] = {}
        self._phase: Phase = "forward"
        self._place = ""
        self._kernel_peak = kernel_peak
        self._granularity_bytes = granularity_bytes
        self._note_operation = note_operation
        self._operations = 0
        # By the address of the storage object, which is its own as long as it lives.
        self._known: dict[int, weakref.ref[Any]] = {}
        self._alive: set[int] = set()
        for tensor in existing:
            self._note_existing(tensor.untyped_storage())
        self._names = {} if model is None else {module: name for name, module in model.named_modules()}
        self._running: list[str] = []
        self._thread = threading.get_ident()
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> "LiveStorages":
        self._thread = threading.get_ident()
        self._undo.enter_context(_calls_seen_by(self._call))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._undo.close()

    @property
    def peak(self) -> Peak:
        return max(self.peaks.values(), default=Peak(0, 0, "", 0))

    def end_forward(self) -> int:
        """From here on is backward. Returns the saved bytes."""
        self._phase = "backward"
        self.forward_end = len(self.changes)
        for index in self._alive:
            self.storages[index].saved = True
        return self.level_bytes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        before_bytes = self.level_bytes
        self._operations += 1
        self._note_operation(f"{self._operations} {func}")
        by_engine = _called_by_engine(sys._getframe().f_back)
        # Without a dispatch mode the engine adds a gradient to an earlier one in place where nobody else has that: the
        # sum then takes no memory, and its storage is the earlier one's.
        reused_bytes = _sole_owner_bytes(args[0]) if by_engine and func is torch.ops.aten.add.Tensor else None
        out = func(*args, **(kwargs or {}))
        self._note_operation("")
        for tensor in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._note(tensor, func, args, by_engine, reused_bytes)
        rise_bytes = self.level_bytes - before_bytes
        risen_bytes = rise_bytes if reused_bytes is None else 0
        if self._kernel_peak is not None:
            risen_bytes = max(risen_bytes, self._kernel_peak(func, args, out))
        here = self._phase, self._place
        if here not in self.peaks or before_bytes + risen_bytes > self.peaks[here].level_bytes:
            kernel_bytes = max(0, risen_bytes - rise_bytes)
            self.peaks[here] = Peak(before_bytes + risen_bytes, len(self.changes), str(func), kernel_bytes)
        return out

    def _note(
        self, tensor: Tensor, func: Any, args: tuple[Any, ...], by_engine: bool, reused_bytes: int | None
    ) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        if any(isinstance(t, Tensor) and t.untyped_storage()._cdata == key for t in tree_leaves(args)):
            self._note_existing(storage)  # a view of what was there before
            return
        index = len(self.storages)
        nbytes = storage.nbytes() if reused_bytes is None else reused_bytes
        nbytes = -(-nbytes // self._granularity_bytes) * self._granularity_bytes

        def die(_: Any) -> None:
            del self._known[key]
            self._alive.discard(index)
            self.level_bytes -= nbytes
            self.changes.append((index, -nbytes))
            if self._phase == "backward" and self.storages[index].saved:
                self._place = _place_of(self.storages[index].owner)

        self._known[key] = weakref.ref(storage, die)
        self._alive.add(index)
        self.level_bytes += nbytes
        self.changes.append((index, nbytes))
        owner = self._running[-1] if self._running else ""
        address = 0 if storage.device.type == "meta" else storage.data_ptr()
        born = Storage(nbytes, self._phase, str(func), owner, by_engine, address, time.time_ns())
        born.device = tensor.device.type
        born.in_engine, born.caller = _called_from(sys._getframe(1).f_back)
        # The engine works for a GPU in a thread of its own, where nothing on the Python stack tells of it.
        born.in_engine |= threading.get_ident() != self._thread
        self.storages.append(born)

    def _note_existing(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        self._known.setdefault(key, weakref.ref(storage, lambda _: self._known.pop(key)))

    def _call(self, module: nn.Module, call: Callable[[], Any]) -> Any:
        name = self._names.get(module) or type(module).__name__
        self._place = _place_of(name)
        self._running.append(name)
        try:
            return call()
        finally:
            self._running.pop()


def _place_of(path: str) -> str:
    parts = path.split(".")[:3]
    return ".".join([*parts[:2], *("0" if part == "0" else "*" for part in parts[2:])])


def _sole_owner_bytes(tensor: Tensor) -> int | None:
    """Of the tensor's storage, if no other tensor shares it."""
    storage = tensor.untyped_storage()
    tensor_and_this_name = 2
    return storage.nbytes() if torch._C._storage_Use_Count(storage._cdata) <= tensor_and_this_name else None


def _called_by_engine(frame: FrameType | None) -> bool:
    while frame is not None and frame.f_globals.get("__name__") in _WRAPPERS:
        frame = frame.f_back
    # In a thread of the engine's own there is no Python below what it calls.
    return frame is None or frame.f_code.co_name == _ENGINE


def _called_from(frame: FrameType | None) -> tuple[bool, str]:
    """Whether the engine is running, and the module of the innermost frame outside torch, up to the engine's run."""
    caller = ""
    while frame is not None:
        if frame.f_code.co_name == _ENGINE:
            return True, caller
        module = frame.f_globals.get("__name__", "")
        if not caller and module != __name__ and module.partition(".")[0] != "torch":
            caller = module
        frame = frame.f_back
    return False, caller


@contextlib.contextmanager
def _calls_seen_by(around: Callable[[nn.Module, Callable[[], Any]], Any]) -> Iterator[None]:
    """Every call of a module goes through `around`. Hooks would not do: a module that has some is evaluated with
    care for what they may keep, and that changes what is measured."""
    original = nn.Module.__call__

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return around(module, lambda: original(module, *args, **kwargs))

    nn.Module.__call__ = call
    try:
        yield
    finally:
        nn.Module.__call__ = original

"""Calls that a dispatch mode does not see, or sees only from within, and that a CUDA graph cannot hold.

Each is replaced by a wrapper for as long as somebody watches, in the whole process; it passes the call on, and tells
the watch of the thread that makes it. A name that was imported before (`from torch import manual_seed`) is not seen.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from revnet_core.capture_rules import READS_DEVICE, READS_HOST, TO_DEVICE, Reason

_SETS_STATE = (
    "random state goes through the host, which a capture does not allow; replays advance the device's generator alone",
    "Seed before the step; around torch.utils.checkpoint, preserve_rng_state=False (activations='checkpointed' repeats "
    "random draws by itself).",
)
_WAITS = ("the host waits for the device, which a capture does not allow", "Wait after the step.")
_RANDOM = ("manual_seed", "seed", "get_rng_state", "set_rng_state")
_CUDA_RANDOM = (*_RANDOM, "manual_seed_all", "seed_all", "get_rng_state_all", "set_rng_state_all")


class Listener(Protocol):
    """A watch. Within `covered` nothing is noted, as part of what was noted already."""

    device: torch.device
    covered: bool
    of_number: bool

    def note(self, reason: Reason) -> None: ...


class _Entry(NamedTuple):
    """One callable: what it is, what speaks against it, and what it returns where nothing has contents."""

    owner: Any
    name: str
    judge: Callable[[torch.device, tuple[Any, ...]], Reason | None]
    blank: Callable[..., Any] | None = None


def _nobody() -> Listener | None:
    return None


_current: Callable[[], Listener | None] = _nobody
_lock = threading.Lock()
_watching = 0
_undo = contextlib.ExitStack()


@contextlib.contextmanager
def heard(current: Callable[[], Listener | None]) -> Iterator[None]:
    """Within, the listener that `current` gives for the calling thread is told of each call."""
    global _current, _watching
    with _lock:
        _current = current
        if not _watching:
            for entry in _entries():
                _undo.callback(_replace(entry))
        _watching += 1
    try:
        yield
    finally:
        with _lock:
            _watching -= 1
            if not _watching:
                _undo.close()


def _replace(entry: _Entry) -> Callable[[], None]:
    own = entry.name in vars(entry.owner)
    original = getattr(entry.owner, entry.name)
    setattr(entry.owner, entry.name, _told(entry, original))
    if own:
        return lambda: setattr(entry.owner, entry.name, original)
    return lambda: delattr(entry.owner, entry.name)


def _told(entry: _Entry, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        listener = _current()
        if listener is None or listener.covered:
            return original(*args, **kwargs)
        before = listener.covered, listener.of_number
        listener.of_number = entry.name == "__setitem__" and not isinstance(args[2], Tensor)
        reason = entry.judge(listener.device, args)
        listener.covered = reason is not None
        try:
            blank = entry.blank if listener.device.type == "meta" else None
            out = blank(*args) if blank else original(*args, **kwargs)
        finally:
            listener.covered, listener.of_number = before
        if entry.name in _MAKERS:
            reason = _reason_against_maker(entry.name, listener.device, args, kwargs, out)
        if reason:
            listener.note(reason)
        return out

    return call


_MAKERS = ("tensor", "as_tensor", "asarray", "new_tensor")


def _reason_against_maker(
    name: str, device: torch.device, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor
) -> Reason | None:
    """A tensor of Python numbers is made on the host. From another tensor it is a copy, which is seen as one."""
    data = kwargs.get("data", args[-1] if args and name == "new_tensor" else args[0] if args else None)
    if isinstance(data, Tensor) or device.type == "cpu" or out.device.type != device.type:
        return None
    return TO_DEVICE.of(f"Tensor.{name}" if name == "new_tensor" else f"torch.{name}")


def _entries() -> Iterator[_Entry]:
    yield _Entry(Tensor, "tolist", _reading("Tensor.tolist"))
    yield _Entry(Tensor, "numpy", _reading("Tensor.numpy"), _numpy)
    yield _Entry(Tensor, "__array__", _reading("Tensor.__array__"), _numpy)
    for name in ("__repr__", "__format__"):
        yield _Entry(Tensor, name, _reading(f"Tensor.{name}", device_only=True))
    for name in ("__getitem__", "__setitem__"):
        yield _Entry(Tensor, name, _indexing(f"Tensor.{name}"))
    for owner, name in ((torch, "tensor"), (torch, "as_tensor"), (torch, "asarray"), (Tensor, "new_tensor")):
        yield _Entry(owner, name, lambda device, args: None)
    for owner in (torch, torch.random):
        for name in _RANDOM:
            yield _Entry(owner, name, _always(f"torch.{name}", *_SETS_STATE))
    for owner in (torch.cuda, torch.cuda.random):
        for name in _CUDA_RANDOM:
            blank = _no_states if name.endswith("_all") else _no_state
            yield _Entry(owner, name, _always(f"torch.cuda.{name}", *_SETS_STATE), blank)
    yield _Entry(torch.cuda, "synchronize", _always("torch.cuda.synchronize", *_WAITS), lambda *_: None)
    yield _Entry(torch.accelerator, "synchronize", _always("torch.accelerator.synchronize", *_WAITS), lambda *_: None)
    for owner in (torch.cuda.Event, torch.cuda.Stream):
        for name in ("query", "synchronize"):
            what = f"torch.cuda.{owner.__name__}.{name}"
            yield _Entry(owner, name, _always(what, *_WAITS), lambda *_: True)


def _always(what: str, why: str, remedy: str) -> Callable[[torch.device, tuple[Any, ...]], Reason]:
    return lambda device, args: Reason(what, why, remedy)


def _reading(what: str, *, device_only: bool = False) -> Callable[[torch.device, tuple[Any, ...]], Reason | None]:
    def judge(device: torch.device, args: tuple[Any, ...]) -> Reason | None:
        if args[0].device.type == device.type:
            return READS_DEVICE.of(what)
        return None if device_only else READS_HOST.of(what)

    return judge


def _indexing(what: str) -> Callable[[torch.device, tuple[Any, ...]], Reason | None]:
    """A list among the indices is made a tensor on the host first."""

    def judge(device: torch.device, args: tuple[Any, ...]) -> Reason | None:
        if device.type == "cpu" or args[0].device.type != device.type:
            return None
        indices = args[1] if isinstance(args[1], tuple) else (args[1],)
        return TO_DEVICE.of(f"{what} with a list") if any(map(_is_made_a_tensor, indices)) else None

    return judge


def _is_made_a_tensor(index: Any) -> bool:
    if isinstance(index, list):
        # Of tensors and slices it is a tuple in disguise.
        return all(isinstance(i, int | list) for i in index)
    return isinstance(index, range) or (hasattr(index, "__array__") and not isinstance(index, Tensor))


def _numpy(tensor: Tensor, *_: Any) -> Any:
    return torch.ones(tensor.shape, dtype=tensor.dtype).numpy() if tensor.is_meta else tensor.detach().numpy()


def _no_state(*_: Any) -> Tensor:
    return torch.empty(0, dtype=torch.uint8)


def _no_states(*_: Any) -> list[Tensor]:
    return []

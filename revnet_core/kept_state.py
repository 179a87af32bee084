"""What a step leaves behind for the next other than by changing a tensor in place: a replayed graph would not."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from revnet_core.capture_rules import Reason

# Of every module, whatever it computes.
_OF_EVERY_MODULE = frozenset(nn.Module().__dict__)


class Change(NamedTuple):
    """module  its name within the model, None for the optimizer"""

    module: str | None
    reason: Reason


class _Slot(NamedTuple):
    """A place where state is kept; of an optimizer's, one name for the state of all parameters."""

    module: str | None
    name: str
    entry: object


class KeptState:
    """The state as it is, to be compared with what a step makes of it.

    Tensors and numbers that modules hold as parameters, buffers and attributes, also in a list, tuple or dict, and
    those in the optimizer's state and groups. What modules of this package keep for themselves is left out.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
        self._model = model
        self._optimizer = optimizer
        self._before = self._read()
        self._replaceable = {_storage_of(v) for v in self._before.values() if isinstance(v, Tensor)}
        self._used: set[object] = set()

    def use(self, tensor: Tensor) -> None:
        """To be called with each tensor that an operation of the step gets."""
        storage = _storage_of(tensor)
        if storage in self._replaceable:
            self._used.add(storage)

    def changes(self) -> Iterator[Change]:
        """Numbers that are others, and tensors that the step used and then replaced by another. A tensor that is
        replaced without having been used, as an output kept for later, is written by each replay as well."""
        after = self._read()
        for slot, old in self._before.items():
            new = after.get(slot)
            if isinstance(old, Tensor):
                if new is old or _storage_of(old) not in self._used:
                    continue
                if isinstance(new, Tensor) and _storage_of(new) == _storage_of(old):
                    continue
                yield Change(slot.module, _replaced(slot.name))
            elif new is not None and new is not old and not isinstance(new, Tensor) and new != old:
                yield Change(slot.module, _counted(slot.name, old, new))

    def _read(self) -> dict[_Slot, Tensor | float]:
        found: dict[_Slot, Tensor | float] = {}
        for path, module in self._model.named_modules():
            own = type(module).__module__.startswith("revnet_core.")
            for attributes in (module._parameters, module._buffers, vars(module)):
                for name, value in attributes.items():
                    if name in _OF_EVERY_MODULE or (own and name.startswith("_")):
                        continue
                    for suffix, leaf in _leaves(value):
                        found[_Slot(path, f"self.{name}{suffix}", None)] = leaf
        if self._optimizer:
            kind = type(self._optimizer).__name__
            for owner, state in self._optimizer.state.items():
                for suffix, leaf in _leaves(state):
                    found[_Slot(None, f"{kind}.state[...]{suffix}", owner)] = leaf
            for index, group in enumerate(self._optimizer.param_groups):
                settings = {name: value for name, value in group.items() if name != "params"}
                for suffix, leaf in _leaves(settings):
                    found[_Slot(None, f"{kind}.param_groups[...]{suffix}", index)] = leaf
        return found


def _leaves(value: Any) -> Iterator[tuple[str, Tensor | float]]:
    if isinstance(value, Tensor | bool | int | float):
        yield "", value
    elif isinstance(value, list | tuple | Mapping):
        if not isinstance(value, Mapping):
            yield "'s length", len(value)
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            if isinstance(item, Tensor | bool | int | float):
                yield f"[{key!r}]", item


def _storage_of(tensor: Tensor) -> object:
    try:
        return tensor.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):  # a sparse one has none
        return id(tensor)


def _replaced(name: str) -> Reason:
    return Reason(
        f"{name} = ...",
        "the step uses this tensor and puts another in its place: every replay would use the old one again",
        "Change it in place, as with copy_, mul_ or add_.",
    )


def _counted(name: str, old: float, new: float) -> Reason:
    return Reason(
        f"{name} = ...",
        f"the step changes a number on the host (it went from {old} to {new}): replays neither change nor heed it",
        "Keep it in a tensor on the device that is changed in place, or count outside of the step.",
    )

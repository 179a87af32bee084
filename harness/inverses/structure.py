"""How the blocks are made, in words: what a baseline keeps so that a change can be named."""

import ctypes
import hashlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from harness.inverses.chain import blocks_of, is_ours, named
from revnet_core.audit import outermost_sequences

Structure = dict[str, list[str]]


def blocks_with_modules(module: nn.Module) -> dict[str, nn.Module]:
    """By the names that figures have, first to last."""
    if is_ours(module):
        couplings = [c for sequence in outermost_sequences(module) for c in sequence.couplings]
        return {named(index, coupling): coupling for index, coupling in enumerate(couplings)}
    return {block.name: block.module for block in blocks_of(module)}


def structure_of(module: nn.Module) -> Structure:
    """Each block's parts that have none themselves, with their settings: `f.0 BatchNorm2d(4, eps=1e-05, ...)`.

    A block that is made as an earlier one has `as` and that one's name in their place.
    """
    found: Structure = {}
    first: dict[tuple[str, ...], str] = {}
    for name, block in blocks_with_modules(module).items():
        parts = tuple(
            f"{path or '(whole)'} {part!r}".replace("\n", " ") + ("" if part.training else " in eval mode")
            for path, part in block.named_modules()
            if not any(True for _ in part.children())
        )
        found[name] = [f"as {first[parts]}"] if parts in first else list(parts)
        first.setdefault(parts, name)
    return found


def parts_of(structure: Structure, name: str) -> list[str]:
    """Of one block, also where it is made as another."""
    parts = structure.get(name, [])
    return structure.get(parts[0].removeprefix("as "), parts) if len(parts) == 1 else parts


def weights_outside(module: nn.Module) -> str:
    """A hash of the parameters that belong to no block, such as a stem's."""
    inside = {id(p) for block in blocks_with_modules(module).values() for p in block.parameters()}
    return hash_of(p for p in module.parameters() if id(p) not in inside)


def weights_of(block: nn.Module) -> list[str]:
    """`part=hash` of the values of each direct part's parameters and buffers, and of the block's own."""
    parts = {name: (*part.parameters(), *part.buffers()) for name, part in block.named_children()}
    parts["(own)"] = (*block.parameters(recurse=False), *block.buffers(recurse=False))
    return [f"{name}={hash_of(tensors)}" for name, tensors in parts.items() if tensors]


def hash_of(tensors: Iterable[Tensor]) -> str:
    """Of the values in float64, so that a precision's copy has the hash of what it was copied from."""
    digest = hashlib.sha256()
    for tensor in tensors:
        wide = tensor.detach().double().cpu().contiguous()
        # Not by numpy, which torch can do without.
        digest.update(ctypes.string_at(wide.data_ptr(), wide.nbytes))
    return digest.hexdigest()[:12]


def difference(before: list[str], now: list[str]) -> str | None:
    """The first part that is another than it was, in words; None where all are the same."""
    for old, new in zip(before, now, strict=False):
        if old != new:
            return f"it was {old}, it is {new}"
    if len(before) != len(now):
        return f"it had {len(before)} parts, it has {len(now)}"
    return None


class Calls(TorchDispatchMode):
    """A context that notes what one block does as it runs.

    order   its direct children, as they are called
    modes   of each part that has no parts: its path, its class and whether it is in training mode
    dtypes  each floating dtype that an operation on such a tensor returned, with the first such operation
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.order: list[str] = []
        self.modes: list[tuple[str, str, bool]] = []
        self.dtypes: dict[torch.dtype, str] = {}
        self._block = block
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> "Calls":
        for path, part in self._block.named_modules():
            if path:
                # A function, which a copy of the module shares; a bound method would be copied with all it knows.
                self._handles.append(part.register_forward_pre_hook(self._noting(path)))
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        while self._handles:
            self._handles.pop().remove()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        computed = isinstance(out, Tensor) and out.is_floating_point() and func is not torch.ops.aten._to_copy.default
        if computed and any(isinstance(arg, Tensor) and arg.is_floating_point() for arg in args):
            self.dtypes.setdefault(out.dtype, func._overloadpacket.__name__)
        return out

    def _noting(self, path: str) -> Callable[[nn.Module, Any], None]:
        order, modes = self.order, self.modes

        def note(part: nn.Module, args: Any) -> None:
            if "." not in path:
                order.append(path)
            if not any(True for _ in part.children()):
                modes.append((path, type(part).__name__, part.training))

        return note

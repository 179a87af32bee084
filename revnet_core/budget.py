"""A budget of bytes for saved activations: as many of the last blocks as fit are stored, the others reconstructed."""

import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from revnet_core.errors import UnsupportedError


class Budgeted:
    """`activations=Budgeted(bytes)`; the same object given to several sequences is one budget for all of them.

    What a block saves is measured in the first forward of each input shape, dtype, and mode; that forward stores
    nothing. From the next on the last blocks are stored, as many as the budget holds, those of later sequences
    first; the others are reconstructed. Counted are the bytes that autograd saves for one forward, each storage once,
    without parameters and buffers; two forwards before their backwards save twice.
    """

    def __init__(self, budget_bytes: int) -> None:
        if budget_bytes < 0:
            raise UnsupportedError(f"budget_bytes = {budget_bytes}; a budget is at least 0 bytes.")
        self.budget_bytes = budget_bytes
        # In the order of the first forward through them.
        self._demands: dict[weakref.ref[nn.Module], tuple[Hashable, list[int]]] = {}

    def stored_blocks(self, sequence: nn.Module, key: Hashable) -> int | None:
        """How many of the last blocks of `sequence` are stored; None while nothing is known for this key."""
        own = weakref.ref(sequence)
        if own not in self._demands or self._demands[own][0] != key:
            return None
        left_bytes = self.budget_bytes
        for later, (_, block_bytes) in reversed(list(self._demands.items())):
            if later() is None:
                del self._demands[later]
                continue
            count, used_bytes = _fitting(block_bytes, left_bytes)
            if later == own:
                return count
            left_bytes -= used_bytes
        raise AssertionError("the sequence is among the demands")

    def learn(self, sequence: nn.Module, key: Hashable, block_bytes: Sequence[int]) -> None:
        self._demands[weakref.ref(sequence)] = key, list(block_bytes)

    def __repr__(self) -> str:
        return f"Budgeted({self.budget_bytes})"

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of a model measures anew; within one copy its sequences share the budget as before.
        return Budgeted, (self.budget_bytes,)


class SavedBytes:
    """A `Meter` for `ChainRun.step` that adds up what autograd would save of each block."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self.block_bytes = [0] * len(blocks)
        # Kept, since a buffer that is replaced would leave its address to somebody else.
        self._own = [t for block in blocks for t in (*block.parameters(), *block.buffers())]
        # The streams that a block has been charged with: G's source is what the next block's F changes. Kept as well.
        self._charged: dict[int, Tensor] = {}

    def net(self, index: int, call: Callable[[Tensor], Tensor], source: Tensor) -> Tensor:
        copies: list[Tensor] = []

        def call_on_copy(leaf: Tensor) -> Tensor:
            copies.append(leaf.clone())
            return call(copies[0])

        out, saved = self._measured(index, call_on_copy, source)
        # It stands for the stream that the net will get itself if it leaves it alone.
        if copies[0]._version == 0 and _address_of(copies[0]) in saved:
            self._charged[_address_of(source)] = source
        return out

    def update(self, index: int, update: Callable[..., Tensor], stream: Tensor, residual: Tensor) -> Tensor:
        changed, _ = self._measured(index, update, stream, residual)
        self._charged.pop(_address_of(stream), None)
        return changed

    def _measured(self, index: int, call: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, set[int]]:
        """What the call returns, and the addresses of what was saved for the first time."""
        known = {_address_of(t) for t in self._own} | self._charged.keys()
        new: set[int] = set()
        # The graph dies with this call; what it saved is kept until then, for the same reason.
        saved: list[Tensor] = []

        def pack(tensor: Tensor) -> Tensor:
            address = _address_of(tensor)
            if address not in known | new:
                new.add(address)
                self.block_bytes[index] += tensor.untyped_storage().nbytes()
            saved.append(tensor)
            return tensor

        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return call(*(t.detach().requires_grad_() for t in inputs)).detach(), new


def _address_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _fitting(block_bytes: Sequence[int], budget_bytes: int) -> tuple[int, int]:
    """How many of the last blocks fit, and their bytes."""
    used_bytes = 0
    for count, size_bytes in enumerate(reversed(block_bytes)):
        if used_bytes + size_bytes > budget_bytes:
            return count, used_bytes
        used_bytes += size_bytes
    return len(block_bytes), used_bytes

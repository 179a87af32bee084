"""What the bytes of one step are, and whose: the allocator's events joined with the storages that operations returned.

An allocation is a storage's when it lies at the storage's address at the moment of its birth. It has one category
from its birth to its end, so at each moment the categories sum to the allocator's level, exactly.
"""

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from harness.measure.events import AllocatorHistory
from harness.measure.live import Storage

# What a rank holds between steps, and all that a byte of a step can be; defined in docs/measures.md.
HELD = ("parameter", "gradient", "optimizer", "buffer", "batch")
CATEGORIES = (*HELD, "saved", "reconstruction", "temporary", "unattributed")
_COLLECTIVES = ("c10d::", "c10d.", "gloo:", "nccl:")


@dataclass(slots=True)
class Block:
    """One allocation of the step: a range of addresses from its birth to its end.

    start, end  positions of its events; None for the end when it outlives the step
    owner       dotted path of the module that was running; "" when there was none
    operation   that made it, or during which the kernel took it
    """

    address: int
    nbytes: int
    start: int
    end: int | None
    operation: str
    category: str = "unattributed"
    owner: str = ""


class Held(NamedTuple):
    """A storage that exists before the step or is kept after it."""

    category: str
    address: int
    nbytes: int


class Owner(NamedTuple):
    """Bytes of one category that a module, or an operation that no module ran, has at the peak."""

    category: str
    name: str
    nbytes: int


@dataclass(frozen=True)
class Attribution:
    """The blocks of a step, by category.

    held                     what existed at the start
    unmatched_storage_bytes  of storages on this device that no allocation was found for
    """

    history: AllocatorHistory
    blocks: list[Block]
    held: list[Held]
    unmatched_storage_bytes: int

    def levels(self) -> dict[str, list[int]]:
        """Bytes of each category, what existed at the start included: first at the start, then after each event."""
        changes = {category: [0] * (1 + len(self.history.events)) for category in CATEGORIES}
        for storage in self.held:
            changes[storage.category][0] += storage.nbytes
        for block in self.blocks:
            changes[block.category][1 + block.start] += block.nbytes
            if block.end is not None:
                changes[block.category][1 + block.end] -= block.nbytes
        return {category: list(accumulate(of_category)) for category, of_category in changes.items()}

    def owners(self, most: int) -> list[Owner]:
        """Whose the bytes above the start are at the peak: the `most` largest, then the sum of the others."""
        levels = self.history.levels
        peak = levels.index(max(levels)) - 1
        owned: Counter[tuple[str, str]] = Counter()
        for block in self.blocks:
            if block.start <= peak and (block.end is None or block.end > peak):
                owned[block.category, block.owner or block.operation or "unknown"] += block.nbytes
        ranked = [Owner(*key, nbytes) for key, nbytes in owned.most_common()]
        rest = ranked[most:]
        others = [Owner("", "others", sum(owner.nbytes for owner in rest))] if rest else []
        return ranked[:most] + others


def attribute(
    history: AllocatorHistory,
    storages: Iterable[Storage],
    *,
    device: torch.device,
    before: Sequence[Held],
    after: Sequence[Held],
    category_of: Callable[[Storage], str | None] = lambda storage: None,
) -> Attribution:
    """Give each allocation of the step its category and owner.

    before, after  what is held at the start, and what is kept at the end
    category_of    what a storage is that a training engine made for itself; None for one that it did not
    """
    blocks = _blocks(history)
    by_address: dict[int, list[Block]] = defaultdict(list)
    for block in blocks:
        by_address[block.address].append(block)
    times_ns = [event.time_ns for event in history.events]
    kept = {held.address: held.category for held in after}
    unmatched_bytes = 0
    storages_of: dict[int, Storage] = {}
    for storage in storages:
        if storage.device != device.type or not storage.address:
            continue
        block = _alive_at(by_address[storage.address], storage.born_ns, times_ns)
        if block is None:
            unmatched_bytes += storage.nbytes
        else:
            storages_of.setdefault(id(block), storage)
    for block in blocks:
        storage = storages_of.get(id(block))
        if storage is None:
            if _is_scratch(block, history):
                block.category = "temporary"
            continue
        block.operation, block.owner = storage.operation, storage.owner
        block.category = category_of(storage) or _category(storage)
        if block.end is None and block.address in kept:
            block.category = kept[block.address]
    return Attribution(history, blocks, list(before), unmatched_bytes)


def held_storages(tensors: Mapping[str, Iterable[Tensor]], device: torch.device) -> list[Held]:
    """The storages under these tensors by category, on this device, each once: in the first category that has it."""
    found: dict[int, Held] = {}
    for category, group in tensors.items():
        for tensor in group:
            storage = tensor.untyped_storage()
            if storage.device.type == device.type and storage.nbytes():
                found.setdefault(storage._cdata, Held(category, storage.data_ptr(), storage.nbytes()))
    return list(found.values())


def _blocks(history: AllocatorHistory) -> list[Block]:
    blocks: list[Block] = []
    live: dict[int, Block] = {}
    for index, event in enumerate(history.events):
        if event.nbytes > 0:
            live[event.address] = Block(event.address, event.nbytes, index, None, event.operation)
            blocks.append(live[event.address])
        else:
            live.pop(event.address).end = index
    return blocks


def _alive_at(blocks: Sequence[Block], time_ns: int, times_ns: Sequence[int]) -> Block | None:
    """The one of the blocks at one address, in order, that was alive then."""
    index = bisect_right(blocks, time_ns, key=lambda block: times_ns[block.start]) - 1
    if index < 0:
        return None
    end = blocks[index].end
    return blocks[index] if end is None or times_ns[end] > time_ns else None


def _is_scratch(block: Block, history: AllocatorHistory) -> bool:
    """Allocated and freed within one call of an operation, or by a collective, which ends when it is waited for."""
    if block.operation.startswith(_COLLECTIVES):
        return True
    call = history.events[block.start].call
    return bool(call) and block.end is not None and history.events[block.end].call == call


def _category(storage: Storage) -> str:
    if storage.saved:
        return "saved"
    by_python = storage.in_engine and not storage.by_engine and "_backward" not in storage.operation
    return "reconstruction" if storage.phase == "backward" and by_python else "temporary"

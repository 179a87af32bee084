"""Saved activations on the host: copied there when autograd saves them, and back when the backward needs them."""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

# Below this a copy costs more than the bytes are worth.
SMALLEST_BYTES = 4096


class _OnHost(NamedTuple):
    host: Tensor
    device: torch.device

    def back(self) -> Tensor:
        return self.host.to(self.device, non_blocking=True)


class _Form(NamedTuple):
    """What is left of a tensor without contents when it is off the device."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def back(self) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)


_standing_for_a_device = False


@contextlib.contextmanager
def standing_for_a_device() -> Iterator[None]:
    """Within, tensors without contents (fake ones, or on `meta`) stand for those of a device that is not the host: what
    is offloaded takes no memory of it."""
    global _standing_for_a_device
    before, _standing_for_a_device = _standing_for_a_device, True
    try:
        yield
    finally:
        _standing_for_a_device = before


@contextlib.contextmanager
def offloaded(module: nn.Module) -> Iterator[None]:
    """What autograd saves within lies in pinned host memory; on the CPU it is there already and stays as it is.

    Unlike `torch.autograd.graph.save_on_cpu` it leaves the parameters of `module` where they are, and copies a tensor
    that several operations save only once.
    """
    own = {t.untyped_storage()._cdata for t in (*module.parameters(), *module.buffers())}
    # By the storage's own address, which may be given again once it has died.
    copies: dict[tuple[object, ...], tuple[StorageWeakRef, _OnHost]] = {}

    def pack(tensor: Tensor) -> Tensor | _OnHost | _Form:
        storage = tensor.untyped_storage()
        if _is_on_host(tensor) or storage.nbytes() < SMALLEST_BYTES or storage._cdata in own:
            return tensor
        if _standing_for_a_device:
            return _Form(tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        key = storage._cdata, tensor._version, tensor.dtype, tensor.storage_offset(), tensor.shape, tensor.stride()
        if key in copies and not copies[key][0].expired():
            return copies[key][1]
        host = torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda"
        )
        # Ordered before whatever uses the device's memory next, since both are on the current stream.
        packed = _OnHost(host.copy_(tensor, non_blocking=True), tensor.device)
        copies[key] = StorageWeakRef(storage), packed
        return packed

    def unpack(packed: Tensor | _OnHost | _Form) -> Tensor:
        return packed if isinstance(packed, Tensor) else packed.back()

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
    copies.clear()


def _is_on_host(tensor: Tensor) -> bool:
    # On "meta" there is nothing to copy.
    return tensor.device.type in ("cpu", "meta") and not _standing_for_a_device

"""What one operation would do to the capture of a CUDA graph, told from its tags and from where its tensors lie."""

import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload

# Whether the indices are masks decides, not the tag.
_INDEXING = ("index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put")
# They read what they find on the device, and torch has no tag for it.
_UNTAGGED_READS = ("_linalg_check_errors", "_coalesce")
_MASKS = (torch.bool, torch.uint8)


class Reason(NamedTuple):
    """Why something cannot be in a graph, and what to do instead."""

    operation: str
    why: str
    remedy: str


class _Why(NamedTuple):
    why: str
    remedy: str

    def of(self, operation: str) -> Reason:
        return Reason(operation, self.why, self.remedy)


READS_DEVICE = _Why(
    "the host waits for a value of the device, which a capture does not allow",
    "Keep the value on the device (torch.where in place of a branch, tensors in place of numbers), and read it after "
    "the step.",
)
READS_HOST = _Why(
    "a value on the host is read during the capture, and every replay goes on with it",
    "Keep it in a tensor on the device that is changed in place; if it never changes, use a Python number.",
)
TO_HOST = _Why(
    "it copies from the device to the host, for which the host would have to wait",
    "Copy after the step, from a tensor that the step leaves behind.",
)
TO_DEVICE = _Why(
    "it copies from the host's pageable memory, which a capture does not allow; replays would not see new contents",
    "Put it on the device before the step: as a buffer (register_buffer), or as an input of the step.",
)
_SETS_NUMBER = _Why(
    "it copies the number from the host's pageable memory, which a capture does not allow",
    "Set a slice (x[0:1] = 1.0) or where a mask is true, or use fill_ or index_fill_, which take a number as it is.",
)
_DATA_DEPENDENT_SHAPE = _Why(
    "the size of its result depends on the contents, for which the host would have to wait",
    "Use what has a fixed size: torch.where or a product with the mask, torch.nonzero_static, or the operation's "
    "output_size.",
)
_FROZEN = _Why(
    "a host tensor of one value becomes a constant of the graph: each replay uses the value of the capture",
    "Make it a buffer on the device (register_buffer); if it never changes, a Python number.",
)
_PINS = _Why(
    "it allocates pinned memory on the host, which a capture does not allow",
    "Allocate it before the step, and use it again.",
)
_DRAWS_ON_HOST = _Why(
    "it draws on the host, during the capture: each replay uses the same numbers",
    "Draw on the device (device=x.device), from its default generator.",
)
_OWN_GENERATOR = _Why(
    "it draws from a generator of its own, which a graph does not advance unless it was registered with it",
    "Draw from the device's default generator.",
)


def reason_against(
    func: OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any], device: torch.device, *, of_number: bool = False
) -> Reason | None:
    """None where a capture on `device` can take the operation.

    of_number  the operation is part of setting elements to a Python number, which torch puts on the host for it
    """
    why = _why_not(func, args, kwargs, device, of_number)
    return why.of(_traits(func).operation) if why else None


def needs_contents(func: OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether what comes out, or its size, depends on the contents of tensors."""
    traits = _traits(func)
    if traits.name in _INDEXING:
        return not traits.name.endswith(("put", "put_", "impl_")) and _is_masked(args)
    return traits.reads or _is_shaped_by_contents(traits, kwargs)


def destination(func: OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[str, str] | None:
    """From where to where the operation copies, as device types; None where it does not copy at all."""
    name = _traits(func).name
    if name == "_to_copy":
        return args[0].device.type, torch.device(kwargs.get("device") or args[0].device).type
    if name in ("copy_", "copy"):
        return args[1].device.type, args[0].device.type
    return None


def pins(func: OpOverload, kwargs: Mapping[str, Any]) -> bool:
    return _traits(func).name == "_pin_memory" or bool(kwargs.get("pin_memory"))


class _Traits(NamedTuple):
    name: str
    operation: str
    reads: bool
    shapes: bool
    draws: bool


@functools.cache
def _traits(func: OpOverload) -> _Traits:
    name = func._schema.name.split("::")[1]
    return _Traits(
        name,
        f"{func.namespace}.{name}",
        reads=torch.Tag.data_dependent_output in func.tags or name in _UNTAGGED_READS,
        shapes=torch.Tag.dynamic_output_shape in func.tags,
        draws=torch.Tag.nondeterministic_seeded in func.tags,
    )


def _why_not(
    func: OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any], device: torch.device, of_number: bool
) -> _Why | None:
    traits = _traits(func)
    tensors = list(tensors_in((*args, *kwargs.values())))
    on_device = any(t.device.type == device.type for t in tensors)
    on_host = [t for t in tensors if t.device.type == "cpu"] if device.type != "cpu" else []
    of_number = of_number and device.type != "cpu"
    if copied := destination(func, args, kwargs):
        if of_number and not args[0].dim():
            return _SETS_NUMBER
        if device.type == "cpu" or copied not in ((device.type, "cpu"), ("cpu", device.type)):
            return None
        if _is_pinned_copy(args, kwargs):
            return None
        return TO_HOST if copied[1] == "cpu" else TO_DEVICE
    if traits.name in _INDEXING and on_device:
        return _why_not_index(traits.name, args, bool(on_host), of_number)
    if traits.reads:
        return READS_DEVICE if on_device else READS_HOST
    if on_device and _is_shaped_by_contents(traits, kwargs):
        return _DATA_DEPENDENT_SHAPE
    if traits.draws and (why := _why_not_draw(args, kwargs, device, on_device)):
        return why
    if pins(func, kwargs):
        return _PINS
    if on_device and on_host:
        if any(t.dim() for t in on_host):
            return TO_DEVICE
        return None if of_number else _FROZEN
    return None


def _why_not_index(name: str, args: tuple[Any, ...], any_on_host: bool, of_number: bool) -> _Why | None:
    _, indices, *rest = args
    value = rest[0] if rest else None
    single = value is not None and not value.dim()
    if not _is_masked(args):
        if single and of_number:
            return _SETS_NUMBER
        return TO_DEVICE if any_on_host else None
    # Setting to one number of the host where one mask is true is a masked_fill, of fixed size.
    fills = single and len([t for t in indices if t is not None]) == 1 and not any(rest[1:])
    if fills and (of_number or name == "index_put"):
        # The latter is what the backward makes of the former, with a zero for a number.
        return None
    return _FROZEN if fills and any_on_host else _DATA_DEPENDENT_SHAPE


def _is_pinned_copy(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """A graph can hold a copy from or to pinned memory for which nothing waits; each replay makes it anew."""
    if not kwargs.get("non_blocking", any(args[2:3])):
        return False
    return any(t.device.type == "cpu" and t.is_pinned() for t in args[:2] if isinstance(t, Tensor))


def _why_not_draw(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], device: torch.device, on_device: bool
) -> _Why | None:
    if not on_device and torch.device(kwargs.get("device") or "cpu").type != device.type:
        return _DRAWS_ON_HOST
    drawn_from = {_address_of(g) for g in (*args, *kwargs.values()) if isinstance(g, torch.Generator)}
    defaults = {_address_of(g) for g in (torch.default_generator, *torch.cuda.default_generators)}
    return None if drawn_from <= defaults else _OWN_GENERATOR


def _address_of(generator: torch.Generator) -> int:
    """Which tells it from others, unlike the Python object, which the dispatcher makes anew."""
    return generator._cdata  # pyright: ignore[reportAttributeAccessIssue]


def _is_shaped_by_contents(traits: _Traits, kwargs: Mapping[str, Any]) -> bool:
    return traits.shapes and kwargs.get("output_size") is None


def _is_masked(args: tuple[Any, ...]) -> bool:
    return any(isinstance(t, Tensor) and t.dtype in _MASKS for t in list(args)[1])


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """Also in lists and tuples."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)

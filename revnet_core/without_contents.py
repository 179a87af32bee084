"""A model, and what its operations give, on `meta`: tensors that have a shape and no contents."""

import contextlib
import copy
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._pytree import tree_map_only

from revnet_core.capture_rules import destination, needs_contents, pins

M = TypeVar("M", bound=nn.Module)

_OPTIMIZER_DEVICES = ("_get_capturable_supported_devices", "_get_fused_kernels_supported_devices")


def blank(value: Any) -> Any:
    """The value with its tensors, in whatever containers, on `meta`."""
    return tree_map_only(Tensor, _blank, value)


def blank_copy(module: M) -> M:
    """A copy whose parameters and buffers are on `meta`, and take no memory on the way there. Other tensors that a
    module holds stay on the host if they are there, as with `module.to(device)`."""
    memo: dict[int, Any] = {}
    for part in module.modules():
        for parameter in part._parameters.values():
            if parameter is not None:
                memo[id(parameter)] = nn.Parameter(_blank(parameter), requires_grad=parameter.requires_grad)
        for buffer in part._buffers.values():
            if buffer is not None:
                memo[id(buffer)] = _blank(buffer)
        for value in vars(part).values():
            items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
            for tensor in (value, *items):
                if isinstance(tensor, Tensor) and id(tensor) not in memo:
                    on_host = tensor.device.type == "cpu"
                    memo[id(tensor)] = tensor.detach().clone() if on_host else _blank(tensor)
    return copy.deepcopy(module, memo)


def outcome(func: OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What the operation gives to tensors on `meta`; as to ones, where it needs contents."""
    if destination(func, args, kwargs) == ("meta", "cpu"):
        if func._schema.is_mutable:
            return args[0]
        return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
    if pins(func, kwargs):
        return args[0] if isinstance(args[0], Tensor) else func(*args, **{**kwargs, "pin_memory": False})
    if not needs_contents(func, args, kwargs):
        return func(*args, **kwargs)
    ones_args, ones_kwargs = tree_map_only(Tensor, _ones, (args, dict(kwargs)))
    return blank(func(*ones_args, **ones_kwargs))


@contextlib.contextmanager
def optimizers_allowed() -> Iterator[None]:
    """Torch's optimizers take capturable=True and fused=True for tensors on `meta` as well."""
    with contextlib.ExitStack() as undo:
        for name, module in list(sys.modules.items()):
            for function in _OPTIMIZER_DEVICES:
                if name.startswith("torch.optim.") and function in vars(module):
                    own = vars(module)[function]
                    undo.callback(setattr, module, function, own)
                    setattr(module, function, _with_meta(own))
        yield


def _with_meta(devices: Callable[..., list[str]]) -> Callable[..., list[str]]:
    return lambda *args, **kwargs: [*devices(*args, **kwargs), "meta"]


def _blank(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor.detach(), device="meta").requires_grad_(tensor.requires_grad)


def _ones(tensor: Tensor) -> Tensor:
    # Of one element, so that it takes no memory either.
    return torch.ones((), dtype=tensor.dtype).expand(tensor.shape) if tensor.is_meta else tensor

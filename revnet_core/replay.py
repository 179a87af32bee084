"""What a recompute must find as the forward found it: random state, autocast, training mode, buffers."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import _has_any_global_hook

from revnet_core.capture import draws_of_evaluation
from revnet_core.draws import Draws, HostDraws
from revnet_core.errors import ChangedStateError
from revnet_core.norms import NormReplay
from revnet_core.partitioned import is_partitioned
from revnet_core.walk import modules_of, trained_parameters

# Of these the running statistics can be left alone by one flag; a subclass with a forward of its own may not heed it.
_FLAGGED_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward)
# Torch's batch norm writes its statistics without counting a version; these are everybody's names for them.
_UNCOUNTED = ("running_mean", "running_var")


class _Held(NamedTuple):
    """A parameter or buffer as the recording found it: the tensor itself, which must keep its version, or a copy
    (version None) of a buffer that the recording changed."""

    module: nn.Module
    name: str
    tensor: Tensor
    version: int | None


class Replay:
    """One evaluation of `net`, recorded once and replayed as often as wanted.

    Draws from torch's global generators (CPU and the current CUDA device) are repeated without moving the
    generators' sequence, and buffers - batch-norm statistics or any other - end as the first evaluation left
    them. Draws from other generators (Python's `random`, NumPy, a `torch.Generator` of one's own) are not
    seen. Costs nothing lasting for a net that draws nothing and changes no other buffer than batch norm's.
    A replay without a recording finds everything as it is, and leaves it so.

    same_graph: the replay must save the same tensors for backward as the recording, which checkpointing counts;
    batch norm then gets copies of its statistics rather than none, which costs a copy.
    bitwise: what the replay computes equals the recording bit for bit; otherwise batch norm reuses the statistics that
    the recording found, which is faster and off by a rounding.
    observed: the net has hooks in the evaluation at hand, which may keep what they see.

    `replaying` raises ChangedStateError when a parameter, or a buffer that the recording only read, was changed.
    """

    def __init__(self, net: nn.Module, device: torch.device, *, same_graph: bool = False, bitwise: bool = True) -> None:
        self._net = net
        self._device = device
        self._modules = modules_of(net)
        self._training = [module.training for module in self._modules]
        self._draws: Draws = HostDraws(device)
        self._parameters: list[_Held] = []
        self._buffers: list[_Held] | None = None
        # What an inner sequence evaluates again, after this replay, it has to find in one way both times.
        inner = [m for m in self._modules if getattr(m, "activations", "stored") not in ("stored", "offloaded")]
        self._same_graph = same_graph or any(sequence.activations == "checkpointed" for sequence in inner)
        again = set(modules_of(*inner))
        self._norms = None if bitwise else NormReplay.of([m for m in self._modules if m not in again])
        self.observed = False

    def _look_for_hooks(self) -> None:
        self.observed = bool(_has_any_global_hook()) or any(
            m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
            for m in self._modules
        )

    @property
    def trained_parameters(self) -> list[nn.Parameter]:
        return trained_parameters(self._modules)

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        self._look_for_hooks()
        self._draws = draws_of_evaluation(self._device)
        before = [
            (_Held(m, name, b, _version_of(b)), None if is_flagged(m) else b.clone())
            for m, name, b in self._read_buffers()
        ]
        with self._draws.recording(), self._norms.recording() if self._norms else contextlib.nullcontext():
            yield
        self._buffers = [
            held._replace(tensor=copy, version=None)
            if copy is not None and (_change_of(held, held.module._buffers) or _is_uncounted(held))
            else held
            for held, copy in before
        ]
        self._parameters = [
            _Held(m, name, p, _version_of(p))
            for m in self._modules
            for name, p in m._parameters.items()
            # A partitioned parameter's contents are moved in and out.
            if p is not None and not is_partitioned(p)
        ]

    @contextlib.contextmanager
    def replaying(self, *, constant_statistics: bool = False) -> Iterator[None]:
        """constant_statistics: where batch norm reuses statistics, gradients leave out that they are of the batch."""
        self._refuse_changes()
        self._look_for_hooks()
        with contextlib.ExitStack() as undo:
            for module, training in zip(self._modules, self._training, strict=True):
                if module.training != training:
                    undo.callback(setattr, module, "training", module.training)
                    module.training = training
                if not (is_flagged(module) and module.training and module.track_running_stats):
                    continue
                if self._same_graph:
                    self._swap_buffers(module, undo)
                else:
                    undo.callback(setattr, module, "track_running_stats", True)
                    module.track_running_stats = False  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
            if self._buffers is None:  # nothing was recorded
                self._buffers = [_Held(m, name, b, None) for m, name, b in self._read_buffers() if not is_flagged(m)]
            for module, name, tensor, version in self._buffers:
                undo.callback(module._buffers.__setitem__, name, module._buffers[name])
                module._buffers[name] = tensor.clone() if version is None else tensor
            undo.enter_context(self._draws.repeating())
            if self._norms:
                undo.enter_context(self._norms.replaying(as_constants=constant_statistics))
            yield

    def _swap_buffers(self, module: nn.Module, undo: contextlib.ExitStack) -> None:
        for name, buffer in module._buffers.items():
            if buffer is not None:
                undo.callback(module._buffers.__setitem__, name, buffer)
                module._buffers[name] = buffer.clone()

    def _refuse_changes(self) -> None:
        for held in self._parameters:
            if change := _change_of(held, held.module._parameters):
                self._refuse("parameter", held, change)
        for held in self._buffers or ():
            # One that was replaced is still held here, as it was.
            if held.version is not None and held.version != _version_of(held.tensor):
                self._refuse("buffer", held, "changed in place")

    def _refuse(self, what: str, held: _Held, change: str) -> NoReturn:
        path = next(name for name, module in self._net.named_modules() if module is held.module)
        name = f"{path}.{held.name}".lstrip(".")
        raise ChangedStateError(
            f"{what} {name!r} of {type(self._net).__name__} was {change} after the forward; "
            "the backward evaluates the net again and needs it as it was. Change it after the backward, or set "
            "activations='stored'."
        )

    def _read_buffers(self) -> Iterator[tuple[nn.Module, str, Tensor]]:
        """Every buffer but those that batch norm in training mode writes and does not read."""
        for module, training in zip(self._modules, self._training, strict=True):
            if module._buffers and not (training and is_flagged(module)):
                for name, buffer in module._buffers.items():
                    if buffer is not None:
                        yield module, name, buffer


def _version_of(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _change_of(held: _Held, tensors: Mapping[str, Tensor | None]) -> str | None:
    if tensors.get(held.name) is not held.tensor:
        return "replaced"
    return "changed in place" if _version_of(held.tensor) != held.version else None


def _is_uncounted(held: _Held) -> bool:
    return held.module.training and held.name in _UNCOUNTED


def is_flagged(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and type(module).forward in _FLAGGED_FORWARDS


@dataclass(frozen=True)
class AutocastState:
    """The autocast under which a forward ran."""

    device_type: str
    enabled: bool
    dtype: torch.dtype

    @classmethod
    def of(cls, device: torch.device) -> "AutocastState":
        kind = device.type
        if not torch.amp.is_autocast_available(kind):  # "meta", say
            return cls("cpu", False, torch.bfloat16)
        return cls(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))

    def restored(self) -> torch.autocast:
        # The cache would hand weights cast without a graph, in the forward, to the recompute: their gradient
        # would be lost.
        return torch.autocast(self.device_type, dtype=self.dtype, enabled=self.enabled, cache_enabled=False)

"""What in a training step a CUDA graph could not hold, or would hold with the values of its capture; found without a
GPU."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from revnet_core import host_calls
from revnet_core.capture_rules import Reason, reason_against, tensors_in
from revnet_core.errors import CaptureError
from revnet_core.kept_state import KeptState
from revnet_core.sequence import ReversibleSequence
from revnet_core.without_contents import blank, blank_copy, optimizers_allowed, outcome

_TORCH = os.path.dirname(torch.__file__) + os.sep
_CORE = os.path.dirname(__file__) + os.sep
# What these do on the host a captured step does in another way, or it is named as a limit of this package.
_ANSWERED = tuple(
    _CORE + name for name in ("draws.py", "exactness.py", "pending.py", "offload.py", "probe.py", "guard.py")
)


@dataclass(frozen=True)
class Obstacle:
    """One thing that speaks against a capture.

    operation  "aten._local_scalar_dense", "Tensor.tolist", "self.mean = ...", ...
    module     the innermost module in whose forward, or recompute, it is: its name within the model and its class; None
               outside of any, as in the loss and the optimizer
    phase      "forward", "backward" or "optimizer"
    source     "file.py:12 in forward", the innermost frame that is neither torch's nor this package's; None without one
    why        what it would do to a capture
    remedy     what to do instead
    """

    operation: str
    module: str | None
    phase: str
    source: str | None
    why: str
    remedy: str

    def __str__(self) -> str:
        where = ", ".join(filter(None, (self.phase, self.module, self.source)))
        return f"{self.operation} ({where}): {self.why}. {self.remedy}"


class ObstacleWatch:
    """A context in which a training step runs; `obstacles` says afterwards what a capture could not hold.

    model      whose modules are named
    device     the one that a capture would be of: "cuda", or "meta" for tensors without contents
    optimizer  whose state is compared, like the modules', before and after: from the second step on, since the first
               may create it
    phase      "forward", "backward" or "optimizer": what runs; may be set as it goes on

    Seen are operations by a dispatch mode, which autograd takes along into the threads of its own in which it runs the
    backward on a GPU, and some calls by replacing them for that time (`Tensor.tolist`, `torch.manual_seed`,
    `torch.cuda.synchronize`, ...). `data_ptr` is none of them: a graph's addresses stay as they are. Not seen: Python's
    `random` and NumPy, whose draws are frozen; plain Python that depends on the time, or on a number that no module and
    no optimizer holds; operations that wait for the device without torch saying so; what does not run in this step,
    like the other branch. The watch installs no hooks and changes nothing that the step computes. On meta, which has no
    contents, every value that is read is one, or true.
    """

    def __init__(
        self, model: nn.Module, device: torch.device | str, optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        self.device = torch.device(device)
        self.phase = "forward"
        self.covered = self.of_number = False
        self._model = model
        self._optimizer = optimizer
        self._names = {module: name for name, module in model.named_modules()}
        self._found: dict[Obstacle, None] = {}

    @property
    def obstacles(self) -> list[Obstacle]:
        """Each once, in the order in which they were found."""
        return list(self._found)

    def __enter__(self) -> "ObstacleWatch":
        self._outermost = sys._getframe(1).f_code
        self._add(_own_limits(self._model))
        self._kept = KeptState(self._model, self._optimizer)
        self._undo = contextlib.ExitStack()
        self._undo.enter_context(host_calls.heard(_current))
        self._undo.enter_context(_Mode(self, self._kept))
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._undo.close()
        if error is None:
            for name, reason in self._kept.changes():
                module = None if name is None else self._title(self._model.get_submodule(name))
                self._add([Obstacle(reason.operation, module, "forward" if module else "optimizer", None, *reason[1:])])
            # What was seen of the optimizer says more.
            seen = any(found.phase == "optimizer" for found in self._found)
            if self._optimizer and not seen and _is_uncapturable(self._optimizer):
                what, remedy = f"{type(self._optimizer).__name__}.step", _remedy_in(self._optimizer)
                why = "with capturable=False it keeps its steps on the host, and refuses to be captured"
                self._add([Obstacle(what, None, "optimizer", None, why, remedy)])
        del self._kept

    def note(self, reason: Reason) -> None:
        """Something that happens now."""
        frames = list(_outward(sys._getframe(1), self._outermost))
        if _is_answered(frames):
            return
        place = _Place.of(frames, self._names)
        module = None if place.module is None else self._title(place.module)
        remedy = reason.remedy if place.optimizer is None else _remedy_in(place.optimizer)
        self._add([Obstacle(reason.operation, module, self.phase, place.source, reason.why, remedy)])

    def _add(self, obstacles: Sequence[Obstacle]) -> None:
        self._found.update(dict.fromkeys(obstacles))

    def _title(self, module: nn.Module) -> str:
        return _title(self._names[module], module)


def find_obstacles(
    model: nn.Module,
    loss: Callable[..., Tensor],
    batch: Sequence[Any],
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
) -> list[Obstacle]:
    """What would break or falsify the capture of a training step, from two steps of a copy on the `meta` device.

    model      stays as it is; a plain tensor attribute that is on the host is taken to stay there
    loss       gives a scalar for loss(model(x), *targets)
    batch      (x, *targets), of the shapes and dtypes to train with; the contents do not matter
    optimizer  makes one from parameters; None: forward and backward alone

    No GPU is needed, and no memory but for what stays on the host. The second step counts, since the first may create
    what is kept. A branch that depends on the contents goes on as if the condition were true, so the other is
    not looked at; nor is code for which `x.is_cuda` has to be true. See `ObstacleWatch` for what is not seen.

    An error of the step is raised, unless obstacles were found before it: it may come of them.
    """
    twin = blank_copy(model)
    criterion = blank_copy(loss) if isinstance(loss, nn.Module) else loss
    found = dict.fromkeys(_own_limits(model))
    with optimizers_allowed(), torch.random.fork_rng(devices=[]):
        with ObstacleWatch(twin, "meta"):  # for what it reads of settings that are on `meta`
            made = optimizer(list(twin.parameters())) if optimizer else None
        watch, failed = _watched_step(twin, criterion, batch, made)
        if not failed:
            watch, failed = _watched_step(twin, criterion, batch, made)
    if failed and not watch.obstacles:
        raise failed
    return list(found | dict.fromkeys(watch.obstacles))


def raise_for(obstacles: Sequence[Obstacle]) -> None:
    """Raises CaptureError, which lists the obstacles, if there are any."""
    if obstacles:
        listed = "".join(f"\n  {obstacle}" for obstacle in obstacles)
        raise CaptureError(f"the training step cannot be captured as a CUDA graph:{listed}")


def _watched_step(
    model: nn.Module, loss: Callable[..., Tensor], batch: Sequence[Any], optimizer: torch.optim.Optimizer | None
) -> tuple[ObstacleWatch, Exception | None]:
    """One step on `meta`, and what it raised."""
    watch = ObstacleWatch(model, "meta", optimizer)
    x, *targets = blank(tuple(batch))
    for parameter in model.parameters():
        parameter.grad = None
    try:
        with watch:
            value = loss(model(x), *targets)
            watch.phase = "backward"
            value.backward()
            watch.phase = "optimizer"
            if optimizer:
                optimizer.step()
    except Exception as error:  # noqa: BLE001 - whatever it is, the caller raises it or has found its cause
        return watch, error
    return watch, None


class _Mode(TorchDispatchMode):
    def __init__(self, watch: ObstacleWatch, kept: KeptState) -> None:
        super().__init__()
        self.watch = watch
        self._kept = kept

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not isinstance(func, OpOverload):
            return func(*args, **kwargs)
        watch = self.watch
        for tensor in tensors_in((*args, *kwargs.values())):
            self._kept.use(tensor)
        if not watch.covered and (
            reason := reason_against(func, args, kwargs, watch.device, of_number=watch.of_number)
        ):
            watch.note(reason)
        return outcome(func, args, kwargs) if watch.device.type == "meta" else func(*args, **kwargs)


def _current() -> ObstacleWatch | None:
    """That of the calling thread, which may be one of autograd's."""
    modes = reversed(_get_current_dispatch_mode_stack())
    return next((mode.watch for mode in modes if isinstance(mode, _Mode)), None)


class _Place(NamedTuple):
    """Where in the step something is; looked for only when something was found."""

    module: nn.Module | None
    optimizer: torch.optim.Optimizer | None
    source: str | None

    @classmethod
    def of(cls, frames: Sequence[FrameType], names: dict[nn.Module, str]) -> "_Place":
        module = optimizer = source = None
        for frame in frames:
            code = frame.f_code
            own = frame.f_locals.get("self") if code.co_varnames[:1] == ("self",) else None
            if module is None and isinstance(own, nn.Module) and own in names:
                module = own
            if optimizer is None and isinstance(own, torch.optim.Optimizer):
                optimizer = own
            if source is None and not _is_passing_on(frame) and not code.co_filename.startswith(_CORE):
                source = f"{os.path.basename(code.co_filename)}:{frame.f_lineno} in {code.co_name}"
        return cls(module, optimizer, source)


def _is_passing_on(frame: FrameType) -> bool:
    """Whether what it does is asked of it by the frame outside."""
    return frame.f_code.co_filename.startswith(_TORCH) or frame.f_code.co_filename == contextlib.__file__


def _is_answered(frames: Sequence[FrameType]) -> bool:
    asking = next((frame for frame in frames if not _is_passing_on(frame)), None)
    return asking is not None and asking.f_code.co_filename in _ANSWERED


def _outward(frame: FrameType | None, outermost: object) -> Iterator[FrameType]:
    """From where it happened to where the watch was entered, without the watch's own frames."""
    watching = (__file__, host_calls.__file__)
    while frame and frame.f_code.co_filename in watching and frame.f_code is not outermost:
        frame = frame.f_back
    while frame:
        yield frame
        if frame.f_code is outermost:
            return
        frame = frame.f_back


def _title(name: str, module: nn.Module) -> str:
    return f"{name or 'the model'} ({type(module).__name__})"


def _is_uncapturable(optimizer: torch.optim.Optimizer) -> bool:
    # One that is being made has no groups yet.
    return any(group.get("capturable") is False for group in getattr(optimizer, "param_groups", ()))


def _remedy_in(optimizer: torch.optim.Optimizer) -> str:
    kind = type(optimizer).__name__
    if _is_uncapturable(optimizer):
        return f"Use {kind}(..., capturable=True), which keeps its steps on the device."
    return (
        f"{kind} does this in its step: give it floats, not tensors, for its settings, or use an optimizer that keeps "
        "all of its state on the device, such as SGD or Adam(..., capturable=True)."
    )


def _own_limits(model: nn.Module) -> list[Obstacle]:
    """What the sequences of this package were set to, and cannot do in a graph."""
    found: list[Obstacle] = []
    for name, module in model.named_modules():
        if not isinstance(module, ReversibleSequence):
            continue
        title = _title(name, module)
        if module.activations == "offloaded":
            why = "it copies activations to the host and back"
            remedy = "Set activations='reconstructed', 'checkpointed' or Budgeted(bytes)."
            found.append(Obstacle("activations='offloaded'", title, "forward", None, why, remedy))
        if module._guard is not None:
            why = "a guard counts steps on the host, and reads there what it finds"
            remedy = "Call the guard's detach(), or take the steps to be compared without a graph."
            found.append(Obstacle("Guard", title, "backward", None, why, remedy))
    return found

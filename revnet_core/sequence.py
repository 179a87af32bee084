"""ReversibleSequence: what users compose, with the choice of what becomes of the activations."""

import contextlib
from collections.abc import Callable, Hashable, Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from revnet_core.backprop import backpropagate
from revnet_core.budget import Budgeted, SavedBytes
from revnet_core.capture import is_capturing, is_under_way, judged
from revnet_core.chain import Block, ChainRun, Streams, split
from revnet_core.compiled import register, run_compiled
from revnet_core.coupling import Coupling
from revnet_core.downsampling import SpaceToDepth
from revnet_core.errors import ShapeError, UnsupportedError, located
from revnet_core.exactness import Verdict
from revnet_core.offload import offloaded
from revnet_core.precision import Precision
from revnet_core.replay import AutocastState, Replay

if TYPE_CHECKING:
    from revnet_core.guard import Guard

ACTIVATIONS = ("stored", "checkpointed", "offloaded", "reconstructed")


class ReversibleSequence(nn.Module):
    """Couplings (and SpaceToDepth) one after another on the two halves of a tensor, or on two tensors.

    activations   "stored": autograd keeps everything; "checkpointed": `torch.utils.checkpoint` per coupling,
                  which keeps each coupling's input; "offloaded": stored, in pinned host memory; "reconstructed":
                  only the sequence's output is kept and the backward rebuilds the rest; `Budgeted(bytes)`:
                  reconstructed but for the last blocks, as many as the bytes allow to store. May be changed at
                  any time; state_dict keys do not depend on it.
    split_dim     the dimension that holds the two streams, of even size (channels: 1; features: -1). None: the
                  sequence takes and returns the two streams, as a pair; sequences that follow each other then
                  pass them on without joining and splitting.
    precision     see `Precision`; `stored` and `checkpointed` compute with the same arithmetic, so that with
                  reconstruction="exact" all three give bit-identical gradients. May be changed too. Raises
                  UnsupportedError for one that a coupling cannot keep.
    overlapped    whether a block is rebuilt while the gradient of the one behind it is taken, on streams beside the
                  current one. On a GPU that the blocks do not fill this saves time; it keeps the graphs of two blocks
                  instead of that of one net. The gradients are the same bits. May be changed too. Refused under ZeRO-3
                  and in a compiled graph.

    Gradients are those of "stored", whatever F and G are: random draws are repeated, statistics are updated
    once, autocast is as in the forward, the caller's tensors are never changed. A gradient of a gradient
    needs "stored" or "checkpointed". An F or G that keeps its own input (not by a hook) must clone it: "reconstructed"
    overwrites the streams.

    An exact reconstruction that was not exact raises ReconstructionError: on the CPU in the backward; on other
    devices, which would have to be waited for, in `raise_if_inexact` or in a later forward.

    Source: Gomez et al. 2017, arXiv:1707.04585, algorithm 1.
    """

    def __init__(
        self,
        couplings: Iterable[Block],
        *,
        split_dim: int | None = 1,
        activations: str | Budgeted = "reconstructed",
        precision: Precision = Precision(),  # noqa: B008 - immutable
        overlapped: bool = False,
    ) -> None:
        super().__init__()
        self.couplings = nn.ModuleList(couplings)
        for index, block in enumerate(self.couplings):
            if type(block).forward not in (Coupling.forward, SpaceToDepth.forward):
                raise UnsupportedError(
                    f"couplings[{index}] is a {type(block).__name__}, whose forward the backward would not undo. Give "
                    "an AdditiveCoupling(f, g), an AffineCoupling(f, g) or a SpaceToDepth, and put what is special "
                    "into f and g."
                )
        self.split_dim = split_dim
        self.activations = activations
        self.precision = precision
        self.overlapped = overlapped
        self._unread: list[Verdict] = []
        self._guard: Guard | None = None
        self._number = register(self.couplings)

    @property
    def activations(self) -> str | Budgeted:
        return self._activations

    @activations.setter
    def activations(self, value: str | Budgeted) -> None:
        self._activations = value if isinstance(value, Budgeted) else check_activations(value)

    @property
    def precision(self) -> Precision:
        return self._precision

    @precision.setter
    def precision(self, value: Precision) -> None:
        for index, block in enumerate(self.couplings):
            if isinstance(block, Coupling):
                with located(f"couplings[{index}]: "):
                    block.check_precision(value)
        self._precision = value

    @overload
    def forward(self, x: Tensor, **side: Any) -> Tensor: ...
    @overload
    def forward(self, x: Streams, **side: Any) -> Streams: ...
    def forward(self, x: Tensor | Streams, **side: Any) -> Tensor | Streams:
        """Map x to y, in the streams' dtype and of the same shape (but for SpaceToDepth); `side` goes to every F and
        G by keyword.

        x and y are one tensor, or pairs of streams of equal shape where split_dim is None. Tensors among the side
        inputs get gradients. Raises ShapeError when split_dim is odd or F or G changes the shape, PrecisionError when
        float64 would be narrowed, ReconstructionError or DriftError for an earlier backward on a device other than the
        CPU.
        """
        inputs = self._check(x)
        device = inputs[0].device
        if torch.compiler.is_compiling():
            with self.precision.autocast(device.type):
                return self._forward_compiled(tuple(self.precision.enter(tensor) for tensor in inputs), side)
        if not is_capturing(device):
            self._read_verdicts(wait=False)
            if self._guard:
                self._guard.answer()
        with self.precision.autocast(device.type):
            inputs = tuple(self.precision.enter(_dense(tensor)) for tensor in inputs)
            saving = torch.is_grad_enabled() and self._needs_gradients(inputs, side)
            chain = self._chain()
            rebuilt, meter = self._rebuilt_blocks(inputs) if saving else (0, None)
            probe = self._guard.probe(self, rebuilt) if self._guard and saving and self.training else None
            if rebuilt:
                run = ChainRun(chain[:rebuilt], self.precision, side)
                join = self.split_dim is not None and rebuilt == len(chain)
                outputs = backpropagate(
                    run,
                    inputs,
                    split_dim=self.split_dim or 0,
                    join=join,
                    judge=self._judge,
                    meter=meter,
                    probe=probe,
                    overlapped=self.overlapped,
                )
                if meter:
                    self._budget.learn(self, self._key(inputs), meter.block_bytes)
                if join:
                    return outputs[0]
                s1, s2 = outputs
            else:
                s1, s2 = self._split(inputs)
            call = replayed_checkpoint if self._activations == "checkpointed" and saving else _run
            with offloaded(self) if self._activations == "offloaded" and saving else contextlib.nullcontext():
                for index, block in enumerate(chain[rebuilt:], start=rebuilt):
                    with located(f"couplings[{index}]."):
                        s1, s2 = call(block, s1, s2, precision=self.precision, **side)
            return self._join(s1, s2)

    @overload
    def inverse(self, y: Tensor, **side: Any) -> Tensor: ...
    @overload
    def inverse(self, y: Streams, **side: Any) -> Streams: ...
    def inverse(self, y: Tensor | Streams, **side: Any) -> Tensor | Streams:
        """Rebuild the input of `forward` from its output; shapes and dtypes as there.

        Buffers are left as they are. What the forward drew at random cannot be known here: in
        training mode with dropout use `audit_inverse`, which replays it.
        Source: Gomez et al. 2017, arXiv:1707.04585, eq. 8.
        """
        s1, s2 = self._split(self._check(y))
        with self.precision.autocast(s1.device.type), Replay(self, s1.device).replaying():
            for index, block in reversed(list(enumerate(self._chain()))):
                with located(f"couplings[{index}]."):
                    s1, s2 = block.inverse(s1, s2, precision=self.precision, **side)
            return self._join(s1, s2)

    def raise_if_inexact(self) -> None:
        """Wait for the device and raise ReconstructionError if an exact reconstruction since the last call was not
        exact. Where the loss is read anyway, this costs nothing more. On the CPU the backward has raised it already."""
        self._read_verdicts(wait=True)

    def extra_repr(self) -> str:
        overlapped = ", overlapped=True" if self.overlapped else ""
        return f"activations={self._activations!r}, split_dim={self.split_dim}, precision={self.precision}{overlapped}"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_unread": [], "_guard": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._number = register(self.couplings)

    def _chain(self) -> list[Block]:
        return list(self.couplings)  # pyright: ignore[reportReturnType]

    @property
    def _budget(self) -> Budgeted:
        assert isinstance(self._activations, Budgeted)
        return self._activations

    def _rebuilt_blocks(self, inputs: tuple[Tensor, ...]) -> tuple[int, SavedBytes | None]:
        """How many of the first blocks are reconstructed, and a meter where their bytes are not known yet."""
        if self._activations == "reconstructed":
            return len(self.couplings), None
        if not isinstance(self._activations, Budgeted):
            return 0, None
        stored = self._activations.stored_blocks(self, self._key(inputs))
        if stored is None:
            return len(self.couplings), SavedBytes(self._chain())
        return len(self.couplings) - stored, None

    def _key(self, inputs: tuple[Tensor, ...]) -> Hashable:
        """What the bytes that a block saves depend on."""
        kinds = tuple((t.shape, t.dtype, t.device) for t in inputs)
        learning = sum(p.requires_grad for p in self.parameters())
        return kinds, self.training, learning, AutocastState.of(inputs[0].device)

    def _forward_compiled(self, inputs: tuple[Tensor, ...], side: dict[str, Any]) -> Tensor | Streams:
        saving = torch.is_grad_enabled() and self._needs_gradients(inputs, side)
        if self._guard and saving and self.training and self._activations == "reconstructed":
            raise UnsupportedError(
                "a guard cannot follow a sequence into a compiled graph. Detach it, or compile F and G each on their "
                "own."
            )
        if self.overlapped and saving and self._activations == "reconstructed":
            raise UnsupportedError(
                "overlapped=True has no place in a compiled graph, which orders its operations itself. Set "
                "overlapped=False, or compile F and G each on their own."
            )
        activations = "budgeted" if isinstance(self._activations, Budgeted) else self._activations
        return run_compiled(
            self._number, self.couplings, activations, self.precision, inputs, self.split_dim, side, saving=saving
        )

    def _judge(self, verdict: Verdict) -> None:
        if not judged(verdict):
            self._unread.append(verdict)
            self._read_verdicts(wait=verdict.on_host)

    def _read_verdicts(self, *, wait: bool) -> None:
        while self._unread and (wait or self._unread[0].is_ready()):
            self._unread.pop(0).raise_if_failed()

    def _needs_gradients(self, inputs: tuple[Tensor, ...], side: dict[str, Any]) -> bool:
        """Otherwise autograd keeps nothing anyway, but for a tensor that F or G holds unknown to us: its gradient
        is then right."""
        tensors = [*inputs, *(value for value in side.values() if isinstance(value, Tensor))]
        return any(t.requires_grad for t in tensors) or any(p.requires_grad for p in self.parameters())

    def _split(self, inputs: tuple[Tensor, ...]) -> Streams:
        if self.split_dim is None:
            return inputs  # pyright: ignore[reportReturnType]
        return split(inputs[0], self.split_dim)

    def _join(self, s1: Tensor, s2: Tensor) -> Tensor | Streams:
        return (s1, s2) if self.split_dim is None else torch.cat((s1, s2), dim=self.split_dim)

    def _check(self, x: Tensor | Streams) -> tuple[Tensor, ...]:
        if self.split_dim is None:
            if not isinstance(x, tuple) or len(x) != 2 or x[0].shape != x[1].shape:
                what = f"shapes {[tuple(t.shape) for t in x]}" if isinstance(x, tuple) else type(x).__name__
                raise ShapeError(
                    f"with split_dim=None the input is a pair (x1, x2) of tensors of one shape; this is {what}. "
                    "Give the pair, or set split_dim to the dimension that holds both streams."
                )
            return x
        if isinstance(x, tuple):
            raise ShapeError("the input is a tuple; set split_dim=None for a sequence that takes the two streams.")
        size = x.shape[self.split_dim]
        if size % 2:
            raise ShapeError(
                f"dimension {self.split_dim} of the input {tuple(x.shape)} has odd size {size}; two equal streams need "
                "an even one. Widen the layer in front by one, or choose another split_dim."
            )
        return (x,)


def check_activations(value: str) -> str:
    """Raises UnsupportedError for what does not exist."""
    if value in ACTIVATIONS:
        return value
    raise UnsupportedError(f"activations = {value!r}; allowed: {', '.join(ACTIVATIONS)}, or Budgeted(budget_bytes).")


def _dense(x: Tensor) -> Tensor:
    """Streams are dense, so that a rebuilt one has the original's layout and the same kernels see both."""
    if x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)):
        return x
    return x.contiguous()


def _run(module: nn.Module, *inputs: Tensor, **kwargs: Any) -> Any:
    return module(*inputs, **kwargs)


class _Repeatable:
    """A context that can be entered again, as a second backward through a checkpoint does."""

    def __init__(self, make: Callable[[], AbstractContextManager[None]]) -> None:
        self._make = make

    def __enter__(self) -> None:
        self._current = self._make()
        self._current.__enter__()

    def __exit__(self, *error: Any) -> bool | None:
        return self._current.__exit__(*error)


def replayed_checkpoint(module: nn.Module, *inputs: Tensor, **kwargs: Any) -> Any:
    """`torch.utils.checkpoint` of a module, with its statistics updated once a step."""
    replay = Replay(module, inputs[0].device, same_graph=True)
    return checkpoint(
        module,
        *inputs,
        use_reentrant=False,
        preserve_rng_state=False,  # the replay repeats the draws
        # In a graph, a recompute that left out the last draws would fall behind the forward from replay to replay.
        early_stop=not is_under_way(),
        context_fn=lambda: (replay.recording(), _Repeatable(replay.replaying)),
        **kwargs,
    )

"""ReversibleSequence: what users compose, with the choice of what becomes of the activations."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from revnet_core.backprop import ChainRun, backpropagate, split
from revnet_core.coupling import AdditiveCoupling
from revnet_core.errors import ShapeError, UnsupportedError, located
from revnet_core.precision import Precision
from revnet_core.replay import Replay

ACTIVATIONS = ("stored", "checkpointed", "reconstructed")


class ReversibleSequence(nn.Module):
    """Couplings one after another on the two halves of a tensor.

    activations   "stored": autograd keeps everything; "checkpointed": `torch.utils.checkpoint` per coupling,
                  which keeps each coupling's input; "reconstructed": only the sequence's output is kept and
                  the backward rebuilds the rest. May be changed at any time; state_dict keys do not depend
                  on it.
    split_dim     the dimension that holds the two streams, of even size (channels: 1; features: -1).
    precision     see `Precision`; `stored` and `checkpointed` compute with the same arithmetic, so that with
                  reconstruction="exact" all three give bit-identical gradients.

    Gradients are those of "stored", whatever F and G are: random draws are repeated, statistics are updated
    once, autocast is as in the forward, the caller's tensors are never changed. A gradient of a gradient
    needs "stored" or "checkpointed". An F or G that keeps its own input (not by a hook) must clone it: "reconstructed"
    overwrites the streams.

    Source: Gomez et al. 2017, arXiv:1707.04585, algorithm 1.
    """

    def __init__(
        self,
        couplings: Iterable[AdditiveCoupling],
        *,
        split_dim: int = 1,
        activations: str = "reconstructed",
        precision: Precision = Precision(),  # noqa: B008 - immutable
    ) -> None:
        super().__init__()
        self.couplings = nn.ModuleList(couplings)
        self.split_dim = split_dim
        self.activations = activations
        self.precision = precision

    @property
    def activations(self) -> str:
        return self._activations

    @activations.setter
    def activations(self, value: str) -> None:
        if value not in ACTIVATIONS:
            raise UnsupportedError(f"activations = {value!r}; allowed: {', '.join(ACTIVATIONS)}.")
        self._activations = value

    def forward(self, x: Tensor, **side: Any) -> Tensor:
        """Map x to y of the same shape, in the streams' dtype; `side` goes to every F and G by keyword.

        Tensors among the side inputs get gradients. Raises ShapeError when split_dim is odd or F or G changes
        the shape, PrecisionError when float64 would be narrowed.
        """
        self._check(x)
        with self.precision.autocast(x.device.type):
            x = self.precision.enter(x)
            saving = torch.is_grad_enabled() and self._needs_gradients(x, side)
            if self._activations == "reconstructed" and saving:
                return backpropagate(ChainRun(self._chain(), self.precision, side), x, self.split_dim)
            run = replayed_checkpoint if self._activations == "checkpointed" and saving else _run
            s1, s2 = split(x, self.split_dim)
            for index, coupling in enumerate(self._chain()):
                with located(f"couplings[{index}]."):
                    s1, s2 = run(coupling, s1, s2, precision=self.precision, **side)
            return torch.cat((s1, s2), dim=self.split_dim)

    def inverse(self, y: Tensor, **side: Any) -> Tensor:
        """Rebuild the input of `forward` from its output; shape and dtype as the output's.

        Buffers are left as they are. What the forward drew at random cannot be known here: in
        training mode with dropout use `audit_inverse`, which replays it.
        Source: Gomez et al. 2017, arXiv:1707.04585, eq. 8.
        """
        self._check(y)
        with self.precision.autocast(y.device.type), Replay(self, y.device).replaying():
            s1, s2 = split(y, self.split_dim)
            for index, coupling in reversed(list(enumerate(self._chain()))):
                with located(f"couplings[{index}]."):
                    s1, s2 = coupling.inverse(s1, s2, precision=self.precision, **side)
            return torch.cat((s1, s2), dim=self.split_dim)

    def extra_repr(self) -> str:
        return f"activations={self._activations!r}, split_dim={self.split_dim}, precision={self.precision}"

    def _chain(self) -> list[AdditiveCoupling]:
        return list(self.couplings)  # pyright: ignore[reportReturnType]

    def _needs_gradients(self, x: Tensor, side: dict[str, Any]) -> bool:
        """Otherwise autograd keeps nothing anyway, but for a tensor that F or G holds unknown to us: its gradient
        is then right."""
        inputs = [x, *(value for value in side.values() if isinstance(value, Tensor))]
        return any(t.requires_grad for t in inputs) or any(p.requires_grad for p in self.parameters())

    def _check(self, x: Tensor) -> None:
        size = x.shape[self.split_dim]
        if size % 2:
            raise ShapeError(
                f"dimension {self.split_dim} of the input {tuple(x.shape)} has odd size {size}; two equal streams need "
                "an even one. Widen the layer in front by one, or choose another split_dim."
            )


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
        context_fn=lambda: (replay.recording(), _Repeatable(replay.replaying)),
        **kwargs,
    )

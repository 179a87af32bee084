"""One chain of couplings, built with each library on the very same F and G.

To add a contender: write one function from the pairs (F, G) to a module that maps the joined tensor to the joined
tensor, and name it in CONTENDERS. The measurements, the table and the tests take it from there.

Legend: N batch, C channels of both streams together, H height, W width; x1, x2 the streams, x the two joined.
"""

import importlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from revnet_core import AdditiveCoupling, Budgeted, Precision, ReversibleSequence

Pair = tuple[nn.Module, nn.Module]
# F and G are the contender's own to keep, but are not to be copied: their gradients are read.
Build = Callable[[Sequence[Pair]], nn.Module]


class PlainCoupling(nn.Module):
    """A coupling in plain autograd: the reference does not rest on what is compared with it."""

    def __init__(self, f: nn.Module, g: nn.Module) -> None:
        super().__init__()
        self.f = f
        self.g = g

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        y1 = x1 + self.f(x2)
        return y1, x2 + self.g(y1)


def _call(coupling: nn.Module, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
    return coupling(x1, x2)


def _checkpointed_call(coupling: nn.Module, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
    return checkpoint(coupling, x1, x2, use_reentrant=False)  # pyright: ignore[reportReturnType]


class PlainChain(nn.Module):
    """Splits once, runs the couplings, joins once."""

    def __init__(
        self, pairs: Sequence[Pair], call: Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]
    ) -> None:
        super().__init__()
        self.couplings = nn.ModuleList(PlainCoupling(f, g) for f, g in pairs)
        self.call = call

    def forward(self, x_NCHW: Tensor) -> Tensor:
        x1, x2 = x_NCHW.chunk(2, dim=1)
        for coupling in self.couplings:
            x1, x2 = self.call(coupling, x1, x2)
        return torch.cat((x1, x2), dim=1)


def stored(pairs: Sequence[Pair]) -> nn.Module:
    """Plain autograd keeps everything."""
    return PlainChain(pairs, _call)


def torch_checkpoint(pairs: Sequence[Pair]) -> nn.Module:
    """torch.utils.checkpoint around each coupling, as its documentation advises (use_reentrant=False)."""
    return PlainChain(pairs, _checkpointed_call)


def memcnn(pairs: Sequence[Pair]) -> nn.Module:
    """One InvertibleModuleWrapper per coupling; keep_input=False is its default, and what it is used for."""
    library = _import_quietly("memcnn")
    return nn.Sequential(
        *(
            library.InvertibleModuleWrapper(
                fn=library.AdditiveCoupling(Fm=f, Gm=g), keep_input=False, keep_input_inverse=False
            )
            for f, g in pairs
        )
    )


def revtorch(pairs: Sequence[Pair]) -> nn.Module:
    """One ReversibleSequence of ReversibleBlocks, as in its README."""
    library = _import_quietly("revtorch")
    return library.ReversibleSequence(nn.ModuleList(library.ReversibleBlock(f, g) for f, g in pairs))


def reconstructed(pairs: Sequence[Pair]) -> nn.Module:
    return _ours(pairs, "reconstructed")


def checkpointed(pairs: Sequence[Pair]) -> nn.Module:
    return _ours(pairs, "checkpointed")


def stored_exact(pairs: Sequence[Pair]) -> nn.Module:
    """Everything kept, and residuals rounded to the grid as `exact` rounds them."""
    return ReversibleSequence(_couplings(pairs), activations="stored", precision=Precision(reconstruction="exact"))


def exact(pairs: Sequence[Pair]) -> nn.Module:
    return ReversibleSequence(_couplings(pairs), precision=Precision(reconstruction="exact"))


class TwoStreams(nn.Module):
    """Sequences that pass the two streams on; they are split before the first and joined behind the last."""

    def __init__(self, sequences: Sequence[ReversibleSequence]) -> None:
        super().__init__()
        self.sequences = nn.ModuleList(sequences)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        first, second = x_NCHW.chunk(2, dim=1)
        streams = first, second
        for sequence in self.sequences:
            streams = sequence(streams)
        return torch.cat(streams, dim=1)


def revtorch_in_parts(pairs: Sequence[Pair]) -> nn.Module:
    return nn.Sequential(*map(revtorch, _parts(pairs)))


def reconstructed_in_parts(pairs: Sequence[Pair]) -> nn.Module:
    return nn.Sequential(*map(reconstructed, _parts(pairs)))


def two_streams_in_parts(pairs: Sequence[Pair]) -> nn.Module:
    return TwoStreams([_ours(part, "reconstructed", split_dim=None) for part in _parts(pairs)])


def budgeted(pairs: Sequence[Pair], budget_bytes: int) -> nn.Module:
    return _ours(pairs, Budgeted(budget_bytes))


def compiled(pairs: Sequence[Pair], activations: str) -> nn.Module:
    """The whole chain as one graph; it is compiled in its first step."""
    return torch.compile(_ours(pairs, activations), fullgraph=True)  # pyright: ignore[reportReturnType]


def _parts(pairs: Sequence[Pair]) -> list[Sequence[Pair]]:
    """PARTS sequences of as many couplings, or as many as there are couplings."""
    size = max(1, len(pairs) // PARTS)
    return [pairs[start : start + size] for start in range(0, len(pairs), size)]


def _ours(pairs: Sequence[Pair], activations: str | Budgeted, *, split_dim: int | None = 1) -> ReversibleSequence:
    wide = any(p.dtype == torch.float64 for f, g in pairs for net in (f, g) for p in net.parameters())
    precision = Precision(reconstruction="fp64" if wide else "fp32")
    return ReversibleSequence(_couplings(pairs), split_dim=split_dim, activations=activations, precision=precision)


def _couplings(pairs: Sequence[Pair]) -> list[AdditiveCoupling]:
    return [AdditiveCoupling(f, g) for f, g in pairs]


def _import_quietly(package: str) -> Any:
    """Imported when asked for, so that the table is there without the peers; they need not be typed either."""
    with warnings.catch_warnings():
        # memcnn 1.5.2 decorates with torch.cuda.amp, which torch says is deprecated.
        warnings.simplefilter("ignore", FutureWarning)
        return importlib.import_module(package)


@dataclass(frozen=True)
class Contender:
    """name       as the table shows it
    build      makes the chain; raises ImportError when its package is not installed
    package    in the package index, whose version is recorded; None for ours and torch's
    reference  builds the chain of the same arithmetic that keeps every activation
    """

    name: str
    build: Build
    package: str | None = None
    reference: Build = stored


PARTS = 4
MIB = 2**20
STORED = Contender("stored", stored)
CONTENDERS = (
    STORED,
    Contender("torch checkpoint", torch_checkpoint),
    Contender("memcnn", memcnn, package="memcnn"),
    Contender("RevTorch", revtorch, package="revtorch"),
    Contender("ours: reconstructed", reconstructed),
    Contender("ours: exact", exact, reference=stored_exact),
    Contender("ours: checkpointed", checkpointed),
)
# The first of each is what the others are divided by.
SUITES = {
    "peers": CONTENDERS,
    # A network of several sequences, as one with strided units between them is.
    "sequences": (
        STORED,
        Contender(f"RevTorch, {PARTS} sequences", revtorch_in_parts, package="revtorch"),
        Contender(f"ours: {PARTS} sequences", reconstructed_in_parts),
        Contender(f"ours: {PARTS} sequences, two streams", two_streams_in_parts),
    ),
    # In the default workload a coupling that is stored saves 16 MiB.
    "budget": (
        STORED,
        *(
            Contender(f"ours: budgeted {mib} MiB", partial(budgeted, budget_bytes=mib * MIB))
            for mib in (0, 64, 128, 192, 256)
        ),
    ),
    "compiled": (
        Contender("ours: stored, compiled", partial(compiled, activations="stored")),
        Contender("ours: reconstructed, compiled", partial(compiled, activations="reconstructed")),
    ),
}

"""The training steps that are compared: RevNets of the same weights in every activations, eager and as one graph, and
the same network with other libraries' chains in place of ours.

To add one: a function from the settings to a model, and its name in `runners_of`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from harness.models import loss_of
from revnet_core import AdditiveCoupling, Precision, ReversibleSequence, TrainingStep, create_model
from studies.peers.contenders import Build, Pair, memcnn, revtorch

CLASSES = 10
EAGER, GRAPH = "eager", "graph"


@dataclass(frozen=True, kw_only=True)
class Sizes:
    depth: int = 110
    batch_size: int = 128
    image_size: int = 32
    channels: tuple[int, ...] | None = None

    def batch(self, device: torch.device) -> tuple[Tensor, Tensor]:
        draws = torch.Generator().manual_seed(1)
        images_NCHW = torch.randn(self.batch_size, 3, self.image_size, self.image_size, generator=draws)
        labels_N = torch.randint(CLASSES, (self.batch_size,), generator=draws)
        return images_NCHW.to(device), labels_N.to(device)


@dataclass(frozen=True)
class Runner:
    """package: in the package index, of somebody else's library
    layout   of images and weights
    """

    activations: str
    how: str
    build: Callable[[], nn.Module]
    package: str | None = None
    layout: torch.memory_format = torch.contiguous_format

    @property
    def name(self) -> str:
        return f"{self.activations}, {self.how}"


def runners_of(sizes: Sizes, compute: str) -> list[Runner]:
    """Those that steps are divided by come first: stored, eager and as a graph."""
    plain, exact = Precision(compute), Precision(compute, "exact")
    ours = {
        "stored": partial(revnet, sizes, "stored", plain),
        "checkpointed": partial(revnet, sizes, "checkpointed", plain),
        "reconstructed": partial(revnet, sizes, "reconstructed", plain),
        "exact": partial(revnet, sizes, "reconstructed", exact),
    }
    peers: dict[str, Build] = {"memcnn": memcnn_behind_a_copy, "revtorch": revtorch}
    if compute == "bf16":
        peers = {name: partial(_casting_itself, build) for name, build in peers.items()}
    return [
        *(Runner(name, how, build) for name, build in ours.items() for how in (EAGER, GRAPH)),
        *(Runner(name, EAGER, partial(with_chains, sizes, plain, build), name) for name, build in peers.items()),
    ]


def measures_of(sizes: Sizes, compute: str) -> list[Runner]:
    """What may make a step faster, one by one and together, beside the step without."""
    plain, exact, last = Precision(compute), Precision(compute, "exact"), torch.channels_last
    built = partial(revnet, sizes)
    stored, rebuilt = partial(built, "stored", plain), partial(built, "reconstructed", plain)
    ahead, compiled = partial(built, "reconstructed", plain, overlapped=True), partial(with_compiled_nets, rebuilt)
    return [
        Runner("stored", EAGER, stored),
        Runner("stored", GRAPH, stored),
        Runner("reconstructed", GRAPH, rebuilt),
        Runner("exact", GRAPH, partial(built, "reconstructed", exact)),
        Runner("stored, channels last", GRAPH, stored, layout=last),
        Runner("reconstructed, channels last", GRAPH, rebuilt, layout=last),
        Runner("reconstructed, rebuilding ahead", EAGER, ahead),
        Runner("reconstructed, rebuilding ahead", GRAPH, ahead),
        Runner("reconstructed, channels last, rebuilding ahead", GRAPH, ahead, layout=last),
        Runner("stored, F and G compiled", GRAPH, partial(with_compiled_nets, stored)),
        Runner("reconstructed, F and G compiled", GRAPH, compiled),
    ]


def with_compiled_nets(build: Callable[[], nn.Module]) -> nn.Module:
    """F and G each on their own: nets of one form share what is compiled."""
    model = build()
    for module in model.modules():
        if isinstance(module, AdditiveCoupling):
            module.f.compile()
            module.g.compile()
    return model


def revnet(sizes: Sizes, activations: str, precision: Precision, *, overlapped: bool = False) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return create_model(
            "revnet",
            num_classes=CLASSES,
            depth=sizes.depth,
            channels=sizes.channels,
            activations=activations,
            precision=precision,
            overlapped=overlapped,
        )


def with_chains(sizes: Sizes, precision: Precision, build: Build) -> nn.Module:
    """Each ReversibleSequence replaced by what `build` makes of its couplings' F and G; all else is stored."""
    model = revnet(sizes, "stored", precision)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, ReversibleSequence):
                couplings = [c for c in child.couplings if isinstance(c, AdditiveCoupling)]
                assert len(couplings) == len(child.couplings)
                setattr(parent, name, build([(c.f, c.g) for c in couplings]))
    return model


class Copied(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.clone()


class Widened(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float()


class CastsItself(nn.Module):
    """Neither memcnn nor RevTorch recomputes under the autocast of the forward, and both fail for it; so the net opens
    it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            return self.net(x)


def _casting_itself(build: Build, pairs: Sequence[Pair]) -> nn.Module:
    return nn.Sequential(Widened(), build([(CastsItself(f), CastsItself(g)) for f, g in pairs]))


def memcnn_behind_a_copy(pairs: Sequence[Pair]) -> nn.Module:
    """memcnn frees its input's memory, also where the ReLU before it keeps that for its own backward; so it gets a copy
    of it, in each stage one."""
    return nn.Sequential(Copied(), memcnn(pairs))


def step_of(model: nn.Module, batch: tuple[Tensor, Tensor], *, graph: bool) -> TrainingStep:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    return TrainingStep(model, loss_of, optimizer, batch, cuda_graph=graph)

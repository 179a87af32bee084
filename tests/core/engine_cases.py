"""Engines, networks that are trained under them, and flaws that a comparison must find.

Legend: N batch, C channels, H height, W width.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from revnet_core import AdditiveCoupling, AffineCoupling, ReversibleSequence
from tests.core.nets import conv_bn

# Buckets smaller than these networks: gradients are reduced while others are still to come.
DDP: dict[str, dict[str, Any]] = {
    "ddp": {"bucket_cap_mb": 0.001},
    "ddp_views": {"gradient_as_bucket_view": True},
    "ddp_unused": {"bucket_cap_mb": 0.001, "find_unused_parameters": True},
    "ddp_static": {"bucket_cap_mb": 0.001, "static_graph": True},
}
SMALL_BUCKETS = {"reduce_bucket_size": 300, "allgather_bucket_size": 300}
ZERO: dict[str, dict[str, Any]] = {
    "zero0": {"stage": 0},
    "zero1": {"stage": 1, **SMALL_BUCKETS},
    "zero2": {"stage": 2, **SMALL_BUCKETS},
    # Partitions every parameter and gathers it for no longer than its module runs.
    "zero3": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 0,
        **SMALL_BUCKETS,
    },
    # Partitions every parameter too, fetches it ahead of its use and keeps it as long as DeepSpeed likes.
    "zero3_prefetching": {"stage": 3, "stage3_param_persistence_threshold": 0},
    # Parameters of this size are left whole.
    "zero3_persistent": {"stage": 3},
}


class Case(NamedTuple):
    """A network under an engine.

    accumulation  micro-batches a step
    """

    engine: str
    network: str
    reconstruction: str
    accumulation: int = 1

    @property
    def family(self) -> str:
        """Which process group runs it."""
        return "zero" if self.engine in ZERO else "ddp"

    def __str__(self) -> str:
        accumulated = f"-{self.accumulation}_micro_batches" if self.accumulation > 1 else ""
        return f"{self.engine}-{self.network}-{self.reconstruction}{accumulated}"


class Branching(nn.Module):
    """A convolution, and another that is used only when asked for."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.trunk = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.branch = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x_NCHW: Tensor, *, branching: bool = False) -> Tensor:
        out_NCHW = self.trunk(x_NCHW)
        return torch.tanh(out_NCHW + self.branch(x_NCHW) if branching else out_NCHW)


class Classifier(nn.Module):
    """Sequences between a stem, which may be missing, and a tail."""

    def __init__(self, stem: nn.Module | None, *sequences: ReversibleSequence) -> None:
        super().__init__()
        self.stem = stem
        self.sequences = nn.ModuleList(sequences)
        # Without a norm: it would take out the biases in front of it, whose gradient would be zero.
        self.tail = nn.Sequential(nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5))

    def forward(self, x_NCHW: Tensor, **side: bool) -> Tensor:
        if self.stem is not None:
            x_NCHW = self.stem(x_NCHW, **side)
        for sequence in self.sequences:
            x_NCHW = sequence(x_NCHW, **side)
        return self.tail(x_NCHW)


def stem() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))


def dropping_conv_bn() -> nn.Module:
    return nn.Sequential(conv_bn(), nn.Dropout(0.3))


def nested() -> nn.Module:
    def inner() -> nn.Module:
        return nn.Sequential(nn.Conv2d(2, 2, 3, padding=1, bias=False), nn.BatchNorm2d(2), nn.Dropout(0.3), nn.Tanh())

    return nn.Sequential(nn.BatchNorm2d(4), chain(inner, 2))


def chain(net: Callable[[], nn.Module], count: int) -> ReversibleSequence:
    return ReversibleSequence([AdditiveCoupling(net(), net()) for _ in range(count)])


def affine() -> ReversibleSequence:
    def net() -> nn.Module:
        return nn.Sequential(conv_bn(), nn.Tanh(), nn.Conv2d(4, 8, 1))

    return ReversibleSequence([AffineCoupling(net(), net()) for _ in range(2)])


def sharing() -> nn.Module:
    """Two sequences with one net in common."""
    net = conv_bn()
    first = ReversibleSequence([AdditiveCoupling(conv_bn(), conv_bn()), AdditiveCoupling(net, conv_bn())])
    second = ReversibleSequence([AdditiveCoupling(conv_bn(), net), AdditiveCoupling(conv_bn(), conv_bn())])
    return Classifier(stem(), first, second)


def repeating() -> nn.Module:
    """One sequence that uses a net three times."""
    net = conv_bn()
    return Classifier(stem(), ReversibleSequence([AdditiveCoupling(net, conv_bn()), AdditiveCoupling(net, net)]))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: Classifier(stem(), chain(conv_bn, 3)),
    "dropout": lambda: Classifier(stem(), chain(dropping_conv_bn, 2)),
    "nested": lambda: Classifier(stem(), chain(nested, 2)),
    "affine": lambda: Classifier(stem(), affine()),
    # Its input needs no gradient.
    "chain_first": lambda: Classifier(None, chain(conv_bn, 2)),
    "sharing": sharing,
    "repeating": repeating,
    "branching": lambda: Classifier(Branching(3, 8), chain(lambda: Branching(4, 4), 2)),
}

# DeepSpeed keeps float32.
CASES = (
    Case("ddp", "plain", "fp64"),
    Case("ddp", "plain", "exact"),
    Case("ddp", "plain", "fp64", accumulation=2),
    Case("ddp", "dropout", "fp64"),
    Case("ddp", "nested", "fp64"),
    Case("ddp", "affine", "fp64"),
    Case("ddp", "chain_first", "fp64"),
    Case("ddp", "sharing", "fp64"),
    Case("ddp", "repeating", "fp64"),
    Case("ddp_views", "plain", "fp64"),
    Case("ddp_unused", "plain", "fp64"),
    Case("ddp_unused", "sharing", "fp64"),
    Case("ddp_unused", "branching", "fp64"),
    Case("ddp_static", "plain", "fp64"),
    Case("ddp_static", "sharing", "fp64"),
    *(Case(engine, "plain", "fp32") for engine in ZERO),
    Case("zero2", "plain", "exact"),
    Case("zero2", "plain", "fp32", accumulation=2),
    Case("zero2", "affine", "fp32"),
    Case("zero2", "chain_first", "fp32"),
    Case("zero2", "sharing", "fp32"),
    Case("zero2", "branching", "fp32"),
    Case("zero3", "plain", "fp32", accumulation=2),
    Case("zero3", "dropout", "fp32"),
    Case("zero3", "nested", "exact"),
    Case("zero3", "affine", "fp32"),
    Case("zero3", "chain_first", "fp32"),
    Case("zero3", "sharing", "fp32"),
    Case("zero3", "repeating", "fp32"),
    Case("zero3", "branching", "fp32"),
)
# Ranks that nothing connects.
ALONE = Case("alone", "plain", "fp64")


def scale_gradient(model: nn.Module) -> None:
    """Send 1.01 times its gradient into one F."""

    def scale(net: nn.Module, args: Any, out: Tensor) -> None:
        if out.requires_grad:
            out.register_hook(lambda gradient: 1.01 * gradient)

    first_coupling(model).f.register_forward_hook(scale)


def scale_loss(model: nn.Module) -> None:
    """Train with 1.01 times every gradient, which clipping would hide."""
    model.register_forward_hook(lambda net, args, y: 1.01 * y - (0.01 * y).detach())


def perturb_output(model: nn.Module, *, forwards: float = math.inf) -> None:
    """Rebuild from an output that is wrong by a thousandth, in the first so many forwards."""
    sequence = next(m for m in model.modules() if isinstance(m, ReversibleSequence))
    forward, left = sequence.forward, forwards

    def perturbed(x: Tensor, **side: Any) -> Tensor:
        nonlocal left
        left -= 1
        if left < 0 or sequence.activations != "reconstructed":
            return forward(x, **side)
        with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: 1.001 * saved):
            return forward(x, **side)

    sequence.forward = perturbed  # pyright: ignore[reportAttributeAccessIssue]


def perturb_rank_1(model: nn.Module, *, forwards: float = math.inf) -> None:
    if dist.get_rank() == 1:
        perturb_output(model, forwards=forwards)


def count_twice(model: nn.Module) -> None:
    """Update the statistics of one batch norm twice a step, as a naive recompute does; gradients are right."""

    def again(norm: nn.Module, args: Any) -> None:
        with torch.no_grad():
            norm.forward(*args)

    next(m for m in first_coupling(model).modules() if isinstance(m, nn.BatchNorm2d)).register_forward_pre_hook(again)


# Each with the activations that it is put into.
FLAWS: dict[str, tuple[str, Callable[[nn.Module], None]]] = {
    "scale_gradient": ("reconstructed", scale_gradient),
    "scale_loss": ("reconstructed", scale_loss),
    "perturb_output": ("reconstructed", perturb_output),
    "count_twice": ("stored", count_twice),
    "drifts": ("reconstructed", perturb_rank_1),
    "drifts_once": ("reconstructed", functools.partial(perturb_rank_1, forwards=1)),
}
FLAWS_OF_ALL_RANKS = ("scale_gradient", "scale_loss", "perturb_output", "count_twice")
FLAWED_RUNS = (
    *((Case("ddp", "plain", "fp64"), flaw) for flaw in FLAWS_OF_ALL_RANKS),
    *((Case("zero2", "plain", "fp32"), flaw) for flaw in FLAWS_OF_ALL_RANKS),
    (Case("zero3", "plain", "fp32"), "scale_gradient"),
    (Case("zero3", "plain", "fp32"), "perturb_output"),
)
CHECKPOINTED_UNDER_ZERO = (Case("zero2", "plain", "fp32"), Case("zero3", "dropout", "fp32"))
COMPARED_RUNS = (
    *((case, "reconstructed") for case in CASES),
    *((case, "checkpointed") for case in CASES if case.family == "ddp" or case in CHECKPOINTED_UNDER_ZERO),
)

# Each with the action of a guard that compares at every step, and the flaw under its eyes.
GUARDED: dict[str, tuple[str, Callable[[nn.Module], None] | None]] = {
    "guarded": ("stop", None),
    "guard_stops": ("stop", perturb_output),
    "guard_stops_rank_1": ("stop", perturb_rank_1),
    "guard_warns": ("warn", perturb_rank_1),
    "guard_stores": ("store", perturb_rank_1),
}
TOLERATED = 1e-4
HEALTHY_CASES = (
    Case("ddp", "plain", "fp64"),
    Case("ddp", "plain", "fp64", accumulation=2),
    Case("ddp", "dropout", "fp64"),
    Case("ddp", "sharing", "fp64"),
    Case("ddp_static", "plain", "fp64"),
    Case("zero0", "plain", "fp32"),
    Case("zero1", "plain", "fp32"),
    Case("zero2", "plain", "fp32", accumulation=2),
    Case("zero3", "plain", "fp32", accumulation=2),
    Case("zero3", "nested", "exact"),
)
DRIFTING_CASES = (
    Case("ddp", "plain", "fp64"),
    Case("ddp_static", "plain", "fp64"),
    Case("zero2", "plain", "fp32", accumulation=2),
    Case("zero3", "plain", "fp32"),
)
STORING_CASES = (
    Case("ddp", "plain", "fp64"),
    Case("ddp", "plain", "fp64", accumulation=2),
    Case("ddp_static", "plain", "fp64"),
    Case("zero0", "plain", "fp32"),
)
# Where ranks that store and ranks that rebuild would be at odds.
NOT_STORING_CASES = tuple(Case(engine, "plain", "fp32") for engine in ("zero1", "zero2", "zero3"))
GUARDED_RUNS = (
    *((case, "guarded") for case in HEALTHY_CASES),
    *((case, "guard_warns") for case in DRIFTING_CASES),
    *((case, "drifts") for case in dict.fromkeys((*DRIFTING_CASES, *STORING_CASES))),
    *((case, run) for case in STORING_CASES for run in ("guard_stores", "drifts_once")),
    *((case, "guard_stores") for case in NOT_STORING_CASES),
    # What these leave in the engine is nobody's to go on with.
    *((case, "guard_stops") for case in DRIFTING_CASES),
)
RUNS = (*((case, "stored") for case in (*CASES, ALONE)), *COMPARED_RUNS, *FLAWED_RUNS, *GUARDED_RUNS)


def first_coupling(model: nn.Module) -> AdditiveCoupling:
    return next(m for m in model.modules() if isinstance(m, AdditiveCoupling))

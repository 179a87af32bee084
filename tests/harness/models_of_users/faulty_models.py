"""Factories as a user would write them, each of a model that goes wrong in one way."""

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C import _len_torch_dispatch_stack

from revnet_core import AdditiveCoupling, Precision, ReversibleSequence


class Linear(nn.Module):
    def __init__(self, num_classes: int, before: Callable[[], object]) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * 32 * 32, num_classes)
        self.before = before

    def forward(self, x: Tensor) -> Tensor:
        self.before()
        return self.linear(x.flatten(1))


def fine(*, num_classes: int, **options: Any) -> nn.Module:
    return Linear(num_classes, lambda: None)


def raises(*, num_classes: int, **options: Any) -> nn.Module:
    def fail() -> None:
        raise ValueError("planted")

    return Linear(num_classes, fail)


def killed(*, num_classes: int, **options: Any) -> nn.Module:
    return Linear(num_classes, lambda: os.kill(os.getpid(), signal.SIGKILL))


def hangs(*, num_classes: int, **options: Any) -> nn.Module:
    return Linear(num_classes, lambda: threading.Event().wait())


def hangs_on_rank_1(*, num_classes: int, **options: Any) -> nn.Module:
    """In training, so that the others wait for it in their next collective."""

    def hang() -> None:
        if dist.is_initialized() and dist.get_rank() == 1:
            threading.Event().wait()

    return Linear(num_classes, hang)


def hungry(*, num_classes: int, **options: Any) -> nn.Module:
    """Keeps 16 MiB more each time round, up to 8 GiB."""
    kept: list[Tensor] = []
    return Linear(num_classes, lambda: [kept.append(torch.ones(2**22)) for _ in range(512)])


def affinity(*, num_classes: int, **options: Any) -> nn.Module:
    """Goes not wrong, but says where it computes."""
    return Linear(num_classes, lambda: print("computes on", sorted(os.sched_getaffinity(0))))


def reads(*, num_classes: int, **options: Any) -> nn.Module:
    """Decides by a value, which a tensor without contents does not have."""
    model = Linear(num_classes, lambda: model.linear.bias.sum().item() > 0)
    return model


def diverges(*, num_classes: int, **options: Any) -> nn.Module:
    model = Linear(num_classes, lambda: None)
    nn.init.constant_(model.linear.weight, float("nan"))
    return model


def profiles_itself(*, num_classes: int, **options: Any) -> nn.Module:
    """From its third forward on, which is the one whose memory is measured."""
    calls: list[None] = []

    def profile() -> None:
        calls.append(None)
        if len(calls) > 2:
            with torch.profiler.profile():
                torch.ones(1)

    return Linear(num_classes, profile)


def refuses_dispatch_modes(*, num_classes: int, **options: Any) -> nn.Module:
    def refuse() -> None:
        if _len_torch_dispatch_stack():
            raise NotImplementedError("planted: not under a dispatch mode")

    return Linear(num_classes, refuse)


def decides_by_values(*, num_classes: int, **options: Any) -> nn.Module:
    class Decides(Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if x.sum() > 0 else -x)

    return Decides(num_classes, lambda: None)


MEAN = torch.full((1,), 0.5)


def centred(*, num_classes: int, **options: Any) -> nn.Module:
    """A model that runs, with a constant of its module's."""

    class Centred(Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x - MEAN)

    return Centred(num_classes, lambda: None)


class Wavering(nn.Module):
    """Gives another value at each call, of a recompute too."""

    def __init__(self, net: nn.Module, wavers: bool) -> None:
        super().__init__()
        self.net, self.wavers, self.calls = net, wavers, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.wavers
        return self.net(x) + 0.1 * self.calls


def wavers_on_rank_1(*, num_classes: int, activations: str, precision: Precision, **options: Any) -> nn.Module:
    wavers = os.environ.get("RANK") == "1"
    couplings = [AdditiveCoupling(nn.Conv2d(4, 4, 1), Wavering(nn.Conv2d(4, 4, 1), wavers)) for _ in range(2)]
    sequence = ReversibleSequence(couplings, activations=activations, precision=precision)
    return nn.Sequential(nn.Conv2d(3, 8, 1), sequence, nn.Flatten(), nn.Linear(8 * 32 * 32, num_classes))

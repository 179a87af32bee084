"""Blocks as users write them, with `forward` and `inverse`, and the faults that can be planted in one."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

CHANNELS = 4
BLOCKS = 4
FAULTY = 2


def residual(dropout: float = 0.0) -> nn.Sequential:
    convolution = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
    return nn.Sequential(nn.BatchNorm2d(CHANNELS), nn.ReLU(), convolution, nn.Dropout(dropout))


class Additive(nn.Module):
    """y1 = x1 + f(x2), y2 = x2 + g(y1); `fault` is what one edit could make of it."""

    fault = ""

    def __init__(self) -> None:
        super().__init__()
        self.f = residual()
        self.g = residual()

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        if self.fault == "other order":
            y2 = x2 + self.g(x1)
            return x1 + self.f(y2), y2
        y1 = x1 + self.f(x2)
        return y1, x2 + self.g(y1)

    def inverse(self, y1: Tensor, y2: Tensor) -> tuple[Tensor, Tensor]:
        if self.fault in ("other order", "order of the inverse"):
            x1 = y1 - self.f(y2)
            return x1, y2 - self.g(x1)
        if self.fault == "eval in the inverse":
            self.g.eval()
        out = self.g(y1)
        self.g.train()
        x2 = (y2.bfloat16() - out.bfloat16()).to(y2.dtype) if self.fault == "bf16 in the inverse" else y2 - out
        x1 = y1 - self.f(x2)
        if self.fault == "epsilon of the inverse":
            x1 = y1 - self.f[1:](nn.functional.batch_norm(x2, None, None, training=True, eps=1e-3))
        return (x1 * 1.001 if self.fault == "scale" else x1), x2


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Additive() for _ in range(BLOCKS)))


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x1, x2 = (torch.randn(2, CHANNELS, 6, 6, generator=generator) for _ in range(2))
    return x1, x2


def planted(fault: str) -> Callable[[nn.Sequential], None]:
    def plant(net: nn.Sequential) -> None:
        setattr(net[FAULTY], "fault", fault)  # noqa: B010 - an attribute of a module, to a type checker a tensor

    return plant


def with_other_epsilon(net: nn.Sequential) -> None:
    net[FAULTY].f[0].eps = 1e-3  # pyright: ignore[reportIndexIssue, reportAttributeAccessIssue]


def with_f_and_g_exchanged(net: nn.Sequential) -> None:
    block = net[FAULTY]
    block.f, block.g = block.g, block.f


def with_dropout(net: nn.Sequential) -> None:
    net[FAULTY].f[3].p = 0.3  # pyright: ignore[reportIndexIssue, reportAttributeAccessIssue]


def with_other_weights(net: nn.Sequential) -> None:
    nn.init.normal_(net.get_submodule(f"{FAULTY}.g.2").get_parameter("weight"))


def in_eval_mode(net: nn.Sequential) -> None:
    net[FAULTY].eval()

"""Tensors without contents (torch's fake tensors): a step on them takes no memory of its tensors and little time."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

Loss = Callable[[Tensor, Tensor], Tensor]
Batch = tuple[Tensor, Tensor]


@contextlib.contextmanager
def fake_tensors() -> Iterator[None]:
    """What is made inside has a shape, a dtype and no contents.

    A compiled model runs as it is written, since its kernels would show nothing of what it computes, and torch's random
    state is left as it was. A module that is imported inside keeps fake constants for good: import it before.
    """
    as_eager = torch.compiler.set_stance("force_eager")
    with torch.random.fork_rng(devices=[]), FakeTensorMode(allow_non_fake_inputs=True), as_eager:
        yield


def blank_batch(image_shape: tuple[int, int, int, int]) -> Batch:
    """Images (samples, channels, height, width) in fp32 and labels (samples,) in int64, all zero."""
    return torch.zeros(image_shape), torch.zeros(image_shape[0], dtype=torch.long)


def forward_loss(model: nn.Module, loss: Loss, batch: Batch, autocast: torch.dtype | None) -> Tensor:
    """Autocast is around the model only, as the engine's."""
    x, labels = batch
    with contextlib.nullcontext() if autocast is None else torch.autocast(x.device.type, dtype=autocast):
        out = model(x)
    return loss(out, labels)


def first_line(error: BaseException) -> str:
    """Its class and what it says, of which the rest is often a stack."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"

"""Channels last (NHWC in memory), in which a GPU's convolutions are fastest: kept through every block, and back."""

import copy

import pytest
import torch
from torch import Tensor, nn

from revnet_core import Precision, create_model

# Widths are a few channels, but where a family's blocks want more.
NETWORKS = {
    "revnet26": [4, 6, 8],
    "revnet_bottleneck38": [8, 8, 8],
    "gomez_revnet26": [4, 6, 8],
    "gomez_revnet_bottleneck38": [8, 8, 8],
    "revnet_affine26": [4, 6, 8],
    "irevnet20": None,
}


def network(name: str, precision: Precision) -> nn.Module:
    torch.manual_seed(0)
    channels = NETWORKS[name]
    options = {} if channels is None else {"channels": channels}
    return create_model(name, num_classes=10, precision=precision, **options)


def layouts(model: nn.Module) -> list[bool]:
    """Gets, of each input of a convolution or norm whose layout is not open, whether it is channels last."""
    found: list[bool] = []

    def note(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        x = args[0]
        if x.shape[1] > 1 and x.shape[2] > 1:
            # A half of a tensor that is channels last is so as well, though not dense.
            found.append(x.stride(1) == 1)

    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d)):
            module.register_forward_hook(note)
    return found


# An affine coupling has no exact reconstruction.
CASES = [
    (name, kind) for name in NETWORKS for kind in ("fp32", "exact") if (name, kind) != ("revnet_affine26", "exact")
]


@pytest.mark.parametrize(("name", "reconstruction"), CASES)
def test_the_layout_is_kept_in_the_forward_and_in_the_recompute(name: str, reconstruction: str) -> None:
    model = network(name, Precision(reconstruction=reconstruction)).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    found = layouts(model)
    out = model(torch.randn(2, 3, 32, 32).to(memory_format=torch.channels_last))
    forward = len(found)
    out.square().mean().backward()
    assert len(found) > forward
    assert all(found)


def test_a_layout_that_is_lost_is_noticed() -> None:
    model = network("revnet26", Precision()).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    found = layouts(model)
    model(torch.randn(2, 3, 32, 32))
    assert not all(found)


@pytest.mark.parametrize("name", ["revnet26", "gomez_revnet26"])
def test_gradients_are_those_of_the_other_layout(name: str) -> None:
    model = network(name, Precision(reconstruction="fp64")).double()
    twin = copy.deepcopy(model).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    for one, given in ((model, x), (twin, x.to(memory_format=torch.channels_last))):
        one(given).square().mean().backward()
    for own, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(other.grad, own.grad, rtol=1e-9, atol=1e-12)

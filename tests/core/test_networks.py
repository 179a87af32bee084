"""The networks are the published ones, and train alike whatever becomes of their activations."""

import pytest
import torch
from torch import nn

from revnet_core import (
    DepthError,
    Precision,
    ReversibleSequence,
    ShapeError,
    UnknownModelError,
    UnsupportedError,
    check_depth,
    create_model,
    list_models,
)
from revnet_core.networks.base import Network
from tests.core.nets import FP64, assert_same, training_step


def network(name: str, activations: str | None = None, precision: Precision | None = None) -> Network:
    torch.manual_seed(1)
    precision = precision or (FP64 if name.startswith("revnet") else Precision())
    return create_model(name, num_classes=10, activations=activations, precision=precision)


@pytest.mark.parametrize("name", ["resnet14", "revnet14"])
def test_widths_are_as_given(name: str) -> None:
    wide = create_model(name, num_classes=10, channels=(8, 20, 12))
    assert wide.state_dict()["stem.0.weight"].shape[0] == 8
    assert wide(torch.randn(2, 3, 8, 8)).shape == (2, 10)


@pytest.mark.parametrize(
    ("name", "channels", "message"),
    [
        ("revnet14", (8, 9, 12), r"channels\[1\] = 9, and the width of a revnet is even.*Write 8 or 10"),
        ("revnet14", (0, 8, 12), r"channels\[0\] = 0"),
        ("revnet14", (8, 12), "revnet has 3 stages"),
        ("resnet14", (0, 8, 12), "at least 1"),
    ],
)
def test_widths_that_cannot_be_are_refused(name: str, channels: tuple[int, ...], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        create_model(name, num_classes=10, channels=channels)


def test_a_resnet_may_have_odd_widths() -> None:
    assert create_model("resnet14", num_classes=10, channels=(7, 9, 11))(torch.randn(2, 3, 8, 8)).shape == (2, 10)


def tiny_images(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()


@pytest.mark.parametrize(
    ("name", "parameters", "blocks", "reversible_blocks"),
    [
        ("resnet32", 466906, 15, 0),
        ("resnet110", 1730714, 54, 0),
        ("revnet38", 573994, 9, 7),
        ("revnet110", 1854890, 27, 25),
    ],
)
def test_sizes_are_the_published_ones(name: str, parameters: int, blocks: int, reversible_blocks: int) -> None:
    with torch.device("meta"):
        model = create_model(name, num_classes=10)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert (model.blocks, model.reversible_blocks) == (blocks, reversible_blocks)
    assert reversible_blocks == sum(len(m.couplings) for m in model.modules() if isinstance(m, ReversibleSequence))


@pytest.mark.parametrize("name", ["resnet14", "revnet14", "revnet26"])
def test_activations_agree(name: str) -> None:
    modes = ("checkpointed",) if name.startswith("resnet") else ("checkpointed", "reconstructed")
    expected = training_step(network(name, "stored").double(), tiny_images())
    assert expected.buffers
    for activations in modes:
        assert_same(training_step(network(name, activations).double(), tiny_images()), expected)


def test_exact_agrees_bit_for_bit() -> None:
    exact = Precision(compute="bf16", reconstruction="exact")
    stored, rebuilt = (
        training_step(network("revnet26", mode, exact), tiny_images(torch.float32))
        for mode in ("stored", "reconstructed")
    )
    assert_same(rebuilt, stored, bits=True)


@pytest.mark.parametrize(("name", "activations"), [("revnet14", "reconstructed"), ("resnet14", "stored")])
def test_default_activations(name: str, activations: str) -> None:
    assert network(name).activations == activations


@pytest.mark.parametrize("name", ["resnet", "revnet"])
def test_a_family_and_its_depth_may_be_given_apart(name: str) -> None:
    apart, together = create_model(name, depth=14, num_classes=10), create_model(f"{name}14", num_classes=10)
    assert apart.state_dict().keys() == together.state_dict().keys()
    assert name in list_models()


@pytest.mark.parametrize("name", ["resnet14", "revnet14"])
def test_logits_and_channels(name: str) -> None:
    model = create_model(name, num_classes=7, in_channels=1)
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 7)


@pytest.mark.parametrize(
    ("name", "depth", "message"),
    [
        ("revnet", 40, r"depth = 40; revnet has depths 12n\+2\. The nearest two are 38 and 50\."),
        ("resnet", 40, r"depth = 40; resnet has depths 6n\+2\. The nearest two are 38 and 44\."),
        ("revnet", 2, r"The nearest two are 14 and 26\."),
        ("revnet", -5, r"The nearest two are 14 and 26\."),
    ],
)
def test_a_depth_that_the_family_does_not_have(name: str, depth: int, message: str) -> None:
    with pytest.raises(DepthError, match=message):
        check_depth(name, depth)
    with pytest.raises(DepthError, match=message):
        create_model(name, depth=depth, num_classes=10)


def test_a_family_without_a_depth() -> None:
    with pytest.raises(DepthError, match=r"revnet needs a depth of the form 12n\+2, e\.g\. revnet74"):
        create_model("revnet", num_classes=10)


@pytest.mark.parametrize("name", ["revnte", "revnte38"])
def test_an_unknown_model_names_the_near_misses(name: str) -> None:
    with pytest.raises(UnknownModelError, match=r"unknown model 'revnte'\. Did you mean revnet.*Known: resnet, revnet"):
        create_model(name, num_classes=10)


def test_an_unknown_model_that_resembles_nothing() -> None:
    with pytest.raises(UnknownModelError, match=r"unknown model 'xyzzy'\. Known: resnet, revnet"):
        create_model("xyzzy", depth=14, num_classes=10)


def test_a_resnet_cannot_be_rebuilt() -> None:
    with pytest.raises(UnsupportedError, match=r"resnet has no activations = 'reconstructed'.*use revnet"):
        network("resnet14", "reconstructed")


@pytest.mark.parametrize("reconstruction", ["exact", "bf16"])
def test_a_resnet_carries_no_streams(reconstruction: str) -> None:
    with pytest.raises(UnsupportedError, match=f"reconstruction = '{reconstruction}' means nothing"):
        network("resnet14", precision=Precision(reconstruction=reconstruction))


def test_unknown_activations_of_a_network() -> None:
    with pytest.raises(
        UnsupportedError, match="revnet has no activations = 'offloaded'; it has stored, checkpointed, reconstructed"
    ):
        network("revnet14", "offloaded")


def test_no_convolution_has_a_bias() -> None:
    convolutions = [m for m in network("revnet26").modules() if isinstance(m, nn.Conv2d)]
    assert convolutions
    assert all(convolution.bias is None for convolution in convolutions)

"""What a family can be asked for: names, depths, units, widths, activations; and what it says of the rest."""

import pytest
import torch

from revnet_core import (
    DepthError,
    Precision,
    ShapeError,
    UnknownModelError,
    UnsupportedError,
    check_channels,
    check_depth,
    create_model,
    list_models,
)

IMAGES_NCHW = (2, 3, 8, 8)
FIRST_DEPTHS = {
    "resnet": 8,
    "revnet": 14,
    "resnet_bottleneck": 11,
    "revnet_bottleneck": 20,
    "resnet_imagenet": 50,
    "revnet_imagenet": 56,
}
ALONE = {"irevnet": 20, "revnet_affine": 14}


def test_the_families_are_two_variants_of_six_and_two_alone() -> None:
    assert list_models() == [*FIRST_DEPTHS, *(f"gomez_{name}" for name in FIRST_DEPTHS), *ALONE]


@pytest.mark.parametrize("name", list_models())
def test_a_family_and_its_depth_may_be_given_apart(name: str) -> None:
    depth = (FIRST_DEPTHS | ALONE)[name.removeprefix("gomez_")]
    with torch.device("meta"):
        apart, together = (
            create_model(name, depth=depth, num_classes=10),
            create_model(f"{name}{depth}", num_classes=10),
        )
    assert apart.state_dict().keys() == together.state_dict().keys()
    assert apart.activations == ("reconstructed" if "revnet" in name else "stored")


@pytest.mark.parametrize(
    ("name", "depth", "message"),
    [
        ("revnet", 40, r"depth = 40; revnet has depths 12n\+2\. The nearest two are 38 and 50\."),
        ("resnet", 40, r"depth = 40; resnet has depths 6n\+2\. The nearest two are 38 and 44\."),
        ("revnet", 2, r"The nearest two are 14 and 26\."),
        ("revnet", -5, r"The nearest two are 14 and 26\."),
        ("resnet_bottleneck", 112, r"resnet_bottleneck has depths 9n\+2\. The nearest two are 110 and 119\."),
        (
            "gomez_revnet_bottleneck",
            112,
            r"gomez_revnet_bottleneck has depths 18n\+2\. The nearest two are 110 and 128",
        ),
        ("revnet_affine", 40, r"depth = 40; revnet_affine has depths 12n\+2\. The nearest two are 38 and 50\."),
        ("irevnet", 163, r"irevnet has depths 18n\+2\. The nearest two are 146 and 164\."),
        ("resnet_imagenet", 38, r"resnet_imagenet has depths 50 or 101\. The nearest two are 50 and 101\."),
        ("gomez_revnet_imagenet", 110, r"depths 56 or 104\. The nearest two are 56 and 104\."),
    ],
)
def test_a_depth_that_the_family_does_not_have(name: str, depth: int, message: str) -> None:
    with pytest.raises(DepthError, match=message):
        check_depth(name, depth)
    with pytest.raises(DepthError, match=message):
        create_model(name, depth=depth, num_classes=10)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("revnet", r"revnet needs a depth of the form 12n\+2, e\.g\. revnet110, or units"),
        ("gomez_revnet_imagenet", r"needs a depth of 56 or 104, e\.g\. gomez_revnet_imagenet56, or units"),
    ],
)
def test_a_family_without_a_depth(name: str, message: str) -> None:
    with pytest.raises(DepthError, match=message):
        create_model(name, num_classes=10)


@pytest.mark.parametrize("name", list_models())
def test_units_may_be_given_instead_of_a_depth(name: str) -> None:
    channels = (8, 32) if name == "irevnet" else (4, 8)
    model = create_model(name, num_classes=10, units=(1, 3), channels=channels, precision=Precision())
    assert model.blocks == 4
    # memcnn's couplings keep the shape; gomez's are all units but the first of a stage; i-RevNet's are all.
    first_of_stages = {"revnet": 1, "revnet_affine": 1, "irevnet": 2}.get(name, 0)
    assert model.reversible_blocks == (2 + first_of_stages if "revnet" in name else 0)
    assert model(torch.randn(IMAGES_NCHW)).shape == (2, 10)


def test_units_of_a_published_network_make_that_network() -> None:
    with torch.device("meta"):
        units = create_model("gomez_revnet_imagenet", units=(2, 2, 11, 2), num_classes=10).state_dict()
        depth = create_model("gomez_revnet_imagenet104", num_classes=10).state_dict()
    assert {name: t.shape for name, t in units.items()} == {name: t.shape for name, t in depth.items()}


@pytest.mark.parametrize(
    ("units", "message"),
    [
        ((), r"units = \[\]; revnet needs at least one stage"),
        ((2, 0, 2), r"units = \[2, 0, 2\]; units\[1\] = 0"),
    ],
)
def test_units_that_cannot_be_are_refused(units: tuple[int, ...], message: str) -> None:
    with pytest.raises(DepthError, match=message):
        create_model("revnet", num_classes=10, units=units)


@pytest.mark.parametrize(("name", "depth"), [("revnet", 38), ("revnet38", None)])
def test_units_and_a_depth_are_not_given_together(name: str, depth: int | None) -> None:
    with pytest.raises(DepthError, match=r"both depth = 38 and units = \[3, 3, 3\]"):
        create_model(name, depth=depth, num_classes=10, units=(3, 3, 3))


def test_units_of_another_number_of_stages_need_widths() -> None:
    with pytest.raises(ShapeError, match=r"units = \[2, 2\]; the published widths of revnet.*Give channels: 2 widths"):
        create_model("revnet", num_classes=10, units=(2, 2))


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("resnet14", (7, 9, 5)),
        ("revnet14", (8, 20, 12)),
        ("resnet_bottleneck11", (3, 2, 1)),
        ("gomez_revnet_bottleneck20", (8, 6, 2)),
        ("gomez_resnet14", (7, 9, 9)),
        ("gomez_revnet14", (6, 8, 14)),
    ],
)
def test_widths_are_as_given(name: str, channels: tuple[int, ...]) -> None:
    model = create_model(name, num_classes=10, channels=channels)
    assert model.state_dict()["stem.0.weight"].shape[0] == channels[0]
    assert model.state_dict()["tail.4.weight"].shape[1] == channels[-1] * (4 if "bottleneck" in name else 1)
    assert model(torch.randn(IMAGES_NCHW)).shape == (2, 10)


@pytest.mark.parametrize(
    ("name", "channels", "message"),
    [
        ("revnet", (8, 9, 12), r"channels\[1\] = 9, and the width of a revnet is even.*Write 8 or 10"),
        ("revnet_affine", (8, 9, 12), r"channels\[1\] = 9, and the width of a revnet_affine is even.*Write 8 or 10"),
        ("revnet", (0, 8, 12), r"channels\[0\] = 0.*Write 2\."),
        ("revnet", (8, 12), "revnet has 3 stages"),
        ("resnet", (0, 8, 12), "at least 1"),
        ("gomez_revnet_imagenet", (8, 8, 8), "gomez_revnet_imagenet has 4 stages. Give 4 widths"),
        ("revnet_bottleneck", (8, 8, 7), r"channels\[2\] = 7, and the width of a revnet_bottleneck is even"),
        ("gomez_resnet", (8, 9, 5), r"channels\[2\] = 5.*cannot get narrower.*Write 9 or more, or use resnet\."),
        ("gomez_revnet", (8, 6, 12), r"channels\[1\] = 6.*cannot get narrower.*Write 8 or more, or use revnet\."),
    ],
)
def test_widths_that_cannot_be_are_refused(name: str, channels: tuple[int, ...], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        check_channels(name, channels)
    with pytest.raises(ShapeError, match=message):
        create_model(name, depth=(FIRST_DEPTHS | ALONE)[name.removeprefix("gomez_")], num_classes=10, channels=channels)


@pytest.mark.parametrize("name", ["revnte", "revnte38"])
def test_an_unknown_model_names_the_near_misses(name: str) -> None:
    with pytest.raises(UnknownModelError, match=r"unknown model 'revnte'\. Did you mean revnet.*Known: resnet, revnet"):
        create_model(name, num_classes=10)


def test_an_unknown_variant_names_the_near_misses() -> None:
    with pytest.raises(UnknownModelError, match=r"Did you mean gomez_revnet_bottleneck"):
        create_model("gomes_revnet_bottleneck164", num_classes=10)


def test_an_unknown_model_that_resembles_nothing() -> None:
    with pytest.raises(UnknownModelError, match=r"unknown model 'xyzzy'\. Known: resnet, revnet"):
        create_model("xyzzy", depth=14, num_classes=10)


@pytest.mark.parametrize(("name", "remedy"), [("resnet", "revnet"), ("gomez_resnet_imagenet", "gomez_revnet_imagenet")])
def test_a_resnet_cannot_be_rebuilt(name: str, remedy: str) -> None:
    depth = FIRST_DEPTHS[name.removeprefix("gomez_")]
    with pytest.raises(UnsupportedError, match=rf"{name} has no activations = 'reconstructed'.*use {remedy}\."):
        create_model(name, depth=depth, num_classes=10, activations="reconstructed")


@pytest.mark.parametrize("reconstruction", ["exact", "bf16"])
def test_a_resnet_carries_no_streams(reconstruction: str) -> None:
    with pytest.raises(
        UnsupportedError, match=f"reconstruction = '{reconstruction}' means nothing.*or use gomez_revnet"
    ):
        create_model("gomez_resnet14", num_classes=10, precision=Precision(reconstruction=reconstruction))


def test_unknown_activations_of_a_network() -> None:
    with pytest.raises(UnsupportedError, match="activations = 'rebuilt'; allowed: stored, checkpointed, offloaded"):
        create_model("revnet14", num_classes=10, activations="rebuilt")

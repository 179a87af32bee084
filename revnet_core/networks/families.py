"""The families of networks as data, and what each of them can be asked for.

A family's networks differ in depth. Its name is [gomez_]{resnet|revnet}[_bottleneck|_imagenet]: without a prefix the
layers are memcnn's, with `gomez_` those of the paper's code; without a suffix the units are basic ones for CIFAR.
`irevnet` and `revnet_affine` stand beside them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import NamedTuple

from revnet_core.errors import DepthError, ShapeError, UnknownModelError, UnsupportedError
from revnet_core.networks.base import Network
from revnet_core.networks.gomez import GomezRevNet
from revnet_core.networks.irevnet import IRevNet
from revnet_core.networks.layers import PoolAndPad, Stem, ZerosInFront, cifar_stem, imagenet_stem
from revnet_core.networks.resnet import ResNet
from revnet_core.networks.revnet import AffineRevNet, RevNet
from revnet_core.networks.units import (
    GOMEZ_BASIC,
    GOMEZ_BOTTLENECK,
    IREVNET_BOTTLENECK,
    MEMCNN_BASIC,
    MEMCNN_BOTTLENECK,
    UnitDesign,
)


class Variant(NamedTuple):
    prefix: str
    basic: UnitDesign
    bottleneck: UnitDesign
    resnet: Callable[..., Network]
    revnet: Callable[..., Network]
    source: str

    def family(self, size: "Size") -> "Family":
        design = self.bottleneck if size.bottleneck else self.basic
        return Family(size, design, self.resnet if size.streams == 1 else self.revnet, self.source)


class Size(NamedTuple):
    """What a family is but for its layers; both variants of one have it in common.

    channels  width of each stage of the published networks, by their depth
    units     of each stage, by depth; None where every depth exists that gives all stages the same number
    growth    a stage's width by the one's before; None where every stage may choose its own
    """

    name: str
    summary: str
    streams: int
    bottleneck: bool
    stem: Stem
    channels: Mapping[int, tuple[int, ...]]
    units: Mapping[int, tuple[int, ...]] | None = None
    growth: int | None = None


VARIANTS = (
    Variant("", MEMCNN_BASIC, MEMCNN_BOTTLENECK, ResNet, RevNet, "memcnn"),
    Variant("gomez_", GOMEZ_BASIC, GOMEZ_BOTTLENECK, ResNet, GomezRevNet, "Gomez et al."),
)
SIZES = (
    Size("resnet", "ResNet for CIFAR", streams=1, bottleneck=False, stem=cifar_stem, channels={110: (16, 32, 64)}),
    Size(
        "revnet",
        "RevNet for CIFAR",
        streams=2,
        bottleneck=False,
        stem=cifar_stem,
        channels={38: (32, 64, 112), 110: (32, 64, 128)},
    ),
    Size(
        "resnet_bottleneck",
        "ResNet of bottlenecks for CIFAR",
        streams=1,
        bottleneck=True,
        stem=cifar_stem,
        channels={164: (16, 32, 64)},
    ),
    Size(
        "revnet_bottleneck",
        "RevNet of bottlenecks for CIFAR",
        streams=2,
        bottleneck=True,
        stem=cifar_stem,
        channels={164: (32, 64, 128)},
    ),
    Size(
        "resnet_imagenet",
        "ResNet-50 and 101 for ImageNet",
        streams=1,
        bottleneck=True,
        stem=imagenet_stem,
        channels={50: (64, 128, 256, 512)},
        units={50: (3, 4, 6, 3), 101: (3, 4, 23, 3)},
    ),
    Size(
        "revnet_imagenet",
        "RevNet-56 and 104 for ImageNet",
        streams=2,
        bottleneck=True,
        stem=imagenet_stem,
        channels={56: (128, 256, 512, 832)},
        units={56: (2, 2, 3, 2), 104: (2, 2, 11, 2)},
    ),
)

IREVNET = Size(
    "irevnet",
    "i-RevNet for CIFAR",
    streams=2,
    bottleneck=True,
    stem=ZerosInFront,
    channels={164: (32, 128, 512)},
    growth=4,
)
# No network of it is published; the widths are those of the additive one.
REVNET_AFFINE = next(size for size in SIZES if size.name == "revnet")._replace(
    name="revnet_affine", summary="RevNet with affine couplings for CIFAR"
)


@dataclass(frozen=True)
class Family:
    """scales: whether its couplings multiply, so that it can be asked for a log_scale_gain."""

    size: Size
    design: UnitDesign
    build: Callable[..., Network]
    source: str
    scales: bool = False

    @property
    def summary(self) -> str:
        return f"{self.size.summary}, layers of {self.source}"

    @property
    def activations(self) -> tuple[str, ...]:
        return ("stored", "checkpointed", "offloaded") + (("reconstructed", "budgeted") if self.reversible else ())

    @property
    def reversible(self) -> bool:
        return self.size.streams > 1

    @property
    def width_step(self) -> int:
        """Every stage's width is a multiple of it."""
        return self.size.streams * self.design.narrowing

    @property
    def stages(self) -> int:
        return len(next(iter(self.size.channels.values())))

    @property
    def unit_depth(self) -> int:
        """Convolutions, one after another, of a unit; stem and tail make two more."""
        return self.size.streams * len(self.design.kernels)

    @property
    def depth_step(self) -> int:
        """From one depth to the next: a unit more in each stage, or in any one where the depths are named."""
        return self.unit_depth * (1 if self.size.units else self.stages)

    @property
    def depths(self) -> str:
        return " or ".join(map(str, self.size.units)) if self.size.units else f"{self.depth_step}n+2"

    def units(self, depth: int) -> tuple[int, ...] | None:
        """Of each stage; None where there is no such depth."""
        if self.size.units:
            return self.size.units.get(depth)
        count, rest = divmod(depth - 2, self.depth_step)
        return (count,) * self.stages if count > 0 and not rest else None

    def nearest_depths(self, depth: int) -> tuple[int, int]:
        if self.size.units:
            first, second = sorted(sorted(self.size.units, key=lambda named: abs(named - depth))[:2])
            return first, second
        below = max(1, (depth - 2) // self.depth_step) * self.depth_step + 2
        return below, below + self.depth_step

    def channels(self, units: Sequence[int]) -> tuple[int, ...]:
        """The widths of the published network that is just as deep, or else of the next deeper one or the deepest."""
        depth = sum(units) * self.unit_depth + 2
        published = self.size.channels
        return published[min((d for d in published if d >= depth), default=max(published))]


FAMILIES = {variant.prefix + size.name: variant.family(size) for variant in VARIANTS for size in SIZES} | {
    IREVNET.name: Family(IREVNET, IREVNET_BOTTLENECK, IRevNet, "Jacobsen et al."),
    REVNET_AFFINE.name: Family(REVNET_AFFINE, MEMCNN_BASIC, AffineRevNet, "memcnn", scales=True),
}


def list_models() -> list[str]:
    """The names of the families."""
    return list(FAMILIES)


def find_family(name: str) -> Family:
    """Raises UnknownModelError, which names the near misses."""
    if name not in FAMILIES:
        near = get_close_matches(name, FAMILIES)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise UnknownModelError(f"unknown model {name!r}.{hint} Known: {', '.join(FAMILIES)}.")
    return FAMILIES[name]


def units_of(name: str, depth: int) -> tuple[int, ...]:
    """The units of each stage. Raises DepthError, which names the nearest two depths of the family."""
    family = find_family(name)
    units = family.units(depth)
    if units is None:
        nearest = family.nearest_depths(depth)
        raise DepthError(
            f"depth = {depth}; {name} has depths {family.depths}. The nearest two are {nearest[0]} and {nearest[1]}."
        )
    return units


def check_depth(name: str, depth: int) -> None:
    """Raises DepthError, which names the nearest two depths of the family."""
    units_of(name, depth)


def check_units(name: str, units: Sequence[int]) -> None:
    """Raises DepthError for a stage without a unit, or no stage at all."""
    if not units:
        raise DepthError(f"units = []; {name} needs at least one stage. Give its number of units.")
    for stage, count in enumerate(units):
        if count < 1:
            raise DepthError(f"units = {list(units)}; units[{stage}] = {count}, and a stage has at least 1.")


def check_channels(name: str, channels: Sequence[int], stages: int | None = None) -> None:
    """Raises ShapeError for widths that the family cannot have.

    stages: how many the network has, by default those of the published ones.
    """
    family = find_family(name)
    step, growth = family.width_step, family.size.growth
    one = f"an {name}" if name[0] in "aeiou" else f"a {name}"
    stages = stages or family.stages
    if len(channels) != stages:
        raise ShapeError(f"channels = {list(channels)}; {name} has {stages} stages. Give {stages} widths.")
    for stage, width in enumerate(channels):
        where = f"channels = {list(channels)}; channels[{stage}] = {width}"
        if width < step or width % step:
            near = max(step, width // step * step), max(step, (width // step + 1) * step)
            raise ShapeError(
                f"{where}, and the width of {one} is {_widths(family)}. "
                f"Write {near[0] if near[0] == near[1] else f'{near[0]} or {near[1]}'}."
            )
        if growth and width != channels[0] * growth**stage:
            fitting = [channels[0] * growth**index for index in range(stages)]
            raise ShapeError(
                f"{where}, and each stage of {one} is {growth} times as wide as the one before: between them its "
                f"pixels become channels. Write {fitting}, or another first width."
            )
        if family.design.new_shortcut is PoolAndPad and width < channels[max(0, stage - 1)]:
            raise ShapeError(
                f"{where}, and a {name} cannot get narrower: its shortcuts have no parameters and only add channels. "
                f"Write {channels[stage - 1]} or more, or use {name.removeprefix('gomez_')}."
            )


def check_log_scale_gain(name: str, gain: float) -> None:
    """Raises UnsupportedError for a family whose couplings only add, and for a gain that is negative or not finite."""
    if not find_family(name).scales:
        scaling = " or ".join(other for other, family in FAMILIES.items() if family.scales)
        raise UnsupportedError(
            f"log_scale_gain = {gain}; {name} has no log-scales, since none of its couplings multiplies. Leave it out, "
            f"or use {scaling}."
        )
    if not 0 <= gain < math.inf:
        raise UnsupportedError(
            f"log_scale_gain = {gain}; a factor of the initial log-scales is finite and at least 0. Give 0.1, say."
        )


def _widths(family: Family) -> str:
    if family.design.narrowing > 1:
        return f"a multiple of {family.width_step}, since its functions narrow a stream, half of it, to a quarter"
    return "even, since half of the channels is a stream" if family.size.streams > 1 else "at least 1"

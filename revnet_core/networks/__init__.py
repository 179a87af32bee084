"""The networks, by name. A family (`revnet`) comes in many depths; a network is one of them (`revnet110`)."""

import re
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import NamedTuple

from revnet_core.errors import DepthError, ShapeError, UnknownModelError, UnsupportedError
from revnet_core.networks.base import Network
from revnet_core.networks.resnet import ResNet
from revnet_core.networks.revnet import RevNet
from revnet_core.precision import Precision

STAGES = 3


class Family(NamedTuple):
    """A family: its depths are depth_step * n + 2 for n >= 1."""

    build: Callable[..., Network]
    depth_step: int
    activations: tuple[str, ...]
    streams: int
    summary: str


FAMILIES = {
    "resnet": Family(
        ResNet, 6, ("stored", "checkpointed"), 1, "pre-activation ResNet for CIFAR, depth 6n+2 (He et al. 2016)"
    ),
    "revnet": Family(
        RevNet, 12, ("stored", "checkpointed", "reconstructed"), 2, "RevNet for CIFAR, depth 12n+2 (Gomez et al. 2017)"
    ),
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


def check_depth(name: str, depth: int) -> None:
    """Raises DepthError, which names the nearest two depths of the family."""
    step = find_family(name).depth_step
    if depth < step + 2 or (depth - 2) % step:
        below = (depth - 2) // step * step + 2
        nearest = (below, below + step) if below >= step + 2 else (step + 2, 2 * step + 2)
        raise DepthError(
            f"depth = {depth}; {name} has depths {step}n+2. The nearest two are {nearest[0]} and {nearest[1]}."
        )


def check_channels(name: str, channels: Sequence[int]) -> None:
    """Raises ShapeError for widths that the family cannot have."""
    streams = find_family(name).streams
    if len(channels) != STAGES:
        raise ShapeError(f"channels = {list(channels)}; {name} has {STAGES} stages. Give {STAGES} widths.")
    for stage, width in enumerate(channels):
        if width < streams or width % streams:
            even = "even, since half of the channels is a stream" if streams > 1 else "at least 1"
            near = max(streams, width - 1), max(streams, width + 1)
            raise ShapeError(
                f"channels = {list(channels)}; channels[{stage}] = {width}, and the width of a {name} is {even}. "
                f"Write {near[0] if near[0] == near[1] else f'{near[0]} or {near[1]}'}."
            )


def create_model(
    name: str,
    *,
    num_classes: int,
    in_channels: int = 3,
    depth: int | None = None,
    channels: Sequence[int] | None = None,
    activations: str | None = None,
    precision: Precision = Precision(),  # noqa: B008 - immutable
) -> Network:
    """Build a network: N,in_channels,H,W images to N,num_classes logits.

    name         a family with `depth` given, or a family and its depth in one ("revnet110").
    channels     the width of each stage, even for a revnet; by default the published one.
    activations  one of the family's; by default "reconstructed" where the family has it, else "stored".

    Raises UnknownModelError, DepthError, ShapeError (of channels), or UnsupportedError for activations that the
    family does not have.
    """
    if depth is None and (match := re.fullmatch(r"([a-z]+)(\d+)", name)):
        name, depth = match[1], int(match[2])
    family = find_family(name)
    if depth is None:
        raise DepthError(
            f"{name} needs a depth of the form {family.depth_step}n+2, e.g. {name}{6 * family.depth_step + 2}."
        )
    check_depth(name, depth)
    if channels is not None:
        check_channels(name, channels)
    if activations is None:
        activations = "reconstructed" if "reconstructed" in family.activations else "stored"
    if activations not in family.activations:
        raise UnsupportedError(
            f"{name} has no activations = {activations!r}; it has {', '.join(family.activations)}."
            + (" Its blocks are not reversible; use revnet." if activations == "reconstructed" else "")
        )
    units = (depth - 2) // family.depth_step
    return family.build(
        units,
        channels=channels,
        num_classes=num_classes,
        in_channels=in_channels,
        activations=activations,
        precision=precision,
    )

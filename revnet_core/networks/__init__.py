"""The networks, by name. A family (`revnet`) comes in many depths; a network is one of them (`revnet110`)."""

import re
from collections.abc import Sequence

from revnet_core.budget import Budgeted
from revnet_core.errors import DepthError, ShapeError, UnsupportedError
from revnet_core.networks.base import Layout, Network
from revnet_core.networks.families import FAMILIES as FAMILIES
from revnet_core.networks.families import check_channels as check_channels
from revnet_core.networks.families import check_depth as check_depth
from revnet_core.networks.families import check_log_scale_gain as check_log_scale_gain
from revnet_core.networks.families import check_units, find_family, units_of
from revnet_core.networks.families import list_models as list_models
from revnet_core.precision import Precision
from revnet_core.sequence import ReversibleSequence, check_activations


def create_model(
    name: str,
    *,
    num_classes: int,
    in_channels: int = 3,
    depth: int | None = None,
    units: Sequence[int] | None = None,
    channels: Sequence[int] | None = None,
    log_scale_gain: float | None = None,
    activations: str | Budgeted | None = None,
    precision: Precision = Precision(),  # noqa: B008 - immutable
    overlapped: bool = False,
) -> Network:
    """Build a network: N,in_channels,H,W images to N,num_classes logits.

    name         a family with `depth` or `units` given, or a family and its depth in one ("revnet110"). A family is
                 [gomez_]{resnet|revnet}[_bottleneck|_imagenet], irevnet or revnet_affine. Without a prefix the layers
                 are those of memcnn, with `gomez_` those of the RevNet paper's code. CIFAR's depths are 6n+2 (resnet),
                 12n+2 (revnet, revnet_affine), 9n+2 and 18n+2 (their bottlenecks), 18n+2 (irevnet); ImageNet's 50 and
                 101 (resnet), 56 and 104 (revnet).
    units        residual units of each stage, instead of a depth; each stage but the first halves height and width.
    channels     the width of each stage, in which its 3x3 convolutions compute; bottlenecks end four times as wide.
                 Even for a revnet, not decreasing for a `gomez_` family of basic units. Those of an irevnet are of both
                 streams together, to which the image is padded: a multiple of 8, then each 4 times the one before. By
                 default the published one.
    log_scale_gain
                 of revnet_affine only: what the weights that make its log-scales begin with, as a factor of PyTorch's
                 initial ones; by default 0.1. At 1 a deep network cannot be inverted.
    activations  one of the family's, or Budgeted(bytes); by default "reconstructed" where the family has it, else
                 "stored".
    overlapped   of the network's sequences; see `ReversibleSequence`.

    Raises UnknownModelError, DepthError (also of units), ShapeError (of channels), or UnsupportedError for activations,
    a reconstruction precision or log-scales that the family does not have.
    """
    if depth is None and (match := re.fullmatch(r"([a-z_]+)(\d+)", name)):
        name, depth = match[1], int(match[2])
    family = find_family(name)
    if depth is not None and units is not None:
        raise DepthError(f"{name} got both depth = {depth} and units = {list(units)}. Give one of them.")
    if units is not None:
        check_units(name, units)
    elif depth is not None:
        units = units_of(name, depth)
    else:
        form = family.depths if family.size.units else f"the form {family.depths}"
        raise DepthError(f"{name} needs a depth of {form}, e.g. {name}{max(family.size.channels)}, or units.")
    if channels is not None:
        check_channels(name, channels, len(units))
    elif len(units) != family.stages:
        raise ShapeError(
            f"units = {list(units)}; the published widths of {name} are those of {family.stages} stages. "
            f"Give channels: {len(units)} widths."
        )
    if log_scale_gain is not None:
        check_log_scale_gain(name, log_scale_gain)
    if activations is None:
        activations = "reconstructed" if family.reversible else "stored"
    reversible = name.replace("resnet", "revnet")
    kind = "budgeted" if isinstance(activations, Budgeted) else check_activations(activations)
    if kind not in family.activations:
        raise UnsupportedError(
            f"{name} has no activations = {kind!r}; it has {', '.join(family.activations)}. Its blocks are not "
            f"reversible; use {reversible}."
        )
    if not family.reversible and precision.reconstruction != "fp32":
        raise UnsupportedError(
            f"{name} carries no residual streams, so reconstruction = {precision.reconstruction!r} means nothing to "
            f"it. Leave reconstruction at fp32, or use {reversible}."
        )
    network = family.build(
        Layout(family.design, family.size.stem, units, channels or family.channels(units)),
        num_classes=num_classes,
        in_channels=in_channels,
        activations=activations,
        precision=precision,
        **({} if log_scale_gain is None else {"log_scale_gain": log_scale_gain}),
    )
    for module in network.modules():
        if isinstance(module, ReversibleSequence):
            module.overlapped = overlapped
    return network

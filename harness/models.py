"""From a trial to its model: a family of revnet_core, or a user's own `package.module:factory`."""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from harness.data import CHANNELS, num_classes
from harness.errors import ModelError
from harness.trials import TrialSpec
from revnet_core import (
    Budgeted,
    DepthError,
    Precision,
    ShapeError,
    UnknownModelError,
    UnsupportedError,
    check_channels,
    check_depth,
    check_log_scale_gain,
    create_model,
)


def check_model(
    name: str, depth: int | None, channels: Sequence[int] | None = None, log_scale_gain: float | None = None
) -> None:
    """Raises ModelError for an unknown family or factory, or a depth, widths or log-scales that the family cannot have.

    A factory is imported, which runs its module's code.
    """
    if ":" in name:
        _import_factory(name)
        return
    try:
        if depth is None:
            raise ModelError(f"{name} needs a depth. Give one in `fixed` or as an axis in `grid`.")
        check_depth(name, depth)
        if channels is not None:
            check_channels(name, channels)
        if log_scale_gain is not None:
            check_log_scale_gain(name, log_scale_gain)
    except (DepthError, ShapeError, UnknownModelError, UnsupportedError) as error:
        raise ModelError(str(error)) from None


def build_model(
    name: str,
    *,
    depth: int | None,
    channels: Sequence[int] | None,
    log_scale_gain: float | None,
    num_classes: int,
    in_channels: int,
    activations: str | Budgeted,
    precision: Precision,
) -> nn.Module:
    """The model of a trial; a factory is called with the same keywords (`depth`, `channels` and
    `log_scale_gain` only where the study gives them)."""
    options: dict[str, Any] = {
        "num_classes": num_classes,
        "in_channels": in_channels,
        "activations": activations,
        "precision": precision,
    }
    given = {"depth": depth, "channels": channels, "log_scale_gain": log_scale_gain}
    options |= {key: value for key, value in given.items() if value is not None}
    if ":" not in name:
        return create_model(name, **options)
    model = _import_factory(name)(**options)
    if not isinstance(model, nn.Module):
        raise ModelError(f"{name} returned a {type(model).__name__}; a factory returns a torch.nn.Module.")
    return model


def create(spec: TrialSpec) -> nn.Module:
    """The trial's model on the host: the same weights for the same seed, whatever becomes of the activations."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        model = build_model(
            spec.model,
            depth=spec.depth,
            channels=spec.channels,
            log_scale_gain=spec.log_scale_gain,
            num_classes=num_classes(spec.data.name),
            in_channels=CHANNELS,
            activations=spec.activations if spec.budget_bytes is None else Budgeted(spec.budget_bytes),
            precision=Precision(spec.compute, spec.reconstruction),
        )
    return model.train()


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy in at least fp32, whatever the network computed in."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return nn.functional.cross_entropy(wide, labels)


def _import_factory(name: str) -> Callable[..., Any]:
    module_name, _, attribute = name.partition(":")
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ModelError(
            f"cannot import the model {name!r} ({error}). Write package.module:factory and make it importable: "
            "install it or set PYTHONPATH."
        ) from None
    if not callable(factory):
        raise ModelError(f"{name} is a {type(factory).__name__}; a factory is a function that returns a module.")
    return factory

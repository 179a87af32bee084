"""This package's own networks put nothing in a capture's way, and a watch changes nothing that they compute."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from revnet_core import Budgeted, Precision, ReversibleSequence, create_model, find_obstacles, list_models
from revnet_core.obstacles import ObstacleWatch
from tests.core.nets import KINDS, assert_same, input_of, sequence_of, side_of, training_step, twin_of

SMALLEST_DEPTHS = {
    "resnet": 8,
    "revnet": 14,
    "resnet_bottleneck": 11,
    "revnet_bottleneck": 20,
    "revnet_affine": 14,
    "irevnet": 20,
}
# A unit a stage, since their smallest depths are of 50 layers.
UNITS = {"resnet_imagenet": (1, 1, 1, 1), "revnet_imagenet": (1, 1, 1, 1)}
FP32, BF16, EXACT = Precision(), Precision(reconstruction="bf16"), Precision(reconstruction="exact")
AUTOCAST = Precision(compute="bf16")
# Bytes are a budget for all sequences of a network, which store a part of them.
MODES: list[tuple[str | int, Precision]] = [
    *((activations, FP32) for activations in ("stored", "checkpointed", "reconstructed", 20_000)),
    *((activations, EXACT) for activations in ("checkpointed", "reconstructed", 20_000)),
    ("reconstructed", BF16),
    ("reconstructed", AUTOCAST),
]


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 0.1, momentum=0.9, weight_decay=1e-4)


def modes_of(family: str) -> list[tuple[str | int, Precision]]:
    if "revnet" not in family:
        return [("stored", FP32), ("stored", AUTOCAST)]
    return [mode for mode in MODES if mode[1] is not EXACT or family != "revnet_affine"]


@pytest.mark.parametrize("family", list_models())
def test_every_family_can_be_captured(family: str) -> None:
    name = family.removeprefix("gomez_")
    size = 32 if name in UNITS else 8
    batch = torch.empty(2, 3, size, size, device="meta"), torch.empty(2, dtype=torch.long, device="meta")
    for activations, precision in modes_of(family):
        kept = Budgeted(activations) if isinstance(activations, int) else activations
        shape: dict[str, Any] = {"units": UNITS[name]} if name in UNITS else {"depth": SMALLEST_DEPTHS[name]}
        with torch.device("meta"):
            model = create_model(family, num_classes=10, activations=kept, precision=precision, **shape)
        assert find_obstacles(model, nn.functional.cross_entropy, batch, sgd) == [], (activations, precision)


@pytest.mark.parametrize("activations", ["stored", "checkpointed", "reconstructed", 500])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("conditioned", "counting")])
def test_every_kind_of_net_can_be_captured(kind: str, activations: str | int) -> None:
    model = sequence_of(kind, 3, precision=FP32)
    for sequence in (m for m in model.modules() if isinstance(m, ReversibleSequence)):
        sequence.precision = FP32
        sequence.activations = Budgeted(activations) if isinstance(activations, int) else activations
    x = input_of(kind, torch.float32)
    assert find_obstacles(model, nn.functional.mse_loss, (x, x.detach())) == []


@pytest.mark.parametrize("activations", ["stored", "checkpointed", "reconstructed"])
def test_a_net_that_replaces_a_buffer_cannot(activations: str) -> None:
    model = twin_of(sequence_of("counting", 2, precision=FP32), activations)
    x = input_of("counting", torch.float32)
    obstacles = find_obstacles(model, nn.functional.mse_loss, (x, x.detach()))
    assert [(o.operation, o.module) for o in obstacles] == [
        ("self.mean = ...", f"couplings.{index}.{net} (Counting)") for index in (0, 1) for net in ("f", "g")
    ]


@pytest.mark.parametrize("activations", ["checkpointed", "reconstructed"])
@pytest.mark.parametrize("precision", [FP32, EXACT], ids=["fp32", "exact"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_watch_changes_nothing_that_is_computed(kind: str, precision: Precision, activations: str) -> None:
    """With the CPU in the place of the device."""
    model = sequence_of(kind, 2, precision=precision, activations=activations).float()
    for sequence in (m for m in model.modules() if isinstance(m, ReversibleSequence)):
        sequence.precision = precision
    watched = copy.deepcopy(model)
    side: dict[str, torch.Tensor | float] = {
        k: v.detach().float() if isinstance(v, torch.Tensor) else v for k, v in side_of(kind).items()
    }
    x = input_of(kind, torch.float32)
    with ObstacleWatch(watched, "cpu") as watch:
        outcome = training_step(watched, x, side)
    assert_same(outcome, training_step(model, input_of(kind, torch.float32), side), bits=True)
    assert {o.operation for o in watch.obstacles if o.module} == ({"self.mean = ..."} if kind == "counting" else set())
    # Done by the step of these tests, not by the model.
    assert {o.operation for o in watch.obstacles if not o.module} <= {"torch.manual_seed", "torch.get_rng_state"}

"""The networks are the published ones, and train alike whatever becomes of their activations.

Legend: N batch, C channels, H height, W width.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from revnet_core import (
    AdditiveCoupling,
    AffineCoupling,
    Precision,
    ReversibleSequence,
    UnsupportedError,
    audit_gradients,
    create_model,
    list_models,
)
from revnet_core.coupling import Coupling
from revnet_core.networks.base import Network
from revnet_core.networks.gomez import TwoStreamUnit
from revnet_core.networks.layers import PoolAndPad
from revnet_core.networks.units import GOMEZ_BASIC, UnitShape
from tests.core.nets import FP64, assert_same, training_step

EXACT = Precision(compute="bf16", reconstruction="exact")
# Has neither a convolution for a stem nor shortcuts; see test_irevnet.
WITH_A_STEM = [name for name in list_models() if name != "irevnet"]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """On tensors this small threads only wait for each other, on a busy machine for seconds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def narrow(name: str, activations: str | None = None, precision: Precision = FP64) -> Network:
    """A network of the family with few units, one stage of them alone in its stage, and few channels."""
    torch.manual_seed(1)
    precision = precision if "revnet" in name else Precision()
    return create_model(
        name,
        num_classes=10,
        units=(2, 1, 3),
        channels=(8, 32, 128) if name == "irevnet" else (4, 6, 10),
        activations=activations,
        precision=precision,
    )


def images_for(name: str, dtype: torch.dtype = torch.float64) -> Tensor:
    size = 32 if "imagenet" in name else 8
    draws = torch.Generator().manual_seed(2)
    return torch.randn(2, 3, size, size, generator=draws).to(dtype).requires_grad_()


@pytest.mark.parametrize(
    ("name", "num_classes", "parameters", "blocks", "reversible_blocks"),
    [
        ("resnet32", 10, 466906, 15, 0),
        ("resnet110", 10, 1730714, 54, 0),
        ("resnet_bottleneck164", 10, 1704154, 54, 0),
        ("revnet38", 10, 573994, 9, 7),
        ("revnet110", 10, 1854890, 27, 25),
        ("revnet_bottleneck164", 10, 1983786, 27, 24),
        ("gomez_resnet32", 10, 464154, 15, 0),
        ("gomez_resnet110", 10, 1727962, 54, 0),
        ("gomez_resnet_bottleneck164", 10, 1703258, 54, 0),
        ("gomez_revnet38", 10, 464890, 9, 6),
        ("gomez_revnet110", 10, 1729194, 27, 24),
        ("gomez_revnet_bottleneck164", 10, 1748778, 27, 24),
        ("gomez_revnet_imagenet104", 1000, 45428072, 17, 13),
        ("irevnet164", 10, 6392810, 27, 27),
        # No published network, but as many blocks as the additive one.
        ("revnet_affine110", 10, 2633642, 27, 25),
        # As many as torchvision's ResNet-50 and 101, whose layers are these in another order.
        ("resnet_imagenet50", 1000, 25557032, 16, 0),
        ("resnet_imagenet101", 1000, 44549160, 33, 0),
    ],
)
def test_sizes_are_the_published_ones(
    name: str, num_classes: int, parameters: int, blocks: int, reversible_blocks: int
) -> None:
    with torch.device("meta"):
        model = create_model(name, num_classes=num_classes)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert (model.blocks, model.reversible_blocks) == (blocks, reversible_blocks)
    sequences = [m for m in model.modules() if isinstance(m, ReversibleSequence)]
    assert reversible_blocks == sum(isinstance(block, Coupling) for s in sequences for block in s.couplings)


def test_affine_couplings_have_twice_the_last_channels() -> None:
    """But for that, and the smaller log-scales, it is RevNet."""
    affine, additive = (narrow(name, precision=Precision()) for name in ("revnet_affine", "revnet"))
    couplings = [m for m in affine.modules() if isinstance(m, AffineCoupling)]
    assert affine.reversible_blocks == additive.reversible_blocks == len(couplings) == 4
    assert not any(isinstance(m, AdditiveCoupling) for m in affine.modules())
    extra = 0
    for coupling in couplings:
        for net in (coupling.f, coupling.g):
            last = list(net.parameters())[-1]
            log_scale, shift = last.chunk(2)
            bound = last[0].numel() ** -0.5
            assert bound / 2 < shift.abs().max() <= bound
            assert bound / 20 < log_scale.abs().max() <= bound / 10
            extra += shift.numel()
    assert affine.state_dict().keys() == additive.state_dict().keys()
    sizes = [sum(p.numel() for p in model.parameters()) for model in (affine, additive)]
    assert sizes[0] - sizes[1] == extra


def test_affine_couplings_cannot_be_exact() -> None:
    with pytest.raises(UnsupportedError, match=r"couplings\[0\]: AffineCoupling multiplies.*fp32.*or AdditiveCoupling"):
        narrow("revnet_affine", precision=EXACT)


def count_by_hand(name: str, units: tuple[int, ...], channels: tuple[int, ...], num_classes: int) -> int:
    """Parameters of an ImageNet family, from its description."""
    gomez, streams = name.startswith("gomez"), 2 if "revnet" in name else 1

    def bottleneck(before: int, inside: int, *, activate: bool = True) -> int:
        norms = 2 * before * activate + 4 * inside
        return norms + before * inside + 9 * inside * inside + 4 * inside * inside

    count, before = 3 * 49 * channels[0] + 2 * channels[0], channels[0]
    for stage, (units_here, width) in enumerate(zip(units, channels, strict=True)):
        after = 4 * width
        if gomez:
            halves = before // streams, width // streams, after // streams
            count += bottleneck(halves[0], halves[1], activate=stage > 0) + streams * halves[0] * halves[2]
            count += bottleneck(halves[2], halves[1]) if streams == 2 else 0
        else:
            count += bottleneck(before, width, activate=stage > 0) + before * after + 2 * after
        count += (units_here - 1) * streams * bottleneck(after // streams, width // streams)
        before = after
    return count + 2 * before + before * num_classes + num_classes


@pytest.mark.parametrize(
    ("size", "units"),
    [
        ("resnet_imagenet50", (3, 4, 6, 3)),
        ("resnet_imagenet101", (3, 4, 23, 3)),
        ("revnet_imagenet56", (2, 2, 3, 2)),
        ("revnet_imagenet104", (2, 2, 11, 2)),
    ],
)
@pytest.mark.parametrize("variant", ["", "gomez_"])
def test_imagenet_networks_train(variant: str, size: str, units: tuple[int, ...]) -> None:
    channels = (4, 6, 8, 6)
    model = create_model(variant + size, num_classes=7, channels=channels)
    outcome = training_step(model, images_for(size, torch.float32))
    assert outcome.y.shape == (2, 7)
    assert sum(gradient.numel() for name, gradient in outcome.gradients.items() if name != "x") == count_by_hand(
        variant + size, units, channels, 7
    )


@pytest.mark.parametrize("name", list_models())
def test_activations_agree(name: str) -> None:
    expected = training_step(narrow(name, "stored").double(), images_for(name))
    assert expected.buffers
    for activations in ("checkpointed", "reconstructed") if "revnet" in name else ("checkpointed",):
        assert_same(training_step(narrow(name, activations).double(), images_for(name)), expected)


@pytest.mark.parametrize("name", [name for name in list_models() if "revnet" in name and "affine" not in name])
def test_exact_agrees_bit_for_bit(name: str) -> None:
    stored, *others = (
        training_step(narrow(name, mode, EXACT), images_for(name, torch.float32))
        for mode in ("stored", "checkpointed", "reconstructed")
    )
    for other in others:
        assert_same(other, stored, bits=True)


@pytest.mark.parametrize("name", ["gomez_revnet", "gomez_revnet_bottleneck"])
@pytest.mark.parametrize("reconstruction", ["fp64", "bf16"])
def test_streams_may_have_another_dtype_than_the_nets(name: str, reconstruction: str) -> None:
    model = narrow(name, precision=Precision(reconstruction=reconstruction))
    seen: list[torch.dtype] = []
    for module in model.modules_in_order():
        module.register_forward_hook(lambda module, args, out: seen.extend(stream.dtype for stream in out))
    outcome = training_step(model, images_for(name, torch.float32))
    assert set(seen) == {getattr(torch, {"fp64": "float64", "bf16": "bfloat16"}[reconstruction])}
    assert outcome.y.dtype == torch.float32
    assert all(gradient.isfinite().all() for gradient in outcome.gradients.values())


@pytest.mark.parametrize("name", ["gomez_revnet", "revnet_bottleneck", "revnet_affine"])
def test_gradients_are_audited(name: str) -> None:
    labels = torch.tensor([0, 1])
    batch = images_for(name, torch.float32).detach(), labels
    parity = audit_gradients(narrow(name, precision=Precision()), nn.functional.cross_entropy, batch)
    assert parity.rel < 1e-4
    assert parity.reference_rel is not None
    assert parity.reference_rel < 1e-3


def count_forwards(module: nn.Module, model: nn.Module, x: Tensor) -> int:
    """Of `module`, in a training step of `model`."""
    calls = []
    hook = module.register_forward_hook(lambda *_: calls.append(1))
    training_step(model, x)
    hook.remove()
    return len(calls)


@pytest.mark.parametrize(
    ("name", "activations", "forwards"),
    [
        ("gomez_revnet", "stored", 1),
        ("gomez_revnet", "checkpointed", 2),
        ("gomez_revnet", "reconstructed", 2),
        ("revnet", "stored", 1),
        ("revnet", "checkpointed", 2),
        ("revnet", "reconstructed", 1),
    ],
)
def test_what_becomes_of_a_unit_that_changes_the_shape(name: str, activations: str, forwards: int) -> None:
    """memcnn's is stored where the couplings are rebuilt; the paper's is recomputed from its stored input."""
    model = narrow(name, activations, Precision())
    strided = [
        m for m in model.modules() if isinstance(m, nn.Conv2d) and m.stride == (2, 2) and m.kernel_size == (3, 3)
    ]
    assert len(strided) == 2
    assert [count_forwards(m, model, images_for(name, torch.float32)) for m in strided] == [forwards, forwards]


def test_first_unit_of_two_streams() -> None:
    torch.manual_seed(1)
    unit = TwoStreamUnit(GOMEZ_BASIC, UnitShape(2, 6, 6, stride=2)).eval()
    x1, x2 = torch.randn(2, 2, 2, 8, 8)
    y1, y2 = unit(x1, x2)
    assert not list(unit.shortcut1.parameters())
    torch.testing.assert_close(y1 - unit.f(x2), unit.shortcut1(x1))
    torch.testing.assert_close(y2 - unit.g(y1), unit.shortcut2(x2))


@pytest.mark.parametrize(("size", "pooled_size"), [(4, 2), (5, 3)])
def test_shortcut_without_parameters(size: int, pooled_size: int) -> None:
    x_NCHW = torch.arange(size * size, dtype=torch.float32).view(1, 1, size, size).repeat(1, 2, 1, 1)
    y_NCHW = PoolAndPad(2, 5, 2)(x_NCHW)
    assert y_NCHW.shape == (1, 5, pooled_size, pooled_size)
    assert y_NCHW.abs().sum((0, 2, 3)).bool().tolist() == [False, True, True, False, False]
    assert y_NCHW[0, 1, 0, 0] == (0 + 1 + size + size + 1) / 4
    assert y_NCHW[0, 1, -1, -1] == x_NCHW[0, 0, 2 * pooled_size - 2 :, 2 * pooled_size - 2 :].mean()


@pytest.mark.parametrize("name", WITH_A_STEM)
def test_stems(name: str) -> None:
    imagenet = "imagenet" in name
    stem = narrow(name).stem
    assert stem(torch.randn(2, 3, 32, 32)).shape[2:] == ((8, 8) if imagenet else (32, 32))
    assert stem.get_parameter("0.weight").shape[2:] == ((7, 7) if imagenet else (3, 3))


@pytest.mark.parametrize("name", WITH_A_STEM)
def test_layers_of_the_variants(name: str) -> None:
    modules = list(narrow(name).modules())
    convolutions = [m for m in modules if isinstance(m, nn.Conv2d)]
    assert all(m.bias is None for m in convolutions)
    assert {(m.eps, m.momentum) for m in modules if isinstance(m, nn.BatchNorm2d)} == {
        (1e-3, 0.01) if name.startswith("gomez") else (1e-5, 0.1)
    }
    # The 1x1 convolutions of stride 2: shortcuts, and in the paper's bottlenecks the first of three.
    pointwise = [m for m in convolutions if m.stride == (2, 2) and m.kernel_size == (1, 1)]
    streams = 2 if "revnet" in name else 1
    basic, bottleneck = (0, 2 * (streams + 1)) if name.startswith("gomez") else (2, 2)
    assert len(pointwise) == (basic if name.removeprefix("gomez_") in ("resnet", "revnet") else bottleneck)

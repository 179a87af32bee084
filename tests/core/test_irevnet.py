"""i-RevNet is reversible from the padded image to the tail, and stores what lies behind its chain alone.

Legend: N batch, C channels, H height, W width.
"""

import pytest
import torch
from torch import Tensor, nn

from revnet_core import (
    AdditiveCoupling,
    Budgeted,
    Precision,
    ReversibleSequence,
    ShapeError,
    SpaceToDepth,
    audit_gradients,
    audit_model_inverse,
    check_channels,
    create_model,
)
from revnet_core.networks.base import Network
from tests.core.nets import FP64, assert_same, training_step
from tests.core.test_budget import forward_and_count

CHANNELS = (8, 32, 128)
EXACT = Precision(compute="bf16", reconstruction="exact")
EVERY_MODE = ["checkpointed", "offloaded", "reconstructed", Budgeted(0), Budgeted(30_000), Budgeted(10**9)]


def small(activations: str | Budgeted, precision: Precision = FP64, units: tuple[int, ...] = (1, 2, 3)) -> Network:
    torch.manual_seed(1)
    channels = CHANNELS[: len(units)]
    return create_model(
        "irevnet", num_classes=10, units=units, channels=channels, activations=activations, precision=precision
    )


def images(dtype: torch.dtype = torch.float64, size: int = 8) -> Tensor:
    draws = torch.Generator().manual_seed(2)
    return torch.randn(2, 3, size, size, generator=draws).to(dtype).requires_grad_()


def chain_of(model: Network) -> ReversibleSequence:
    (chain,) = model.modules_in_order()
    assert isinstance(chain, ReversibleSequence)
    return chain


@pytest.mark.parametrize("activations", EVERY_MODE, ids=str)
def test_gradients_are_those_of_stored(activations: str | Budgeted) -> None:
    stored, model = small("stored").double(), small(activations).double()
    assert list(model.buffers())
    for _ in range(2):  # the first step under a budget measures
        for each in (stored, model):
            each.zero_grad()
        assert_same(training_step(model, images()), training_step(stored, images()))


@pytest.mark.parametrize("activations", EVERY_MODE, ids=str)
def test_exact_gradients_are_bit_equal(activations: str | Budgeted) -> None:
    stored, model = small("stored", EXACT), small(activations, EXACT)
    for _ in range(2):
        for each in (stored, model):
            each.zero_grad()
        expected, actual = (training_step(each, images(torch.float32)) for each in (stored, model))
        assert_same(actual, expected, bits=True)


def test_a_budget_in_between_stores_some_blocks() -> None:
    saved_bytes = []
    for budget_bytes in (0, 30_000, 10**9):
        model = small(Budgeted(budget_bytes)).double()
        model(images())
        saved_bytes.append(forward_and_count(model, images()).saved_bytes)
    assert saved_bytes[0] < saved_bytes[1] < saved_bytes[2]


def count_by_hand(units: tuple[int, ...], channels: tuple[int, ...], num_classes: int) -> int:
    """Parameters, from the description: the only function without a first batch norm is the network's first."""
    count = -2 * (channels[0] // 2)
    for couplings, width in zip(units, channels, strict=True):
        stream, inside = width // 2, width // 8
        convolutions = 9 * (stream * inside + inside * inside + inside * stream)
        count += 2 * couplings * (convolutions + 2 * (stream + inside + inside))
    return count + 2 * channels[-1] + (channels[-1] + 1) * num_classes


@pytest.mark.parametrize(
    ("units", "channels", "num_classes"),
    [((9, 9, 9), (32, 128, 512), 10), ((1, 2, 3), CHANNELS, 7), ((2, 1), (24, 96), 100)],
)
def test_parameters_are_those_of_the_description(
    units: tuple[int, ...], channels: tuple[int, ...], num_classes: int
) -> None:
    with torch.device("meta"):
        model = create_model("irevnet", units=units, channels=channels, num_classes=num_classes)
    assert sum(p.numel() for p in model.parameters()) == count_by_hand(units, channels, num_classes)
    assert all(m.kernel_size == (3, 3) and m.stride == (1, 1) for m in model.modules() if isinstance(m, nn.Conv2d))


def test_published_layout() -> None:
    """18 functions a stage in couplings of two, streams of 16, 64 and 256 channels."""
    model = create_model("irevnet164", num_classes=10)
    with torch.no_grad():
        y = chain_of(model)(model.stem(torch.zeros(1, 3, 32, 32)))
    blocks = list(chain_of(model).couplings)
    assert [i for i, block in enumerate(blocks) if isinstance(block, SpaceToDepth)] == [9, 19]
    widths = [block.f.get_parameter("2.weight").shape[1] for block in blocks[1:] if isinstance(block, AdditiveCoupling)]
    assert widths == [16] * 8 + [64] * 9 + [256] * 9
    assert y.shape == (1, 512, 8, 8)
    assert model.blocks == model.reversible_blocks == 27


def test_the_output_of_the_chain_gives_the_image_back() -> None:
    model = small("reconstructed").double()
    with torch.no_grad():
        model(images())  # running statistics other than the initial ones
        model.eval()
        padded_NCHW = model.stem(images())
        rebuilt = chain_of(model).inverse(chain_of(model)(padded_NCHW))
    assert padded_NCHW.shape == (2, CHANNELS[0], 8, 8)
    assert torch.equal(padded_NCHW[:, -3:], images())
    assert not padded_NCHW[:, :-3].any()
    torch.testing.assert_close(rebuilt, padded_NCHW, rtol=0, atol=1e-12)


def test_drift_is_audited_back_to_the_image() -> None:
    drifts = audit_model_inverse(small("reconstructed").double(), images().detach())
    # Six couplings, and the two SpaceToDepth between them.
    assert len(drifts) == 8
    assert all(drift.rel < 1e-12 for drift in drifts)


def zeros_behind(model: Network) -> Network:
    model.stem.register_forward_hook(lambda stem, args, x_NCHW: x_NCHW.flip(1))
    return model


def idle_parameters(model: Network) -> list[str]:
    gradients = training_step(model, images(torch.float32)).gradients
    return [name for name, gradient in gradients.items() if not gradient.any()]


def test_every_function_learns_from_the_first_step() -> None:
    assert idle_parameters(small("stored", Precision())) == []
    assert "stages.0.0.couplings.0.f.0.weight" in idle_parameters(zeros_behind(small("stored", Precision())))


def test_the_place_of_the_zeros_keeps_rounding_errors_small() -> None:
    batch = images(torch.float32).detach(), torch.tensor([0, 1])
    parity, behind = (
        audit_gradients(model, nn.functional.cross_entropy, batch)
        for model in (small("reconstructed", Precision()), zeros_behind(small("reconstructed", Precision())))
    )
    assert parity.rel < 1e-2
    assert behind.rel > 1


def saved_bytes(units: tuple[int, ...], activations: str) -> int:
    return forward_and_count(small(activations, Precision(), units), images(torch.float32, 16)).saved_bytes


@pytest.mark.parametrize("units", [(1, 1, 1), (1, 2, 3), (5, 1, 4)])
def test_only_the_output_of_the_chain_and_the_tail_are_stored(units: tuple[int, ...]) -> None:
    model = small("reconstructed", Precision(), units)
    with torch.no_grad():
        joined = chain_of(model)(model.stem(images(torch.float32, 16)))
    # What the chain returns is also what the tail's batch norm saves.
    expected_bytes = joined.numel() * joined.element_size() + forward_and_count(model.tail, joined).saved_bytes
    assert saved_bytes(units, "reconstructed") == expected_bytes
    assert saved_bytes(units, "stored") > 2 * expected_bytes


def test_stored_bytes_do_not_depend_on_depth() -> None:
    depths = (1, 1, 1), (2, 2, 2), (3, 3, 3)
    reconstructed = {saved_bytes(units, "reconstructed") for units in depths}
    assert len(reconstructed) == 1
    stored = [saved_bytes(units, "stored") for units in depths]
    assert stored[2] - stored[1] == stored[1] - stored[0] > max(reconstructed)


def test_stored_bytes_hardly_depend_on_the_number_of_stages() -> None:
    """Every stage holds as many values; only the tail's statistics and features grow with its channels."""
    one, three = (saved_bytes(units, "reconstructed") for units in ((2,), (2, 2, 2)))
    features = CHANNELS[2] - CHANNELS[0]
    assert three - one == features * 4 * (2 + 2)  # mean and deviation, and what two images give the linear layer


@pytest.mark.parametrize(
    ("channels", "message"),
    [
        ((8, 16, 32), r"channels\[1\] = 16, and each stage of an irevnet is 4 times.*Write \[8, 32, 128\]"),
        ((8, 32, 64), r"channels\[2\] = 64, and each stage.*Write \[8, 32, 128\]"),
        ((12, 48, 192), r"channels\[0\] = 12, and the width of an irevnet is a multiple of 8.*Write 8 or 16"),
        ((0, 0, 0), r"channels\[0\] = 0.*Write 8\."),
        ((8, 32), "irevnet has 3 stages"),
    ],
)
def test_widths_that_cannot_be_are_refused(channels: tuple[int, ...], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        check_channels("irevnet", channels)
    with pytest.raises(ShapeError, match=message):
        create_model("irevnet20", num_classes=10, channels=channels)


def test_an_image_wider_than_the_first_stage() -> None:
    with pytest.raises(ShapeError, match=r"in_channels = 9, channels\[0\] = 8; the image has to fit"):
        create_model("irevnet20", num_classes=10, in_channels=9, channels=CHANNELS)
    model = create_model("irevnet20", num_classes=10, in_channels=8, channels=CHANNELS)
    assert model(torch.randn(2, 8, 8, 8)).shape == (2, 10)


def test_pixels_that_cannot_become_channels() -> None:
    with pytest.raises(ShapeError, match=r"couplings\[4\]: 3 x 3 pixels are no multiple of block_size = 2"):
        small("reconstructed")(images(size=6).float())

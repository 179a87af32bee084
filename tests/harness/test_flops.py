"""Operations of a step: by hand for single layers, by the blocks for what the backward computes again."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.checkpoint import set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode

from harness.measure.flops import NAMES, StepFlops, UncountedError, count_step, measure_flops, utilization
from harness.measure.peaks import peak_flops_per_s
from harness.models import loss_of
from harness.training import count_flops
from harness.trials import TrialSpec
from revnet_core import AdditiveCoupling, Budgeted, ReversibleSequence

# N batch, C channels, H height, W width
N, C, H, W = 2, 4, 6, 8
CLASSES, BLOCKS = 3, 5
SHAPE = (N, C, H, W)
CONV_3X3 = 2 * N * (C // 2) * (C // 2) * 9 * H * W
BLOCK_FORWARD = 2 * 2 * CONV_3X3  # F and G, of two convolutions each
LABELS = torch.zeros(N, dtype=torch.long, device="meta")


def residual() -> nn.Module:
    """Ends with a ReLU, whose result the backward needs: a checkpoint's recompute goes that far, but no further."""
    half = C // 2
    return nn.Sequential(nn.Conv2d(half, half, 3, padding=1), nn.ReLU(), nn.Conv2d(half, half, 3, padding=1), nn.ReLU())


def reversible(activations: str | Budgeted, net: Callable[[], nn.Module] = residual) -> nn.Module:
    couplings = [AdditiveCoupling(net(), net()) for _ in range(BLOCKS)]
    sequence = ReversibleSequence(couplings, activations=activations)
    # The stem's gradient is computed whatever becomes of the activations, so that of the sequence's input is, too.
    return nn.Sequential(nn.Conv2d(C, C, 1), sequence, nn.Flatten(), nn.Linear(C * H * W, CLASSES))


def measured(activations: str, *, budget_bytes: int = 0) -> dict[str, int]:
    def build(choice: str) -> nn.Module:
        return reversible(Budgeted(budget_bytes) if choice == "budgeted" else choice)

    metrics, unmeasured = measure_flops(build, activations, loss_of, SHAPE)
    assert not unmeasured
    return metrics


def summed(out: Tensor, _: Tensor) -> Tensor:
    return out.sum()


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize(
    ("layer", "shape", "forward"),
    [
        (nn.Linear(5, 7), (N, 5), 2 * N * 5 * 7),
        (nn.Conv2d(C, 6, 3, padding=1), SHAPE, 2 * N * C * 6 * 9 * H * W),
        (nn.Conv2d(C, 6, 3, stride=2, padding=1), SHAPE, 2 * N * C * 6 * 9 * (H // 2) * (W // 2)),
        (nn.Conv2d(C, C, 3, padding=1, groups=2), SHAPE, 2 * N * C * (C // 2) * 9 * H * W),
        (nn.ConvTranspose2d(C, 6, 2, stride=2), SHAPE, 2 * N * C * 6 * 4 * H * W),
        (nn.ConvTranspose2d(C, C, 2, stride=2, groups=2), SHAPE, 2 * N * C * (C // 2) * 4 * H * W),
    ],
    ids=["linear", "conv", "strided", "grouped", "transposed", "transposed grouped"],
)
def test_a_layer_by_its_formula(layer: nn.Module, shape: tuple[int, ...], forward: int, device: str) -> None:
    layer = layer.to_empty(device=device)
    x = torch.zeros(shape, device=device)
    # As many for the gradient by the weight, and again for that by the input where it is asked for.
    assert count_step(layer, summed, (x, x)) == StepFlops(forward, forward)
    assert count_step(layer, summed, (x.requires_grad_(), x)) == StepFlops(forward, 2 * forward)


def test_the_total_is_that_of_torch_s_own_counter() -> None:
    model, x = reversible("stored").to("meta"), torch.zeros(SHAPE, device="meta")
    with FlopCounterMode(display=False) as counter:
        loss_of(model(x), LABELS).backward()
    counted = count_step(model, loss_of, (x, LABELS))
    assert counted.forward + counted.backward == counter.get_total_flops()


def test_counting_leaves_no_hook_for_a_net_to_see() -> None:
    seen: list[bool] = []

    class Net(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            seen.append(bool(_has_any_global_hook()))
            return super().forward(input)

    net, x = Net(5, 7), torch.zeros(N, 5)
    count_step(net, summed, (x, x))
    with FlopCounterMode(display=False):
        net(x)
    assert seen == [False, True]  # the second: why torch's own counter is not used


@pytest.mark.parametrize("activations", ["stored", "offloaded"])
def test_what_is_kept_is_not_computed_again(activations: str) -> None:
    assert measured(activations)["flops_recompute"] == 0


@pytest.mark.parametrize("activations", ["reconstructed", "checkpointed"])
def test_the_recompute_is_one_forward_of_the_blocks(activations: str) -> None:
    assert measured(activations)["flops_recompute"] == BLOCKS * BLOCK_FORWARD


def test_a_checkpoint_stops_where_the_backward_needs_no_more() -> None:
    """Without a ReLU at its end, the last convolution of a coupling's G is not computed again."""

    def bare() -> nn.Module:
        return nn.Sequential(*list(residual())[:-1])  # pyright: ignore[reportArgumentType]

    def recompute() -> int:
        metrics, _ = measure_flops(lambda choice: reversible(choice, bare), "checkpointed", loss_of, SHAPE)
        return metrics["flops_recompute"]

    assert recompute() == BLOCKS * (BLOCK_FORWARD - CONV_3X3)
    with set_checkpoint_early_stop(False):
        assert recompute() == BLOCKS * BLOCK_FORWARD


def test_a_budget_s_recompute_is_that_of_the_blocks_that_do_not_fit() -> None:
    forwards = {block_count * BLOCK_FORWARD for block_count in range(1, BLOCKS)}
    plane_bytes = 4 * N * (C // 2) * H * W
    # A net keeps its input and the results of its convolutions and ReLUs.
    assert measured("budgeted", budget_bytes=2 * 2 * 5 * plane_bytes)["flops_recompute"] in forwards
    assert measured("budgeted", budget_bytes=0) == measured("reconstructed")
    assert measured("budgeted", budget_bytes=2**40) == measured("stored")


@pytest.mark.parametrize("activations", ["checkpointed", "offloaded", "reconstructed", "budgeted"])
def test_forward_and_gradients_are_those_of_stored(activations: str) -> None:
    stored, own = measured("stored"), measured(activations)
    for name in ("flops_forward", "flops_backward"):
        assert own[name] == stored[name] > 0


@pytest.mark.parametrize("compute", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize("reconstruction", ["fp32", "fp64", "exact"])
def test_precision_changes_no_count(compute: str, reconstruction: str, spec: TrialSpec) -> None:
    other = spec.model_copy(update={"compute": compute, "reconstruction": reconstruction})
    assert count_flops(other) == count_flops(spec)
    assert count_flops(spec)[0].keys() == set(NAMES)


def test_a_trial_s_count_grows_with_its_batch_and_with_nothing_else(spec: TrialSpec) -> None:
    once, _ = count_flops(spec)
    assert count_flops(spec.model_copy(update={"batch_size": 3 * spec.batch_size}))[0] == {
        name: 3 * flops for name, flops in once.items()
    }
    others = {"workers": 2, "zero_stage": 3, "seed": 5, "learning_rate": 0.5}
    assert count_flops(spec.model_copy(update=others))[0] == once


def test_what_a_budget_stores_depends_on_autocast(spec: TrialSpec) -> None:
    """In bf16 a block saves other bytes: smaller activations, and the weights as they were cast."""
    update = {"depth": 26, "activations": "budgeted", "budget_bytes": 2_500_000}
    wide, narrow = (count_flops(spec.model_copy(update=update | {"compute": name}))[0] for name in ("fp32", "bf16"))
    assert narrow["flops_recompute"] < wide["flops_recompute"]


def test_a_compiled_model_is_counted_as_if_it_were_not() -> None:
    def build(choice: str) -> Any:
        return torch.compile(reversible(choice))

    metrics, unmeasured = measure_flops(build, "reconstructed", loss_of, SHAPE)
    assert (metrics, unmeasured) == (measured("reconstructed"), {})


def test_counting_leaves_the_random_state_as_it_was() -> None:
    torch_state, python_state = torch.get_rng_state(), random.getstate()

    def build(choice: str) -> nn.Module:
        torch.manual_seed(5)
        return nn.Sequential(reversible(choice), nn.Dropout())

    assert measure_flops(build, "reconstructed", loss_of, SHAPE)[0]
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == python_state


class _Reading(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.flatten(1) / input.max().item())


class _Adding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(C))

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) + self.bias


@torch.library.custom_op("revnet_tests::product", mutates_args=())
def product(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight


@product.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


product.register_autograd(
    lambda ctx, d_out: (d_out @ ctx.saved_tensors[1].t(), ctx.saved_tensors[0].t() @ d_out),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


class _Special(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.flatten(1)) + product(input.flatten(1), self.weight.t())


def _refusing(choice: str) -> nn.Module:
    raise ValueError(f"no {choice}")


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda choice: _Reading(C * H * W, CLASSES), "does not run on tensors without contents: DataDependent"),
        (_refusing, "does not run on tensors without contents: ValueError: no stored"),
        (lambda choice: _Special(C * H * W, CLASSES), "torch.ops.revnet_tests.product has no FLOP formula"),
        (lambda choice: _Adding(), "no matrix product"),
    ],
    ids=["reads a value", "cannot be built", "an operator of its own", "no product"],
)
def test_what_cannot_be_counted_is_absent_and_says_why(build: Callable[[str], nn.Module], reason: str) -> None:
    metrics, unmeasured = measure_flops(build, "reconstructed", loss_of, SHAPE)
    assert metrics == {}
    assert unmeasured.keys() == set(NAMES)
    assert all(reason in text for text in unmeasured.values())


def test_a_product_of_torch_s_own_without_a_formula_is_refused() -> None:
    class InPlace(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).addmm_(input, self.weight.t())

    x = torch.zeros(N, 5)
    with pytest.raises(UncountedError, match=r"torch\.ops\.aten\.addmm_ has no FLOP formula"):
        count_step(InPlace(5, 7), summed, (x, x))


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_attention_by_its_two_products(device: str) -> None:
    heads, length, width = 3, 5, 8

    class Attention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x)

    x = torch.zeros(N, heads, length, width, device=device, requires_grad=True)
    counted = count_step(Attention(), summed, (x, x))
    assert counted.forward == 2 * (2 * N * heads * length * length * width)
    assert counted.backward >= 2 * counted.forward


def test_a_missing_count_of_the_recompute_leaves_mfu() -> None:
    known = {name: flops for name, flops in FLOPS.items() if name != "flops_recompute"}
    metrics, unmeasured = utilization(known, 1.0, "NVIDIA H200", "bf16")
    assert "mfu" in metrics
    assert "flops_recompute" in unmeasured["hfu"]


FLOPS = {"flops_forward": 100 * 10**12, "flops_backward": 200 * 10**12, "flops_recompute": 100 * 10**12}


def test_utilization_is_the_share_of_the_peak_with_and_without_the_recompute() -> None:
    metrics, unmeasured = utilization(FLOPS, 2.0, "NVIDIA A100-SXM4-80GB", "bf16")
    assert metrics["device_peak_flops_per_s"] == 312e12
    assert metrics["mfu"] == pytest.approx(150 / 312)
    assert metrics["hfu"] == pytest.approx(200 / 312)
    assert unmeasured == {}


@pytest.mark.parametrize(
    ("name", "compute"),
    [
        ("AMD EPYC", "fp32"),
        ("NVIDIA GeForce RTX 4090", "fp16"),
        ("Tesla V100-SXM2-16GB", "bf16"),  # has none
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16"),  # a seventh of one
        ("NVIDIA H100 NVL", "bf16"),
        ("NVIDIA H100", "bf16"),  # which of them?
        ("", "fp32"),
    ],
)
def test_a_peak_that_is_not_known_is_no_other_device_s(name: str, compute: str) -> None:
    assert peak_flops_per_s(name, compute) is None
    metrics, unmeasured = utilization(FLOPS, 2.0, name, compute)
    assert metrics == {}
    assert unmeasured == dict.fromkeys(
        ("device_peak_flops_per_s", "mfu", "hfu"), f"n/a: the peak of {name} at {compute} is not known"
    )


def test_a_peak_is_known_by_the_whole_name() -> None:
    assert peak_flops_per_s("NVIDIA L4", "bf16") == 121e12
    assert peak_flops_per_s("NVIDIA L40S", "bf16") == 362.05e12
    assert peak_flops_per_s("Tesla V100-SXM2-16GB", "fp16") == 125e12
    assert peak_flops_per_s("NVIDIA H100 80GB HBM3", "tf32") != peak_flops_per_s("NVIDIA H100 PCIe", "tf32")

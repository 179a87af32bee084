"""However backward is called, the gradients are those of stored activations; and nothing grows with depth."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from revnet_core import ACTIVATIONS, AdditiveCoupling, Precision
from tests.core.nets import (
    FP64,
    IMAGE_NCHW,
    assert_same,
    gradients_of,
    input_of,
    outcome_of,
    sequence_of,
    side_of,
    training_step,
    twin_of,
    weighted_sum,
)

SAVING = ("checkpointed", "reconstructed")
STATEFUL = ("conv_bn", "dropout", "counting", "nested")


def two_forwards_first(model: nn.Module, x: Tensor) -> Tensor:
    first = model(x)
    second = model(2 * x)
    weighted_sum(second).backward()
    weighted_sum(first).backward()
    return first


def backward_twice(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    weighted_sum(y).backward(retain_graph=True)
    weighted_sum(y).backward()
    return y


def accumulated(model: nn.Module, x: Tensor) -> Tensor:
    weighted_sum(model(2 * x)).backward()
    y = model(x)
    weighted_sum(y).backward()
    return y


def two_losses(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    (weighted_sum(y) + weighted_sum(y.flip(0))).backward()
    return y


def part_of_the_output(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    weighted_sum(y.narrow(1, 0, 1)).backward()
    return y


def random_draws_in_between(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    torch.rand(7)
    weighted_sum(y).backward()
    torch.rand(7)
    return y


@pytest.mark.parametrize("activations", SAVING)
@pytest.mark.parametrize("kind", STATEFUL)
@pytest.mark.parametrize(
    "call", [two_forwards_first, backward_twice, accumulated, two_losses, part_of_the_output, random_draws_in_between]
)
def test_ways_of_calling_backward(call: Callable[[nn.Module, Tensor], Tensor], kind: str, activations: str) -> None:
    outcomes = []
    for mode in ("stored", activations):
        model, x = twin_of(sequence_of(kind, 3), mode), input_of(kind)
        torch.manual_seed(4)
        y = call(model, x)
        outcomes.append(outcome_of(model, x, y))
    assert_same(outcomes[1], outcomes[0])


@pytest.mark.parametrize("activations", SAVING)
@pytest.mark.parametrize("kind", ["conv_bn", "dropout", "conditioned"])
@pytest.mark.parametrize("wanted", ["input", "parameters", "all"])
def test_autograd_grad(wanted: str, kind: str, activations: str) -> None:
    found = []
    for mode in ("stored", activations):
        model, x, side = twin_of(sequence_of(kind, 3), mode), input_of(kind), side_of(kind)
        tensors = [x] if wanted == "input" else list(model.parameters())
        if wanted == "all":
            tensors += [x, *(s for s in side.values() if isinstance(s, Tensor) and s.requires_grad)]
        torch.manual_seed(4)
        found.append(torch.autograd.grad(weighted_sum(model(x, **side)), tensors))
        assert not gradients_of(model, x=x, **side)
    torch.testing.assert_close(found[1], found[0], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("activations", SAVING)
@pytest.mark.parametrize("backward_inside", [True, False])
@pytest.mark.parametrize("kind", ["conv_bn", "norm_mlp", "attention"])
def test_callers_autocast(kind: str, backward_inside: bool, activations: str) -> None:
    outcomes = []
    for mode in ("stored", activations):
        model, x = (
            twin_of(sequence_of(kind, 3, precision=Precision(reconstruction="exact")), mode),
            input_of(kind, torch.float32),
        )
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = model(x)
            loss = weighted_sum(y)
            if backward_inside:
                loss.backward()
        if not backward_inside:
            loss.backward()
        outcomes.append(outcome_of(model, x, y))
    assert len(outcomes[0].gradients) == 1 + len(list(sequence_of(kind, 3).parameters()))
    assert_same(outcomes[1], outcomes[0], bits=True)


def test_autocast_changes_what_is_computed() -> None:
    model, x = sequence_of("conv_bn", 3, precision=Precision()), input_of("conv_bn", torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(x)
    assert not torch.equal(half, model(x))


@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("shared", [False, True])
def test_hooks_on_parameters_see_each_gradient_once(activations: str, shared: bool) -> None:
    model = sequence_of("norm_mlp", 2, shared=shared, activations=activations)
    expected = training_step(twin_of(model, "stored"), input_of("norm_mlp")).gradients
    seen: list[str] = []
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda gradient, name=name: (seen.append(name), 2 * gradient)[1])
    doubled = training_step(model, input_of("norm_mlp")).gradients
    assert sorted(seen) == sorted(name for name, _ in model.named_parameters())
    for name in seen:
        torch.testing.assert_close(doubled[name], 2 * expected[name])


@pytest.mark.parametrize("activations", SAVING)
def test_hooks_on_modules_see_what_stored_shows_them(activations: str) -> None:
    shown: dict[str, dict[str, Tensor]] = {}
    for mode in ("stored", activations):
        model = twin_of(sequence_of("norm_mlp", 3), mode)
        calls = shown.setdefault(mode, {})
        for name, module in model.named_modules():
            if name.endswith((".f", ".g")):
                module.register_forward_hook(
                    lambda m, args, out, c=calls, n=name: c.update({f"{n} in": args[0], f"{n} out": out})
                )
                module.register_full_backward_hook(
                    lambda m, d_in, d_out, c=calls, n=name: c.update({f"{n} d_out": d_out[0]})
                )
        training_step(model, input_of("norm_mlp"))
    torch.testing.assert_close(shown[activations], shown["stored"], rtol=1e-8, atol=1e-10)


def watch_globally(model: nn.Module, hook: Callable[..., None]) -> RemovableHandle:
    return register_module_forward_hook(hook)


def watch_one_net(model: nn.Module, hook: Callable[..., None]) -> RemovableHandle:
    return model.get_submodule("couplings.1.g").register_forward_hook(hook)


@pytest.mark.parametrize("watch", [watch_globally, watch_one_net])
@pytest.mark.parametrize("since", ["forward", "backward"])
def test_what_a_hook_keeps_is_not_overwritten(since: str, watch: Callable[..., RemovableHandle]) -> None:
    model, x = sequence_of("norm_mlp", 3), input_of("norm_mlp")
    kept: list[tuple[Tensor, Tensor]] = []

    def keep(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        if isinstance(out, Tensor) and isinstance(args[0], Tensor):
            kept.extend((t, t.detach().clone()) for t in (args[0], out))

    handle = watch(model, keep) if since == "forward" else None
    y = model(x)
    handle = handle or watch(model, keep)
    weighted_sum(y).backward()
    handle.remove()
    assert len(kept) >= 2
    assert all(torch.equal(tensor, before) for tensor, before in kept)


class _SavedBytes:
    """Bytes that autograd saves in a forward, other than parameters; one storage counts once."""

    def __init__(self, model: nn.Module) -> None:
        self._parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self._alive: dict[int, Tensor] = {}

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._parameters:
            self._alive[storage.data_ptr()] = tensor
        return tensor

    def measure(self, forward: Callable[[], Any]) -> int:
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
            kept = forward()
        assert kept.requires_grad
        return sum(tensor.untyped_storage().nbytes() for tensor in self._alive.values())


def saved_bytes(kind: str, count: int, activations: str) -> int:
    model = sequence_of(kind, count, activations=activations)
    x, side = input_of(kind), side_of(kind)
    return _SavedBytes(model).measure(lambda: model(x, **side))


@pytest.mark.parametrize("kind", ["conv_bn", "attention", "dropout", "nested", "conditioned", "counting"])
def test_saved_bytes_do_not_grow_with_the_number_of_couplings(kind: str) -> None:
    assert saved_bytes(kind, 8, "reconstructed") == saved_bytes(kind, 2, "reconstructed")


@pytest.mark.parametrize("kind", ["conv_bn", "attention", "dropout", "nested", "conditioned", "counting"])
def test_saved_bytes_of_stored_grow(kind: str) -> None:
    # The control of the test above: each coupling stores at least what F and G saw.
    x_bytes = input_of(kind).untyped_storage().nbytes()
    assert saved_bytes(kind, 8, "stored") >= saved_bytes(kind, 2, "stored") + 6 * x_bytes


def test_saved_bytes_are_those_of_the_output() -> None:
    assert saved_bytes("conv_bn", 8, "reconstructed") == input_of("conv_bn").untyped_storage().nbytes()


def test_the_saved_bytes_meter_counts_a_known_tensor() -> None:
    net = nn.Sequential(nn.Linear(6, 6), nn.Tanh()).double()
    x = torch.zeros(10, 6, dtype=torch.float64, requires_grad=True)
    # The linear layer saves its input, tanh its output.
    assert _SavedBytes(net).measure(lambda: net(x)) == 2 * 10 * 6 * 8


def test_layout_of_the_input_does_not_matter() -> None:
    stored = sequence_of("conv_bn", 3, activations="stored")
    x = input_of("conv_bn").detach().to(memory_format=torch.channels_last).requires_grad_()
    expected = training_step(twin_of(stored, "stored"), input_of("conv_bn"))
    assert_same(training_step(twin_of(stored, "reconstructed"), x), expected)


def test_precision_of_the_reconstruction_reaches_the_output() -> None:
    assert sequence_of("conv_bn", precision=FP64)(input_of("conv_bn")).dtype == torch.float64
    half = sequence_of("conv_bn", precision=Precision(reconstruction="bf16"))
    assert half(input_of("conv_bn", torch.float32)).dtype == torch.bfloat16


@pytest.mark.parametrize("reconstruction", ["fp32", "fp64"])
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_an_addition_that_widens_gives_the_same_bits_with_fewer_casts(
    reconstruction: str, compute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    precision = Precision(compute, reconstruction)
    found: list[tuple[int, list[Tensor]]] = []
    for widens in (True, False):
        torch.manual_seed(0)
        model = sequence_of("conv_bn", 3, precision=precision).float().train()
        monkeypatch.setattr(AdditiveCoupling, "widens", widens)
        x = torch.randn(IMAGE_NCHW, requires_grad=True)
        with Casts(precision.stream_dtype) as casts:
            y = model(x)
            weighted_sum(y).backward()
        assert x.grad is not None
        found.append((casts.count, [y, x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]))
    (fewer, ours), (more, plain) = found
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
    # Of F and G, in the forward and in the backward.
    narrow = compute == "bf16" or reconstruction == "fp64"
    assert more - fewer == (3 * 2 * 2 if narrow else 0)


class Casts(TorchDispatchMode):
    """Counts casts to a dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default and (kwargs or {}).get("dtype") == self.dtype:
            self.count += 1
        return func(*args, **(kwargs or {}))

"""Offloading copies activations and nothing else, once, and changes no gradient."""

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from revnet_core import offload
from tests.core.nets import assert_same, input_of, sequence_of, side_of, training_step, twin_of


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Treat the CPU as a device other than the host, and note what is copied to the host."""
    made: list[Tensor] = []
    empty_strided = torch.empty_strided

    def noted(*args: object, **kwargs: object) -> Tensor:
        made.append(empty_strided(*args, **kwargs))  # pyright: ignore[reportArgumentType]
        return made[-1]

    monkeypatch.setattr(offload, "_is_on_host", lambda tensor: False)
    monkeypatch.setattr(offload, "SMALLEST_BYTES", 0)
    monkeypatch.setattr(offload.torch, "empty_strided", noted)
    return made


@pytest.mark.parametrize("kind", ["conv_bn", "dropout", "attention", "inplace_first", "conditioned", "counting"])
def test_gradients_are_those_of_stored(kind: str, copies: list[Tensor]) -> None:
    expected = training_step(twin_of(sequence_of(kind, 3), "stored"), input_of(kind), side_of(kind))
    assert not copies
    assert_same(training_step(twin_of(sequence_of(kind, 3), "offloaded"), input_of(kind), side_of(kind)), expected)
    assert copies


def test_parameters_stay_and_nothing_is_copied_twice(copies: list[Tensor]) -> None:
    model = twin_of(sequence_of("conv_bn", 3), "offloaded")
    model(input_of("conv_bn"))
    weights = [p for p in model.parameters() if p.ndim == 4]
    assert not any(c.shape == w.shape and torch.equal(c, w) for c in copies for w in weights)
    of_size = [c for c in copies if c.shape == (3, 4, 5, 5)]
    assert len(of_size) > 6
    assert not any(torch.equal(a, b) for i, a in enumerate(of_size) for b in of_size[:i])


def test_an_address_that_is_used_again_is_copied_again(copies: list[Tensor]) -> None:
    """A tensor that dies gives its memory to the next, which must not get the copy of the first."""
    x = torch.zeros(64, requires_grad=True)
    with offload.offloaded(torch.nn.Identity()):
        y = x
        for value in range(1, 30):
            y = y * torch.full((64,), 1 + value / 100)
    y.sum().backward()
    expected = 1.0
    for value in range(1, 30):
        expected *= 1 + value / 100
    assert x.grad is not None
    assert torch.allclose(x.grad, torch.full((64,), expected))


def test_on_the_host_itself_nothing_is_copied() -> None:
    tensor = torch.zeros(10_000)
    assert offload._is_on_host(tensor)


def test_what_stands_for_a_device_is_not_kept() -> None:
    """So that what a step of an offloaded model takes on a GPU can be found out without one."""
    x = torch.zeros(64, 100, device="meta", requires_grad=True)
    with offload.standing_for_a_device(), offload.offloaded(torch.nn.Identity()):
        y = x.exp()
    saved = StorageWeakRef(y.untyped_storage())
    loss = y.sum()
    del y
    assert saved.expired()
    loss.backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape


def test_on_meta_itself_it_is() -> None:
    x = torch.zeros(64, 100, device="meta", requires_grad=True)
    with offload.offloaded(torch.nn.Identity()):
        y = x.exp()
    saved = StorageWeakRef(y.untyped_storage())
    loss = y.sum()
    del y
    assert loss.grad_fn is not None
    assert not saved.expired()

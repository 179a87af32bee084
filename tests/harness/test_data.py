"""Batches are the data set's images, the same for a seed, another for each rank; anything else is a DataError."""

import hashlib
import pickle
import random
import re
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from harness.data import CHANNELS, DATA_SETS, check_data, cifar10, load_data, num_classes
from harness.data.binary import RECORD_BYTES
from harness.errors import DataError

# N batch, C channels, H height, W width, D bytes of one image

NAMES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]

Batches = list[tuple[torch.Tensor, torch.Tensor]]


def load(name: str = "cifar10", path: Path | None = None, **change: Any) -> Batches:
    arguments: dict[str, Any] = {"batch_size": 4, "batches": 3, "seed": 0, **change}
    return load_data(name, None if path is None else str(path), arguments.pop("image_size", 32), **arguments)


def equal(one: Batches, other: Batches) -> bool:
    return len(one) == len(other) and all(
        torch.equal(x, y) and torch.equal(labels, others) for (x, labels), (y, others) in zip(one, other, strict=True)
    )


def keys(batches: Batches) -> list[bytes]:
    """One key for each sample, equal where the images are."""
    return [image.numpy().tobytes() for images, _ in batches for image in images]


def refused(name: str, path: Path | str | None, image_size: int = 32) -> str:
    with pytest.raises(DataError) as caught:
        check_data(name, None if path is None else str(path), image_size)
    return str(caught.value)


# The shipped sample


def test_sample_is_the_file_its_readme_describes() -> None:
    content = (cifar10.SAMPLE / "test_batch.bin").read_bytes()
    readme = (cifar10.SAMPLE.parent / "README.md").read_text()
    found = re.search(r"`([0-9a-f]{64})`", readme)
    assert found
    assert hashlib.sha256(content).hexdigest() == found[1]
    assert hashlib.sha256(content[:-1] + b"\0").hexdigest() != found[1]
    assert len(content) == 512 * RECORD_BYTES
    assert (cifar10.SAMPLE / "batches.meta.txt").read_text().split() == list(cifar10.CLASSES)


def test_sample_loads_normalized() -> None:
    check_data("cifar10", None, 32)
    ((images_NCHW, labels_N),) = load(batch_size=512, batches=1)
    assert images_NCHW.shape == (512, CHANNELS, 32, 32)
    assert images_NCHW.dtype == torch.float32
    assert labels_N.dtype == torch.int64
    assert set(labels_N.tolist()) == set(range(10))
    assert images_NCHW.mean(dim=(0, 2, 3)).abs().max() < 0.1
    assert (images_NCHW.std(dim=(0, 2, 3)) - 1).abs().max() < 0.1
    # Pixels as they lie in the file are far from that.
    raw_ND = np.fromfile(cifar10.SAMPLE / "test_batch.bin", np.uint8).reshape(-1, RECORD_BYTES)[:, 1:]
    assert abs((raw_ND / 255).mean()) > 0.1


def test_images_are_the_records_of_the_file() -> None:
    records = np.fromfile(cifar10.SAMPLE / "test_batch.bin", np.uint8).reshape(-1, RECORD_BYTES)
    label_of = {record[1:].tobytes(): int(record[0]) for record in records}
    std, mean = (torch.from_numpy(value)[:, None, None] for value in (cifar10.STD, cifar10.MEAN))
    for images_NCHW, labels_N in load():
        pixels_NCHW = ((images_NCHW * std + mean) * 255).round().to(torch.uint8)
        assert [label_of[pixels.numpy().tobytes()] for pixels in pixels_NCHW] == labels_N.tolist()


# What is drawn


@pytest.mark.parametrize("name", DATA_SETS)
def test_same_seed_same_batches_and_another_seed_others(name: str) -> None:
    assert equal(load(name, seed=7), load(name, seed=7))
    assert not equal(load(name, seed=7), load(name, seed=8))


@pytest.mark.parametrize("name", DATA_SETS)
def test_ranks_and_batches_have_different_samples(name: str) -> None:
    ranks = [keys(load(name, rank=rank, world_size=4)) for rank in range(4)]
    samples = [key for rank in ranks for key in rank]
    assert len(set(samples)) == len(samples) == 4 * 3 * 4
    # Two processes that take themselves for the same rank would share every sample.
    assert set(keys(load(name, rank=1, world_size=4))) == set(ranks[1])


def test_ranks_together_draw_what_one_rank_draws() -> None:
    alone = keys(load(batch_size=8))
    shared = [load(rank=rank, world_size=2) for rank in range(2)]
    assert alone == [key for index in range(3) for rank in shared for key in keys(rank[index : index + 1])]


def test_a_small_set_wraps_around_in_the_same_order() -> None:
    samples = keys(load(batch_size=200, batches=6))
    assert len(set(samples)) == 512
    assert samples[512:1024] == samples[:512]
    assert samples[1024:] == samples[: 1200 - 1024]
    assert len(set(keys(load(batch_size=256, batches=2)))) == 512


@pytest.mark.parametrize("name", DATA_SETS)
def test_global_random_state_is_left_alone(name: str) -> None:
    def state() -> tuple[bytes, ...]:
        return (
            pickle.dumps(random.getstate()),
            pickle.dumps(np.random.get_state()),
            torch.get_rng_state().numpy().tobytes(),
        )

    before = state()
    first = load(name)
    assert state() == before
    for draw in (random.random, np.random.rand, lambda: torch.rand(1)):
        before = state()
        draw()
        assert state() != before
    assert equal(load(name), first)


def test_synthetic_images_are_standard_normal_of_any_size() -> None:
    ((images_NCHW, labels_N),) = load("synthetic", image_size=48, batch_size=64, batches=1)
    assert images_NCHW.shape == (64, CHANNELS, 48, 48)
    assert (images_NCHW.dtype, labels_N.dtype) == (torch.float32, torch.int64)
    assert abs(float(images_NCHW.mean())) < 0.01
    assert abs(float(images_NCHW.std()) - 1) < 0.01
    assert set(labels_N.tolist()) == set(range(num_classes("synthetic")))
    assert not equal(load("synthetic"), load("synthetic", split="test"))


@pytest.mark.parametrize("name", DATA_SETS)
def test_each_batch_owns_its_memory(name: str) -> None:
    for images_NCHW, labels_N in load(name):
        assert images_NCHW.untyped_storage().nbytes() == images_NCHW.nbytes
        assert labels_N.untyped_storage().nbytes() == labels_N.nbytes
    assert load(name, batches=0) == []


def test_a_batch_costs_no_reading_of_the_data_set(tmp_path: Path) -> None:
    for name in NAMES:
        with (tmp_path / f"{name}.bin").open("wb") as file:
            file.truncate(10_000 * RECORD_BYTES)

    def peak_bytes(action: Callable[[], object]) -> int:
        tracemalloc.start()
        try:
            action()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak_bytes(lambda: load(path=tmp_path)) < 2**21
    assert peak_bytes(lambda: np.fromfile(tmp_path / "test_batch.bin", np.uint8)) > 2**24


def test_checking_needs_no_torch() -> None:
    check = "import sys; from harness.data import check_data; check_data('cifar10', None, 32)"
    for module, code in (("torch", 0), ("numpy", 1)):
        done = subprocess.run([sys.executable, "-c", f"{check}; sys.exit({module!r} in sys.modules)"])
        assert done.returncode == code


# Bad input


@pytest.mark.parametrize(
    ("name", "near"), [("cifar", "cifar10"), ("CIFAR-10", "cifar10"), ("synthetics", "synthetic"), ("mnist", None)]
)
def test_unknown_data_set_names_the_allowed_and_the_near(name: str, near: str | None) -> None:
    message = refused(name, None)
    assert "cifar10, synthetic" in message
    assert ("Did you mean" in message) == (near is not None)
    assert near is None or repr(near) in message
    with pytest.raises(DataError):
        num_classes(name)
    with pytest.raises(DataError):
        load(name)


@pytest.mark.parametrize(
    ("name", "path", "image_size", "words"),
    [
        ("cifar10", None, 224, ["data.image_size = 224", "32", "synthetic"]),
        ("synthetic", None, 7, ["data.image_size = 7", "at least 8"]),
        ("synthetic", "/data", 32, ["data.path = '/data'", "must be null"]),
        ("cifar10", "no/such/folder", 32, ["data.path = 'no/such/folder'", "does not exist", "data_batch_1.bin"]),
        ("cifar10", __file__, 32, ["is a file", "Unpack"]),
    ],
)
def test_bad_settings_say_what_is_allowed(name: str, path: str | None, image_size: int, words: Sequence[str]) -> None:
    message = refused(name, path, image_size)
    assert [word for word in words if word not in message] == []
    with pytest.raises(DataError):
        load_data(name, path, image_size, batch_size=1, batches=1, seed=0)
    check_data("synthetic", None, 8)

"""A pickle that is not a batch of CIFAR-10 is refused, and nothing that it asks for runs."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.data.binary import IMAGE_BYTES
from harness.data.pickled import PickledBatch
from harness.errors import DataError

# R records of one file, D bytes of one image

RECORDS = 12


def made_images(dtype: Any = np.uint8) -> np.ndarray:
    return np.random.default_rng(0).integers(256, size=(RECORDS, IMAGE_BYTES)).astype(dtype)


def batch_of(images_RD: np.ndarray) -> dict[bytes, Any]:
    return {b"data": images_RD, b"labels": list(range(len(images_RD)))}


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_pickles_of_either_memory_order_read_equal(tmp_path: Path, order: Any, protocol: int) -> None:
    images_RD = made_images()
    file = tmp_path / "batch"
    file.write_bytes(pickle.dumps(batch_of(np.asarray(images_RD, order=order)), protocol))
    found_RD, labels = PickledBatch(file).read([3, 1])
    assert np.array_equal(found_RD, images_RD[[3, 1]])
    assert labels == [3, 1]


class Calls:
    """Unpickled by pickle itself, this calls the function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def read_error(folder: Path, content: bytes) -> str:
    file = folder / "batch"
    file.write_bytes(content)
    with pytest.raises(DataError) as caught:
        PickledBatch(file).read([0])
    assert str(file) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_that_calls_a_function_is_refused_before_the_call(tmp_path: Path, protocol: int) -> None:
    made = tmp_path / "made"
    content = pickle.dumps({b"extra": Calls(os.system, f"touch {made}"), **batch_of(made_images())}, protocol)
    assert f"{os.system.__module__}.system" in read_error(tmp_path, content)
    assert not made.exists()
    # The same bytes do call it where nothing refuses them.
    pickle.loads(content)
    assert made.exists()


@pytest.mark.parametrize(
    "module_and_name",
    [
        "builtins eval",
        "builtins getattr",
        "numpy load",
        "numpy.core.multiarray scalar",
        "numpy matrix",
        "_codecs decode",
    ],
)
def test_every_other_global_is_refused_by_name(tmp_path: Path, module_and_name: str) -> None:
    module, name = module_and_name.split()
    content = f"c{module}\n{name}\n.".encode().rjust(IMAGE_BYTES + 1, b"N")
    assert f"{module}.{name}" in read_error(tmp_path, b"\x80\x02" + content)


@pytest.mark.parametrize("dtype", [object, np.int8, np.float32, np.dtype([("a", np.uint8)])])
def test_arrays_of_other_than_uint8_are_refused(tmp_path: Path, dtype: Any) -> None:
    assert "uint8 is allowed" in read_error(tmp_path, pickle.dumps(batch_of(made_images(dtype)), 2))


@pytest.mark.parametrize(
    "batch",
    [
        pytest.param([bytes(IMAGE_BYTES)], id="no dict"),
        pytest.param({b"images": bytes(IMAGE_BYTES), b"labels": [1]}, id="no data"),
        pytest.param({b"data": np.zeros((2, IMAGE_BYTES), np.uint8)}, id="no labels"),
        pytest.param({b"data": np.zeros((2, IMAGE_BYTES), np.uint8), b"labels": [1]}, id="a label too few"),
        pytest.param({b"data": np.zeros((1, IMAGE_BYTES), np.uint8), b"labels": ["cat"]}, id="a label that is a word"),
        pytest.param({b"data": np.zeros((1, IMAGE_BYTES + 1), np.uint8), b"labels": [1]}, id="images of another set"),
        pytest.param(
            {b"data": np.zeros((0, IMAGE_BYTES), np.uint8), b"labels": [], b"": bytes(IMAGE_BYTES)}, id="no images"
        ),
        pytest.param({b"data": bytes(IMAGE_BYTES), b"labels": [1]}, id="data that is no array"),
    ],
)
def test_pickles_of_something_else_are_refused(tmp_path: Path, batch: object) -> None:
    read_error(tmp_path, pickle.dumps(batch, 3))


@given(cut=st.integers(min_value=0, max_value=RECORDS * IMAGE_BYTES), stop=st.booleans())
def test_a_cut_pickle_is_refused_wherever_it_is_cut(
    tmp_path_factory: pytest.TempPathFactory, cut: int, stop: bool
) -> None:
    whole = pickle.dumps(batch_of(made_images()), 3)
    read_error(tmp_path_factory.mktemp("cut"), whole[:cut] + b"." * stop)

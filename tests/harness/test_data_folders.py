"""A folder with either published version of CIFAR-10 loads the same; an incomplete or damaged one is a DataError."""

import os
import pickle
import re
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from harness.data import Split, check_data, load_data
from harness.data.binary import IMAGE_BYTES, RECORD_BYTES
from harness.errors import DataError

# R records of one file, D bytes of one image

NAMES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
RECORDS = 12
BINARY, PYTHON = "cifar-10-batches-bin", "cifar-10-batches-py"


def made_images(seed: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    images_RD = generator.integers(256, size=(RECORDS, IMAGE_BYTES), dtype=np.uint8)
    return images_RD, generator.integers(10, size=RECORDS, dtype=np.uint8)


def python2_stream(images_RD: np.ndarray, labels_R: np.ndarray) -> bytes:
    """The pickle that Python 2 wrote in protocol 2, opcode by opcode: Python 3 has no way to write its strings."""

    def string(text: bytes) -> bytes:
        return pickle.BINSTRING + struct.pack("<i", len(text)) + text

    def integer(number: int) -> bytes:
        return pickle.BININT + struct.pack("<i", number)

    dtype = (
        b"cnumpy\ndtype\n(" + string(b"u1") + integer(0) + integer(1) + b"tR("
        b"" + integer(3) + string(b"|") + b"NNN" + integer(-1) + integer(-1) + integer(0) + b"tb"
    )
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n" + integer(0) + b"\x85" + string(b"b") + b"tR("
        b"" + integer(1) + integer(len(images_RD)) + integer(IMAGE_BYTES) + b"\x86" + dtype + b"\x89"
        b"" + string(images_RD.tobytes()) + b"tb"
    )
    labels = b"](" + b"".join(b"K" + bytes([label]) for label in labels_R) + b"e"
    content = string(b"batch_label") + string(b"made") + string(b"labels") + labels + string(b"data") + array
    return b"\x80\x02}(" + content + b"u."


def python3_stream(images_RD: np.ndarray, labels_R: np.ndarray, protocol: int = 2) -> bytes:
    return pickle.dumps({b"data": images_RD, b"labels": labels_R.tolist()}, protocol)


def write_binary(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for seed, name in enumerate(NAMES):
        images_RD, labels_R = made_images(seed)
        np.concatenate([labels_R[:, None], images_RD], axis=1).tofile(folder / f"{name}.bin")
    return folder


def write_python(folder: Path, stream: Callable[..., bytes] = python2_stream) -> Path:
    folder.mkdir(parents=True)
    for seed, name in enumerate(NAMES):
        (folder / name).write_bytes(stream(*made_images(seed)))
    return folder


def load(folder: Path, batches: int, split: Split = "train") -> tuple[torch.Tensor, torch.Tensor]:
    """All samples of so many batches, each of as many samples as a file has."""
    loaded = load_data("cifar10", str(folder), 32, batch_size=RECORDS, batches=batches, seed=0, split=split)
    return torch.cat([images for images, _ in loaded]), torch.cat([labels for _, labels in loaded])


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("stream", [python2_stream, python3_stream])
@pytest.mark.parametrize("split", ["train", "test"])
def test_binary_and_python_version_load_equal(
    tmp_path: Path, inside: bool, stream: Callable[..., bytes], split: Split
) -> None:
    binary = write_binary(tmp_path / "one" / BINARY)
    python = write_python(tmp_path / "other" / PYTHON, stream)
    folders = (binary, python) if inside else (binary.parent, python.parent)
    for folder in folders:
        check_data("cifar10", str(folder), 32)
    (images, labels), (others, other_labels) = (load(folder, 7, split) for folder in folders)
    assert torch.equal(images, others)
    assert torch.equal(labels, other_labels)
    (python / "test_batch").write_bytes(stream(*made_images(99)))
    assert torch.equal(images, load(folders[1], 7, split)[0]) == (split == "train")


def test_python2_stream_is_what_pickle_takes_it_for() -> None:
    images_RD, labels_R = made_images(0)
    batch = pickle.loads(python2_stream(images_RD, labels_R), encoding="bytes")
    assert list(batch) == [b"batch_label", b"labels", b"data"]
    assert np.array_equal(batch[b"data"], images_RD)
    assert batch[b"labels"] == labels_R.tolist()


def test_a_folder_is_drawn_whole_before_it_wraps(tmp_path: Path) -> None:
    write_binary(tmp_path / BINARY)
    train, test = load(tmp_path, 10)[0], load(tmp_path, 1, "test")[0]
    assert len(train.unique(dim=0)) == 5 * RECORDS
    assert torch.equal(train[: 5 * RECORDS], train[5 * RECORDS :])
    assert len(test.unique(dim=0)) == RECORDS
    assert len(torch.cat([train, test]).unique(dim=0)) == 6 * RECORDS


def test_folder_of_neither_version_says_which_files_are_expected(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"")
    with pytest.raises(DataError) as caught:
        check_data("cifar10", str(tmp_path), 32)
    for word in (BINARY, PYTHON, "data_batch_1.bin", "test_batch"):
        assert word in str(caught.value)


@pytest.mark.parametrize(("write", "name"), [(write_binary, "data_batch_3.bin"), (write_python, "test_batch")])
def test_a_missing_file_is_named(tmp_path: Path, write: Callable[[Path], Path], name: str) -> None:
    folder = write(tmp_path / "folder")
    check_data("cifar10", str(folder), 32)
    (folder / name).unlink()
    with pytest.raises(DataError, match=re.escape(f"without {name}.")):
        check_data("cifar10", str(folder), 32)


@pytest.mark.parametrize(("write", "name"), [(write_binary, "data_batch_3.bin"), (write_python, "data_batch_3")])
@pytest.mark.parametrize("size_bytes", [0, 100, RECORD_BYTES * 2 - 1])
def test_a_truncated_file_is_named(tmp_path: Path, write: Callable[[Path], Path], name: str, size_bytes: int) -> None:
    folder = write(tmp_path / "folder")
    check_data("cifar10", str(folder), 32)
    os.truncate(folder / name, size_bytes)
    with pytest.raises(DataError, match=re.escape(f"{folder / name}: {size_bytes} bytes")):
        check_data("cifar10", str(folder), 32)
    with pytest.raises(DataError, match=re.escape(str(folder / name))):
        load(folder, 5)


@pytest.mark.parametrize(("write", "name"), [(write_binary, "data_batch_2.bin"), (write_python, "data_batch_2")])
def test_a_label_that_is_no_class_is_named_with_its_record(
    tmp_path: Path, write: Callable[[Path], Path], name: str
) -> None:
    folder = write(tmp_path / "folder")
    load(folder, 5)
    images_RD, labels_R = made_images(1)
    labels_R[5] = 10
    binary = np.concatenate([labels_R[:, None], images_RD], axis=1).tobytes()
    (folder / name).write_bytes(binary if name.endswith(".bin") else python2_stream(images_RD, labels_R))
    with pytest.raises(DataError, match=re.escape(f"{folder / name}: record 5 (counted from 0) has label 10")):
        load(folder, 5)

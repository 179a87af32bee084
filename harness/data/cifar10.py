"""CIFAR-10 from the files that its authors publish, or from the 512 test images shipped with the package.

Source: Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.
"""

# N batch, C channels, H height, W width, D = C*H*W bytes of one image

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np

from harness.data.binary import BinaryBatch
from harness.data.pickled import PickledBatch
from harness.errors import DataError

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
IMAGE_SIZE = 32
SAMPLE = Path(__file__).parent / "cifar10_sample" / "cifar-10-batches-bin"

# Of the training images' pixels, scaled to 0..1, by channel.
MEAN = np.array([0.4914, 0.4822, 0.4465], np.float32)
STD = np.array([0.2470, 0.2435, 0.2616], np.float32)

_SPLITS = {"train": [f"data_batch_{number}" for number in range(1, 6)], "test": ["test_batch"]}


class _BatchFile(Protocol):
    path: Path

    def check(self) -> None: ...
    def count(self) -> int: ...
    def read(self, records: Sequence[int]) -> tuple[np.ndarray, list[int]]: ...


class _Version(NamedTuple):
    title: str
    folder: str
    suffix: str
    open: Callable[[Path], _BatchFile]


_VERSIONS = (
    _Version("binary version", "cifar-10-batches-bin", ".bin", BinaryBatch),
    _Version("python version", "cifar-10-batches-py", "", PickledBatch),
)


def check(path: str | None, image_size: int) -> None:
    """Raises DataError unless the images have `image_size` pixels a side and `path` holds all of a version's files."""
    check_image_size(image_size)
    for file in _batch_files(path, [*_SPLITS["train"], *_SPLITS["test"]]):
        with _readable(file.path):
            file.check()


def check_image_size(image_size: int) -> None:
    """Raises DataError for any but 32 pixels."""
    if image_size != IMAGE_SIZE:
        raise DataError(
            f"data.image_size = {image_size}; the images of cifar10 have {IMAGE_SIZE} pixels a side and are not "
            f"resized. Set it to {IMAGE_SIZE}, or take data.name = 'synthetic' for another size."
        )


def draw(
    path: str | None, split: Literal["train", "test"], batch_ids: Sequence[int], batch_size: int, seed: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Normalized float32 images N, C, H, W and int64 labels N of each batch.

    The split's files are taken in an order drawn from the seed, and the records of each likewise, so that a short
    run reads records of one file; batch i has the samples from i * batch_size on, counted round the split.
    Raises DataError for a missing or damaged file and for a label that is not a class.
    """
    files = _batch_files(path, _SPLITS[split])
    generator = np.random.default_rng(seed)
    files = [files[index] for index in generator.permutation(len(files))]
    positions = np.add.outer(np.asarray(batch_ids, np.int64) * batch_size, np.arange(batch_size)).reshape(-1)
    images_ND, labels = _gather(files, positions, generator)
    batches = []
    # An array per batch: a view of all of them would hold the memory of all.
    for start in range(0, len(positions), batch_size):
        images_NCHW = images_ND[start : start + batch_size].reshape(-1, 3, IMAGE_SIZE, IMAGE_SIZE)
        scaled_NCHW = images_NCHW.astype(np.float32) / np.float32(255)
        normalized_NCHW = (scaled_NCHW - MEAN[:, None, None]) / STD[:, None, None]
        batches.append((normalized_NCHW, labels[start : start + batch_size].copy()))
    return batches


def _gather(
    files: Sequence[_BatchFile], positions: np.ndarray, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """uint8 images and int64 labels at these positions of the shuffled files, counted round from the last to 0."""
    last = int(positions.max(initial=-1))
    starts = [0]
    for file in files:
        if starts[-1] > last:
            break
        with _readable(file.path):
            starts.append(starts[-1] + file.count())
    images_ND = np.empty((len(positions), 3 * IMAGE_SIZE**2), np.uint8)
    labels = np.empty(len(positions), np.int64)
    for file, start, end in zip(files, starts, starts[1:], strict=False):
        wrapped = positions % starts[-1]
        chosen = np.flatnonzero((start <= wrapped) & (wrapped < end))
        order = generator.permutation(end - start)
        records = order[wrapped[chosen] - start].tolist()
        with _readable(file.path):
            images_ND[chosen], found = file.read(records)
        for record, label in zip(records, found, strict=True):
            if not 0 <= label < len(CLASSES):
                raise DataError(
                    f"{file.path}: record {record} (counted from 0) has label {label}; the labels of cifar10 are "
                    f"0..{len(CLASSES) - 1}, so the file is damaged or another data set's. Unpack the archive again."
                )
        labels[chosen] = found
    return images_ND, labels


def _batch_files(path: str | None, names: Sequence[str]) -> Sequence[_BatchFile]:
    """The files of these names, of whichever version `path` or a folder in it holds. Raises DataError."""
    if path is None:
        return [BinaryBatch(SAMPLE / "test_batch.bin")]
    root = Path(os.path.expanduser(path))
    with _readable(root):
        return _find(path, root, names)


def _find(path: str, root: Path, names: Sequence[str]) -> Sequence[_BatchFile]:
    if not root.is_dir():
        found = "is a file" if root.exists() else "does not exist"
        raise DataError(
            f"data.path = {path!r} {found}; it must be a folder with an unpacked version of CIFAR-10: {_expected()}. "
            "Unpack the archive and name its folder, or set data.path to null for the shipped sample."
        )
    incomplete = None
    for version in _VERSIONS:
        for folder in (root, root / version.folder):
            files = [version.open(folder / f"{name}{version.suffix}") for name in names]
            missing = [file.path.name for file in files if not file.path.is_file()]
            if not missing:
                return files
            if len(missing) < len(files):
                incomplete = incomplete or (folder, version.title, missing)
    if incomplete:
        folder, title, missing = incomplete
        raise DataError(
            f"{folder}: part of the {title} of CIFAR-10, without {', '.join(missing)}. "
            "Unpack the archive again, or set data.path to null for the shipped sample."
        )
    raise DataError(
        f"data.path = {path!r} holds neither version of CIFAR-10: {_expected()}. "
        "Name the unpacked folder or the one that holds it, or set data.path to null for the shipped sample."
    )


def _expected() -> str:
    return " or ".join(
        f"the {version.title} (data_batch_1{version.suffix} to data_batch_5{version.suffix} and "
        f"test_batch{version.suffix}, by default in {version.folder})"
        for version in _VERSIONS
    )


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}). Make it readable for the user who runs the trials."
        ) from None

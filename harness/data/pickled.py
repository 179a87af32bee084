"""One file of CIFAR-10's "python version": a pickled dict, read without letting it call anything of Python's.

A pickle may name any function and have it called. Here every name but those of a numpy array is refused, and
those stand for classes of this file that can hold an array of uint8 and do nothing else.
"""

# R records, D bytes of one image: 1,024 red, 1,024 green, 1,024 blue, row by row

import pickle
import reprlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from harness.data.binary import IMAGE_BYTES
from harness.errors import DataError

_REMEDY = "Unpack the archive again, or get it from the data set's own site."

# What an unpickler raises on bytes that are no pickle, or one of something else.
_DAMAGE = (
    pickle.UnpicklingError,
    AttributeError,
    EOFError,
    IndexError,
    KeyError,
    MemoryError,
    OverflowError,
    TypeError,
    ValueError,
)


class PickledBatch:
    """A file of the python version: {b"data": R x 3072 uint8, b"labels": [int, ...], ...}."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def check(self) -> None:
        """Raises DataError when the file is too small, or does not begin and end as a pickle; reads 2 bytes."""
        size_bytes = self.path.stat().st_size
        with self.path.open("rb") as file:
            first = file.read(1)
            file.seek(max(size_bytes - 1, 0))
            last = file.read(1)
        if size_bytes <= IMAGE_BYTES or first != pickle.PROTO or last != pickle.STOP:
            raise DataError(
                f"{self.path}: {size_bytes} bytes that do not begin and end as a pickled batch does, so the file is "
                f"truncated or not CIFAR-10. {_REMEDY}"
            )

    def count(self) -> int:
        """Records in the file. Raises DataError when it is not a batch of CIFAR-10."""
        return len(self._content[1])

    def read(self, records: Sequence[int]) -> tuple[np.ndarray, list[int]]:
        """uint8 images R, D and labels of these records. Raises DataError when the file is not a batch."""
        images_RD, labels = self._content
        return images_RD[records], [labels[record] for record in records]

    @cached_property
    def _content(self) -> tuple[np.ndarray, list[int]]:
        self.check()
        with self.path.open("rb") as file:
            try:
                batch = _ArrayUnpickler(file, self.path).load()
            except _DAMAGE as error:
                raise DataError(
                    f"{self.path}: not a pickled batch ({type(error).__name__}: {error}). {_REMEDY}"
                ) from None
        array = batch.get(b"data") if isinstance(batch, dict) else None
        labels = batch.get(b"labels") if isinstance(batch, dict) else None
        images_RD = array.values if isinstance(array, _PickledArray) else None
        if (
            images_RD is None
            or images_RD.shape[1:] != (IMAGE_BYTES,)
            or not isinstance(labels, list)
            or not all(isinstance(label, int) for label in labels)
            or not len(labels) == len(images_RD) > 0
        ):
            raise DataError(
                f"{self.path}: not a batch of CIFAR-10; that is a dict with b'data', a uint8 array of some images x "
                f"{IMAGE_BYTES}, and b'labels', a list of as many integers. {_REMEDY}"
            )
        return images_RD, labels


class _ArrayType:
    """Stands for numpy.dtype; uint8 is the only one there is, so an array of objects cannot be asked for."""

    def __init__(self, name: object, align: object = False, copy: object = False) -> None:
        if name not in ("u1", b"u1"):
            raise pickle.UnpicklingError(f"it holds an array of {reprlib.repr(name)}; uint8 is allowed, objects never")

    def __setstate__(self, state: object) -> None:
        """Byte order, fields and alignment: nothing of it changes single bytes."""


class _PickledArray:
    """Stands for what numpy's _reconstruct returns: an empty array that is filled by its state."""

    values: np.ndarray | None = None

    def __init__(self, subtype: object, shape: object, kind: object) -> None:
        if subtype is not _NDARRAY:
            raise pickle.UnpicklingError("it holds a subclass of numpy.ndarray")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _version, shape, kind, fortran, content = state
        if not isinstance(kind, _ArrayType) or not isinstance(content, bytes):
            raise pickle.UnpicklingError("it holds an array that is not of uint8")
        self.values = np.frombuffer(content, np.uint8).reshape(shape, order="F" if fortran else "C")


def _latin1(text: str, encoding: str) -> bytes:
    """Stands for _codecs.encode, with which Python 3 writes bytes in protocol 2."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it asks for the codec {reprlib.repr(encoding)}")
    return text.encode("latin1")


# Neither callable nor with attributes to set: a pickle can only pass it on.
_NDARRAY = object()

_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _PickledArray,
    ("numpy._core.multiarray", "_reconstruct"): _PickledArray,
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): _ArrayType,
    ("_codecs", "encode"): _latin1,
}


class _ArrayUnpickler(pickle.Unpickler):
    def __init__(self, file: BinaryIO, path: Path) -> None:
        super().__init__(file, encoding="bytes")
        self._path = path

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        try:
            return _ALLOWED[module_name, global_name]
        except KeyError:
            raise DataError(
                f"{self._path}: asks for {module_name}.{global_name}; a batch of CIFAR-10 needs numpy's array "
                f"reconstruction only, so it was refused and nothing of it ran. {_REMEDY}"
            ) from None

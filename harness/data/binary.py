"""One file of CIFAR-10's "binary version": records of a label byte and 3,072 pixel bytes."""

# R records, D bytes of one image: 1,024 red, 1,024 green, 1,024 blue, row by row

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from harness.errors import DataError

IMAGE_BYTES = 3 * 32 * 32
RECORD_BYTES = 1 + IMAGE_BYTES


class BinaryBatch:
    """A file of the binary version; any whole number of records, so that a part of the data set will do."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def check(self) -> None:
        """Raises DataError when the file does not hold whole records."""
        self.count()

    def count(self) -> int:
        """Records in the file. Raises DataError when the last one is cut, or when there is none."""
        size_bytes = self.path.stat().st_size
        if size_bytes == 0 or size_bytes % RECORD_BYTES:
            raise DataError(
                f"{self.path}: {size_bytes} bytes; a batch file holds whole records of {RECORD_BYTES} bytes "
                f"(the published ones {10_000 * RECORD_BYTES} bytes), so this one is truncated or not CIFAR-10. "
                "Unpack the archive again."
            )
        return size_bytes // RECORD_BYTES

    def read(self, records: Sequence[int]) -> tuple[np.ndarray, list[int]]:
        """uint8 images R, D and labels of these records, without reading the others."""
        stored = np.memmap(self.path, np.uint8, mode="r").reshape(-1, RECORD_BYTES)[records]
        return stored[:, 1:], stored[:, 0].tolist()

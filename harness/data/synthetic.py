"""Random images with random labels: for sizes that no data set has, where only memory and time matter."""

# N batch, C channels, H height, W width

from collections.abc import Sequence
from typing import Literal

import numpy as np

from harness.errors import DataError

CLASS_COUNT = 10
SMALLEST_IMAGE = 8


def check(path: str | None, image_size: int) -> None:
    """Raises DataError for a path, which synthetic images do not have, and for an image below 8 pixels."""
    if path is not None:
        raise DataError(
            f"data.path = {path!r}; synthetic images are made, not read, so data.path must be null. "
            "Remove the path, or read it with data.name = 'cifar10'."
        )
    if image_size < SMALLEST_IMAGE:
        raise DataError(
            f"data.image_size = {image_size}; a synthetic image has at least {SMALLEST_IMAGE} pixels a side. "
            f"Set it to {SMALLEST_IMAGE} or more."
        )


def draw(
    image_size: int, split: Literal["train", "test"], batch_ids: Sequence[int], batch_size: int, seed: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Standard normal float32 images N, C, H, W and uniform int64 labels N of each batch.

    A batch depends on its id, the split and the seed alone, so any rank can make any batch.
    """
    batches = []
    for batch_id in batch_ids:
        generator = np.random.default_rng([seed, int(split == "test"), batch_id])
        images_NCHW = generator.standard_normal((batch_size, 3, image_size, image_size), dtype=np.float32)
        batches.append((images_NCHW, generator.integers(CLASS_COUNT, size=batch_size, dtype=np.int64)))
    return batches

"""Input data: which data sets there are, whether one can be used, and batches of it on the host."""

import difflib
from typing import TYPE_CHECKING, Literal

from harness.data import cifar10, synthetic
from harness.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

Split = Literal["train", "test"]

CHANNELS = 3
DATA_SETS = {"cifar10": len(cifar10.CLASSES), "synthetic": synthetic.CLASS_COUNT}


def num_classes(name: str) -> int:
    """Number of classes of a data set. Raises DataError when it is unknown."""
    if name not in DATA_SETS:
        near = difflib.get_close_matches(name.lower(), DATA_SETS, n=1)
        remedy = f"Did you mean {near[0]!r}?" if near else "Use one of these."
        raise DataError(f"data.name = {name!r}; the data sets are {', '.join(DATA_SETS)}. {remedy}")
    return DATA_SETS[name]


def check_data(name: str, path: str | None, image_size: int) -> None:
    """Look whether `load_data` will find what it needs, by names and sizes of files; reads no images.

    Raises DataError for an unknown data set, a folder that is missing or holds neither version of the data set, a
    file that is missing or truncated, and an `image_size` (pixels, height and width) that the data set does not have.
    """
    num_classes(name)
    if name == "synthetic":
        synthetic.check(path, image_size)
    else:
        cifar10.check(path, image_size)


def load_data(
    name: str,
    path: str | None,
    image_size: int,
    *,
    batch_size: int,
    batches: int,
    seed: int,
    split: Split = "train",
    rank: int = 0,
    world_size: int = 1,
) -> "list[tuple[Tensor, Tensor]]":
    """One rank's batches on the host: normalized float32 images N, C, H, W and int64 labels N.

    The same arguments give the same batches, and no global random state is read or changed. Batches and ranks have
    different samples; a set with fewer than `batches * world_size * batch_size` is drawn from again in the same order.
    `path` is the folder `cifar-10-batches-bin` or `cifar-10-batches-py`, or the one that holds it; None takes
    the shipped sample, 512 test images that serve as either split. `batch_size` is per rank; `seed` is at least 0.

    Raises DataError as `check_data` does, and for a file whose content is not the data set's.
    """
    # Planning calls check_data alone, and does so without loading torch.
    import torch

    num_classes(name)
    batch_ids = [index * world_size + rank for index in range(batches)]
    if name == "synthetic":
        synthetic.check(path, image_size)
        drawn = synthetic.draw(image_size, split, batch_ids, batch_size, seed)
    else:
        cifar10.check_image_size(image_size)
        drawn = cifar10.draw(path, split, batch_ids, batch_size, seed)
    return [(torch.from_numpy(images_NCHW), torch.from_numpy(labels_N)) for images_NCHW, labels_N in drawn]

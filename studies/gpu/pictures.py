"""CIFAR-10 on the device, and its augmentation there: a captured step picks, shifts and mirrors its own images."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from harness.data import load_data

IMAGE_SIZE = 32
# Images of a split of the published data set; the shipped sample serves as either.
COUNTS = {"train": 50_000, "test": 10_000}
SAMPLE_COUNT = 512
BORDER = 4


class Split(NamedTuple):
    images_NCHW: Tensor
    labels_N: Tensor


def load(path: str | None, device: torch.device) -> tuple[Split, Split]:
    """Training and test images, normalized, all of them on the device. Raises DataError."""

    def one(split: str, count: int) -> Split:
        (batch,) = load_data(
            "cifar10",
            path,
            IMAGE_SIZE,
            batch_size=count,
            batches=1,
            seed=0,
            split="train" if split == "train" else "test",
        )
        return Split(*(tensor.to(device) for tensor in batch))

    counts = COUNTS if path is not None else dict.fromkeys(COUNTS, SAMPLE_COUNT)
    return one("train", counts["train"]), one("test", counts["test"])


class Pictures(nn.Module):
    """The network behind its images: takes places in the training set, N, and gives logits.

    The images are no buffer: they are no part of the state.
    """

    def __init__(self, network: nn.Module, images_NCHW: Tensor) -> None:
        super().__init__()
        self.network = network
        self._images_NCHW = images_NCHW

    def forward(self, places_N: Tensor) -> Tensor:
        return self.network(augmented(self._images_NCHW[places_N]))


def augmented(images_NCHW: Tensor) -> Tensor:
    """Each image shifted by up to BORDER pixels either way, with zeros for what comes in, and mirrored or not.

    All draws are from the device's own generator, so that a graph draws anew in each replay.
    """
    count, _, height, width = images_NCHW.shape
    device = images_NCHW.device
    down_N111, right_N111 = torch.randint(2 * BORDER + 1, (2, count, 1, 1, 1), device=device)
    mirrored_N111 = torch.randint(2, (count, 1, 1, 1), device=device).bool()
    return shifted(images_NCHW, down_N111, right_N111, mirrored_N111, (height, width))


def shifted(
    images_NCHW: Tensor, down_N111: Tensor, right_N111: Tensor, mirrored_N111: Tensor, size: tuple[int, int]
) -> Tensor:
    """The part of each image, with its border, that begins `down` and `right`; mirrored where it is to be."""
    height, width = size
    rows = torch.arange(height, device=images_NCHW.device).view(1, 1, height, 1)
    columns = torch.arange(width, device=images_NCHW.device).view(1, 1, 1, width)
    columns = torch.where(mirrored_N111, width - 1 - columns, columns)
    bordered = functional.pad(images_NCHW, (BORDER,) * 4)
    places = (rows + down_N111) * (width + 2 * BORDER) + columns + right_N111
    flat = places.flatten(2).expand(-1, images_NCHW.shape[1], -1)
    return bordered.flatten(2).gather(2, flat).view_as(images_NCHW)

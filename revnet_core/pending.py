"""What a device is still computing, and whether the host would have to wait for it."""

import torch
from torch import Tensor


def is_blank(tensor: Tensor) -> bool:
    """A tensor without contents, on `meta` or a fake one, has nothing to say."""
    return tensor.device.type == "meta" or type(tensor) is not Tensor


def is_stream_captured() -> bool:
    """Whether CUDA only writes down what it is given."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


class Pending:
    """To be made when all that the reading needs is queued on the device of `found`.

    is_captured  whether it is part of a graph: then a replay finds it, and there is nothing here to wait for
    """

    def __init__(self, found: Tensor) -> None:
        self._device_type = found.device.type
        self._is_blank = is_blank(found)
        self.is_captured = self._device_type == "cuda" and is_stream_captured()
        self._event: torch.cuda.Event | None = None
        if self._device_type == "cuda" and not self._is_blank and not self.is_captured:
            self._event = torch.cuda.Event()
            self._event.record()

    @property
    def is_blank(self) -> bool:
        """Whether there is nothing to read."""
        return self._is_blank

    @property
    def on_host(self) -> bool:
        """Whether the device is the host itself, which never waits."""
        return self._device_type == "cpu"

    def is_ready(self) -> bool:
        """Whether reading it waits for nothing."""
        return self._event is None or self._event.query()

    def wait(self) -> None:
        """Until the device has come here."""
        if self._event is not None:
            self._event.synchronize()

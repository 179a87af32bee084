"""What is found on a device tells whether reading it would wait, and whether there is anything to read."""

from collections.abc import Callable

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from revnet_core.exactness import Verdict
from revnet_core.pending import Pending
from revnet_core.precision import Precision
from revnet_core.probe import Finding


def finding(device: str) -> Pending:
    return Finding(0, torch.ones(4, device=device))


def verdict(device: str) -> Pending:
    return Verdict(torch.tensor(True, device=device), torch.ones(2, device=device), Precision(reconstruction="exact"))


KINDS = pytest.mark.parametrize("found", [finding, verdict])


@KINDS
def test_on_the_cpu_nothing_waits(found: Callable[[str], Pending]) -> None:
    there = found("cpu")
    assert (there.on_host, there.is_ready(), there.is_blank) == (True, True, False)
    there.wait()


@KINDS
def test_without_contents_there_is_nothing_to_read(found: Callable[[str], Pending]) -> None:
    assert found("meta").is_blank
    with FakeTensorMode():
        for device in ("cpu", "cuda"):
            assert found(device).is_blank
            assert found(device).is_ready()

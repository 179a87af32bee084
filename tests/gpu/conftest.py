"""The device that these tests are of.

They are of a CUDA device, and are skipped where there is none. With REVNET_TEST_DEVICE=cpu they run on the CPU instead,
captured steps on a tape: whether the tests themselves work can be seen that way, but nothing of a GPU.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from revnet_core import graph_model, graphs
from revnet_core.cuda_graphs import CudaGraphs
from revnet_core.graphed import GraphedModel, checked, rehearse
from tests.core.tape import CpuGraphs

CHOSEN = os.environ.get("REVNET_TEST_DEVICE", "cuda")


@pytest.fixture(scope="session", autouse=True)
def _cublas_is_deterministic() -> None:
    # Read when cuBLAS is first used.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    if CHOSEN == "cpu":
        monkeypatch.setitem(graphs.GRAPHS, "cpu", CpuGraphs)
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def gpu(device: torch.device) -> torch.device:
    """For what nothing on the CPU can stand for."""
    if device.type != "cuda":
        pytest.skip("is about CUDA alone; REVNET_TEST_DEVICE is cpu")
    return device


@pytest.fixture(autouse=True)
def _deterministic(device: torch.device) -> Iterator[None]:
    """Captured steps are compared with eager ones bit for bit, which kernels that add in any order would not allow.

    Those that have no deterministic form say so in a warning; whether any of them matters here, a test finds out by
    comparing eager steps with eager ones.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    switches: Any = torch.utils.deterministic
    filled = switches.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    switches.fill_uninitialized_memory = False
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]):
            torch.manual_seed(0)
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        switches.fill_uninitialized_memory = filled
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32


class UnlikeCudaGraphs(CudaGraphs):
    """Gives out states that should be equal and are not."""

    def equal_states(self, count: int) -> list[torch.Generator]:
        return [state for _ in range(count) for state in super(UnlikeCudaGraphs, self).equal_states(1)]


@pytest.fixture
def unlike_states(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    unlike: Any = UnlikeCudaGraphs if device.type == "cuda" else partial(CpuGraphs, alike=False)
    monkeypatch.setitem(graphs.GRAPHS, device.type, unlike)


Graphed = Callable[..., AbstractContextManager[GraphedModel]]


@pytest.fixture
def graphed(device: torch.device) -> Graphed:
    """`graph_model`; on the CPU what it does around torch's capture, with the model's own forward for the graphs."""
    return graph_model if device.type == "cuda" else _without_graphs


@contextlib.contextmanager
def _without_graphs(model: nn.Module, *inputs: Tensor, **options: object) -> Iterator[GraphedModel]:
    buffers = [buffer.clone() for buffer in model.buffers()]
    rehearse(model, *inputs)
    with torch.no_grad():
        for buffer, before in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(before)
    model.forward = checked(model, model.forward, inputs)
    yield GraphedModel(0, ())
    del model.forward

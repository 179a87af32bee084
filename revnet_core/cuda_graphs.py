"""CUDA's graphs, as a captured training step needs them."""

import contextlib
import gc
from collections.abc import Callable, Iterator

import torch
from torch import Tensor


class CudaGraphs:
    """Of one device; see `revnet_core.graphs.Graphs`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # Autograd runs a backward where its forward ran, so the eager steps and the capture share one stream.
        self._stream = torch.cuda.Stream(device)
        self._default = torch.cuda.default_generators[
            torch.cuda.current_device() if device.index is None else device.index
        ]
        self._states: list[torch.Generator] = []

    def equal_states(self, count: int) -> list[torch.Generator]:
        first = torch.Generator(self._device)
        # From the global generator, so that torch.manual_seed decides these too.
        first.manual_seed(int(torch.randint(2**62, (), device=self._device)))
        states = [first, *(first.clone_state() for _ in range(count - 1))]
        self._states += states
        return states

    @contextlib.contextmanager
    def drawing_from(self, state: torch.Generator) -> Iterator[None]:
        own = self._default.graphsafe_get_state()
        self._default.graphsafe_set_state(state)
        try:
            yield
        finally:
            self._default.graphsafe_set_state(own)

    def eagerly(self, step: Callable[[], Tensor]) -> Tensor:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            out = step()
        current.wait_stream(self._stream)
        return out

    def capture(self, step: Callable[[], None]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        for state in self._states:
            graph.register_generator_state(state)
        self._states = []
        # What dies during a capture would ask the device.
        gc.collect()
        # After an error torch leaves the captured stream the current one.
        with (
            torch.cuda.stream(torch.cuda.current_stream(self._device)),
            # Other threads go on as they like: one that pins a loader's batches, or NCCL's watch.
            torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"),
        ):
            step()
        return graph

    def host_flag(self) -> Tensor:
        return torch.zeros((), dtype=torch.bool, pin_memory=True)

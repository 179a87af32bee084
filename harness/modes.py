"""How a trial's step is executed: as it is written, compiled, or replayed as a CUDA graph; and where that cannot be."""

import contextlib
import re
from collections.abc import Iterator
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from harness.errors import MeasurementError, PredictionError
from harness.measure.fakes import first_line
from harness.trials import TrialSpec
from revnet_core import UnsupportedError
from revnet_core.precision import AUTOCAST_DTYPES

COMPILE_METRICS = ("compile_s", "compile_cache_hits")
GRAPH_METRIC = "graph_pool_bytes"
# What dynamo says of an error that the model raises while it is traced.
_RAISED = re.compile(r"""UnsupportedError\((["'])(?P<message>.*)\1\)$""", re.MULTILINE)


def check_modes(spec: TrialSpec, device: Literal["cpu", "cuda"]) -> None:
    """Raises UnsupportedError for what cannot be, whatever the model is."""
    if spec.cuda_graph:
        if device == "cpu":
            raise UnsupportedError(
                "cuda_graph = true: a CUDA graph needs a CUDA device; this device is a CPU. Set it to false."
            )
        if spec.zero_stage == 3:
            raise UnsupportedError(
                "cuda_graph = true under ZeRO-3, which moves the parameters in and out as the step goes; a graph finds "
                "them where they were. Use zero_stage 0 to 2."
            )
        if spec.activations == "offloaded":
            raise UnsupportedError(
                "cuda_graph = true with offloaded activations, for which the step waits for the host; a graph cannot. "
                "Choose other activations."
            )
        if spec.guard_every:
            raise UnsupportedError(
                "cuda_graph = true with a guard, which compares now and then; a graph does the same each time. Set "
                "guard_every to 0."
            )
        if spec.compile:
            raise UnsupportedError("cuda_graph = true and compile = true: a step has one of the two. Set one to false.")
    if spec.compile and spec.zero_stage == 3:
        raise UnsupportedError(
            "compile = true under ZeRO-3, which gathers the parameters of each module as it runs; a compiled graph has "
            "no place for that. Use zero_stage 0 to 2."
        )
    if spec.compile and device == "cpu" and spec.resources.memory_bytes is not None:
        raise UnsupportedError(
            "compile = true with resources.memory on a CPU, where the limit is on the process: what the compiler takes "
            "would count against it. Leave out one of the two."
        )


def check_predictable(spec: TrialSpec, device: Literal["cpu", "cuda"]) -> None:
    """Raises UnsupportedError as `check_modes`, and PredictionError where the step is not the one that is predicted."""
    check_modes(spec, device)
    if spec.compile:
        raise PredictionError(
            "compile = true: a prediction is of the uncompiled step, and the compiler decides anew what is kept."
        )


def check_compiler(device: torch.device) -> None:
    """Raises UnsupportedError where this machine lacks what `torch.compile` generates code with."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler
    from torch.utils._triton import has_triton

    if device.type == "cuda":
        if not has_triton():
            raise UnsupportedError(
                "compile = true: torch.compile generates Triton code for a GPU, and there is no Triton that works with "
                "this one. Install it, or set compile to false."
            )
        return
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise UnsupportedError(
            "compile = true: torch.compile generates C++, and this machine has no C++ compiler that works. Install g++ "
            "or name one in the environment variable CXX, or set compile to false."
        ) from None


class Findings(Protocol):
    """What a trial found out so far."""

    metrics: dict[str, int | float | None]
    unmeasured: dict[str, str]


class CompiledSteps:
    """What compiling took of a training's steps; asked after the first, after the warm-up and after the last."""

    def __init__(self, spec: TrialSpec) -> None:
        self._on = spec.compile
        self.metrics: dict[str, int | float | None] = {}
        self.unmeasured: dict[str, str] = {}
        self._graphs = 0
        if not self._on:
            self.unmeasured = dict.fromkeys(COMPILE_METRICS, "the study's compile is off")

    @contextlib.contextmanager
    def tracing(self) -> Iterator[None]:
        """Around the steps. Raises UnsupportedError, with the core's own words, for what is not one graph."""
        if not self._on:
            yield
            return
        from torch._dynamo.exc import Unsupported

        try:
            yield
        except Unsupported as error:
            raise UnsupportedError(why_not_one_graph(error)) from error

    def took(self, index: int, seconds: float, *, measured: bool) -> None:
        """A step is over. measured: whether its time is told.

        Raises MeasurementError where it is and something was compiled in it.
        """
        if not self._on:
            return
        from torch._dynamo.utils import counters

        graphs = counters["stats"]["unique_graphs"]
        if index == 0:
            self.metrics["compile_s"] = seconds
            self.metrics["compile_cache_hits"] = counters["inductor"]["fxgraph_cache_hit"]
        elif measured and graphs > self._graphs:
            raise MeasurementError(
                f"the model was compiled again in step {index}, counted from 0, which is measured: its time is not a "
                "step's. Give more warmup_steps."
            )
        self._graphs = graphs


def why_not_one_graph(error: BaseException) -> str:
    """In the words of the core, where it was the core that refused; else in dynamo's."""
    found = _RAISED.search(str(error))
    if found:
        return found["message"]
    return f"compile = true: the model cannot be one compiled graph ({first_line(error)}). Set it to false."


@contextlib.contextmanager
def graphed(spec: TrialSpec, model: nn.Module, x: Tensor, result: Findings) -> Iterator[None]:
    """Inside, forward and backward of `model` on batches like `x` are replayed; after it they are as they were.

    Raises UnsupportedError where they cannot be captured, and torch.OutOfMemoryError where the capture has no room.
    """
    if not spec.cuda_graph:
        result.unmeasured[GRAPH_METRIC] = "the study's cuda_graph is off"
        yield
        return
    from revnet_core import CaptureError, graph_model

    dtype = AUTOCAST_DTYPES[spec.compute]
    with contextlib.ExitStack() as stack:
        # As the engine's, which is around the forward of each step.
        with (
            contextlib.nullcontext()
            if dtype is None
            else torch.autocast(x.device.type, dtype=dtype, cache_enabled=False)
        ):
            try:
                graph = stack.enter_context(graph_model(model, x))
            except CaptureError as error:
                shortage = _shortage(error)
                if shortage is not None:
                    raise shortage from None
                raise UnsupportedError(str(error)) from error
        result.metrics[GRAPH_METRIC] = int(graph.pool_bytes)
        yield
    # So that the graph's pool is no part of what eager steps are measured to reserve.
    torch.cuda.empty_cache()


def _shortage(error: BaseException | None) -> torch.OutOfMemoryError | None:
    """The shortage of memory that an error came of."""
    while error is not None and not isinstance(error, torch.OutOfMemoryError):
        error = error.__cause__ or error.__context__
    return error

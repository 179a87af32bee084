"""Step times of RevNet-110: every activations, eager and as one CUDA graph, beside memcnn and RevTorch.

Each round runs one step of everyone, in an order that moves on; only times of the same round are divided. A step is
forward, loss, backward and update. Peak, of eager steps: allocated in a step above what is allocated between steps.
Pool, of graphs: what the capture took of the device, for as long as the graph is there.
"""

import importlib.util
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from harness.measure.timing import time_step
from studies.gpu.place import NO_COUNTERS, NO_GRAPHS, free, set_compute
from studies.gpu.results import Result, Target, markdown, mib
from studies.gpu.runners import EAGER, GRAPH, Runner, Sizes, measures_of, runners_of, step_of
from studies.peers.measure import interleaved, quartiles

# Eager ones, the capture, and replays.
WARMUP_CALLS = 8
SMALL = Sizes(depth=14, batch_size=2, image_size=8, channels=(4, 8, 8))
STORED_EAGER, STORED_GRAPH, OURS = f"stored, {EAGER}", f"stored, {GRAPH}", f"reconstructed, {GRAPH}"
AIMS = {STORED_EAGER: 0.5, STORED_GRAPH: 1.35}
# Of which the aims speak.
AIMED_COMPUTE = "bf16"
Step = Callable[[], Tensor]


def measure(device: torch.device, sizes: Sizes, compute: str, rounds: int) -> Result:
    """Raises HarnessError for a `compute` that the device has not."""
    result = _measured("steps", runners_of(sizes, compute), device, sizes, compute, rounds)
    rows = {row["name"]: row for row in result.rows}
    result.targets = [_target(base, most, rows, compute) for base, most in AIMS.items()]
    return result


def measure_measures(device: torch.device, sizes: Sizes, compute: str, rounds: int) -> Result:
    """What may make a step faster, one by one. Raises as `measure`."""
    return _measured("measures", measures_of(sizes, compute), device, sizes, compute, rounds)


def _measured(
    benchmark: str, runners: Sequence[Runner], device: torch.device, sizes: Sizes, compute: str, rounds: int
) -> Result:
    set_compute(compute, device)
    settings = {**vars(sizes), "compute": compute, "rounds": rounds, "device": device.type}
    result = Result(benchmark=f"{benchmark}-{compute}", settings=settings)
    batch = sizes.batch(device)
    steps: dict[str, Step] = {}
    rows: dict[str, dict[str, Any]] = {}
    for runner in runners:
        rows[runner.name] = row = {"name": runner.name, "package": runner.package}
        if reason := _why_not(runner, device):
            row["reason"] = reason
            continue
        try:
            steps[runner.name] = _warm(runner, batch, device, row)
        except Exception as error:  # noqa: BLE001 - other libraries fail in any way, and each is a row
            row["reason"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        free(device)
    # Once more, so that nobody's first measured step takes memory from the device.
    for step in steps.values():
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(rounds):
        for name in interleaved(list(steps), round_):
            times[name].append(time_step(device, partial(_take, steps[name])))
    for name, own in times.items():
        rows[name] |= _figures(own, times)
    result.rows = list(rows.values())
    if device.type == "cpu":
        result.unmeasured |= {"peak and pool": NO_COUNTERS}
    return result


def as_text(result: Result) -> str:
    headings = ["step", "ms [quartiles]", f"/ {STORED_EAGER}", f"/ {STORED_GRAPH}", "peak MiB", "pool MiB"]
    cells = [_cells(row) for row in result.rows]
    reasons = [f"{row['name']}: not measured; {row['reason']}" for row in result.rows if "reason" in row]
    return "\n".join([markdown(headings, cells), "", *reasons, *result.closing_lines()])


def _why_not(runner: Runner, device: torch.device) -> str | None:
    if runner.how == GRAPH and device.type != "cuda":
        return NO_GRAPHS
    if runner.package and importlib.util.find_spec(runner.package) is None:
        return f"{runner.package} is not installed (pip install --no-deps {runner.package})"
    return None


def _warm(runner: Runner, batch: tuple[Tensor, Tensor], device: torch.device, row: dict[str, Any]) -> Step:
    model = runner.build().to(device=device, memory_format=runner.layout).train()  # pyright: ignore[reportCallIssue]
    images_NCHW, labels_N = batch
    batch = images_NCHW.to(memory_format=runner.layout), labels_N
    step = step_of(model, batch, graph=runner.how == GRAPH)
    for _ in range(WARMUP_CALLS):
        # The call that captures is the first behind the eager ones; nothing else takes memory of the device in it.
        free(device)
        before_bytes = torch.cuda.memory_reserved(device) if device.type == "cuda" else 0
        captured = step.captured
        step(batch)
        if step.captured and not captured:
            row["pool_bytes"] = torch.cuda.memory_reserved(device) - before_bytes
    if device.type == "cuda" and runner.how == EAGER:
        torch.cuda.synchronize(device)
        between_bytes = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step(batch)
        torch.cuda.synchronize(device)
        row["peak_bytes"] = torch.cuda.max_memory_allocated(device) - between_bytes
    step.raise_if_inexact()
    return partial(step, batch)


def _take(step: Step) -> None:
    step()


def _figures(own: Sequence[float], times: dict[str, list[float]]) -> dict[str, Any]:
    q1, middle, q3 = quartiles(own)
    figures: dict[str, Any] = {"step_s": list(own), "step_median_s": middle, "step_q1_s": q1, "step_q3_s": q3}
    for base in (STORED_EAGER, STORED_GRAPH):
        if base in times:
            figures[f"ratio to {base}"] = quartiles([a / b for a, b in zip(own, times[base], strict=True)])
    return figures


def _target(base: str, most: float, rows: dict[str, dict[str, Any]], compute: str) -> Target:
    what = f"{compute}: step time of {OURS}, over {base}"
    if compute != AIMED_COMPUTE:
        return Target(what=what, most=most, reason=f"the aim is for {AIMED_COMPUTE}")
    ratio = rows[OURS].get(f"ratio to {base}")
    if ratio is None:
        missing = rows[OURS] if "reason" in rows[OURS] else rows[base]
        return Target(what=what, most=most, reason=missing["reason"])
    return Target(what=what, most=most, figure=ratio[1])


def _cells(row: dict[str, Any]) -> list[str]:
    if "step_s" not in row:
        return [row["name"], "not measured", *[""] * 4]
    q1, middle, q3 = (1e3 * row[f"step_{name}_s"] for name in ("q1", "median", "q3"))
    ratios = [row.get(f"ratio to {base}") for base in (STORED_EAGER, STORED_GRAPH)]
    return [
        row["name"],
        f"{middle:.2f} [{q1:.2f}, {q3:.2f}]",
        *("" if ratio is None else f"{ratio[1]:.3f}" for ratio in ratios),
        mib(row.get("peak_bytes")),
        mib(row.get("pool_bytes")),
    ]

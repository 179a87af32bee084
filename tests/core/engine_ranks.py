"""Three training steps under a parallel engine: what each rank of a test's process group runs.

Legend: N batch, C channels, H height, W width.
"""

import contextlib
import datetime
import gc
import os
import sys
import traceback
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from revnet_core import Guard, Precision, ReversibleSequence
from tests.core.engine_cases import DDP, FLAWS, GUARDED, NETWORKS, TOLERATED, ZERO, Case
from tests.core.nets import IMAGE_NCHW, twin_of, weighted_sum

RANKS = 2
STEPS = 3
LEARNING_RATE = 0.05
COLLECTIVE_TIMEOUT = datetime.timedelta(seconds=30)

# By kind ("parameters", "buffers") and name: the value after all steps less the value before them, in float64. Under a
# guard also "checks", the relative error by step and block, and "warnings", which it gave.
Changes = dict[str, dict[str, Tensor]]


def key(case: Case, run: str) -> str:
    """Under which name a rank saves what came of a run."""
    return f"{case}/{run}"


def run_rank(rank: int, runs: Sequence[tuple[Case, str]], folder: str) -> None:
    """Do all runs and save {key: changes, or the traceback of what was raised}."""
    with Path(folder, f"rank{rank}.log").open("w") as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
    torch.set_num_threads(1)
    # DeepSpeed looks for these and searches for MPI otherwise.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "DS_ACCELERATOR": "cpu"}
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", rendezvous, COLLECTIVE_TIMEOUT, rank=rank, world_size=RANKS)
    results: dict[str, Changes | str] = {}
    for case, run in runs:
        try:
            results[key(case, run)] = trained(case, run)
        except Exception:  # noqa: BLE001 - one run that fails must not cost the results of the others
            results[key(case, run)] = traceback.format_exc()
    torch.save(results, Path(folder, f"rank{rank}.pt"))
    dist.destroy_process_group()


def trained(case: Case, run: str) -> Changes:
    """The change of every parameter and buffer by three steps, in float64."""
    activations, flaw = FLAWS.get(run, (run, None))
    action = None
    if run in GUARDED:
        activations = "reconstructed"
        action, flaw = GUARDED[run]
    torch.manual_seed(0)
    precision = Precision(reconstruction=case.reconstruction)
    dtype = torch.float64 if case.reconstruction == "fp64" else torch.float32
    model = twin_of(NETWORKS[case.network](), activations).to(dtype)
    for module in model.modules():
        if isinstance(module, ReversibleSequence):
            module.precision = precision
    if flaw:
        flaw(model)
    guard = Guard(every=1, tolerance=TOLERATED, action=action).attach(model) if action else None
    before = snapshot(model)
    micro_batches = [
        [inputs_of(case, step, micro, dtype) for micro in range(case.accumulation)] for step in range(STEPS)
    ]
    # Once and not at every step: what a step draws depends on what earlier ones drew.
    torch.manual_seed(10 + dist.get_rank())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        after = (train_zero if case.engine in ZERO else train_ddp)(case, model, micro_batches)
    changes = {
        kind: {name: tensor.double() - before[kind][name].double() for name, tensor in tensors.items()}
        for kind, tensors in after.items()
    }
    return changes if guard is None else changes | answers(guard, [str(warning.message) for warning in caught])


def answers(guard: Guard, warned: list[str]) -> Changes:
    return {
        "checks": {f"{report.step} {report.where}": torch.tensor(report.rel) for report in guard.history},
        "warnings": {text: torch.ones(()) for text in warned if "relative error" in text},
    }


def inputs_of(case: Case, step: int, micro: int, dtype: torch.dtype) -> dict[str, Any]:
    """A batch that differs between ranks; the branch is used by both, then by none, then by one of them where the
    engine can do that with stored activations (DeepSpeed cannot)."""
    rank = dist.get_rank()
    channels = 3 if case.network != "chain_first" else IMAGE_NCHW[1]
    draws = torch.Generator().manual_seed(100 * rank + 10 * step + micro)
    inputs: dict[str, Any] = {"x_NCHW": torch.randn(4, channels, 5, 5, generator=draws, dtype=dtype)}
    if case.network == "branching":
        inputs["branching"] = step == 0 or (step == 2 and (rank == 0 or case.engine in ZERO))
    return inputs


def snapshot(model: nn.Module) -> Changes:
    return {"parameters": copies(model.named_parameters()), "buffers": copies(model.named_buffers())}


def copies(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in named}


def train_ddp(case: Case, model: nn.Module, micro_batches: list[list[dict[str, Any]]]) -> Changes:
    replica = model if case.engine == "alone" else DistributedDataParallel(model, **DDP[case.engine])
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9)
    for step in micro_batches:
        for index, inputs in enumerate(step, start=1):
            last = index == len(step)
            waiting = contextlib.nullcontext() if last else replica.no_sync()  # pyright: ignore[reportCallIssue]
            with waiting:
                weighted_sum(replica(**inputs)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return snapshot(model)


def train_zero(case: Case, model: nn.Module, micro_batches: list[list[dict[str, Any]]]) -> Changes:
    import deepspeed

    # DeepSpeed would compile a shared-memory collective at its first start: 50 s and a C++ compiler needed.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Stage 3 collects garbage at its start: 0.4 s each time with all that the imports left.
    gc.freeze()
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9),
        config={
            "train_micro_batch_size_per_gpu": 4,
            "gradient_accumulation_steps": case.accumulation,
            # DeepSpeed's 1.0 would hide a gradient of the wrong scale.
            "gradient_clipping": 0.0,
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 2**31,
            "zero_optimization": ZERO[case.engine],
        },
    )
    for step in micro_batches:
        for inputs in step:
            engine.backward(weighted_sum(engine(**inputs)))
            engine.step()
    whole = contextlib.nullcontext()
    if ZERO[case.engine]["stage"] == 3:
        whole = deepspeed.zero.GatheredParameters(list(model.parameters()))
    with whole:
        after = snapshot(model)
    engine.destroy()
    return after

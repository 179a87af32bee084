"""The only importer of deepspeed: a training engine around a model, on this process's device."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from harness.measure.live import Storage
from harness.ranks import INIT_METHOD, LOOPBACK
from revnet_core import UnsupportedError

AUTOCAST = {"bf16": "bfloat16", "fp16": "float16"}
# Modules of DeepSpeed's whose tensors are those of the layer that they stand in for.
_LAYERS = "deepspeed.runtime.zero.linear"
_GATHERS_PARAMETERS = "deepspeed.runtime.zero.partition_parameters"


def pick_device(gpus_per_worker: int | None) -> torch.device:
    """This rank's device: a GPU where there is one, unless the trial asks for none.

    Raises UnsupportedError when a GPU is asked for and there is none.
    """
    if torch.cuda.is_available() and gpus_per_worker != 0:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        torch.cuda.set_device(device)
        return device
    if gpus_per_worker:
        raise UnsupportedError(f"the trial asks for {gpus_per_worker} GPU per worker and this process sees none.")
    return torch.device("cpu")


def set_compute(compute: str) -> None:
    """Set the process-wide switches that tell fp32 from tf32; autocast sees to the others.

    Raises UnsupportedError where DeepSpeed does not support the precision on this device.
    """
    torch.backends.cuda.matmul.allow_tf32 = compute == "tf32"
    torch.backends.cudnn.allow_tf32 = compute == "tf32"
    accelerator = get_accelerator()
    assert accelerator is not None  # DeepSpeed falls back to the CPU
    device = accelerator.device_name()
    if compute == "fp16" and not accelerator.is_fp16_supported():
        raise UnsupportedError(
            f"compute = 'fp16': DeepSpeed does not support it on this device ({device}). Use bf16 or fp32."
        )
    if compute == "bf16" and not accelerator.is_bf16_supported():
        raise UnsupportedError(f"compute = 'bf16': DeepSpeed does not support it on this device ({device}). Use fp32.")
    if compute == "tf32" and device == "cpu":
        raise UnsupportedError("compute = 'tf32' is a mode of NVIDIA GPUs; this device is a CPU. Use fp32.")


class TrainingEngine:
    """One model under DeepSpeed with SGD and momentum 0.9.

    model     as given, though under ZeRO its parameters lie elsewhere than before
    compiled  whether its forward is compiled in place, as one graph; the first step does it
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        batch_size: int,
        compute: str,
        zero_stage: int,
        learning_rate: float,
        extra_config: dict[str, Any],
        compiled: bool = False,
    ) -> None:
        # DeepSpeed would compile a shared-memory collective at its first start: 50 s and a C++ compiler needed,
        # for something that a measured step on one rank never calls.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.model = model
        self.compiled = compiled
        self._zero_stage = zero_stage
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        parameter_count = sum(p.numel() for p in model.parameters())
        optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=0.9)
        config = engine_config(
            batch_size=batch_size,
            compute=compute,
            zero_stage=zero_stage,
            parameter_count=parameter_count,
            extra=extra_config,
        )
        self._engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        if compiled:
            # Its forward alone: whatever hooks DeepSpeed has on the model stay outside of the graph.
            model.forward = torch.compile(model.forward, fullgraph=True)

    def forward(self, x: Tensor) -> Tensor:
        return self._engine(x)

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)

    def step(self) -> None:
        self._engine.step()

    def allocate_gradients(self) -> None:
        """Give every parameter its gradient before a measured step, so that it is not counted as activation.

        Under ZeRO 1 to 3 the engine keeps reduced gradients in buffers of its own making during backward; they
        stay in the figure.
        """
        if self._zero_stage == 0:
            for parameter in self._parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)

    def held_tensors(self) -> dict[str, list[Tensor]]:
        """What this rank keeps for its share of the model, by category; one tensor may be a view of another.

        parameter  of the model, and under ZeRO-3 this rank's partition of them
        gradient   of the parameters or of this rank's partition, and the buckets in which they are reduced
        optimizer  momentum, which SGD makes in the first step, and under ZeRO the master weights of the partition
        buffer     of the model
        """
        optimizer: Any = self._engine.optimizer
        inner = getattr(optimizer, "optimizer", optimizer)
        parameters = list(self.model.parameters())
        partitions = _tensors([getattr(parameter, "ds_tensor", None) for parameter in parameters])
        masters = _tensors_of(optimizer, "single_partition_of_fp32_groups", "fp32_partitioned_groups_flat")
        reduced = _tensors_of(optimizer, "averaged_gradients", "grad_partitions_flat_buffer", "ipg_buckets")
        return {
            "parameter": [*parameters, *partitions],
            "gradient": _tensors([tensor.grad for tensor in (*parameters, *masters)]) + reduced,
            "optimizer": masters + _tensors(dict(inner.state)),
            "buffer": list(self.model.buffers()),
        }

    @staticmethod
    def category_of(storage: Storage) -> str | None:
        """What a storage of a step is if DeepSpeed made it for itself: a "parameter" gathered under ZeRO-3, or a
        "gradient" flattened or in a bucket. None for all others."""
        if storage.caller == _GATHERS_PARAMETERS:
            return "parameter"
        ours = storage.caller.partition(".")[0] == "deepspeed" and storage.caller != _LAYERS
        # A scaled loss is no gradient.
        is_scalar = storage.nbytes <= torch.float64.itemsize
        return "gradient" if ours and storage.phase == "backward" and not is_scalar else None

    def close(self) -> None:
        self._engine.destroy()


def _tensors_of(owner: object, *names: str) -> list[Tensor]:
    return [tensor for name in names for tensor in _tensors(getattr(owner, name, None))]


def _tensors(value: object) -> list[Tensor]:
    """The tensors in nested containers, as DeepSpeed and torch keep them."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return _tensors(list(value.values()))
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in _tensors(item)]
    return _tensors(vars(value)) if dataclasses.is_dataclass(value) else []


def engine_config(
    *, batch_size: int, compute: str, zero_stage: int, parameter_count: int, extra: dict[str, Any]
) -> dict[str, Any]:
    """The DeepSpeed configuration of a trial: the study's own keys under what the harness sets.

    gradient_clipping is 0 rather than DeepSpeed's 1.0, which would hide a gradient of the wrong scale; buckets are
    no larger than the model rather than 5e8 elements (1.9 GiB), which would swamp the activations.
    """
    bucket = max(1, parameter_count)
    zero: dict[str, Any] = {"reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    if zero_stage == 3:
        # Otherwise parameters stay gathered through the whole reversible backward.
        zero |= {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
    zero |= extra.get("zero_optimization", {})
    config: dict[str, Any] = {
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
        **extra,
        "train_micro_batch_size_per_gpu": batch_size,
        "gradient_accumulation_steps": 1,
        "zero_optimization": zero | {"stage": zero_stage},
    }
    if compute in AUTOCAST:
        config["torch_autocast"] = {"enabled": True, "dtype": AUTOCAST[compute]}
    return config


def join_ranks(device: torch.device, scratch: Path) -> None:
    """Form the process group of this trial's ranks; a process that nobody gave a RANK is a group of its own."""
    if "RANK" not in os.environ:
        # DeepSpeed looks for these and searches for MPI otherwise.
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", INIT_METHOD: f"file://{scratch}/rendezvous"}
        os.environ |= LOOPBACK
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=os.environ.get(INIT_METHOD, "env://"),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )


def leave_ranks() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def gather(value: Any) -> list[Any]:
    """`value` of every rank, on every rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values

"""What DeepSpeed's ZeRO keeps on a rank: its share of the model's state, and buffers for gradients in the backward."""

from typing import NamedTuple

from torch import nn

from harness.trials import TrialSpec
from revnet_core.precision import AUTOCAST_DTYPES


class ModelSize(NamedTuple):
    """Of the whole model; trained: its parameters that need a gradient."""

    parameter_count: int
    parameter_bytes: int
    trained_bytes: int
    buffer_bytes: int

    @classmethod
    def of(cls, model: nn.Module) -> "ModelSize":
        parameters = list(model.parameters())
        return cls(
            parameter_count=sum(p.numel() for p in parameters),
            parameter_bytes=sum(p.nbytes for p in parameters),
            trained_bytes=sum(p.nbytes for p in parameters if p.requires_grad),
            buffer_bytes=sum(b.nbytes for b in model.buffers()),
        )


class ModelState(NamedTuple):
    """Bytes of one rank: the largest share, where they are not equal."""

    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    buffer_bytes: int


def divided(model: ModelSize, stage: int, workers: int) -> ModelState:
    """Each stage divides one thing more: 1 the optimizer's state, 2 gradients, 3 parameters."""
    return ModelState(model.parameter_bytes, model.trained_bytes, model.trained_bytes, model.buffer_bytes)


def gradients_pile_up(stage: int) -> bool:
    """Whether the gradients by parameters are allocated in the backward and stay to its end.

    In stage 0 the harness makes them before the step, and from stage 2 on DeepSpeed moves each into a bucket as it
    comes.
    """
    return stage == 1


def bucket_bytes(spec: TrialSpec, parameter_count: int) -> int:
    """Of the buffers in which stages 1 and 2 collect gradients, made at the start of each backward.

    One for each dtype in which gradients are reduced, and two where communication overlaps with computing; all are of
    the dtype that gradients are summed in, fp32.
    """
    zero = spec.deepspeed.get("zero_optimization")
    options = zero if isinstance(zero, dict) else {}
    if spec.zero_stage not in (1, 2) or not options.get("contiguous_gradients", True):
        return 0
    fp32_bytes = 4
    dtypes = 1 if AUTOCAST_DTYPES[spec.compute] is None else 2
    buckets = dtypes * (2 if options.get("overlap_comm") else 1)
    return buckets * fp32_bytes * int(str(options.get("reduce_bucket_size", parameter_count)))

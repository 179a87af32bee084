"""What DeepSpeed's ZeRO keeps on a rank: its share of the model's state, and buffers for gradients in the backward."""

from typing import Any, NamedTuple

from torch import nn

from harness.trials import TrialSpec
from revnet_core.precision import AUTOCAST_DTYPES

# DeepSpeed's own default.
PERSISTENCE_THRESHOLD = 100_000
FP32_BYTES = 4
# DeepSpeed's MEMORY_OPT_ALLREDUCE_SIZE, which it has no setting for.
FLATTENED_ELEMENTS = 500_000_000


class ModelSize(NamedTuple):
    """Of the whole model; trained: its parameters that need a gradient, small: those that stage 3 keeps whole, too."""

    parameter_count: int
    parameter_bytes: int
    trained_bytes: int
    buffer_bytes: int
    small_bytes: int
    largest_bytes: int

    @classmethod
    def of(cls, model: nn.Module, persistence_threshold: int) -> "ModelSize":
        parameters = list(model.parameters())
        return cls(
            parameter_count=sum(p.numel() for p in parameters),
            parameter_bytes=sum(p.nbytes for p in parameters),
            trained_bytes=sum(p.nbytes for p in parameters if p.requires_grad),
            buffer_bytes=sum(b.nbytes for b in model.buffers()),
            small_bytes=sum(p.nbytes for p in parameters if p.numel() <= persistence_threshold),
            largest_bytes=max((p.nbytes for p in parameters), default=0),
        )


class ModelState(NamedTuple):
    """Bytes of one rank: the largest share, where they are not equal."""

    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    buffer_bytes: int


def divided(model: ModelSize, spec: TrialSpec) -> ModelState:
    """Each stage divides one thing more: 1 the optimizer's state, 2 gradients, 3 parameters.

    From stage 1 on the optimizer has master weights beside its momentum. A gradient that belongs to two ranks is whole
    on both, so the largest share of gradients is known but for one. Stage 3 keeps the bucket in which they are reduced.
    """
    stage, workers = spec.zero_stage, spec.workers
    whole_bytes, trained_bytes = model.parameter_bytes, model.trained_bytes
    if stage == 0:
        return ModelState(whole_bytes, trained_bytes, trained_bytes, model.buffer_bytes)
    # In stages 1 and 2 each rank's part begins at a multiple of two elements.
    granule_bytes = FP32_BYTES * (1 if stage == 3 else 2)
    share_bytes = -(-trained_bytes // (granule_bytes * workers)) * granule_bytes
    if stage == 3:
        parameter_bytes = share_bytes + whole_bytes - trained_bytes + (model.small_bytes if workers > 1 else 0)
        return ModelState(
            parameter_bytes, share_bytes + one_bucket_bytes(spec, model), 2 * share_bytes, model.buffer_bytes
        )
    gradient_bytes = min(trained_bytes, share_bytes + model.largest_bytes) if workers > 1 else trained_bytes
    parameter_bytes = whole_bytes - trained_bytes + share_bytes * workers
    return ModelState(parameter_bytes, gradient_bytes, 2 * share_bytes, model.buffer_bytes)


def persistence_threshold(spec: TrialSpec) -> int:
    """Stage 3 keeps parameters of no more elements whole, too; the same for all trials of the other stages."""
    given = _options(spec).get("stage3_param_persistence_threshold") if spec.zero_stage == 3 else None
    return PERSISTENCE_THRESHOLD if given is None else int(given)


def held_at_start(state: ModelState, stage: int) -> int:
    """Bytes of the model's state before a step. In stages 1 and 2 there is no gradient yet: the backward makes them."""
    return sum(state) - (state.gradient_bytes if stage in (1, 2) else 0)


def gradients_pile_up(stage: int) -> bool:
    """Whether the gradients by parameters are allocated in the backward and stay to its end.

    In stage 0 the harness makes them before the step, and from stage 2 on DeepSpeed moves each into a bucket as it
    comes.
    """
    return stage == 1


def bucket_bytes(spec: TrialSpec, model: ModelSize) -> int:
    """Of the buffers in which stages 1 and 2 collect gradients, made at the start of each backward.

    One for each dtype in which gradients are reduced, and two where communication overlaps with computing; all are of
    the dtype that gradients are summed in, fp32.
    """
    options = _options(spec)
    if spec.zero_stage not in (1, 2) or not options.get("contiguous_gradients", True):
        return 0
    dtypes = 1 if AUTOCAST_DTYPES[spec.compute] is None else 2
    return dtypes * (2 if options.get("overlap_comm") else 1) * one_bucket_bytes(spec, model)


def flattened_bytes(stage: int, model: ModelSize) -> int:
    """Of the copy in which stage 0 reduces gradients, at the end of each backward, on a single rank too."""
    return min(model.trained_bytes, FLATTENED_ELEMENTS * FP32_BYTES) if stage == 0 else 0


def one_bucket_bytes(spec: TrialSpec, model: ModelSize) -> int:
    """The harness makes it as large as the model unless the study says otherwise."""
    return FP32_BYTES * int(str(_options(spec).get("reduce_bucket_size", model.parameter_count)))


def _options(spec: TrialSpec) -> dict[str, Any]:
    zero = spec.deepspeed.get("zero_optimization")
    return zero if isinstance(zero, dict) else {}

"""What a step asks of a device, whatever device: operations, bytes and kernels, counted on tensors without contents."""

from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._pytree import tree_leaves

from harness.data import CHANNELS
from harness.measure.fakes import blank_batch, fake_tensors, forward_loss
from harness.measure.flops import FlopCount
from harness.models import create, loss_of
from harness.trials import TrialSpec
from revnet_core.precision import AUTOCAST_DTYPES

# They allocate, and run nothing.
_ALLOCATIONS = ("empty", "new_empty")


class StepWork(NamedTuple):
    """Of one step of one rank, from the forward to the gradients.

    product_flops  of matrix products, convolutions and attention, as in `harness.measure.flops`
    product_bytes  that those read and write, each operand and result once
    other_bytes    that all other operations read and write
    kernels        operations that run something
    trained_bytes  of the parameters that have a gradient
    """

    product_flops: int
    product_bytes: int
    other_bytes: int
    kernels: int
    trained_bytes: int


class _WorkCount(FlopCount):
    def __init__(self) -> None:
        super().__init__()
        self.product_bytes = self.other_bytes = self.kernels = 0

    def ran(self, func: Any, arguments: Any, out: Any, flops: int) -> None:
        if func.overloadpacket.__name__.startswith(_ALLOCATIONS):
            return
        read, written = _tensors(arguments), _tensors(out)
        if not func._schema.is_mutable and written.keys() <= read.keys():
            return  # a view of what it was given, or a question about it
        nbytes = sum(read.values()) + sum(written.values())
        self.kernels += 1
        if flops:
            self.product_bytes += nbytes
        else:
            self.other_bytes += nbytes


def step_work(spec: TrialSpec) -> StepWork:
    """Of the trial's own step; to be called with the model's module imported (see `fake_tensors`).

    Raises UncountedError, and what the model raises.
    """
    autocast = AUTOCAST_DTYPES[spec.compute]
    with fake_tensors():
        model = create(spec)
        batch = blank_batch((spec.batch_size, CHANNELS, spec.data.image_size, spec.data.image_size))
        if spec.activations == "budgeted":
            forward_loss(model, loss_of, batch, autocast)
        with _WorkCount() as count:
            loss = forward_loss(model, loss_of, batch, autocast)
            count.end_forward()
            loss.backward()
    flops = count.result()
    return StepWork(
        product_flops=flops.forward + flops.backward,
        product_bytes=count.product_bytes,
        other_bytes=count.other_bytes,
        kernels=count.kernels,
        trained_bytes=sum(p.nbytes for p in model.parameters() if p.requires_grad),
    )


def _tensors(tree: Any) -> dict[int, int]:
    """Bytes of each tensor within, by its storage."""
    return {t.untyped_storage()._cdata: t.nbytes for t in tree_leaves(tree) if isinstance(t, Tensor)}

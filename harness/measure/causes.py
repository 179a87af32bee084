"""Why rebuilt activations drift: how much each block's inverse enlarges an error, and what follows from it."""

from torch import Tensor, nn

from harness.measure.drift import Metrics, largest
from harness.record import TraceRow
from revnet_core import BlockAmplification, ReversibleError, audit_amplification
from revnet_core.audit import sequence_inputs

CAUSE_METRICS = ("inverse_bound_max", "noise_gain_max", "predicted_drift_max_rel")
TABLE = "amplification"
_FIGURES = ("largest", "smallest", "noise_gain", "predicted_rel", "bound_rel")


def measure_causes(model: nn.Module, x: Tensor) -> tuple[Metrics, list[TraceRow], dict[str, str]]:
    """Metrics, the table `amplification`, and reasons where there are none. The model stays as it is.

    Blocks are numbered through the model as in the table `drift`; `chain` is the number of the outermost
    ReversibleSequence that a block belongs to, since each is rebuilt from its own stored output.
    """
    chains: list[list[BlockAmplification]] = []
    try:
        for sequence, (streams, side) in sequence_inputs(model, x):
            chains.append(audit_amplification(sequence, streams, **side))
    except (ReversibleError, RuntimeError, ValueError) as error:
        # RuntimeError: of autograd, for an F that cannot be differentiated twice, and of a device that is full.
        first_line = str(error).partition("\n")[0] or type(error).__name__
        return {}, [], dict.fromkeys(CAUSE_METRICS, f"the blocks' Jacobians cannot be computed: {first_line}")
    numbered = [(chain, block) for chain, blocks in enumerate(chains) for block in blocks]
    if not numbered:
        return {}, [], dict.fromkeys(CAUSE_METRICS, "the model has no reversible block")
    rows: list[TraceRow] = []
    for index, (chain, block) in enumerate(numbered):
        rows.append(TraceRow(TABLE, index, "chain", chain))
        rows += [TraceRow(TABLE, index, name, getattr(block, name)) for name in _FIGURES]
    metrics: Metrics = {
        "inverse_bound_max": largest([block.bound for _, block in numbered]),
        "noise_gain_max": largest([block.noise_gain for _, block in numbered]),
        "predicted_drift_max_rel": largest([block.predicted_rel for _, block in numbered]),
    }
    return metrics, rows, {}

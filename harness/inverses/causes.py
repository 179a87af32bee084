"""Why a figure got worse, in a sentence: what differs from the baseline, or what the block does when it runs."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from harness.inverses.baseline import Change
from harness.inverses.chain import Streams, blocks_of, copies, is_ours
from harness.inverses.measurement import MARKS, SEED, BlockFigures, Figures, arguments, relative, single_blocks
from harness.inverses.precisions import FP64, at_precision
from harness.inverses.structure import Calls, Structure, difference, parts_of
from revnet_core import audit_inverse
from revnet_core.audit import sequence_inputs

# Of a rebuilt input in float64: beyond, it is no rounding, whatever a block amplifies.
NOT_ROUNDING = 1e-6
# Of the error: what is left of it when a cause is taken away.
EXPLAINED = 0.05
RANDOM = re.compile("dropout", re.IGNORECASE)


def likely_cause(
    module: nn.Module,
    inputs: Streams,
    changes: Sequence[Change],
    before: Mapping[str, Any],
    now: Figures,
    structures: tuple[Structure, Structure],
) -> str:
    """Of the changes in one precision, in which `before` is the baseline's entry and `now` what was measured."""
    first = culprit(changes)
    if first.metric == "inputs":
        return "the inputs are others: make module and inputs after torch.manual_seed(...)"
    if first.metric == "blocks":
        return "the chain has other blocks"
    if first.block is None:
        return "no block's inverse or output changed: look at the module's backward (its recompute, replay or hooks)"
    index = next(i for i, block in enumerate(now.blocks) if block.name == first.block)
    made = difference(parts_of(structures[0], first.block), parts_of(structures[1], first.block))
    if made is not None:
        return f"block {first.block} is made otherwise: {made}"
    if reason := _other_weights(before["blocks"][index], now.blocks[index]):
        return f"block {first.block}: {reason}"
    if first.metric in MARKS and before["outside"] != now.outside:
        return f"the weights before block {first.block}, outside all blocks, are others: another seed or initialization"
    if first.metric in MARKS and not any(c.block == first.block and c.metric == "inverse_rel" for c in changes):
        return (
            f"block {first.block}: its forward computes something else from the same parts and weights, and its "
            "inverse undoes that"
        )
    if first.metric == "drift_rel":
        return (
            f"no block's own inverse is worse; from block {first.block} on the chain amplifies what later blocks "
            "round: an exact grid (reconstruction='exact') or wider streams end that"
        )
    return f"block {first.block}: " + _of_inverse(module, inputs, index, first.precision)


def doubts(module: nn.Module, inputs: Streams, figures: Mapping[str, Figures]) -> str:
    """What a reader should know before a first baseline is trusted: an inverse that is none. Else empty."""
    if FP64 not in figures:
        return ""
    errors = [block.figures["inverse_rel"] for block in figures[FP64].blocks]
    index = max(range(len(errors)), key=errors.__getitem__)
    if errors[index] <= NOT_ROUNDING:
        return ""
    return (
        f" But block {figures[FP64].blocks[index].name} is not inverted, in float64 it is off by {errors[index]:.1e}: "
        f"{_of_inverse(module, inputs, index, FP64)}."
    )


def culprit(changes: Sequence[Change]) -> Change:
    """The change that the others follow from: the first output, else the worst inverse of a block alone, else any."""
    for change in changes:
        if change.metric in (*MARKS, "inputs", "blocks"):
            return change
    alone = [c for c in changes if c.metric == "inverse_rel"]
    if alone:
        return max(alone, key=lambda c: float(c.now) / max(float(c.limit), 1e-300))
    # A chain is rebuilt from its end.
    drifts = [c for c in changes if c.metric == "drift_rel"]
    return drifts[-1] if drifts else changes[0]


def _other_weights(before: Mapping[str, Any], now: BlockFigures) -> str | None:
    old, new = (dict(part.rsplit("=", 1) for part in parts) for parts in (before["weights"].split(), now.weights))
    moved = [name for name in new if new[name] != old.get(name)]
    if moved and sorted(new.values()) == sorted(old.values()):
        return f"{' and '.join(moved)} changed places"
    if moved:
        return f"the weights of {', '.join(moved)} are others: another seed, initialization or order of construction"
    if (calls := " ".join(now.calls)) != before["calls"]:
        return f"its forward runs {calls}; it ran {before['calls']}"
    return None


def _of_inverse(module: nn.Module, inputs: Streams, index: int, precision: str) -> str:
    """By running the block once forward and once back, in float64 where the error shows there too."""
    errors = {p: _Probe(module, inputs, index, p).error for p in {precision, FP64}}
    chosen = FP64 if errors[FP64] > NOT_ROUNDING else precision
    probe = _Probe(module, inputs, index, chosen)
    for reason in (probe.mode(), probe.order(), probe.draws(), probe.dtype(), probe.scale()):
        if reason:
            return reason
    if chosen == FP64:
        return f"its inverse is not that of its forward: in float64 too it is off by {errors[FP64]:.1e}"
    return (
        f"it rounds more than it did; in float64 its inverse is right to {errors[FP64]:.1e}. Look for a narrower dtype "
        "or another order of additions"
    )


class _Probe:
    """One block, run forward and back under observation."""

    def __init__(self, module: nn.Module, inputs: Streams, index: int, precision: str) -> None:
        twin, given, self._context = at_precision(module, inputs, precision)
        self._devices = [inputs[0].device.index or 0] if inputs[0].device.type == "cuda" else []
        self._autocast = precision.split("/")[0] in ("bf16", "fp16")
        with torch.random.fork_rng(self._devices), self._context:
            torch.manual_seed(SEED)
            self._observe(twin, given, index)

    def _observe(self, twin: nn.Module, given: Streams, index: int) -> None:
        if is_ours(twin):
            met = sequence_inputs(twin, *arguments(twin, copies(given)))
            singles = [(alone, streams, side) for s, (x, side) in met for alone, streams in single_blocks(s, x, side)]
            alone, pair, side = singles[index]
            self._x: Streams = pair
            self._block: nn.Module = alone.couplings[0]
            with Calls(self._block) as calls:
                (drift,) = audit_inverse(alone, pair, **side)
            self.error, self._rebuilt = drift.rel, ()
            self._again: Callable[[], float] = lambda: audit_inverse(alone, pair, **side)[0].rel
            # The chain runs each net once forward and once back, and an audit looks at nothing else.
            half = len(calls.order) // 2
            self._orders = calls.order[:half], calls.order[half:]
            half = len(calls.modes) // 2
            self._modes = calls.modes[:half], calls.modes[half:]
            self._dtypes = calls.dtypes
            return
        blocks, streams = blocks_of(twin), given
        with torch.no_grad():
            for block in blocks[:index]:
                streams = block.forward(streams)
            self._x, self._block, chosen = copies(streams), blocks[index].module, blocks[index]
            with Calls(self._block) as forward:
                out = chosen.forward(streams)
            with Calls(self._block) as back:
                self._rebuilt = chosen.inverse(out)
        self.error = relative(self._rebuilt, self._x)
        self._again = lambda: relative(chosen.inverse(chosen.forward(self._x)), self._x)
        self._orders, self._modes = (forward.order, back.order), (forward.modes, back.modes)
        self._dtypes = forward.dtypes | back.dtypes

    def mode(self) -> str | None:
        """A part that ran in another mode in the inverse."""
        before = {path: training for path, _, training in self._modes[0]}
        for path, kind, training in self._modes[1]:
            if before.get(path, training) != training:
                return (
                    f"{kind} {path} runs in {_mode(training)} mode in the inverse, in {_mode(not training)} mode before"
                )
        return None

    def order(self) -> str | None:
        """Parts that the inverse runs as the forward does, where it has to undo the last first."""
        forward, back = self._orders
        if sorted(forward) == sorted(back) and len(forward) > 1 and back != forward[::-1]:
            needed = ", ".join(forward[::-1])
            return f"its inverse runs {', '.join(back)}; to undo {', '.join(forward)} it has to run {needed}"
        return None

    def dtype(self) -> str | None:
        """An operation in fewer bits than the streams', which no autocast asked for."""
        width = min(torch.finfo(t.dtype).bits for t in self._x)
        for dtype, operation in self._dtypes.items():
            if torch.finfo(dtype).bits < width and not self._autocast:
                return f"`{operation}` is computed in {_name(dtype)}, and the streams are {_name(self._x[0].dtype)}"
        return None

    def draws(self) -> str | None:
        """Random draws that the inverse does not repeat."""
        random = {path: kind for path, kind, training in self._modes[0] if RANDOM.search(kind) and training}
        for paths in (*((path,) for path in random), tuple(random)):
            for path in paths:
                self._block.get_submodule(path).eval()
            with torch.no_grad(), torch.random.fork_rng(self._devices), self._context:
                without = self._again()
            for path in paths:
                self._block.get_submodule(path).train()
            if without <= EXPLAINED * self.error:
                named = ", ".join(f"{random[path]} {path}" for path in paths)
                return f"{named} draws anew in the inverse; its draws of the forward have to be replayed"
        return None

    def scale(self) -> str | None:
        """A stream that comes back as a multiple of itself."""
        for index, (found, true) in enumerate(zip(self._rebuilt, self._x, strict=False)):
            a, b = found.double().flatten(), true.double().flatten()
            factor = ((a @ b) / (b @ b)).item()
            off, left = _norm(a - b), _norm(a - factor * b)
            if off > 0 and left < EXPLAINED * off:
                return f"stream {index + 1} comes back {factor:.6g} times what it was"
        return None


def _mode(training: bool) -> str:
    return "training" if training else "eval"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _norm(t: Tensor) -> float:
    return t.norm().item()

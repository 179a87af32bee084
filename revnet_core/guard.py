"""A guard for training: looks now and then whether the backward rebuilds what the forward saw."""

import math
import warnings
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

from revnet_core.audit import outermost_sequences
from revnet_core.errors import DriftError, UnsupportedError
from revnet_core.partitioned import in_order_of_arrival, is_partitioned
from revnet_core.probe import Finding, Probe
from revnet_core.sequence import ReversibleSequence

GUARD_ACTIONS = ("stop", "warn", "store")


@dataclass(frozen=True)
class DriftReport:
    """One comparison: how far off a block's rebuilt input was.

    step      which forward of the sequence it was, from 1, counting those in training mode with gradients
    sequence  its name in the model that the guard was attached to; empty for the model itself
    block     the block whose input was compared
    rel       relative L2 error over both streams; nan where the forward's own streams were not finite
    """

    step: int
    sequence: str
    block: int
    rel: float

    @property
    def where(self) -> str:
        return f"{self.sequence}.couplings[{self.block}]".lstrip(".")


@dataclass(eq=False)
class _Post:
    """What the guard knows of one sequence."""

    name: str
    steps: int = 0
    warned: set[int] = field(default_factory=set)


class _Unread(NamedTuple):
    sequence: weakref.ref[ReversibleSequence]
    name: str
    step: int
    finding: Finding

    def read(self) -> DriftReport:
        return DriftReport(self.step, self.name, self.finding.block, self.finding.rel())


class Guard:
    """Every `every` steps compares one block's rebuilt input with a copy of what the forward saw.

    every      steps from one comparison to the next, the first step being compared. A step is a forward in training
               mode with gradients; accumulation over four batches makes four.
    tolerance  the greatest relative L2 error over both streams that passes; one that is not finite never does
    action     "stop": raise DriftError; "warn": warn, once per block; "store": switch the sequence to
               activations="stored" from the next forward on, and warn that it did

    Every second comparison is of a sequence's block 0, which carries the drift of all blocks; those in between go round
    the others. Of several sequences they take turns. So a fault of any block is found within two comparisons of each
    sequence, and named more closely within one round.

    A comparison costs the memory of one block's two streams, from that block's forward to its backward; the steps in
    between cost nothing. Nothing waits for the device: on the CPU the backward itself answers, on other devices a
    forward after the comparison has arrived, or `settle`. Only rebuilt blocks are compared: nothing where activations
    are not reconstructed or in a forward whose backward does not come to the block (which counts as a step).

    Each rank answers for itself: "stop" raises on the rank that drifts alone, and has to end its process, for which the
    others wait in their next collective. "store" needs ranks that may differ (DDP, ZeRO-0).

    A copy of a model, and one that was pickled, has no guard.

    Raises UnsupportedError for settings that do not exist.
    """

    def __init__(self, every: int = 100, tolerance: float = 1e-3, action: str = "stop") -> None:
        if every < 1:
            raise UnsupportedError(f"every = {every}; the steps from one comparison to the next are at least 1.")
        if not 0 <= tolerance < math.inf:
            raise UnsupportedError(f"tolerance = {tolerance}; a relative error is at least 0 and finite.")
        if action not in GUARD_ACTIONS:
            raise UnsupportedError(f"action = {action!r}; allowed: {', '.join(GUARD_ACTIONS)}.")
        self.every = every
        self.tolerance = tolerance
        self.action = action
        self._posts: weakref.WeakKeyDictionary[ReversibleSequence, _Post] = weakref.WeakKeyDictionary()
        self._history: list[DriftReport] = []
        # Not read yet, and read but not answered yet.
        self._unread: list[_Unread] = []
        self._unanswered: list[tuple[ReversibleSequence, DriftReport]] = []

    def attach(self, model: nn.Module) -> "Guard":
        """Guard every outermost ReversibleSequence of the model; returns the guard.

        Raises UnsupportedError where there is none, or one that another guard has.
        """
        found = list(_named_sequences(model))
        if not found:
            raise UnsupportedError(
                f"{type(model).__name__} holds no ReversibleSequence, so that there is nothing to guard. Attach the "
                "guard to the model that holds the sequences."
            )
        for name, sequence in found:
            if sequence._guard not in (None, self):
                raise UnsupportedError(f"{name or 'the sequence'} has a guard already. Call its detach() first.")
        for name, sequence in found:
            sequence._guard = self
            self._posts.setdefault(sequence, _Post(name))
        return self

    def detach(self) -> None:
        """Guard nothing any longer; the history stays, and what has not been answered is dropped."""
        for sequence in self._posts:
            sequence._guard = None
        self._posts.clear()
        self._read(wait=True)
        self._unanswered.clear()

    @property
    def history(self) -> tuple[DriftReport, ...]:
        """All comparisons so far. Waits for the device; what it finds is answered by a later forward or `settle`."""
        self._read(wait=True)
        return tuple(self._history)

    def settle(self) -> None:
        """Wait for the device and answer what it found, as a later forward would; for the end of a training.

        Raises DriftError with action="stop".
        """
        self.answer(wait=True)

    def answer(self, *, wait: bool = False) -> None:
        """Answer what is there; without `wait`, nothing that would have to be waited for."""
        self._read(wait=wait)
        while self._unanswered:
            self._act(*self._unanswered.pop(0))

    def probe(self, sequence: ReversibleSequence, rebuilt_blocks: int) -> Probe | None:
        """Count one step of the sequence; what compares in it, if anything does.

        rebuilt_blocks  how many blocks, from the first, the backward will rebuild

        Raises UnsupportedError where a rank that falls back to storing would be at odds with the others.
        """
        post = self._posts.get(sequence)
        if post is None:
            return None
        post.steps += 1
        comparison, left = divmod(post.steps - 1, self.every)
        if left or not rebuilt_blocks:
            return None
        if self.action == "store" and any(is_partitioned(p) or in_order_of_arrival(p) for p in sequence.parameters()):
            raise UnsupportedError(
                "action='store' is decided by each rank for itself, while under ZeRO 1 to 3 all have to reduce "
                "gradients, or gather parameters, in one order. Use action='stop' or 'warn', or ZeRO 0."
            )
        visit, turn = divmod(comparison, len(self._posts))
        if list(self._posts.values())[turn] is not post:
            return None
        own, name, step = weakref.ref(sequence), post.name, post.steps

        def report(finding: Finding) -> None:
            if finding.is_blank:
                return
            self._unread.append(_Unread(own, name, step, finding))
            if finding.on_host:
                self.answer()

        return Probe(_scheduled(visit, rebuilt_blocks), report)

    def _read(self, *, wait: bool) -> None:
        while self._unread and (wait or self._unread[0].finding.is_ready()):
            unread = self._unread.pop(0)
            report, sequence = unread.read(), unread.sequence()
            self._history.append(report)
            # Not `>`, which nan would pass.
            if sequence is not None and not report.rel <= self.tolerance:
                self._unanswered.append((sequence, report))

    def _act(self, sequence: ReversibleSequence, report: DriftReport) -> None:
        what = self._complaint(report)
        if self.action == "stop":
            raise DriftError(what)
        if self.action == "store":
            if sequence.activations != "stored":
                sequence.activations = "stored"
                _warn(f"{what} From the next forward on this sequence stores its activations.")
            return
        post = self._posts.get(sequence)
        if post and report.block not in post.warned:
            post.warned.add(report.block)
            _warn(what)

    def _complaint(self, report: DriftReport) -> str:
        if math.isnan(report.rel):
            return (
                f"{report.where}: at step {report.step} its input, in the forward or rebuilt, is not a number, so that "
                f"its relative error is {report.rel} (tolerance {self.tolerance:g}). If the output or the loss is not "
                "finite either, the forward diverged: lower the learning rate. If they are, use "
                "Precision(reconstruction='exact') or wider streams (reconstruction='fp32' or 'fp64')."
            )
        return (
            f"{report.where}: at step {report.step} its rebuilt input was off by a relative error of {report.rel:.3g}, "
            f"above the tolerance of {self.tolerance:g}; it drifted in this block or behind it, where audit_inverse "
            "shows. Use Precision(reconstruction='exact'), wider streams (reconstruction='fp32' or 'fp64'), or fewer "
            "blocks between stored points (shorter sequences, or activations=Budgeted(bytes)); an F or G that is not "
            "deterministic needs activations='stored'."
        )

    def __repr__(self) -> str:
        return f"Guard(every={self.every}, tolerance={self.tolerance:g}, action={self.action!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy guards nothing until it is attached, since a copied model is another.
        return Guard, (self.every, self.tolerance, self.action)


def _warn(what: str) -> None:
    warnings.warn(what, RuntimeWarning, stacklevel=2)


def _scheduled(visit: int, blocks: int) -> int:
    """The block of a sequence's visit, counted from 0."""
    if visit % 2 == 0 or blocks == 1:
        return 0
    return 1 + visit // 2 % (blocks - 1)


def _named_sequences(model: nn.Module) -> Iterator[tuple[str, ReversibleSequence]]:
    names = {module: name for name, module in model.named_modules()}
    for sequence in dict.fromkeys(outermost_sequences(model)):
        yield names[sequence], sequence

"""The guard of a trial: on the model while it trains, and off it before anything else is measured."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence

from torch import nn

from harness.engine import gather
from harness.measure.drift import Metrics, largest
from harness.record import TraceRow
from harness.trials import TrialSpec
from revnet_core import DriftReport, Guard
from revnet_core.audit import outermost_sequences

GUARD_METRICS = ("guard_checks", "guard_rel_max", "guard_stored_step")


def _guard_row(report: DriftReport) -> TraceRow:
    return TraceRow("guard", report.step, report.where, report.rel)


class TrialGuard:
    """What the guard of a trial compared over the trainings that it stood by."""

    def __init__(self, spec: TrialSpec) -> None:
        self._spec = spec
        self._reports: list[DriftReport] = []
        self._reason: str | None = "the trial did not come to its training"

    @contextlib.contextmanager
    def over(
        self, model: nn.Module, trace: list[TraceRow], as_row: Callable[[DriftReport], TraceRow] = _guard_row
    ) -> Iterator[None]:
        """Guard the training of `model`; at its end the model's activations are those that it came with.

        trace  gets a row for each comparison, with the largest error of all ranks, or with this rank's own where the
               training ended in an error

        Raises DriftError.
        """
        self._reason = _why_not(self._spec, model)
        if self._reason:
            yield
            return
        guard = Guard(self._spec.guard_every, self._spec.guard_tolerance, self._spec.guard_action).attach(model)
        chosen = [(sequence, sequence.activations) for sequence in outermost_sequences(model)]
        reports: Sequence[DriftReport] = ()
        try:
            yield
            guard.settle()
            reports = _of_all_ranks(guard.history)
        except Exception:
            # Another rank may not come to where it could be asked.
            reports = guard.history
            raise
        finally:
            self._reports += reports
            trace += map(as_row, reports)
            guard.detach()
            for sequence, activations in chosen:
                sequence.activations = activations

    def metrics(self) -> tuple[Metrics, dict[str, str]]:
        """Metrics, and reasons where there are none."""
        if self._reason:
            return {}, dict.fromkeys(GUARD_METRICS, self._reason)
        metrics: Metrics = {"guard_checks": len(self._reports)}
        unmeasured: dict[str, str] = {}
        if self._reports:
            metrics["guard_rel_max"] = largest([report.rel for report in self._reports])
        else:
            unmeasured["guard_rel_max"] = "no rebuilt block was compared"
        over = [report.step for report in self._reports if not report.rel <= self._spec.guard_tolerance]
        if self._spec.guard_action != "store":
            unmeasured["guard_stored_step"] = f"the study's guard_action is {self._spec.guard_action!r}"
        elif over:
            metrics["guard_stored_step"] = min(over)
        else:
            unmeasured["guard_stored_step"] = "no error was above the tolerance"
        return metrics, unmeasured


def _why_not(spec: TrialSpec, model: nn.Module) -> str | None:
    if spec.guard_every == 0:
        return "the study's guard_every is 0"
    if spec.activations not in ("reconstructed", "budgeted"):
        return f"with {spec.activations} activations nothing is rebuilt"
    return None if any(outermost_sequences(model)) else "the model has no reversible block"


def _of_all_ranks(own: Sequence[DriftReport]) -> list[DriftReport]:
    by_place: dict[tuple[int, str], list[DriftReport]] = {}
    for reports in gather(own):
        for report in reports:
            by_place.setdefault((report.step, report.where), []).append(report)
    return [dataclasses.replace(same[0], rel=largest([report.rel for report in same])) for same in by_place.values()]

"""A run in a notebook: its trials as a frame, its figures, one trial's trace.

Beside harness.cli on top of everything: nothing in harness but its `__init__`, which imports it when asked for, may
import it. Runs nothing, and needs neither torch nor Ray.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from harness.record import TraceRow
from harness.status import trial_with
from harness.store import RunStore, existing_run

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


class Run:
    """A run directory, finished or not; each call reads it anew, so that a run under way can be followed."""

    def __init__(self, store: RunStore) -> None:
        self.store = store

    def frame(self) -> "pd.DataFrame":
        """One row per finished trial: id, status, reason, the spec's fields, the metrics in their units, `strategy`;
        what was not measured is NaN. The frame that the report is made of."""
        from reports.frames import trials_frame

        return trials_frame(self.store)

    def figures(self) -> "dict[str, go.Figure]":
        """The figures of the report, by the anchor that each has there; those that the run has no data for left out."""
        from reports.pictures import report_figures

        return report_figures(self.store)

    def trace(self, trial_id: str) -> "pd.DataFrame":
        """The long tables of a trial, named by its id or the beginning of it: columns table, index, name, value, as
        `TraceRow` says. No rows where the trial left none. Raises HarnessError where no trial, or several, have it."""
        import pandas as pd

        trace = self.store.read_trace(trial_with(self.store, trial_id))
        return pd.DataFrame(columns=list(TraceRow._fields)) if trace is None else trace.to_pandas()

    def __repr__(self) -> str:
        plan, finished = self.store.read_plan(), len(self.store.finished_ids())
        planned = f" of {len(plan.trials)}" if plan else ""
        return f"Run({self.store.uri!r}: {finished}{planned} trials finished)"


def open_run(path: str | Path) -> Run:
    """The run in a directory or at an fsspec URI. Raises StoreError where there is none."""
    return Run(existing_run(path))

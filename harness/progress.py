"""The live progress of a sweep: done, running, failed, time left and the last finished trial."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from rich.text import Text

from harness.plain_text import printable
from harness.record import RESULT_STATUSES
from harness.schedule import Tick
from harness.trials import TrialSpec


class SweepProgress:
    """A progress bar on a terminal; elsewhere (a log file, a pipe) one line for each finished trial."""

    def __init__(self, selected: int, planned: int) -> None:
        self._console = Console(markup=False)
        self._selected = selected
        self._finished = self._failed = 0
        self._start = time.perf_counter()
        self._last = "starting Ray"
        self._stuck = ""
        kept = f", {planned - selected} kept" if planned > selected else ""
        self._console.print(f"{selected} trials to run{kept}", highlight=False)
        self._bar = Progress(
            SpinnerColumn(),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[state]}"),
            TextColumn("{task.fields[last]}", style="dim", markup=False),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("trials", total=selected, state="", last=self._last)

    def __enter__(self) -> "SweepProgress":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def update(self, tick: Tick) -> None:
        if tick.stuck != self._stuck:
            self._stuck = tick.stuck
            waits = f"waiting for nodes: {tick.stuck}" if tick.stuck else "there are nodes for all trials again"
            self._bar.console.print(printable(waits), highlight=False)
        for outcome in tick.finished:
            self._finished += 1
            self._failed += outcome.status not in RESULT_STATUSES
            self._last = f"{describe(outcome.trial)}: {outcome.status} in {outcome.wall_s:.1f} s"
            if self._bar.disable:
                self._console.print(f"{self._finished}/{self._selected} {self._last}", highlight=False)
            elif outcome.status not in RESULT_STATUSES:
                self._bar.console.print(Text(printable(f"{self._last}: {outcome.reason}"), style="red"))
        others = f"  with others {tick.elsewhere}" if tick.elsewhere else ""
        state = f"running {tick.running}{others}  failed {self._failed}  left {self._time_left()}"
        self._bar.update(self._task, completed=self._finished, state=state, last=self._last)

    def _time_left(self) -> str:
        if not self._finished:
            return "?"
        left_s = (time.perf_counter() - self._start) / self._finished * (self._selected - self._finished)
        minutes, seconds = divmod(round(left_s), 60)
        return f"{minutes}:{seconds:02d}"


def describe(trial: TrialSpec) -> str:
    """A trial in a few words, for a line of progress."""
    depth = "" if trial.depth is None else str(trial.depth)
    words = [f"{trial.model}{depth}", trial.activations, f"batch {trial.batch_size}"]
    words += [trial.compute] * (trial.compute != "fp32")
    words += [trial.reconstruction] * (trial.reconstruction != "fp32")
    words += ["compiled"] * trial.compile + ["graph"] * trial.cuda_graph
    words += [f"ZeRO-{trial.zero_stage}"] * (trial.zero_stage > 0)
    words += [f"seed {trial.seed}"] * (trial.seed > 0)
    return " ".join(words)

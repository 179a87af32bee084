"""Sweeps of trials that sleep, on 1, 2 and 4 slots and of more and more trials; where their time goes.

A slot's time per trial is the wall time of the sweep, times slots, over trials. The work is 2 s of it; starting and
ending a process that does it is measured by itself, without Ray or a run directory; what is left is what scheduling
adds.
"""

import statistics
import tempfile
import time
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from harness.schedule import ray_session, run_trials
from harness.store import RunStore
from harness.supervise import supervise
from harness.trials import TrialSpec
from studies.overhead.sleeper import WORK_S

SLEEPER = "studies.overhead.sleeper"
LIMIT_S = 0.3
SWEEPS = [(1, 20), (2, 40), (4, 80), (4, 160), (4, 500)]


def trials_of(count: int) -> list[TrialSpec]:
    return [TrialSpec(model="revnet", seed=seed) for seed in range(count)]


def process_s(samples: int = 7) -> float:
    """The median time of a supervised process beyond its work."""
    return statistics.median(
        supervise(trial, 60, worker=SLEEPER).record.attempts[0].wall_s - WORK_S for trial in trials_of(samples)
    )


def sweep(slots: int, count: int) -> tuple[float, float, float]:
    """Seconds from the first task to the last record, until the first was done, and the median of the processes."""
    with tempfile.TemporaryDirectory() as folder, ray_session(None, cpus=slots):
        store = RunStore(folder)
        start, first = time.perf_counter(), None
        for tick in run_trials(trials_of(count), store, 60, 1, worker=SLEEPER):
            if tick.finished and first is None:
                first = time.perf_counter() - start
        whole = time.perf_counter() - start
        assert first is not None
        walls = [record.attempts[0].wall_s - WORK_S for record in store.read_records()]
        assert len(walls) == count
        return whole, first, statistics.median(walls)


def main(most: Annotated[int, typer.Option(help="The largest sweep; larger ones are left out.")] = 500) -> None:
    alone_s = process_s()
    table = Table(title=f"seconds per trial and slot; a process that sleeps {WORK_S:g} s takes {alone_s:.2f} s more")
    for name in ("slots", "trials", "whole", "first done", "process", "around it", "added"):
        table.add_column(name, justify="right")
    worst = 0.0
    for slots, count in SWEEPS:
        if count > most:
            continue
        whole, first, process = sweep(slots, count)
        # The first trials wait for Ray to start its own processes, once in a sweep.
        each = (whole - first) * slots / (count - slots) - WORK_S if count > slots else whole - WORK_S
        worst = max(worst, each - alone_s)
        cells = (f"{whole:.1f}", f"{first:.2f}", f"{process:.2f}", f"{each - process:.2f}", f"{each - alone_s:.2f}")
        table.add_row(str(slots), str(count), *cells)
    Console().print(table)
    print(f"scheduling adds at most {worst:.2f} s to a trial (limit {LIMIT_S:g} s)")
    raise typer.Exit(worst > LIMIT_S)


if __name__ == "__main__":
    typer.run(main)

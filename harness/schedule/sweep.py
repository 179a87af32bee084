"""A sweep: places for the trials that are left, tasks in them, and what comes of those."""

import time
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import ray
from ray.exceptions import RayError, TaskCancelledError
from ray.util.placement_group import PlacementGroup, remove_placement_group

from harness.attempts import Job
from harness.jobs import Jobs, Outcome
from harness.placing import Place
from harness.schedule.placement import places_of
from harness.schedule.tasks import Order, submit
from harness.schedule.waiting import Waiting
from harness.store import RunStore
from harness.supervise import WORKER
from harness.trials import TrialSpec

TICK_S = 0.5
STOP_S = 15.0


class Tick(NamedTuple):
    """Where the sweep stands: trials that run at the moment, those that others have, those that were finished since the
    last tick, and why some fit no nodes that are left ("" where all do)."""

    running: int
    elsewhere: int
    finished: list[Outcome]
    stuck: str


def run_trials(
    trials: Sequence[TrialSpec],
    store: RunStore,
    timeout_s: float,
    max_attempts: int,
    exports: Collection[str] = (),
    *,
    worker: str = WORKER,
) -> Iterator[Tick]:
    """Run the trials, as many at a time as there is room for; yields about twice a second.

    Every trial has its record in `store` when its outcome is yielded, also when another driver ran it. Closing the
    iterator early ends the trials that run, which leave no record. Raises ResourceError, before anything starts, for a
    trial that fits no node; KeyboardInterrupt when the store asks to stop.

    max_attempts  of a trial whose node or process is lost
    exports       names of what each trial is to leave beside its record
    worker        the module that runs a trial of one node
    """
    places = places_of(trials)
    jobs = Jobs(trials, store, max_attempts)
    order = Order(store.absolute_uri, timeout_s, tuple(sorted(exports)), worker)
    waiting = Waiting()
    running: dict[ray.ObjectRef, tuple[Job, Place, PlacementGroup]] = {}

    def start(job: Job, place: Place, group: PlacementGroup) -> None:
        running[submit(job, group, order)] = job, place, group

    try:
        while waiting or running or not jobs.is_over:
            finished = jobs.look()
            waiting.look()
            while waiting.has_room and (job := jobs.take()):
                waiting.ask(job, places[job.trial.id])
            for job, place, group in waiting.granted(0 if running else TICK_S):
                start(job, place, group)
            ready, _ = ray.wait(list(running), num_returns=1, timeout=TICK_S) if running else ([], [])
            for task in ready:
                job, place, group = running.pop(task)
                try:
                    finished += jobs.ended(job, ray.get(task))
                    is_whole = True
                except TaskCancelledError:
                    raise KeyboardInterrupt from None
                except RayError as error:
                    # The supervisor was lost: with its node, or ended by the system or by Ray's memory monitor.
                    finished += jobs.lost(job, f"the supervising task was lost: {_in_a_line(error)}")
                    is_whole = False
                # Handed on, since Ray takes seconds to give a freed place to a group that waits for one.
                heir = waiting.heir_of(place) if is_whole else None
                if heir is not None:
                    start(heir, place, group)
                else:
                    remove_placement_group(group)
            if not (running or waiting.is_asking):
                time.sleep(TICK_S)
            if jobs.are_to_stop():
                raise KeyboardInterrupt
            yield Tick(len(running), jobs.elsewhere, finished, waiting.stuck)
    finally:
        for task in running:
            ray.cancel(task)
        if running:
            ray.wait(list(running), num_returns=len(running), timeout=STOP_S)
        waiting.give_up()
        for _, _, group in running.values():
            remove_placement_group(group)


def _in_a_line(error: RayError) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__

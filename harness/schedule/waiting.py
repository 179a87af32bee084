"""Trials that wait for a place: some have asked Ray for one, and some ask for what the cluster has no more.

Ray keeps a request for what only a lost node could give, and says nothing. So what was asked for is held against the
nodes that are there, now and then: a trial may then get another place, or is put aside until nodes come back.
"""

import time
from collections.abc import Callable

from ray.util.placement_group import PlacementGroup, remove_placement_group

from harness.attempts import Job
from harness.errors import ResourceError
from harness.placing import WAITING_PLACES, Amounts, Place, place_of
from harness.schedule.placement import nodes_alive, reserve

LOOK_AGAIN_S = 10.0


class Waiting:
    """As many requests as WAITING_PLACES, in the order in which they were made.

    stuck  why the trials put aside fit no nodes that are there; "" while there are none
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._asked: dict[PlacementGroup, tuple[Job, Place]] = {}
        self._aside: list[Job] = []
        self._clock = clock
        self._looked_s = clock()
        self.stuck = ""

    def __len__(self) -> int:
        return len(self._asked) + len(self._aside)

    @property
    def is_asking(self) -> bool:
        return bool(self._asked)

    @property
    def has_room(self) -> bool:
        return len(self._asked) < WAITING_PLACES

    def ask(self, job: Job, place: Place) -> None:
        self._asked[reserve(place)] = job, place

    def granted(self, wait_s: float) -> list[tuple[Job, Place, PlacementGroup]]:
        """Those that have a place now, which wait no more; waits at most so long for each."""
        ready = [group for group in self._asked if group.wait(timeout_seconds=wait_s)]
        return [(*self._asked.pop(group), group) for group in ready]

    def heir_of(self, place: Place) -> Job | None:
        """The first that waits for such a place, to be given that one."""
        for group, (job, wanted) in self._asked.items():
            if wanted == place:
                del self._asked[group]
                remove_placement_group(group)
                return job
        return None

    def look(self) -> None:
        """Hold what was asked for against the nodes that are there, but not all the time."""
        if not len(self) or self._clock() - self._looked_s < LOOK_AGAIN_S:
            return
        self._looked_s = self._clock()
        nodes = nodes_alive()
        for group, (job, place) in list(self._asked.items()):
            if self._place_now(job, nodes) != place:
                del self._asked[group]
                remove_placement_group(group)
                self._aside.append(job)
        aside, self._aside, self.stuck = self._aside, [], ""
        for job in aside:
            place = self._place_now(job, nodes)
            if isinstance(place, str):
                self._aside.append(job)
                self.stuck = place
            else:
                self.ask(job, place)

    def give_up(self) -> None:
        for group in self._asked:
            remove_placement_group(group)

    @staticmethod
    def _place_now(job: Job, nodes: list[Amounts]) -> Place | str:
        try:
            return place_of(job.trial, nodes)
        except ResourceError as error:
            return str(error)

"""A sweep in time, by the scheduler's own rules: the order of its queue, the places that trials take, and who waits.

What is Ray's own choice, the node among those that have room, is taken to be the fullest, as Ray scores them.
"""

import heapq
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

from harness.placing import WAITING_PLACES, Amounts, Place, times
from harness.trials import TrialSpec

# Free cores and GPUs of a node, and what kind of node it is.
_State = tuple[int, float, float]


class Span(NamedTuple):
    """When a trial runs, and on which nodes, numbered through the cluster; of a spread trial one for each rank."""

    start_s: float
    end_s: float
    nodes: tuple[int, ...]


class Nodes:
    """Those in the same state are one to whoever looks for room, so that thousands take no longer than a few.

    kinds  how many nodes there are of each, and what one of them has
    """

    def __init__(self, kinds: Sequence[tuple[int, Amounts]]) -> None:
        self._states: list[_State] = []
        for kind, (count, amounts) in enumerate(kinds):
            self._states += [(kind, amounts.get("CPU", 0), amounts.get("GPU", 0))] * count
        self._in_state: dict[_State, set[int]] = defaultdict(set)
        for node, state in enumerate(self._states):
            self._in_state[state].add(node)

    def kinds_of(self, nodes: Collection[int]) -> set[int]:
        return {self._states[node][0] for node in nodes}

    def take(self, place: Place) -> tuple[int, ...] | None:
        """A node for each bundle; None, and nothing is taken, where there is no room."""
        taken: list[int] = []
        for bundle in place.bundles:
            node = self._node_for(dict(bundle), place, taken)
            if node is None:
                self.give_back(place, taken)
                return None
            self._change(node, dict(bundle), -1)
            taken.append(node)
        return tuple(taken)

    def give_back(self, place: Place, nodes: Sequence[int]) -> None:
        for node, bundle in zip(nodes, place.bundles, strict=False):
            self._change(node, dict(bundle), 1)

    def _node_for(self, bundle: Amounts, place: Place, taken: Sequence[int]) -> int | None:
        states = [state for state, nodes in self._in_state.items() if nodes and times(_free(state), bundle)]
        if not states:
            return None
        if taken and times(_free(self._states[taken[-1]]), bundle):
            return taken[-1]  # as few nodes as can be
        # A single bundle where it leaves the least; the first of many where most of the others fit too.
        by_room = sorted(states, key=lambda state: (state[2], state[1], state[0]))
        state = max(states, key=lambda state: times(_free(state), bundle)) if place.is_spread else by_room[0]
        return min(self._in_state[state])

    def _change(self, node: int, bundle: Amounts, sign: int) -> None:
        kind, cores, gpus = state = self._states[node]
        self._in_state[state].discard(node)
        if not self._in_state[state]:
            del self._in_state[state]
        # Shares of a core or a GPU add up to whole ones again.
        changed = kind, round(cores + sign * bundle.get("CPU", 0), 6), round(gpus + sign * bundle.get("GPU", 0), 6)
        self._states[node] = changed
        self._in_state[changed].add(node)


def simulate(
    trials: Sequence[TrialSpec],
    places: Mapping[str, Place],
    kinds: Sequence[tuple[int, Amounts]],
    seconds: Callable[[TrialSpec, Collection[int]], float],
) -> dict[str, Span]:
    """When each trial runs, by id.

    trials   in the order of the queue
    places   by id; each fits the cluster when that is idle
    seconds  of a trial on nodes of these kinds, by their positions in `kinds`
    """
    nodes, now_s = Nodes(kinds), 0.0
    left = list(reversed(trials))
    waiting: list[TrialSpec] = []
    running: list[tuple[float, int, TrialSpec, tuple[int, ...]]] = []
    spans: dict[str, Span] = {}

    def start(trial: TrialSpec, on: tuple[int, ...]) -> None:
        end_s = now_s + seconds(trial, nodes.kinds_of(on))
        spans[trial.id] = Span(now_s, end_s, on)
        heapq.heappush(running, (end_s, len(spans), trial, on))

    def fill() -> None:
        while True:
            while left and len(waiting) < WAITING_PLACES:
                waiting.append(left.pop())
            before = len(waiting)
            for trial in list(waiting):
                if (on := nodes.take(places[trial.id])) is not None:
                    waiting.remove(trial)
                    start(trial, on)
            if len(waiting) == before:
                return

    fill()
    while running:
        now_s, _, ended, on = heapq.heappop(running)
        # Its place is handed on to the first that waits for one like it, as the scheduler does.
        heir = next((trial for trial in waiting if places[trial.id] == places[ended.id]), None)
        if heir is None:
            nodes.give_back(places[ended.id], on)
        else:
            waiting.remove(heir)
            start(heir, on)
        fill()
    assert len(spans) == len(trials), "a place that never fits"
    return spans


def _free(state: _State) -> Amounts:
    return {"CPU": state[1], "GPU": state[2]}

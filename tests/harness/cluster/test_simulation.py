"""No node ever holds more than it has, no trial waits beside an idle cluster, and the queue is the scheduler's."""

import random
from collections.abc import Collection, Mapping, Sequence

import pytest

from harness.cluster.simulation import Span, simulate
from harness.errors import ResourceError
from harness.placing import WAITING_PLACES, Amounts, Place, place_of
from harness.trials import TrialResources, TrialSpec

Kinds = Sequence[tuple[int, Amounts]]


def trial(seed: int, workers: int = 1, cpus: int = 1, gpus: int | None = 0) -> TrialSpec:
    resources = TrialResources(gpus_per_worker=gpus, cpus_per_worker=cpus)
    return TrialSpec(model="revnet", seed=seed, workers=workers, resources=resources)


def places_in(kinds: Kinds, trials: Sequence[TrialSpec]) -> dict[str, Place]:
    nodes = [amounts for count, amounts in kinds for _ in range(count)]
    return {one.id: place_of(one, nodes) for one in trials}


def run(kinds: Kinds, trials: Sequence[TrialSpec], seconds: Sequence[float]) -> tuple[list[Span], Mapping[str, Place]]:
    places = places_in(kinds, trials)
    by_id = dict(zip((one.id for one in trials), seconds, strict=True))
    spans = simulate(trials, places, kinds, lambda one, _: by_id[one.id])
    return [spans[one.id] for one in trials], places


def overfull(kinds: Kinds, spans: Mapping[str, Span], places: Mapping[str, Place]) -> list[int]:
    """Nodes that at some moment hold more than they have."""
    has = [amounts for count, amounts in kinds for _ in range(count)]
    found = set()
    for moment in {span.start_s for span in spans.values()}:
        used = [dict.fromkeys(amounts, 0.0) for amounts in has]
        for trial_id, span in spans.items():
            if span.start_s <= moment < span.end_s:
                for node, bundle in zip(span.nodes, places[trial_id].bundles, strict=True):
                    for kind, amount in bundle:
                        used[node][kind] += amount
        found |= {node for node, amounts in enumerate(has) if any(used[node][kind] > amounts[kind] for kind in amounts)}
    return sorted(found)


@pytest.mark.parametrize("seed", range(20))
def test_no_node_is_overfull_and_all_trials_run(seed: int) -> None:
    draw = random.Random(seed)
    kinds: Kinds = [(draw.randint(1, 3), {"CPU": 8.0, "GPU": 4.0}), (draw.randint(1, 4), {"CPU": 4.0, "GPU": 2.0})]
    trials = [trial(n, draw.choice([1, 1, 1, 2, 4, 5]), draw.choice([1, 2]), draw.choice([0, 1])) for n in range(40)]
    seconds = [draw.uniform(1, 9) for _ in trials]
    spans, places = run(kinds, trials, seconds)
    by_id = dict(zip((one.id for one in trials), spans, strict=True))
    assert overfull(kinds, by_id, places) == []
    assert [span.end_s - span.start_s for span in spans] == pytest.approx(seconds)
    # Whoever ran alone could have begun no earlier: something runs all the time, up to the end.
    assert min(span.start_s for span in spans) == 0
    covered_s = 0.0
    for span in sorted(spans):
        assert span.start_s <= covered_s + 1e-9
        covered_s = max(covered_s, span.end_s)


def test_two_trials_in_one_place_would_be_seen() -> None:
    kinds: Kinds = [(1, {"CPU": 1.0})]
    trials = [trial(0), trial(1)]
    places = places_in(kinds, trials)
    on_one_core = {trials[0].id: Span(0, 2, (0,)), trials[1].id: Span(1, 3, (0,))}
    assert overfull(kinds, on_one_core, places) == [0]


def test_equal_trials_on_equal_slots_take_turns() -> None:
    spans, _ = run([(2, {"CPU": 2.0})], [trial(n) for n in range(10)], [3.0] * 10)
    assert sorted(span.start_s for span in spans) == [0] * 4 + [3] * 4 + [6] * 2


def test_a_trial_of_several_ranks_is_packed_where_it_can_be_and_spread_where_it_must() -> None:
    kinds: Kinds = [(3, {"CPU": 2.0})]
    spans, places = run(kinds, [trial(0, workers=2), trial(1, workers=3)], [1.0, 1.0])
    assert not next(iter(places.values())).is_spread
    assert len(spans[0].nodes) == 1
    # Of the three ranks two share a node.
    assert sorted(spans[1].nodes.count(node) for node in set(spans[1].nodes)) == [1, 2]
    assert set(spans[0].nodes).isdisjoint(spans[1].nodes)


def test_small_trials_pass_a_large_one_that_waits_but_only_so_many() -> None:
    """The last of four cores is free while the large trial waits for all of them."""
    kinds: Kinds = [(1, {"CPU": 4.0})]
    trials = [trial(0, workers=3), trial(1, workers=4), *(trial(2 + n) for n in range(2 * WAITING_PLACES))]
    spans, _ = run(kinds, trials, [10.0, 1.0] + [1.0] * 2 * WAITING_PLACES)
    small = [span.start_s for span in spans[2:]]
    # One by one through the free core, handed on from each to the next.
    assert small == [float(n) for n in range(len(small))]
    assert spans[1].start_s == 10.0


def test_a_place_is_handed_to_one_like_it_before_others() -> None:
    """As the scheduler does it, also where the room would let a trial begin that waits for longer."""
    trials = [trial(0, workers=2), trial(1, workers=1), trial(2, workers=2)]
    spans, _ = run([(1, {"CPU": 2.0})], trials, [1.0, 1.0, 1.0])
    assert [span.start_s for span in spans] == [0, 2, 1]


def test_durations_are_asked_of_the_nodes_that_a_trial_comes_to() -> None:
    kinds: Kinds = [(1, {"CPU": 4.0, "GPU": 1.0}), (1, {"CPU": 4.0})]
    trials = [trial(0, gpus=1), trial(1, cpus=4, gpus=0)]
    asked: dict[str, set[int]] = {}

    def seconds(one: TrialSpec, on: Collection[int]) -> float:
        asked[one.id] = set(on)
        return 1.0

    simulate(trials, places_in(kinds, trials), kinds, seconds)
    assert asked == {trials[0].id: {0}, trials[1].id: {1}}


def test_what_no_nodes_hold_is_refused_with_what_they_have() -> None:
    nodes = [{"CPU": 8.0, "GPU": 2.0}] * 2
    with pytest.raises(ResourceError, match="each of its 5 ranks; the nodes have: 2 times 8 CPU, 2 GPU"):
        place_of(trial(0, workers=5, gpus=1), nodes)
    assert place_of(trial(0, workers=4, gpus=1), nodes).is_spread

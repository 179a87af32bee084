"""Places for trials in the cluster that Ray is connected to."""

from collections.abc import Sequence

import ray
from ray.util.placement_group import PlacementGroup, placement_group

from harness.placing import Amounts, Place, place_of
from harness.trials import TrialSpec


def places_of(trials: Sequence[TrialSpec]) -> dict[str, Place]:
    """By id. Raises ResourceError for a trial that fits no node, and whose ranks fit no nodes as the cluster is."""
    nodes = nodes_alive()
    return {trial.id: place_of(trial, nodes) for trial in trials}


def nodes_alive() -> list[Amounts]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def reserve(place: Place) -> PlacementGroup:
    return placement_group([dict(bundle) for bundle in place.bundles], strategy=place.strategy)

"""What a trial takes of a cluster: all its ranks on one node where one can hold them, else as few nodes as can."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import ray
from ray.util.placement_group import PlacementGroup, placement_group

from harness.errors import ResourceError
from harness.trials import TrialSpec


class Place(NamedTuple):
    """Bundles of a placement group. One bundle holds all ranks; several hold one rank each."""

    bundles: tuple[tuple[tuple[str, float], ...], ...]
    strategy: Literal["STRICT_PACK", "PACK"]

    @property
    def is_spread(self) -> bool:
        return len(self.bundles) > 1

    def reserve(self) -> PlacementGroup:
        return placement_group([dict(bundle) for bundle in self.bundles], strategy=self.strategy)


def places_of(trials: Sequence[TrialSpec]) -> dict[str, Place]:
    """By id. Raises ResourceError for a trial that fits no node, and whose ranks fit no nodes as the cluster is."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return {trial.id: _place_of(trial, nodes) for trial in trials}


def _place_of(trial: TrialSpec, nodes: list[dict[str, float]]) -> Place:
    rank = _rank(trial, any(node.get("GPU", 0) for node in nodes))
    whole = {kind: trial.workers * amount for kind, amount in rank.items()}
    if any(_times(node, whole) for node in nodes):
        return Place((tuple(whole.items()),), "STRICT_PACK")
    if sum(_times(node, rank) for node in nodes) >= trial.workers > 1:
        return Place((tuple(rank.items()),) * trial.workers, "PACK")
    wanted = " and ".join(f"{amount:g} {kind}" for kind, amount in rank.items())
    there = "; ".join(f"{node.get('CPU', 0):g} CPU, {node.get('GPU', 0):g} GPU" for node in nodes)
    raise ResourceError(
        f"trial {trial.id} needs {wanted} for each of its {trial.workers} ranks; the nodes have: {there}. Lower "
        "workers, resources.cpus_per_worker or resources.gpus_per_worker in the study, or give a larger cluster with "
        "--address."
    )


def _rank(trial: TrialSpec, has_gpus: bool) -> dict[str, float]:
    gpus = trial.resources.gpus_per_worker
    gpus = int(has_gpus) if gpus is None else gpus
    return {"CPU": float(trial.resources.cpus_per_worker)} | ({"GPU": float(gpus)} if gpus else {})


def _times(node: dict[str, float], wanted: dict[str, float]) -> int:
    """How often it fits."""
    return int(min(node.get(kind, 0) // amount for kind, amount in wanted.items()))

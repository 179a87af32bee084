"""What a trial takes of a cluster: all its ranks on one node where one can hold them, else as few nodes as can.

Knows no Ray: the scheduler asks for such places, and `revnet plan --cluster` goes through a sweep in them.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from harness.errors import ResourceError
from harness.trials import TrialSpec

# Trials that wait for room at a time, in the order of the sweep; the first that fits gets it. Enough that no core
# idles, few enough that a sweep of thousands starts at once.
WAITING_PLACES = 4
# Of a core or a GPU, as Ray counts them.
GRAINS = 10_000
# By kind, "CPU" and "GPU": how many a node has, or a rank takes.
Amounts = Mapping[str, float]


class Place(NamedTuple):
    """One bundle holds all ranks, on one node; of several each holds one rank."""

    bundles: tuple[tuple[tuple[str, float], ...], ...]
    strategy: Literal["STRICT_PACK", "PACK"]

    @property
    def is_spread(self) -> bool:
        return len(self.bundles) > 1


def place_of(trial: TrialSpec, nodes: Sequence[Amounts]) -> Place:
    """On nodes that are idle. Raises ResourceError where no node holds the trial, and all of them its ranks neither."""
    rank = amounts_of_rank(trial, any(node.get("GPU", 0) for node in nodes))
    whole = {kind: trial.workers * amount for kind, amount in rank.items()}
    if any(times(node, whole) for node in nodes):
        return Place((tuple(whole.items()),), "STRICT_PACK")
    if sum(times(node, rank) for node in nodes) >= trial.workers > 1:
        return Place((tuple(rank.items()),) * trial.workers, "PACK")
    wanted = " and ".join(f"{amount:g} {kind}" for kind, amount in rank.items())
    raise ResourceError(
        f"trial {trial.id} needs {wanted} for each of its {trial.workers} ranks; the nodes have: {_in_words(nodes)}. "
        "Lower workers, resources.cpus_per_worker or resources.gpus_per_worker in the study, or give a larger cluster."
    )


def amounts_of_rank(trial: TrialSpec, has_gpus: bool) -> dict[str, float]:
    gpus = trial.resources.gpus_per_worker
    gpus = int(has_gpus) if gpus is None else gpus
    wanted = {"CPU": float(trial.resources.cpus_per_worker)} | ({"GPU": float(gpus)} if gpus else {})
    # No more digits than Ray counts in, rounded so that as many fit as are to share.
    return {
        kind: math.floor(GRAINS * amount / trial.resources.trials_per_device) / GRAINS
        for kind, amount in wanted.items()
    }


def times(node: Amounts, wanted: Amounts) -> int:
    """How often it fits."""
    return min(round(GRAINS * node.get(kind, 0)) // round(GRAINS * amount) for kind, amount in wanted.items())


def _in_words(nodes: Sequence[Amounts]) -> str:
    counts: dict[str, int] = {}
    for node in nodes:
        words = f"{node.get('CPU', 0):g} CPU, {node.get('GPU', 0):g} GPU"
        counts[words] = counts.get(words, 0) + 1
    return "; ".join(words if count == 1 else f"{count} times {words}" for words, count in counts.items())

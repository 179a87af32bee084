"""What becomes of a sweep on a cluster that is only described."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

from harness.cluster.description import NodeGroup
from harness.cluster.durations import Durations, Estimate
from harness.cluster.simulation import Span, simulate
from harness.errors import ResourceError
from harness.forecast import Unpredicted
from harness.placing import Place, amounts_of_rank, place_of, times
from harness.plan_view import Fit
from harness.predict import Prediction
from harness.trials import TrialResources, TrialSpec

# What a scheduler adds to a trial, at most; `python -m studies.overhead` measures it.
SCHEDULING_S = 0.3


class Prospect(NamedTuple):
    """Of one trial.

    place      None where no place of the cluster holds it; `why` says so
    groups     positions of the groups of nodes that it may come to
    fits       on the device of each of these; None without a prediction, and on the host of GPUs
    estimates  of its time on each of them, or why that is not known
    """

    trial: TrialSpec
    place: Place | None
    why: str
    groups: tuple[int, ...]
    fits: tuple[Fit | None, ...]
    estimates: tuple[Estimate | str, ...]

    @property
    def runs_out(self) -> bool:
        """Wherever it comes to."""
        return bool(self.fits) and all(fit is not None and fit.word == "no" for fit in self.fits)

    @property
    def fits_some(self) -> bool:
        """And not all that it may come to."""
        return not self.runs_out and any(fit is not None and fit.word == "no" for fit in self.fits)

    @property
    def unknown(self) -> str | None:
        """Why its time is not known."""
        return next((estimate for estimate in self.estimates if isinstance(estimate, str)), None)

    def seconds(self, groups: Collection[int]) -> float:
        """On nodes of these groups: its ranks wait for the slowest. One that runs out of memory ends where its steps
        would begin."""
        slowest = 0.0
        for group, fit, estimate in zip(self.groups, self.fits, self.estimates, strict=True):
            if group in groups:
                assert isinstance(estimate, Estimate)
                ends_early = fit is not None and fit.word == "no"
                slowest = max(slowest, estimate.beside_s if ends_early else estimate.trial_s(self.trial))
        return slowest + SCHEDULING_S


class Outlook(NamedTuple):
    """spans: of the trials that are placed and whose time is known."""

    cluster: Sequence[NodeGroup]
    prospects: Sequence[Prospect]
    spans: Mapping[str, Span]

    @property
    def makespan_s(self) -> float:
        return max((span.end_s for span in self.spans.values()), default=0.0)

    def device_s(self, prospect: Prospect) -> float:
        """Of all GPUs that it takes; in a cluster without any, of all cores."""
        span = self.spans[prospect.trial.id]
        rank = amounts_of_rank(prospect.trial, self.has_gpus)
        return (span.end_s - span.start_s) * prospect.trial.workers * rank.get("GPU" if self.has_gpus else "CPU", 0)

    @property
    def has_gpus(self) -> bool:
        return any(group.has_gpus for group in self.cluster)

    @property
    def devices(self) -> int:
        """GPUs of the cluster, or cores where it has no GPUs."""
        return sum(group.nodes * group.devices for group in self.cluster if group.has_gpus or not self.has_gpus)


def look_ahead(
    trials: Sequence[TrialSpec],
    cluster: Sequence[NodeGroup],
    predictions: Mapping[str, Prediction | Unpredicted],
    durations: Durations,
) -> Outlook:
    """trials: in the order in which a sweep takes them."""
    place_for = _placer(cluster)
    prospects = [_prospect(trial, cluster, place_for, predictions[trial.id], durations) for trial in trials]
    known = {p.trial.id: p for p in prospects if p.place is not None and p.unknown is None}
    spans = simulate(
        [trial for trial in trials if trial.id in known],
        {trial_id: p.place for trial_id, p in known.items() if p.place is not None},
        [(group.nodes, group.amounts) for group in cluster],
        lambda trial, groups: known[trial.id].seconds(groups),
    )
    return Outlook(cluster, prospects, spans)


def _placer(cluster: Sequence[NodeGroup]) -> Callable[[TrialSpec], Place | str]:
    """Trials that ask for the same get the same, without another look at all nodes."""
    nodes = [group.amounts for group in cluster for _ in range(group.nodes)]
    found: dict[tuple[int, TrialResources], Place | str] = {}

    def place_for(trial: TrialSpec) -> Place | str:
        asked = trial.workers, trial.resources
        if asked not in found:
            try:
                found[asked] = place_of(trial, nodes)
            except ResourceError as error:
                found[asked] = str(error).removeprefix(f"trial {trial.id} ")
        return found[asked]

    return place_for


def _prospect(
    trial: TrialSpec,
    cluster: Sequence[NodeGroup],
    place_for: Callable[[TrialSpec], Place | str],
    prediction: Prediction | Unpredicted,
    durations: Durations,
) -> Prospect:
    place = place_for(trial)
    if isinstance(place, str):
        return Prospect(trial, None, place, (), (), ())
    # A node of such a group holds at least one bundle when it is idle.
    may = [index for index, group in enumerate(cluster) if times(group.amounts, dict(place.bundles[0]))]
    takes_gpu = "GPU" in dict(place.bundles[0])
    fits = tuple(
        Fit.of(prediction, cluster[index].memory_bytes)
        if isinstance(prediction, Prediction) and cluster[index].has_gpus == takes_gpu
        else None
        for index in may
    )
    estimates = tuple(durations.estimate(trial, cluster[index], spread=place.is_spread) for index in may)
    return Prospect(trial, place, "", tuple(may), fits, estimates)

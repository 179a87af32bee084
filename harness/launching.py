"""Trials that were chosen, run from a terminal: here with a bar of progress, or by a driver in a cluster."""

from collections.abc import Sequence

from harness.plain_text import say
from harness.store import RunStore
from harness.study import StudyResources
from harness.trials import TrialSpec


def run_selected(
    selected: Sequence[TrialSpec],
    planned: int,
    store: RunStore,
    resources: StudyResources,
    address: str | None,
    exports: list[str],
) -> bool:
    """Run them with a progress bar; returns whether somebody stopped it."""
    if not selected:
        return False
    store.clear_stop()
    from harness.progress import SweepProgress
    from harness.schedule import ray_session, refuse_unreached, run_trials

    try:
        with ray_session(address), SweepProgress(len(selected), planned) as progress:
            if address is not None:
                refuse_unreached(store)
            for tick in run_trials(selected, store, resources.timeout_s, resources.max_attempts, exports):
                progress.update(tick)
    except KeyboardInterrupt:
        return True
    return False


def leave_to_cluster(
    selected: Sequence[TrialSpec], store: RunStore, resources: StudyResources, address: str | None
) -> None:
    """Start the driver there, and say how to follow it."""
    from harness.schedule import detach, ray_session, refuse_unreached

    store.clear_stop()
    with ray_session(address):
        refuse_unreached(store)
        name = detach(selected, store, resources.timeout_s, resources.max_attempts)
    uri = store.absolute_uri
    say(f"{len(selected)} trials left to the driver {name} in the cluster; it is safe to log out.")
    say(f"See how far it is with `revnet status {uri}`; `revnet report {uri}` works on what is there.")

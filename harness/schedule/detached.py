"""A driver that lives in the cluster: it goes on when whoever started it is gone, and elsewhere if its node is lost."""

import contextlib
import hashlib
import os
import threading
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayError

from harness.attempts import recorded
from harness.errors import ResourceError
from harness.schedule.placement import places_of
from harness.schedule.sweep import run_trials
from harness.store import RunStore
from harness.trials import TrialSpec

NAMESPACE = "revnet"
START_S = 60.0


def detach(trials: Sequence[TrialSpec], store: RunStore, timeout_s: float, max_attempts: int) -> str:
    """Leave the trials to a driver in the cluster; returns its name there. Raises ResourceError when a trial fits no
    node, when the run has such a driver already, and when the driver does not start."""
    places_of(trials)
    name = f"run-{hashlib.sha256(store.absolute_uri.encode()).hexdigest()[:12]}"
    try:
        driver = _Driver.options(
            name=name, namespace=NAMESPACE, lifetime="detached", max_restarts=-1, num_cpus=0
        ).remote(
            [(trial.canonical_json(), recorded(store, trial.id)) for trial in trials],
            store.absolute_uri,
            timeout_s,
            max_attempts,
        )
        ray.get(driver.is_up.remote(), timeout=START_S)
    except ValueError:
        raise ResourceError(
            f"{store.uri}: a driver in this cluster has this run already. `revnet status {store.uri}` says how far it "
            f"is; `revnet stop {store.uri}` ends it."
        ) from None
    except RayError as error:
        raise ResourceError(f"--detach: the driver did not start in the cluster: {error}") from None
    return name


class _DriverInCluster:
    # All is done in the constructor, which Ray calls again when the driver's node was lost.
    def __init__(self, trials: list[tuple[str, int]], uri: str, timeout_s: float, max_attempts: int) -> None:
        store = RunStore(uri)
        # The second time, those that are done since the first are not begun again.
        left = [
            spec for spec, seen in ((TrialSpec.from_json(t), s) for t, s in trials) if recorded(store, spec.id) == seen
        ]
        threading.Thread(target=_drive, args=(left, store, timeout_s, max_attempts), daemon=True).start()

    def is_up(self) -> bool:
        return True


_Driver: Any = ray.remote(_DriverInCluster)


def _drive(trials: list[TrialSpec], store: RunStore, timeout_s: float, max_attempts: int) -> None:
    try:
        with contextlib.suppress(KeyboardInterrupt):  # asked to stop
            for _ in run_trials(trials, store, timeout_s, max_attempts):
                pass
    finally:
        # The one way to end an actor from within, other than from its own methods, that Ray does not take for a loss.
        me = ray.get_runtime_context().current_actor
        ray.kill(me, no_restart=True)
        os._exit(0)

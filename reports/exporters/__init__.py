"""Records of a run for trackers that people already use; one tracker's run for each trial."""

import posixpath
from collections.abc import Iterator
from contextlib import ExitStack

from harness.errors import HarnessError
from harness.store import RunStore
from reports.exporters.rows import printable, read_rows, shortened
from reports.exporters.to_mlflow import Mlflow
from reports.exporters.to_tensorboard import TensorBoard
from reports.exporters.to_wandb import WandB

NAME_CHARACTERS = 100


def export_run(
    store: RunStore,
    *,
    mlflow: str | None = None,
    wandb: str | None = None,
    tensorboard: str | None = None,
    name: str | None = None,
) -> Iterator[str]:
    """Export every finished trial that a tracker does not have as it is, and say of each tracker what was done.

    name  of the experiment, the project or the folder; the last part of the run directory's path if not given

    Raises HarnessError, before any trial is written, where a tracker's library is missing or it cannot be reached.
    """
    asked = [(Mlflow, mlflow), (WandB, wandb), (TensorBoard, tensorboard)]
    called = _name_of(store) if name is None else _checked(name)
    trackers = [tracker(target, called) for tracker, target in asked if target is not None]
    if not trackers:
        raise HarnessError("No tracker to export to. Give --mlflow URI, --wandb DIR or --tensorboard DIR.")
    trials, written = 0, [0] * len(trackers)
    try:
        with ExitStack() as closed:
            for tracker in trackers:
                closed.callback(tracker.close)
            for row in read_rows(store):
                trials += 1
                for index, tracker in enumerate(trackers):
                    written[index] += tracker.put(row)
    except OSError as error:
        raise HarnessError(f"{store.uri}: cannot be exported ({error}). Give another place, or run it again.") from None
    for tracker, count in zip(trackers, written, strict=True):
        yield f"{count} written, {trials - count} unchanged: {tracker.where}"
    plan = store.read_plan()
    if plan is not None and len(plan.trials) > trials:
        yield f"{trials} of {len(plan.trials)} trials have a record; export again when the others have one."


def _name_of(store: RunStore) -> str:
    last = posixpath.basename(store.root.rstrip("/"))
    return shortened(printable(last), NAME_CHARACTERS) or "revnet"


def _checked(name: str) -> str:
    """It becomes a folder's name."""
    if name in ("", ".", "..") or "/" in name or printable(name) != name or len(name) > NAME_CHARACTERS:
        raise HarnessError(
            f"--name {name}: is no name of a folder. Give 1 to {NAME_CHARACTERS} characters without / and controls."
        )
    return name

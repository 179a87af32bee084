"""What a trial can be asked to leave beside its record: one step's memory, for viewers that others made."""

import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from harness.errors import HarnessError

if TYPE_CHECKING:
    from harness.store import RunStore

# Their names, and how the files of a trial end.
EXPORTS = {"snapshot": "snapshot.pickle", "perfetto": "perfetto.json.gz"}
# Set for the process of a trial: names with a comma between them.
EXPORTS_ASKED = "REVNET_EXPORTS"
# A metric of the step that exports are of.
EXPORTED_WITH = "attributed_peak_difference_bytes"


def asked_exports() -> frozenset[str]:
    """What this process is asked for. Raises HarnessError for a name that is none."""
    names = frozenset(filter(None, os.environ.get(EXPORTS_ASKED, "").split(",")))
    for name in sorted(names - EXPORTS.keys()):
        raise HarnessError(f"{EXPORTS_ASKED}: {name!r} is no export. Give some of: {', '.join(EXPORTS)}.")
    return names


def exports_environment(names: Iterable[str]) -> dict[str, str]:
    """What to set for the process of a trial that is asked for these."""
    return {EXPORTS_ASKED: ",".join(sorted(names))}


def export_path(trial_id: str, export: str) -> str:
    """Where an export lies within a run directory."""
    return f"exports/{trial_id}.{EXPORTS[export]}"


def what_was_exported(store: "RunStore", trial_id: str, exports: Sequence[str]) -> list[str]:
    """Where a trial's exports lie, a line each, or why there are none."""
    record = store.find_record(trial_id)
    if record is not None and EXPORTED_WITH in record.metrics:
        return [f"{export}: {store.uri}/{export_path(trial_id, export)}" for export in exports]
    why = None if record is None else record.unmeasured.get(EXPORTED_WITH) or record.reason
    return [f"{', '.join(exports)}: none of {trial_id}, {why or 'which was not run to its end'}"]

"""What a trial can be asked to leave beside its record: one step's memory, for viewers that others made."""

import os
from collections.abc import Iterable

from harness.errors import HarnessError

# Their names, and how the files of a trial end.
EXPORTS = {"snapshot": "snapshot.pickle", "perfetto": "perfetto.json.gz"}
# Set for the process of a trial: names with a comma between them.
EXPORTS_ASKED = "REVNET_EXPORTS"


def asked_exports() -> frozenset[str]:
    """What this process is asked for. Raises HarnessError for a name that is none."""
    names = frozenset(filter(None, os.environ.get(EXPORTS_ASKED, "").split(",")))
    for name in sorted(names - EXPORTS.keys()):
        raise HarnessError(f"{EXPORTS_ASKED}: {name!r} is no export. Give some of: {', '.join(EXPORTS)}.")
    return names


def exports_environment(names: Iterable[str]) -> dict[str, str]:
    """What to set for the process of a trial that is asked for these."""
    return {EXPORTS_ASKED: ",".join(sorted(names))}

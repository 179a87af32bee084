"""In place of `harness.worker`: a trial that sleeps for 2 seconds, and leaves a record."""

import sys
import time
from pathlib import Path

from harness.record import Record
from harness.store import RunStore
from harness.worker import die_with_parent, read_spec

WORK_S = 2.0


def main() -> None:
    die_with_parent()
    spec = read_spec(Path(sys.argv[1]))
    time.sleep(WORK_S)
    RunStore(sys.argv[2]).write_trial(Record(id=spec.id, spec=spec.model_dump(mode="json"), status="ok"))


if __name__ == "__main__":
    main()

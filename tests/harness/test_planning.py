"""Which trials run now: those without a record, those asked for again, and a spread of strategies under a limit."""

from pathlib import Path
from typing import Any

import pytest

from harness.errors import HarnessError
from harness.planning import select_trials
from harness.record import Record, Status
from harness.store import RunStore
from harness.trials import TrialSpec

TRIALS = [
    TrialSpec(model="revnet", depth=depth, activations=activations)
    for activations in ("stored", "reconstructed")
    for depth in (14, 26, 38)
]


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    """The first trial is done, the second failed, the third ran out of memory; the others have not run."""
    store = RunStore(tmp_path / "run")
    statuses: list[Status] = ["ok", "failed", "oom"]
    for trial, status in zip(TRIALS, statuses, strict=False):
        store.write_trial(Record(id=trial.id, spec=trial.model_dump(mode="json"), status=status))
    return store


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [3, 4, 5]),
        ({"retry": "failed"}, [1, 3, 4, 5]),
        ({"retry": "oom, failed"}, [1, 2, 3, 4, 5]),
        ({"only": TRIALS[0].id[:6]}, [0]),
        ({"limit": 1}, [3]),
        ({"limit": 2, "retry": "failed,oom"}, [1, 3]),
        ({"limit": 100}, [3, 4, 5]),
    ],
)
def test_selection(store: RunStore, options: dict[str, Any], expected: list[int]) -> None:
    defaults: dict[str, Any] = {"only": None, "retry": None, "limit": None}
    assert select_trials(TRIALS, store, **(defaults | options)) == [TRIALS[index] for index in expected]


@pytest.mark.parametrize(
    ("options", "message"), [({"only": "zz"}, "no trial of this study"), ({"retry": "broken"}, "no status 'broken'")]
)
def test_what_does_not_exist_is_refused(store: RunStore, options: dict[str, Any], message: str) -> None:
    defaults: dict[str, Any] = {"only": None, "retry": None, "limit": None}
    with pytest.raises(HarnessError, match=message):
        select_trials(TRIALS, store, **(defaults | options))

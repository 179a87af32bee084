"""A place for runs is the same for all who look when each finds the marks of those before."""

from pathlib import Path

import pytest

from harness.storage_check import clear_marks, leave_mark


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_marks_are_found_by_all_and_cleared(kind: str, tmp_path: Path) -> None:
    storage = str(tmp_path / "runs") if kind == "file" else f"memory:/{tmp_path}"
    assert leave_mark(storage, "token", "a") == {"a"}
    assert leave_mark(storage, "token", "b") == {"a", "b"}
    assert leave_mark(storage, "another", "c") == {"c"}
    clear_marks(storage, "token")
    assert leave_mark(storage, "token", "b") == {"b"}


def test_a_place_that_cannot_be_written_raises() -> None:
    with pytest.raises(OSError, match="runs"):
        leave_mark("/proc/runs", "token", "a")

"""A place for runs is the same for all who look when each finds the mark that one left there first."""

from pathlib import Path

import pytest

from harness.storage_check import clear_marks, leave_mark, marked, reach


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


def test_who_looks_at_the_same_place_finds_the_first_mark_and_who_does_not_does_not(tmp_path: Path) -> None:
    storage = str(tmp_path / "runs")
    with marked(storage) as (token, error):
        assert error is None
        assert reach(storage, token, "a") == (None, True)
        assert reach(str(tmp_path / "elsewhere"), token, "a") == (None, False)
    assert list((tmp_path / "runs").iterdir()) == []


def test_why_a_place_cannot_be_written_is_said() -> None:
    with marked("/proc/runs") as (token, error):
        assert "runs" in (error or "")
        assert reach("/proc/runs", token, "a")[0] == error

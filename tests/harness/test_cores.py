"""Trials on one machine have cores of their own, as far as there are any, and give them back whatever ends them."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from harness.cores import CORES, bind, cores_held, held_cores
from harness.trials import TrialSpec
from tests.harness.conftest import Trial, environment

HOLD = """
import sys
from harness.cores import held_cores
with held_cores(int(sys.argv[1])) as cores:
    print(*cores, flush=True)
    sys.stdin.read()
"""
ALL = sorted(os.sched_getaffinity(0))


@pytest.fixture(autouse=True)
def _own_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Apart from those of trials that other tests run meanwhile."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)


def holder(count: int) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", HOLD, str(count)]
    return subprocess.Popen(command, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def cores_of(process: "subprocess.Popen[str]") -> list[int]:
    assert process.stdout is not None
    return [int(core) for core in process.stdout.readline().split()]


def test_two_that_hold_cores_have_different_ones_and_a_third_has_none_where_there_are_no_more() -> None:
    with held_cores(1) as first, held_cores(len(ALL) - 1) as rest:
        assert sorted(first + rest) == ALL
        with held_cores(1) as none:
            assert none == []
    with held_cores(len(ALL)) as again:
        assert again == ALL


def test_what_cannot_be_had_whole_is_left_to_others() -> None:
    """While whoever wanted more goes on without any."""
    with held_cores(1) as one, held_cores(len(ALL)) as none, held_cores(len(ALL) - 1) as others:
        assert none == []
        assert sorted(one + others) == ALL


def test_cores_of_a_process_that_is_killed_are_free_again() -> None:
    with holder(len(ALL)) as process:
        assert cores_of(process) == ALL
        with held_cores(1) as none:
            assert none == []
        process.kill()
        process.wait()
        with held_cores(len(ALL)) as all_of_them:
            assert all_of_them == ALL


def test_a_folder_that_others_can_write_is_not_trusted(tmp_path: Path) -> None:
    folder = tmp_path / f"revnet-cores-{os.getuid()}"
    folder.mkdir()
    folder.chmod(0o777)
    with held_cores(1) as none:
        assert none == []
    folder.chmod(0o700)
    with held_cores(1) as one:
        assert len(one) == 1


@pytest.mark.skipif(len(ALL) < 2, reason="needs two cores")
@pytest.mark.parametrize(("rank", "expected"), [(None, ALL[:2]), ("0", ALL[:1]), ("1", ALL[1:2])])
def test_a_rank_is_bound_to_its_own_of_the_trial_s_cores(
    monkeypatch: pytest.MonkeyPatch, rank: str | None, expected: list[int]
) -> None:
    monkeypatch.setenv(CORES, ",".join(map(str, ALL[:2])))
    if rank is None:
        monkeypatch.delenv("LOCAL_RANK", raising=False)
    else:
        monkeypatch.setenv("LOCAL_RANK", rank)
    assert cores_held() == ALL[:2]
    try:
        bind(1)
        assert sorted(os.sched_getaffinity(0)) == expected
    finally:
        os.sched_setaffinity(0, ALL)


def test_without_cores_of_its_own_a_process_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CORES, raising=False)
    bind(1)
    assert sorted(os.sched_getaffinity(0)) == ALL


def test_a_record_says_which_cores_were_its_trial_s_own(trial: Trial) -> None:
    spec = TrialSpec(model="faulty_models:affinity", depth=None, activations="stored", batch_size=4, audit_batch_size=0)
    done = trial(spec)
    [core] = done.record.machine["own_cores"]
    assert core in ALL
    assert done.log is not None
    assert f"computes on {[core]}" in done.log.decode()

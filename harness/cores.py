"""Cores of this machine that one trial has to itself, so that no other trial disturbs its times.

A core is held by a lock on a file of this user's, which ends with the process that has it. The trial's process is told
by its environment and binds itself before it does anything else.
"""

import contextlib
import fcntl
import os
import stat
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

# Of a trial's process: the cores that are held for it, for all of its ranks on this node.
CORES = "REVNET_CORES"


@contextlib.contextmanager
def held_cores(count: int) -> Iterator[list[int]]:
    """Cores that no other trial holds; none at all where fewer are free, as with two drivers on one machine."""
    with contextlib.ExitStack() as locks:
        held: list[int] = []
        folder = _folder()
        for core in _in_order(sorted(os.sched_getaffinity(0)), count) if folder else ():
            if len(held) < count and _lock(Path(folder or "", f"{core}.lock"), locks):
                held.append(core)
        if len(held) < count:
            locks.close()
            held = []
        yield sorted(held)


def bind(cpus_per_worker: int) -> None:
    """Keep this process, and all that it starts, to the cores that are held for it; a rank to its own of them."""
    cores = cores_held()
    if not cores:
        return
    rank = os.environ.get("LOCAL_RANK")
    if rank is not None:
        first = int(rank) * cpus_per_worker
        cores = cores[first : first + cpus_per_worker] or cores
    with contextlib.suppress(OSError):  # taken from this process since
        os.sched_setaffinity(0, cores)


def cores_held() -> list[int]:
    """For this process's trial; empty where it was told of none."""
    return [int(core) for core in os.environ.get(CORES, "").split(",") if core]


def _lock(path: Path, locks: contextlib.ExitStack) -> bool:
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError:
        return False
    locks.callback(os.close, file)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _folder() -> Path | None:
    """None where it cannot be had, or is not this user's alone."""
    folder = Path(tempfile.gettempdir(), f"revnet-cores-{os.getuid()}")
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return None
    private = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077
    return folder if private else None


def _in_order(cores: Sequence[int], count: int) -> list[int]:
    """Where a physical core runs several threads: single ones first on cores of their own, several together."""
    siblings = [_siblings(core) for core in cores]
    if count == 1:
        return [core for _, core in sorted((own.index(core), core) for own, core in zip(siblings, cores, strict=True))]
    return [core for _, core in sorted((own[0], core) for own, core in zip(siblings, cores, strict=True))]


def _siblings(core: int) -> list[int]:
    """Threads of its physical core, itself among them."""
    path = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list")
    found = {core}
    with contextlib.suppress(OSError, ValueError):
        for part in path.read_text().strip().split(","):
            first, _, last = part.partition("-")
            found |= set(range(int(first), int(last or first) + 1))
    return sorted(found)

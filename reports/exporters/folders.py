"""Trackers that keep each trial in a folder: which of them are still right, and where they may be."""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from harness.errors import HarnessError
from reports.exporters.rows import Row

# Within a trial's folder, written last: the fingerprint of what was exported.
MARK = "revnet-export.sha256"


def writable_folder(option: str, folder: Path) -> Path:
    """The folder, made where it is missing. Raises HarnessError where it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        reason = None if os.access(folder, os.W_OK | os.X_OK) else "Permission denied"
    except OSError as error:
        reason = error.strerror
    if reason is not None:
        raise HarnessError(f"{option} {folder}: cannot be written ({reason}). Give another directory.")
    return folder


def find_current(folders: Iterable[Path], row: Row) -> Path | None:
    """The folder that holds what the trial would be exported as."""
    return next((folder for folder in folders if _mark(folder) == row.fingerprint), None)


def mark(folder: Path, row: Row) -> None:
    (folder / MARK).write_text(row.fingerprint)


def remove(folders: Iterable[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder)


def _mark(folder: Path) -> str | None:
    try:
        return (folder / MARK).read_text()
    except (OSError, UnicodeDecodeError):
        return None

"""Whether a place for runs can be written and read, and is the same place for all who look."""

import posixpath
from collections.abc import Collection

import fsspec


def leave_mark(storage: str, token: str, name: str) -> set[str]:
    """Write a mark of this name and return the names of all marks; raises whatever the file system raises."""
    fs, root = fsspec.core.url_to_fs(storage)
    folder = _folder(root, token)
    fs.makedirs(folder, exist_ok=True)
    path = posixpath.join(folder, name)
    fs.pipe_file(path, name.encode())
    if fs.cat_file(path) != name.encode():
        raise OSError(f"{path} is not read as it was written")
    fs.invalidate_cache()
    return {posixpath.basename(found) for found in fs.ls(folder, detail=False)}


def reach(storage: str, token: str, name: str, marked: Collection[str]) -> tuple[str | None, bool]:
    """Leave a mark; returns why that cannot be done, and whether those that others left are found."""
    try:
        return None, leave_mark(storage, token, name) >= set(marked)
    except Exception as error:  # noqa: BLE001 - file systems raise what they like, and each is a finding
        return f"{type(error).__name__}: {error}", True


def clear_marks(storage: str, token: str) -> None:
    fs, root = fsspec.core.url_to_fs(storage)
    fs.invalidate_cache()
    if fs.exists(_folder(root, token)):
        fs.rm(_folder(root, token), recursive=True)


def _folder(root: str, token: str) -> str:
    return posixpath.join(root, f"revnet-check-{token}")

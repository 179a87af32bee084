"""Whether a place for runs can be written and read, and is the same place for all who look."""

import contextlib
import posixpath
import uuid
from collections.abc import Iterator

import fsspec

FIRST = "first"
REMEDY = (
    "Give a path or URI that this machine and all nodes reach as the same place (a shared file system, s3://, gs://), "
    "with the credentials for it on each."
)


@contextlib.contextmanager
def marked(storage: str) -> Iterator[tuple[str, str | None]]:
    """Leave a mark there, for others to find by the token that is yielded; and say why that cannot be done, if so. All
    marks are cleared at the end."""
    token = uuid.uuid4().hex
    error, _ = reach(storage, token, FIRST)
    try:
        yield token, error
    finally:
        if error is None:
            clear_marks(storage, token)


def reach(storage: str, token: str, name: str) -> tuple[str | None, bool]:
    """Leave a mark of this name; returns why that cannot be done, and whether the first one is found there."""
    try:
        return None, FIRST in leave_mark(storage, token, name)
    except Exception as error:  # noqa: BLE001 - file systems raise what they like, and each is a finding
        return f"{type(error).__name__}: {error}", True


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


def clear_marks(storage: str, token: str) -> None:
    fs, root = fsspec.core.url_to_fs(storage)
    fs.invalidate_cache()
    if fs.exists(_folder(root, token)):
        fs.rm(_folder(root, token), recursive=True)


def _folder(root: str, token: str) -> str:
    return posixpath.join(root, f"revnet-check-{token}")

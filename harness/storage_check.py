"""Whether a place for runs can be written and read, and is the same place for all who look."""

import posixpath

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


def clear_marks(storage: str, token: str) -> None:
    fs, root = fsspec.core.url_to_fs(storage)
    fs.invalidate_cache()
    if fs.exists(_folder(root, token)):
        fs.rm(_folder(root, token), recursive=True)


def _folder(root: str, token: str) -> str:
    return posixpath.join(root, f"revnet-check-{token}")

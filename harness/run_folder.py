"""Files of a run directory, on a local path or any fsspec URI: read within bounds, written whole, and never outside."""

import contextlib
import os
import posixpath
import re
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem

from harness.errors import StoreError

# Of one file: a trace, an export. What is larger was not made by a run.
MOST_BYTES = 2**30


class RunFolder:
    """Names are relative, with / between their parts."""

    def __init__(self, uri: str | Path) -> None:
        """Raises StoreError for a URI of an unknown kind."""
        text = str(uri)
        try:
            self.fs, self.root = fsspec.core.url_to_fs(os.path.expanduser(text))
        except (ValueError, ImportError) as error:
            raise StoreError(f"{text}: {error}. Give a path, or a URI that fsspec can open.") from None
        self.uri = text.rstrip("/")

    @property
    def is_local(self) -> bool:
        return isinstance(self.fs, LocalFileSystem)

    @property
    def is_empty(self) -> bool:
        """Files that are being written do not count."""
        names = self.names_in("")
        return all(re.fullmatch(r"\..+\.[0-9a-f]{32}", name) for name in names)

    def names_in(self, folder: str) -> list[str]:
        # Others write here too: what an object store was found to hold a moment ago is of no use.
        self.fs.invalidate_cache()
        try:
            return [posixpath.basename(path) for path in self.fs.ls(self._path(folder), detail=False)]
        except FileNotFoundError:
            return []

    def read(self, name: str) -> bytes | None:
        """None where there is no such file. Raises StoreError for what is no file, too large, or outside."""
        path = self._path(name)
        try:
            if self.is_local and not stat.S_ISREG(os.stat(path).st_mode):
                raise StoreError(f"{self.uri}/{name}: is no file. Remove it.")
            data = self.fs.cat_file(path, end=MOST_BYTES + 1)
        except (FileNotFoundError, NotADirectoryError):
            return None
        if len(data) > MOST_BYTES:
            raise StoreError(f"{self.uri}/{name}: larger than {MOST_BYTES} bytes. Remove it.")
        return data

    def write(self, name: str, data: bytes) -> None:
        path = self._path(name)
        if not self.is_local:
            self.fs.pipe_file(path, data)  # object stores show a file only once it is whole
            return
        with _whole_file(path, data) as part:
            os.replace(part, path)

    def create(self, name: str, data: bytes) -> bool:
        """Write a file that must not be there yet; False, and nothing is written, where it is. Of two who create the
        same file one succeeds."""
        path = self._path(name)
        try:
            if not self.is_local:
                self.fs.pipe_file(path, data, mode="create")
                return True
            with _whole_file(path, data) as part:
                os.link(part, path)
        except FileExistsError:
            return False
        return True

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(self._path(name))

    def _path(self, name: str) -> str:
        path = posixpath.join(self.root, name)
        if self.is_local:
            # The directory itself may be a link, of whoever gave it; nothing within it may lead out of it.
            root = os.path.realpath(self.root)
            if os.path.commonpath([root, os.path.realpath(path)]) != root:
                raise StoreError(f"{self.uri}/{name}: is a link that leads out of the run directory. Remove it.")
        return path


@contextlib.contextmanager
def _whole_file(path: str, data: bytes) -> Iterator[str]:
    """The data in a file beside `path`, which is gone afterwards."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    # A leading dot and no .json ending: a reader never takes it for a record.
    part = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.{uuid.uuid4().hex}")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield part
    finally:
        if os.path.exists(part):
            os.unlink(part)

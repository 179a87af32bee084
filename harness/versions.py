"""Versions of Python and of packages."""

import importlib.metadata
import platform
from collections.abc import Iterable


def installed(packages: Iterable[str]) -> dict[str, str]:
    """Python's, and theirs by name; a package that is not installed is left out."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found

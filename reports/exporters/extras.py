"""Libraries of trackers, which only those have who asked for them."""

import importlib
from typing import Any

from harness.errors import HarnessError


def library(module: str, extra: str) -> Any:
    """The module. Raises HarnessError, with what to install, where it or something that it needs is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise HarnessError(
            f"--{extra}: cannot import {module} ({error}). Install it with: pip install 'revnet-harness[{extra}]'"
        ) from None

"""The token without which nobody gets at a Ray of our own."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ray import _raylet

MODE, TOKEN, PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"


@contextlib.contextmanager
def own_token(folder: str) -> Iterator[None]:
    """Let the Ray that starts within, and this process, use a token in `folder` that only this user can read.

    On loopback a Ray is open to every user of the machine. Ray's own remedy is a token in the home directory, from then
    on for all clusters, in a file that others may read as far as they get there.
    """
    path = Path(folder, "token")
    path.touch(mode=0o600)
    path.write_text(secrets.token_hex(32))
    before = {name: os.environ.pop(name, None) for name in (MODE, TOKEN, PATH)}
    os.environ[MODE], os.environ[PATH] = "token", str(path)
    _read_again()
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        _read_again()


def _read_again() -> None:
    """Ray keeps what it has read of the environment."""
    ray: Any = _raylet
    ray.Config.initialize("")
    ray.AuthenticationTokenLoader.instance().reset_cache()

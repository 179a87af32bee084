"""A connection to Ray: to a cluster that is there, or to a Ray of our own on this machine."""

import contextlib
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator

# Read when ray is imported: no usage report, no advance notice of a change that does not concern us.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray
from ray._private import ray_constants, services
from ray._private.authentication.authentication_token_setup import ensure_token_if_auth_enabled
from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue]
from ray.exceptions import AuthenticationError, RpcError

from harness.errors import ResourceError
from harness.schedule.client import CLIENT, join_as_client, token_wanted
from harness.schedule.token import own_token

QUIET = {"log_to_driver": False, "logging_level": "ERROR"}


@contextlib.contextmanager
def ray_session(address: str | None, cpus: int | None = None) -> Iterator[None]:
    """Join the cluster at `address`, or start a Ray of our own on this machine that ends with the block.

    cpus  of our own Ray, where they are to be others than this process may use

    Raises ResourceError when the cluster does not answer, asks for a token that is not ours, or can't be joined so.
    """
    if address is not None:
        _join(address)
        try:
            with _ended_by_sigterm():
                yield
        finally:
            ray.shutdown()
        return
    with _loopback_only(), _own_folder() as folder, own_token(folder):
        try:
            ray.init(
                address="local",
                num_cpus=cpus or len(os.sched_getaffinity(0)),
                include_dashboard=False,
                object_store_memory=100 * 2**20,
                _node_ip_address="127.0.0.1",
                # Ray lets everybody into its folder.
                _temp_dir=os.path.join(folder, "ray"),
                **QUIET,
            )
            with _ended_by_sigterm():
                yield
        finally:
            ray.shutdown()


def _join(address: str) -> None:
    if address.startswith(CLIENT):
        join_as_client(address, **QUIET)
        return
    if "://" in address:
        raise ResourceError(
            f"--address {address}: not the address of a Ray cluster. On one of its nodes give HOST:PORT, with the port "
            "of `ray start --head` (6379), or `auto`; from outside, ray://HOST:10001."
        )
    try:
        # Asked beforehand, since ray.init has no reason to give when it fails, and tries 20 times whatever the reason;
        # and this only with a token that can be read, without which it ends the process.
        ensure_token_if_auth_enabled(create_token_if_missing=False)
        GcsClient(address=services.canonicalize_bootstrap_address_or_die(address))
        ray.init(address=address, **QUIET)
    except AuthenticationError:
        raise ResourceError(token_wanted(address)) from None
    except (RpcError, ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        raise ResourceError(
            f"--address {address}: no Ray cluster answers ({error}). Start one with `ray start --head`, or leave "
            "--address out to run on this machine."
        ) from None


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM, with which schedulers announce that they want the machine back, do what Ctrl-C does. For when Ray
    runs: it sets a handler of its own when it starts."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _own_folder() -> Iterator[str]:
    # Not /tmp/ray, which belongs to whoever came first on a shared node; short, since sockets lie in it.
    folder = tempfile.mkdtemp(prefix="revnet-ray-", dir="/tmp" if os.path.isdir("/tmp") else None)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _loopback_only() -> Iterator[None]:
    """Keep every port of the Ray that starts within on 127.0.0.1.

    On Linux Ray replaces a loopback address by one that others can reach, unless this switch (made for systems
    without clusters) says that there are no others; it is read from the environment by Ray's processes, and once,
    at import, by this one.
    """
    before, in_environment = ray_constants.ENABLE_RAY_CLUSTER, os.environ.get(ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR)
    ray_constants.ENABLE_RAY_CLUSTER = False
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        os.environ.pop(ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR)
        if in_environment is not None:
            os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = in_environment

"""Joining a cluster from outside, through the server that its head has for Ray's clients."""

import importlib.util
from typing import Any

import ray
from ray._private.authentication.authentication_token_setup import ensure_token_if_auth_enabled
from ray.exceptions import AuthenticationError

from harness.errors import ResourceError

CLIENT = "ray://"
TRIES = 3
ANSWER_S = 10.0
GIVE_TOKEN = (
    "Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to a file with the token (or RAY_AUTH_TOKEN to the token)."
)


def join_as_client(address: str, **options: Any) -> None:
    """`ray.init(address, **options)` for an address of the form ray://HOST:PORT. Raises ResourceError with the reason,
    which Ray itself has only for its log."""
    if importlib.util.find_spec("grpc") is None:
        raise ResourceError(
            f"--address {address}: Ray's client needs grpcio, here and on the head. Install it with "
            "`pip install 'revnet-harness[client]'`."
        )
    try:
        ensure_token_if_auth_enabled(create_token_if_missing=False)
        _ping(address)
    except AuthenticationError:
        raise ResourceError(token_wanted(address)) from None
    for tries_left in reversed(range(TRIES)):
        try:
            ray.init(address=address, **options)
            return
        except (ConnectionError, RuntimeError, TimeoutError) as error:
            # At times the head's server breaks the process that it starts for a client.
            if tries_left:
                continue
            last_line = str(error).strip(" .)\n").splitlines()[-1]
            raise ResourceError(
                f"--address {address}: the head starts no server for this client: {last_line}. The log is "
                "ray_client_server_*.err in Ray's session folder there. Start Ray on the head with "
                "GRPC_ENABLE_FORK_SUPPORT=0 in its environment, or run this on one of the nodes with HOST:6379."
            ) from None


def token_wanted(address: str) -> str:
    return f"--address {address}: this Ray cluster wants its token, and here is none or another one. {GIVE_TOKEN}"


def _ping(address: str) -> None:
    """Ask for a sign of life, as Ray's client does, which does not tell a wrong token from silence."""
    import grpc
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated import ray_client_pb2, ray_client_pb2_grpc

    messages: Any = ray_client_pb2
    request = messages.ClusterInfoRequest(type=messages.ClusterInfoType.PING)
    channel: Any = init_grpc_channel(address.removeprefix(CLIENT))
    with channel:
        try:
            ray_client_pb2_grpc.RayletDriverStub(channel).ClusterInfo(request, timeout=ANSWER_S)
        except grpc.RpcError as error:
            code, details = error.code(), error.details()  # pyright: ignore[reportAttributeAccessIssue]
            if code == grpc.StatusCode.UNAUTHENTICATED:
                raise AuthenticationError(str(details)) from None
            raise ResourceError(
                f"--address {address}: no server for Ray's clients answers there ({code.name}: {details}). Give "
                f"{CLIENT}HOST:PORT with the client port of the head (10001 if `ray start --head` was given no other), "
                "which it opens where grpcio is installed."
            ) from None

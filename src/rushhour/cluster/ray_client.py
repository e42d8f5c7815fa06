"""This process as a client of a Ray cluster: its address, the connection, and Ray's manners.

Importing it needs the extra `cluster` for nothing; using it does.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
import warnings
from typing import Any, Final

from rushhour.errors import GoalError
from rushhour.system.extras import require

LOOPBACK: Final = "127.0.0.1"
PATIENCE: Final = {"RAY_py_gcs_connect_timeout_s": "10", "RAY_gcs_server_request_timeout_seconds": "10"}
"""Of this process, with an address at which something else than Ray may answer. A Ray that it starts has none of it."""
_QUIET: Final = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
_TRIES: Final = 2
_CONNECT_S: Final = 5.0


def imported() -> Any:
    """The module `ray`, imported without its warnings; it sends no usage statistics.

    Raises:
        InstallError: if Ray is not installed.
    """
    require("cluster")
    os.environ.update({name: value for name, value in {**_QUIET, **PATIENCE}.items() if name not in os.environ})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import ray
    return ray


def address_of(address: str | None) -> str | None:
    """The address, if something listens there; of None that of the Ray that runs on this machine, None if none does.

    Raises:
        GoalError: if it is no address, or nothing listens there.
    """
    if address is not None:
        return _checked(address)
    from ray._private.utils import read_ray_address

    if chosen := os.environ.get("RAY_ADDRESS"):
        return _checked(chosen)
    address = read_ray_address()
    try:
        return _checked(address) if address else None
    except GoalError:
        return None  # it has ended


def connect(ray: Any, address: str) -> None:
    """Make this process a client, until `ray.shutdown()`. It keeps its own handler of SIGTERM.

    Args:
        ray: the module.
        address: from `address_of`.

    Raises:
        GoalError: if Ray does not answer.
    """
    from ray._private import ray_constants

    ray_constants.NUM_REDIS_GET_RETRIES = _TRIES
    if address.startswith((LOOPBACK, "localhost")):
        # Ray takes loopback for the machine's address in its network, but where it expects no other machine. Here it
        # has been imported, and does not read RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER any more.
        ray_constants.ENABLE_RAY_CLUSTER = False
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).addFilter(_is_error)  # Ray Serve sets its level anew
    handler = signal.getsignal(signal.SIGTERM)
    _check_ray(address)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ray.init(address, log_to_driver=False, configure_logging=False, logging_level=logging.ERROR)
    except Exception as error:  # of many kinds
        raise GoalError(
            f"cannot connect to the Ray at {address}",
            why_of(error),
            "run this on a machine of the cluster, with the cluster's versions of Ray and Python",
        ) from error
    finally:
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray's own ends this process at once


def why_of(error: BaseException) -> str:
    """Why Ray failed, in a line. What an actor raised is a trace of Ray's in the text, and an error behind `cause`."""
    cause = getattr(error, "cause", None)
    raised = cause if isinstance(cause, BaseException) else error
    lines = [line.strip() for line in str(raised).splitlines() if line.strip()]
    if raised is cause:
        return "; ".join(lines)[:300] or type(raised).__name__
    return lines[0][:300] if lines else type(raised).__name__


def _check_ray(address: str) -> None:
    """Raise unless a Ray answers there, and a token is sent to it if it asks for one.

    What answers no call over gRPC is not waited for: Ray does so for half a minute. Source: Ray's `GetClusterId`, which
    its clients call first.

    Raises:
        GoalError: if there is none, or there is no token for it.
    """
    import grpc

    if os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
        return
    with grpc.insecure_channel(address) as channel:
        try:
            channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetClusterId")(b"", timeout=_CONNECT_S)
            return
        except grpc.RpcError as error:
            code = error.code()
    what = f"cannot connect to the Ray at {address}"
    if code is grpc.StatusCode.UNAVAILABLE:
        raise GoalError(what, "what listens there is no Ray", "give the address that `ray start --head` shows")
    if code is grpc.StatusCode.UNAUTHENTICATED and not _has_token(address):
        fix = "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to a file with the cluster's token"
        raise GoalError(what, "it asks for a token", fix)


def _has_token(address: str) -> bool:
    """Whether a token is sent to this address: the user's, where nothing else was chosen, to this machine alone.

    `ray.init()` makes one in the home folder, and any Ray that is started on that machine later asks for it; but a
    client that is given an address does not send it by itself.
    """
    from ray._private.authentication import authentication_token_setup as setup

    logging.getLogger(setup.__name__).addFilter(_is_error)
    if setup.AUTH_MODE_ENV_VAR not in os.environ and not _is_here(address):
        return False
    return bool(setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False))


def _is_here(address: str) -> bool:
    """Whether an address is of this machine."""
    host = address.rpartition(":")[0].strip("[]")
    with contextlib.suppress(OSError):
        family, kind, protocol, _, place = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.bind(place)
            return True
    return False


def _checked(address: str) -> str:
    host, _, port = address.rpartition(":")
    if "/" in address or not host or not port.isdecimal():
        raise GoalError(
            f"cannot use the Ray address {address!r}",
            "it is HOST:PORT of the head's key-value store, as `ray start --head` shows it",
            "write for example 10.0.0.5:6379, on a machine of the cluster",
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise GoalError(f"no Ray answers at {address}", why, "give the address of one that runs") from error
    return address


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR

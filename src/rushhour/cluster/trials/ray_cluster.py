"""This process as a client of a Ray cluster."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
import warnings
from collections.abc import Iterator
from typing import Any, Final

from rushhour.errors import GoalError
from rushhour.system.extras import require

AUTO: Final = "auto"
"""The address of the Ray that runs on this machine."""
_CONNECT_S: Final = 5.0
_QUIET: Final = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
_PATIENCE: Final = {"RAY_py_gcs_connect_timeout_s": "10", "RAY_gcs_server_request_timeout_seconds": "10"}
"""Of this process, with an address at which something else than Ray may answer."""
_TRIES: Final = 2


@contextlib.contextmanager
def connected(address: str) -> Iterator[Any]:
    """The module `ray`, connected while the block runs. A connection that was there before is used, and stays.

    Args:
        address: `HOST:PORT` of the cluster's key-value store, or `auto`.

    Raises:
        InstallError: if Ray is not installed.
        GoalError: if no Ray answers there.
    """
    require("cluster")
    os.environ.update({name: value for name, value in {**_QUIET, **_PATIENCE}.items() if name not in os.environ})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import ray

        if ray.is_initialized():
            yield ray
            return
        _connect(ray, _running() if address == AUTO else _checked(address))
    try:
        yield ray
    finally:
        ray.shutdown()


def _checked(address: str) -> str:
    """The address, if something listens there."""
    host, _, port = address.rpartition(":")
    if "/" in address or not host or not port.isdecimal():
        raise GoalError(
            f"cannot use the cluster's address {address!r}",
            "it is HOST:PORT of the head's key-value store, as `ray start --head` shows it",
            "write for example --cluster 10.0.0.5:6379, on a machine of the cluster",
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise GoalError(f"no Ray answers at {address}", why, "give the address of one that runs") from error
    return address


def _running() -> str:
    from ray._private.utils import read_ray_address

    address = os.environ.get("RAY_ADDRESS") or read_ray_address()
    if not address:
        raise GoalError(
            "no Ray runs on this machine",
            "--cluster has no address",
            "write --cluster HOST:PORT, or `ray start --head`",
        )
    return _checked(address)


def _connect(ray: Any, address: str) -> None:
    from ray._private import ray_constants

    ray_constants.NUM_REDIS_GET_RETRIES = _TRIES
    logging.getLogger("ray").setLevel(logging.ERROR)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address, log_to_driver=False, configure_logging=False, logging_level=logging.ERROR)
    except Exception as error:  # of many kinds
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise GoalError(
            f"cannot connect to the Ray at {address}",
            lines[0],
            "run this on a machine of the cluster, with the cluster's versions of Ray and Python",
        ) from error
    finally:
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray has one of its own, which ends this process at once

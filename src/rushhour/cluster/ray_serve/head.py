"""A Ray to deploy on: the one at an address, the one that runs on this machine, or one that is started here."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from rushhour.cluster.ray_serve.registry import Local, Registry
from rushhour.errors import ServeError
from rushhour.system.extras import require
from rushhour.system.machine import cores

_START_S: Final = 120.0
_STOP_S: Final = 60.0
_CONNECT_S: Final = 5.0
_LOOK_S: Final = 0.1
_STORE_BYTES: Final = 100_000_000
"""Of Ray's object store, which holds none of our objects."""
_LOOPBACK: Final = "127.0.0.1"
_QUIET: Final = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
_PATIENCE: Final = {"RAY_py_gcs_connect_timeout_s": "10", "RAY_gcs_server_request_timeout_seconds": "10"}
"""Of this process, with an address at which something else than Ray may answer."""
_TRIES: Final = 2
_ON_LOOPBACK: Final = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Ray takes 127.0.0.1 for the machine's address in its network, but where it expects no other machine."""


@contextlib.contextmanager
def connected(
    address: str | None, *, start: bool = False, say: Callable[[str], None] | None = None
) -> Iterator[Registry]:
    """This process as a client of a Ray, and what that knows of our deployments.

    A connection that was there before is used, and stays.

    Args:
        address: `HOST:PORT` of its key-value store; None for the one that runs on this machine.
        start: start one on this machine, where none runs and no address is given.
        say: is told of it.

    Raises:
        InstallError: if Ray is not installed.
        ServeError: if there is none, or it does not answer.
    """
    require("cluster")
    chosen = {**_QUIET, **_PATIENCE}
    os.environ.update({name: value for name, value in chosen.items() if name not in os.environ})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import ray

        if ray.is_initialized():
            yield Registry()
            return
        address = _checked(address) if address is not None else _running()
        started: Local | None = None
        if address is None:
            if not start:
                raise ServeError(
                    "no Ray runs on this machine", "", "start one with `ray start --head`, or give --ray ADDRESS"
                )
            if say is not None:
                say("no Ray runs on this machine: one is started on loopback")
            started = _start()
            address = started.address
        try:
            _connect(ray, address)
            registry = Registry()
            if started is not None:
                registry.keep_local(started)
        except BaseException:
            if started is not None:
                _end(started.pid)
            raise
        try:
            yield registry
        finally:
            ray.shutdown()


def stop(local: Local) -> None:
    """End a Ray that `connected` has started, with all of its processes. This process is no client of it any more."""
    import ray

    ray.shutdown()
    _end(local.pid)


def free_places(cpus: int) -> tuple[int, int, int]:
    """How many replicas the cluster has room for at all, and now, and how many CPUs its largest node has.

    Args:
        cpus: of each replica.
    """
    import ray
    from ray._private.state import available_resources_per_node

    free = available_resources_per_node()
    whole = now = largest = 0
    for node in ray.nodes():
        if node["Alive"]:
            has = int(node["Resources"].get("CPU", 0))
            whole, largest = whole + has // cpus, max(largest, has)
            now += int(free.get(node["NodeID"], {}).get("CPU", 0)) // cpus
    return whole, now, largest


def _checked(address: str) -> str:
    """The address, if something listens there.

    Raises:
        ServeError: if not.
    """
    host, _, port = address.rpartition(":")
    if address.startswith("ray://") or not host or not port.isdigit():
        raise ServeError(
            f"cannot use the Ray address {address!r}",
            "it is HOST:PORT of the head's key-value store, as `ray start --head` shows it",
            "write for example 10.0.0.5:6379, on a machine of the cluster",
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ServeError(f"no Ray answers at {address}", why, "give the address of one that runs") from error
    return address


def _running() -> str | None:
    """The address of the Ray that runs on this machine, if one does."""
    from ray._private.utils import read_ray_address

    address = os.environ.get("RAY_ADDRESS") or read_ray_address()
    if not address:
        return None
    try:
        return _checked(address)
    except ServeError:
        if os.environ.get("RAY_ADDRESS"):
            raise
        return None  # it has ended


def _connect(ray: Any, address: str) -> None:
    from ray._private import ray_constants

    ray_constants.NUM_REDIS_GET_RETRIES = _TRIES
    if address.startswith((_LOOPBACK, "localhost")):
        ray_constants.ENABLE_RAY_CLUSTER = False  # as `_ON_LOOPBACK` does, in a process that has imported it
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).addFilter(_is_error)  # Ray Serve sets its level anew
    try:
        ray.init(address, log_to_driver=False, configure_logging=False, logging_level=logging.ERROR)
    except Exception as error:  # of many kinds
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ServeError(
            f"cannot connect to the Ray at {address}", lines[0], "run this on a machine of the cluster"
        ) from error


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def _start() -> Local:
    """Start a Ray on loopback, in a process of its own, which outlives this one.

    Raises:
        ServeError: if it does not start.
    """
    from ray._common.utils import get_default_ray_temp_dir

    port = _free_port()
    folder = Path(get_default_ray_temp_dir())
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "rushhour-head.log"
    switches = {
        "node-ip-address": _LOOPBACK,
        "port": port,
        "num-cpus": cores(),
        "include-dashboard": "false",
        "include-log-monitor": "false",
        "ray-client-server-port": _free_port(),
        "dashboard-agent-listen-port": _free_port(),
        "object-store-memory": _STORE_BYTES,
    }
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    with log.open("wb") as said:
        process = subprocess.Popen(
            [*command, "--no-monitor", *(f"--{name}={value}" for name, value in switches.items())],
            env={name: value for name, value in os.environ.items() if name not in _PATIENCE} | _ON_LOOPBACK,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            start_new_session=True,
        )
    deadline = time.monotonic() + _START_S
    try:
        while b"Ray runtime started" not in log.read_bytes():
            if process.poll() is not None or time.monotonic() > deadline:
                lines = log.read_text(errors="replace").strip().splitlines()
                raise ServeError("Ray does not start on this machine", lines[-1] if lines else "", f"see {log}")
            time.sleep(_LOOK_S)
    except BaseException:
        _end(process.pid)
        raise
    return Local(process.pid, f"{_LOOPBACK}:{port}")


def _end(pid: int) -> None:
    """End the head and what it has started: all of them are in its session."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + _STOP_S
    while _session(pid) and time.monotonic() < deadline:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)
        time.sleep(_LOOK_S)
    for left in _session(pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(left, signal.SIGKILL)


def _session(leader: int) -> list[int]:
    """The processes of a session that have not ended."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(fields[3]) == leader and fields[0] != "Z":
                    found.append(int(entry.name))
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port

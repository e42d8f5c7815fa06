"""A Ray to deploy on: the one at an address, the one that runs on this machine, or one that is started here."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from rushhour.cluster.ray_client import LOOPBACK, PATIENCE, address_of, connect, imported
from rushhour.cluster.ray_serve.registry import Local, Registry
from rushhour.errors import ServeError
from rushhour.system.machine import cores

_START_S: Final = 120.0
_STOP_S: Final = 60.0
_LOOK_S: Final = 0.1
_STORE_BYTES: Final = 100_000_000
"""Of Ray's object store, which holds none of our objects."""
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
        GoalError: if it does not answer.
        ServeError: if there is none, or it does not start.
    """
    ray = imported()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of Ray Serve about its own future
        if ray.is_initialized():
            yield Registry()
            return
        found = address_of(address)
        started: Local | None = None
        if found is None:
            if not start:
                raise ServeError(
                    "no Ray runs on this machine", "", "start one with `ray start --head`, or give --ray ADDRESS"
                )
            if say is not None:
                say("no Ray runs on this machine: one is started on loopback")
            started = _start()
            found = started.address
        try:
            connect(ray, found)
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
        "node-ip-address": LOOPBACK,
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
            env={name: value for name, value in os.environ.items() if name not in PATIENCE} | _ON_LOOPBACK,
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
    return Local(process.pid, f"{LOOPBACK}:{port}")


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
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port

"""A Ray of one or two nodes on this machine, and what `rushhour deploy` makes on it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bench.keeper import descendants
from bench.servers import DidNotStart, free_port

_START_S, _STOP_S, _COMMAND_S = 120.0, 60.0, 240.0
_TICK = os.sysconf("SC_CLK_TCK")


class Ray:
    """A running Ray.

    Attributes:
        folder: of its files and ours.
        address: of its head.
        nodes: the processes that started each node, the head's first.
    """

    def __init__(self, folder: Path, cores: frozenset[int], env: Mapping[str, str]) -> None:
        self.folder = folder
        self._cores = cores
        self._env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {
            "RAY_TMPDIR": str(folder),
            "TMPDIR": str(folder),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "disabled",
            **env,
        }
        self.address = ""
        self.nodes: list[subprocess.Popen[bytes]] = []

    def add_node(self, cpus: int, *, alone: bool = True) -> None:
        """Start a node; the first is the head.

        Args:
            cpus: that it is said to have.
            alone: no other node joins, so it is on loopback.

        Raises:
            DidNotStart: if it does not.
        """
        port, head = free_port(), not self.nodes
        log = self.folder / f"node-{len(self.nodes)}.log"
        if head and alone:
            self._env["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        role = ["--head", f"--port={port}", "--include-dashboard=false"] if head else [f"--address={self.address}"]
        role += ["--node-ip-address=127.0.0.1"] if head and alone else []
        role += [f"--ray-client-server-port={free_port()}"] if head else []
        with log.open("wb") as said:
            node = subprocess.Popen(
                [
                    *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"),
                    *(*role, f"--num-cpus={cpus}", "--object-store-memory=100000000"),
                    f"--dashboard-agent-listen-port={free_port()}",
                ],
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                start_new_session=True,
                preexec_fn=lambda: os.sched_setaffinity(0, self._cores),
            )
        self.nodes.append(node)
        deadline = time.monotonic() + _START_S
        while "Ray runtime started" not in log.read_text(errors="replace"):
            if node.poll() is not None or time.monotonic() > deadline:
                raise DidNotStart(f"Ray: {(log.read_text(errors='replace').strip().splitlines() or ['nothing'])[-1]}")
            time.sleep(0.2)
        if head:
            self.address = (self.folder / "ray" / "ray_current_cluster").read_text().strip()

    def deploy(self, *words: str) -> dict[str, Any]:
        """`rushhour deploy`; its result.

        Raises:
            DidNotStart: with its message.
        """
        file = self.folder / "deployed.json"
        command = [sys.executable, "-m", "rushhour", "deploy", *words, "--ray", self.address, "--json", str(file)]
        done = subprocess.run(command, env=self._env, capture_output=True, text=True, check=False, timeout=_COMMAND_S)
        if done.returncode:
            raise DidNotStart((done.stderr.strip().splitlines() or ["rushhour deploy printed no message"])[-1])
        found: dict[str, Any] = json.loads(file.read_text())
        return found

    def begin(self, *words: str) -> subprocess.Popen[bytes]:
        """`rushhour deploy`, beside what follows."""
        command = [sys.executable, "-m", "rushhour", "deploy", *words, "--ray", self.address]
        return subprocess.Popen(command, env=self._env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def cpu_s(self) -> float:
        """CPU seconds of all its processes that live, replicas' servers among them."""
        ticks = 0
        for node in self.nodes:
            for pid in (node.pid, *descendants(node.pid)):
                with contextlib.suppress(OSError):
                    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                    ticks += sum(map(int, fields[11:13]))
        return ticks / _TICK

    def agent_of(self, node: int) -> int:
        """The pid of a node's raylet."""
        for pid in descendants(self.nodes[node].pid):
            with contextlib.suppress(OSError):
                if Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].endswith(b"/raylet"):
                    return pid
        raise DidNotStart("a node has no raylet")

    def stop(self) -> None:
        """End every node, with all that it has started."""
        left = {pid for node in self.nodes for pid in (node.pid, *descendants(node.pid))}
        for node in reversed(self.nodes):
            node.send_signal(signal.SIGTERM)
        for node in self.nodes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                node.wait(_STOP_S)
        for pid in left:
            with contextlib.suppress(OSError):  # its number may be another process's by now
                if str(self.folder).encode() in Path(f"/proc/{pid}/environ").read_bytes():
                    os.kill(pid, signal.SIGKILL)
        for node in self.nodes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                node.wait(5)


@contextlib.contextmanager
def ray_on(cores: frozenset[int], cpus: int, *, nodes: int = 1, haproxy: bool = False) -> Iterator[Ray]:
    """A Ray, as a context.

    Args:
        cores: all of its processes run on these.
        cpus: that each node is said to have.
        nodes: on this machine.
        haproxy: Ray Serve sends requests through its HAProxy.
    """
    with tempfile.TemporaryDirectory(prefix="b", dir="/tmp", ignore_cleanup_errors=True) as name:
        folder = Path(name)  # short: the paths of Ray's sockets have 97 characters at most
        running = Ray(folder, cores, _haproxy(folder) if haproxy else {})
        try:
            for _ in range(nodes):
                running.add_node(cpus, alone=nodes == 1)
            yield running
        finally:
            running.stop()


def _haproxy(folder: Path) -> dict[str, str]:
    """What has Ray Serve send requests through its HAProxy, with a folder for its files."""
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
    }

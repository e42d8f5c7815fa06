"""A Ray of the tests' own on loopback, deployments on it by the real command, and clients that count what they lose."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

PATIENCE_S = 90.0
TOKEN = "auth_token"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def of_session(leader: int) -> list[int]:
    """Processes of a session, and their servers, which have sessions of their own."""
    stats = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if fields[0] != "Z":
                    stats[int(entry.name)] = (int(fields[1]), int(fields[3]))
    found = {pid for pid, (_, session) in stats.items() if session == leader}
    return sorted(found | {pid for pid, (parent, _) in stats.items() if parent in found})


class Cluster:
    """A Ray, and the folder that its commands run in."""

    def __init__(self, folder: Path, address: str) -> None:
        self.folder = folder
        self.address = address

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """`rushhour deploy`."""
        command = [sys.executable, "-m", "rushhour", "deploy", *words]
        done = subprocess.run(
            command, env=environment(self.folder), capture_output=True, text=True, check=False, timeout=170
        )
        print(done.stdout, done.stderr)
        return done

    def deploy(self, *words: str) -> dict[str, Any]:
        """`rushhour deploy`, which must succeed; its result."""
        file = self.folder / "result.json"
        done = self.run(*words, "--ray", self.address, "--json", str(file))
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(file.read_text())
        return found


def environment(folder: Path) -> dict[str, str]:
    """Of Ray and of commands; with a token if the folder has one, as `ray.init()` makes it in the home folder."""
    given = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    given |= {"RAY_TMPDIR": str(folder), "TMPDIR": str(folder), "RAY_USAGE_STATS_ENABLED": "0"}
    return given | {"RAY_AUTH_TOKEN_PATH": str(folder / TOKEN)} if (folder / TOKEN).exists() else given


@contextlib.contextmanager
def cluster(folder: Path, cpus: int) -> Iterator[Cluster]:
    """A Ray that is said to have so many CPUs."""
    port = free_port()
    switches = {
        "node-ip-address": "127.0.0.1",
        "port": port,
        "num-cpus": cpus,
        "include-dashboard": "false",
        "ray-client-server-port": free_port(),
        "dashboard-agent-listen-port": free_port(),
        "object-store-memory": 100_000_000,
    }
    log = folder / "head.log"
    with log.open("wb") as said:
        head = subprocess.Popen(
            [
                *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"),
                *(f"--{name}={value}" for name, value in switches.items()),
            ],
            env=environment(folder) | {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"},
            stdout=said,
            stderr=said,
            start_new_session=True,
        )
    try:
        until(lambda: b"Ray runtime started" in log.read_bytes() or head.poll() is not None)
        assert head.poll() is None, log.read_text()
        yield Cluster(folder, f"127.0.0.1:{port}")
    finally:
        head.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            head.wait(5)
        for pid in of_session(head.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        head.wait()


def until(holds: Callable[[], Any], patience_s: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + patience_s
    while not holds():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.1)


def infer(url: str, model: str, image: np.ndarray[Any, Any], timeout_s: float = 30.0) -> list[float]:
    """An answer over HTTP."""
    what = {"name": "image", "shape": [1, *image.shape], "datatype": "UINT8", "data": image.ravel().tolist()}
    request = urllib.request.Request(
        f"{url}/v2/models/{model}/infer", json.dumps({"inputs": [what]}).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=timeout_s) as answer:
        found: list[float] = json.load(answer)["outputs"][0]["data"]
    return found


def addresses(proxy: str) -> list[str]:
    """Where replicas answer directly that take requests, as the proxy says."""
    with urllib.request.urlopen(f"{proxy}/replicas", timeout=10) as answer:
        return [each["http"] for each in json.load(answer)["replicas"] if each["state"] == "ready"]


class Client(threading.Thread):
    """Sends one request after another to addresses in turn; they are asked for every half second.

    Attributes:
        answered: requests, by address.
        lost: what became of the others.
    """

    def __init__(self, find: Callable[[], list[str]], model: str, image: np.ndarray[Any, Any]) -> None:
        super().__init__(daemon=True)
        self._find, self._model, self._image = find, model, image
        self._ended = threading.Event()
        self.answered: dict[str, int] = {}
        self.lost: list[str] = []
        self.start()

    def run(self) -> None:
        urls, asked = self._find(), time.monotonic()
        number = 0
        while not self._ended.is_set():
            if time.monotonic() > asked + 0.5:
                with contextlib.suppress(OSError):
                    urls = self._find() or urls
                asked = time.monotonic()
            url = urls[number % len(urls)]
            number += 1
            try:
                infer(url, self._model, self._image)
                self.answered[url] = self.answered.get(url, 0) + 1
            except (OSError, ValueError) as error:
                self.lost.append(f"{url}: {error}")
            self._ended.wait(0.01)

    def stop(self) -> None:
        self._ended.set()
        self.join()

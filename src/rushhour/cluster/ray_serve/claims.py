"""What replicas on one machine divide among themselves: cores, ports, and unpacked runs.

Each claim is a locked file in a folder of this user. The kernel frees it when its process ends, however that ends, so
there is nobody to ask and nothing to clean up.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from rushhour.cluster.node_folder import locked
from rushhour.errors import ServeError
from rushhour.system.storage import explained

_RUNS: Final = "runs"


class Claims:
    """Claims of this process.

    Args:
        folder: of all claims.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._held: list[int] = []
        (folder / _RUNS).mkdir(exist_ok=True)

    def cores(self, count: int, among: Iterable[int]) -> list[int]:
        """Cores that no other replica has, the lowest first; none where fewer than `count` are left."""
        taken: list[tuple[int, int]] = []
        for core in sorted(among):
            if len(taken) < count and (handle := self._locked(f"core-{core}")) is not None:
                taken.append((core, handle))
        if len(taken) < count:
            for _, handle in taken:
                os.close(handle)
            return []
        self._held += [handle for _, handle in taken]
        return [core for core, _ in taken]

    def ports(self, count: int, ports: tuple[int, int], host: str) -> list[int]:
        """Ports of a range that are free.

        Raises:
            ServeError: if there are fewer than `count`.
        """
        found: list[int] = []
        for port in range(ports[0], ports[1] + 1):
            if len(found) == count:
                break
            handle = self._locked(f"port-{port}")
            if handle is not None and not _is_free(host, port):
                os.close(handle)
                handle = None
            if handle is not None:
                self._held.append(handle)
                found.append(port)
        if len(found) < count:
            why = f"fewer than {count} of the ports from {ports[0]} to {ports[1]} are free"
            raise ServeError("cannot start the replica's server", why, "give a larger range with --ports")
        return found

    def runs(self, sha256: str) -> Path:
        """The folder of unpacked runs. That with this hash stays while this process lives; unused ones are removed."""
        runs = self._folder / _RUNS
        with explained(f"lock {self._folder / sha256}"):
            handle = os.open(self._folder / f"run-{sha256}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            self._held.append(handle)
            fcntl.flock(handle, fcntl.LOCK_SH)  # waits for a replica that is just removing it
        for other in runs.iterdir():
            if other.name == sha256 or other.name.startswith("."):
                continue
            unused = self._locked(f"run-{other.name}")
            if unused is not None:
                shutil.rmtree(other, ignore_errors=True)
                os.close(unused)
        return runs

    def close(self) -> None:
        """Free them all."""
        while self._held:
            with contextlib.suppress(OSError):
                os.close(self._held.pop())

    def _locked(self, name: str) -> int | None:
        """The handle of a locked file; None where another process holds it."""
        with explained(f"lock {self._folder / name}"):
            return locked(self._folder / name)


def _is_free(host: str, port: int) -> bool:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError:
        return False
    return True

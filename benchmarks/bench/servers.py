"""A server under measurement: started on its cores, monitored, and ended with all its child processes."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from bench.keeper import descendants

_KEEPER = Path(__file__).with_name("keeper.py")
_TICK = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


class DidNotStart(Exception):
    """A server did not start; the message is the last line of its log."""


class Server:
    """A running server; from `running`."""

    def __init__(self, keeper: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self._keeper = keeper
        self.port = port
        self.log = log

    @property
    def pids(self) -> list[int]:
        """All its processes."""
        return descendants(self._keeper.pid)

    def cpu_s(self) -> float:
        """CPU seconds of all its processes since it started, those that have ended included."""
        ticks = 0
        for pid in (self._keeper.pid, *self.pids):
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                own, of_ended = sum(map(int, fields[11:13])), sum(map(int, fields[13:15]))
                ticks += of_ended + (0 if pid == self._keeper.pid else own)
        return ticks / _TICK

    def rss_bytes(self) -> int:
        """Resident memory of all its processes; what they share counts for each."""
        total = 0
        for pid in self.pids:
            with contextlib.suppress(OSError):
                total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE
        return total

    def strays(self, cores: frozenset[int]) -> list[int]:
        """Threads that may run on other cores than `cores`: a server may change its affinity."""
        found = []
        for pid in self.pids:
            with contextlib.suppress(OSError):
                for task in os.listdir(f"/proc/{pid}/task"):
                    if not os.sched_getaffinity(int(task)) <= cores:
                        found.append(int(task))
        return found

    def last_words(self) -> str:
        """The last line of its log that is not empty."""
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines()]
        return next((line for line in reversed(lines) if line), "it printed no message")[:300]


@contextlib.contextmanager
def running(
    command: Sequence[str],
    env: Mapping[str, str],
    port: int,
    cores: frozenset[int],
    log: Path,
    ready: Callable[[], bool],
    patience_s: float = 90.0,
) -> Iterator[Server]:
    """A server, as a context.

    Args:
        command: starts it.
        env: its whole environment.
        port: where it is to listen, on 127.0.0.1.
        cores: it and all its processes run on these.
        log: gets what it says.
        ready: whether it answers.
        patience_s: how long to wait for that.

    Raises:
        DidNotStart: if it ends, or is not ready in time.
    """
    with log.open("wb") as said:
        keeper = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_KEEPER), *command],
            env=dict(env),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            start_new_session=True,  # Ctrl-C reaches the benchmark alone, which then ends its servers
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )
    try:
        server = Server(keeper, port, log)
        deadline = time.monotonic() + patience_s
        assert keeper.stdout is not None
        keeper.stdout.read()  # it ends when the server has been started: before, that there is none says nothing
        while not ready():
            if keeper.poll() is not None or not server.pids:
                raise DidNotStart(f"it ended: {server.last_words()}")
            if time.monotonic() > deadline:
                raise DidNotStart(f"it did not answer within {patience_s:g} s: {server.last_words()}")
            time.sleep(0.1)
        yield server
    finally:
        assert keeper.stdin is not None
        assert keeper.stdout is not None
        keeper.stdin.close()
        keeper.wait()
        keeper.stdout.close()


def free_port() -> int:
    """A free port on 127.0.0.1."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port

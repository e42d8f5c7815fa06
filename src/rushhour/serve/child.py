"""A server as a child process of this one (`python -m rushhour.serve`): started, awaited until it answers, stopped."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Final

import msgspec

from rushhour.errors import ServeError
from rushhour.serve.settings import ServeSettings
from rushhour.system.storage import explained

_START_S: Final = 120.0
_STOP_S: Final = 5.0


class _FirstLine(msgspec.Struct):
    """What the child writes first: where it answers, or why it does not."""

    url: str = ""
    grpc: str = ""
    way: str = ""
    error: str = ""


class ChildServer:
    """A running server. It stops when it is closed, and when this process ends, however that ends.

    Attributes:
        url: where it answers over HTTP.
        grpc: host and port of gRPC; empty without.
        way: what it serves and how, in words.
        pid: of the process; of the supervisor, where the server has several cells.

    Args:
        target: a run, a plan or a bundle.
        settings: where and how it listens.
        log: the file that the server's log is appended to; None: nowhere.

    Raises:
        ServeError: if it does not come up; the reason is the server's own.
    """

    def __init__(self, target: Path, settings: ServeSettings, log: Path | None = None) -> None:
        path = Path(os.devnull) if log is None else log
        with explained(f"write {path}"), path.open("ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "rushhour.serve", str(target), "-"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,  # the terminal's Ctrl-C reaches this process alone
            )
        self._lock = threading.Lock()
        try:
            first = self._start(settings)
        except BaseException:
            self.close()
            raise
        if not first.url:
            self.close()
            why = first.error or next(iter(path.read_text(errors="replace").strip().splitlines()[-1:]), "")
            raise ServeError(f"the server of {target} does not start", why or "it wrote no message")
        self.url, self.grpc, self.way, self.pid = first.url, first.grpc, first.way, self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether the process has not ended."""
        return self._process.poll() is None

    def close(self, timeout_s: float = _STOP_S) -> None:
        """Stop it: what is in flight is answered, for at most `timeout_s`. Repeatable."""
        with self._lock:
            if self._process.poll() is None:
                self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                assert pipe is not None
                pipe.close()

    def _start(self, settings: ServeSettings) -> _FirstLine:
        """Give the process its settings and read its first line; an empty one where it ends or takes too long."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        deadline, line = time.monotonic() + _START_S, b""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(msgspec.json.encode(settings) + b"\n")
            self._process.stdin.flush()
        while not line.endswith(b"\n") and (left := deadline - time.monotonic()) > 0:
            readable, _, _ = select.select([self._process.stdout], [], [], left)
            chunk = os.read(self._process.stdout.fileno(), 65_536) if readable else b""
            if not chunk:
                break
            line += chunk
        try:
            return msgspec.json.decode(line, type=_FirstLine)
        except msgspec.DecodeError:
            return _FirstLine()

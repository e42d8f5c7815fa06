"""The generator as seen from its parent: a process that takes jobs and returns samples, started once for many runs."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection
from types import TracebackType
from typing import Protocol

import msgspec

from rushhour.errors import LoadError
from rushhour.load.generator.job import ClosedJob, OpenJob, Refusal, Tick, receive, send, unpack
from rushhour.load.generator.samples import Samples


class Sender(Protocol):
    """Sends load: a `Generator`, or a simulated one (`rushhour.testing.queues`)."""

    def run(self, job: OpenJob | ClosedJob, on_progress: Callable[[Tick], None] | None = None) -> Samples:
        """Run a job and return its samples."""


class Generator:
    """The load generator, a process of its own, so that neither the server's work nor the parent's delays it.

    Use as a context manager; one job at a time. It ends with the block, or when the parent dies.

    Args:
        cores: pin it to these cores, where the server can be kept off them; None leaves that to the kernel.
    """

    def __init__(self, cores: Collection[int] | None = None) -> None:
        self._cores = cores
        self._process: subprocess.Popen[bytes] | None = None
        self._stopping = False

    def __enter__(self) -> Generator:
        self._channel, theirs = socket.socketpair()
        lifeline, self._lifeline = os.pipe()
        cores = [str(core) for core in self._cores or ()]
        self._errors = tempfile.TemporaryFile()
        with theirs:
            # -P: files in the working directory must not shadow the standard library.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "rushhour.load.generator", str(theirs.fileno()), str(lifeline), *cores],
                pass_fds=[theirs.fileno(), lifeline],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._errors,
                start_new_session=True,  # Ctrl-C of the terminal goes to the parent only
            )
        os.close(lifeline)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._channel.close()
        os.close(self._lifeline)
        if self._process is not None:
            try:
                self._process.wait(timeout=2)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._errors.close()

    @property
    def pid(self) -> int:
        """The process.

        Raises:
            LoadError: if it was not started.
        """
        return self._started().pid

    def run(self, job: OpenJob | ClosedJob, on_progress: Callable[[Tick], None] | None = None) -> Samples:
        """Run a job and return its samples.

        Args:
            job: what to send, where and when.
            on_progress: called about five times a second while it runs.

        Raises:
            LoadError: if the server cannot be reached, rejects the requests or answers with something that is not
                an answer; or if the generator's process has ended.
        """
        self._started()
        try:
            send(self._channel, b"j", msgspec.msgpack.encode(job))
        except OSError:
            raise self._gone() from None
        if self._stopping:
            self.stop()
        while (frame := receive(self._channel)) is not None:
            kind, content = frame
            if kind == b"r":
                return unpack(content)
            if kind == b"e":
                refusal = msgspec.msgpack.decode(content, type=Refusal)
                raise LoadError(refusal.what, refusal.why, refusal.fix)
            if on_progress is not None:
                on_progress(msgspec.msgpack.decode(content, type=Tick))
        raise self._gone()

    def stop(self) -> None:
        """End the running job early, and all later ones at once: `run` returns what was measured until then. Safe to
        call from signal handlers and other threads."""
        self._stopping = True
        if self._process is not None:
            with contextlib.suppress(OSError):
                os.write(self._lifeline, b".")

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise LoadError(
                "the load generator was not started", "it starts when its context is entered", "use `with Generator()`"
            )
        return self._process

    def _gone(self) -> LoadError:
        process = self._started()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=2)
        code = process.returncode
        if code is not None and code < 0:
            why = f"its process {process.pid} was killed by {signal.Signals(-code).name}"
        else:
            self._errors.seek(0)
            lines = self._errors.read().decode("utf-8", "replace").split("\n")
            last = next((line for line in reversed(lines) if line.strip()), "it wrote no message")
            why = f"its process {process.pid} ended with code {code}: {last}"
        return LoadError("the load generator process has ended", why, "run the command again")

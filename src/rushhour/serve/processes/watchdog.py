"""`ParentWatchdog`: stops the server when its parent process has ended, and exchanges messages with it until then."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import msgspec

from rushhour.serve.processes.messages import Command, Count, Execute, FromSupervisor, FromWorker, Result, Speed
from rushhour.serve.processes.signals import SIGNALS

_CHUNK_BYTES = 2**16
_COUNT_S, _COMMAND_S = 5.0, 600.0
"""How long the supervisor may take to answer: with counters, and after a command in all worker processes."""


class ParentWatchdog:
    """Reads messages from standard input on a thread; when it is closed, this process drains and stops.

    Args:
        messages: standard input, unbuffered: a thread would hold a buffer's lock, and block the exit.
        write: writes a line to the parent process. Called on threads, one after another.
    """

    def __init__(self, messages: io.RawIOBase, write: Callable[[bytes], None]) -> None:
        self._input = messages
        self._write = write
        self._loop: asyncio.AbstractEventLoop | None = None
        self._execute: Execute | None = None
        self._writing = asyncio.Lock()
        self._pending: dict[int, asyncio.Future[Result]] = {}
        self._next = 0
        # Of its own: the event loop's threads may all be busy, and a worker process that does not respond is killed.
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="tether")
        self._tasks: set[asyncio.Task[None]] = set()
        threading.Thread(target=self._read, name="tether", daemon=True).start()

    def attach(self, execute: Execute) -> None:
        """Execute the parent's commands by `execute` from now on, on the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._execute = execute

    async def in_all_processes(self, command: Command) -> Result:
        """Have a command executed in all worker processes, this one among them."""
        self._next += 1
        number = self._next
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._pending[number] = future
        try:
            await self._send(FromWorker(id=number, work=command))
            async with asyncio.timeout(_COUNT_S if isinstance(command, Count | Speed) else _COMMAND_S):
                return await future
        except TimeoutError:
            return Result("the supervisor of the worker processes does not respond", 503)
        finally:
            del self._pending[number]

    def _read(self) -> None:
        rest = b""
        while chunk := self._input.read(_CHUNK_BYTES):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                try:
                    message = msgspec.json.decode(line, type=FromSupervisor)
                except msgspec.DecodeError:
                    continue
                if self._loop is not None:
                    self._loop.call_soon_threadsafe(self._receive, message)
        if not SIGNALS.stopping:  # a second signal would end this process at once
            os.kill(os.getpid(), signal.SIGTERM)

    def _receive(self, message: FromSupervisor) -> None:
        pending = self._pending.get(message.id)
        if message.done is not None and pending is not None and not pending.done():
            pending.set_result(message.done)
        if message.work is not None:
            task = asyncio.get_running_loop().create_task(self._answer(message.id, message.work))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _answer(self, number: int, command: Command) -> None:
        assert self._execute is not None
        await self._send(FromWorker(id=number, done=await self._execute(command)))

    async def _send(self, message: FromWorker) -> None:
        # On a thread: a full pipe would block the event loop until the supervisor reads.
        line = msgspec.json.encode(message) + b"\n"
        async with self._writing:
            await asyncio.get_running_loop().run_in_executor(self._writer, self._write, line)

"""Several cells behind one port: one process each, pinned to its own cores, sharing nothing but the port.

The kernel spreads connections over the cells (SO_REUSEPORT). A cell that dies is started again, at once the first
time and with growing pauses after that; only requests in flight on it fail. What must be the same in all cells (a
reload) is asked of the supervisor by the cell that was asked, and done in each.

A cell and its supervisor speak in JSON lines over the cell's standard input and output; see `Order` and `Said`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Literal

import msgspec

from rushhour.errors import ServeError
from rushhour.serve.settings import ServeSettings

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 10.0
_STEADY_S = 30.0
_START_S = 300.0
_STOP_S = 40.0
_CHANGE_S = 300.0

Change = Literal["load", "unload"]


class Order(msgspec.Struct, frozen=True):
    """What a supervisor tells a cell: make this change, or how the change that it asked for went."""

    change: Change | None = None
    version: int = 0
    """Of the model after a load."""
    outcome: str | None = None
    """Of the change that this cell asked for: empty where all cells made it, else what went wrong."""


class Said(msgspec.Struct, frozen=True):
    """What a cell tells its supervisor: it is ready at `url`, asks for a change in all cells, or has made one."""

    url: str = ""
    grpc: str = ""
    """The address for gRPC, where that is served."""
    error: str = ""
    ask: Change | None = None
    made: str | None = None
    """A change was made: empty where it went well, else what went wrong."""


class Supervisor:
    """Keeps a number of cells alive until told to stop.

    Args:
        target: what the cells serve.
        settings: of each cell, with the port they share.
        pins: for each cell, the cores it may use.
    """

    def __init__(self, target: Path, settings: ServeSettings, pins: Sequence[frozenset[int]]) -> None:
        self._target = target
        self._settings = settings
        self._cells = [_Cell(self, number, cores) for number, cores in enumerate(pins)]
        self._stopping = asyncio.Event()
        self._changing = asyncio.Lock()

    async def run(self, ready: Callable[[str], None]) -> None:
        """Start all cells, call `ready` with the URL when all are, and supervise until SIGTERM or SIGINT.

        Raises:
            ServeError: if a cell cannot start for the first time; the others are stopped.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stopping.set)
        keepers: list[asyncio.Task[None]] = []
        try:
            urls = await asyncio.gather(*(cell.start() for cell in self._cells))
            ready(urls[0])
            keepers = [asyncio.create_task(cell.keep()) for cell in self._cells]
            await self._stopping.wait()
        finally:
            for keeper in keepers:
                keeper.cancel()
            await asyncio.gather(*keepers, return_exceptions=True)
            await asyncio.gather(*(cell.stop() for cell in self._cells))

    async def change(self, change: Change) -> str:
        """Make a change in every cell that lives; what went wrong in any of them, or nothing."""
        async with self._changing:
            version = self._settings.version + (change == "load")
            outcomes = await asyncio.gather(*(cell.change(Order(change, version)) for cell in self._cells))
            if not any(outcomes):
                self._settings = msgspec.structs.replace(self._settings, version=version)
        return "; ".join(sorted({outcome for outcome in outcomes if outcome}))

    def command(self) -> list[str]:
        """What starts a cell."""
        return [sys.executable, "-m", "rushhour.serve", str(self._target), "-"]

    def settings(self) -> bytes:
        """What a cell is told first: its settings, as they are by now."""
        return msgspec.json.encode(self._settings)


class _Cell:
    """One cell's process, and what it says."""

    def __init__(self, supervisor: Supervisor, number: int, cores: frozenset[int]) -> None:
        self._supervisor = supervisor
        self._number = number
        self._cores = cores
        self._process: asyncio.subprocess.Process | None = None
        self._listener: asyncio.Task[None] | None = None
        self._asked: set[asyncio.Task[None]] = set()
        self._made: asyncio.Future[str] | None = None

    async def start(self) -> str:
        """Start the process and wait until it is ready; its URL.

        Raises:
            ServeError: with the cell's own words, if it does not come up.
        """
        process = await asyncio.create_subprocess_exec(
            *self._supervisor.command(),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,  # the terminal's Ctrl-C reaches the supervisor alone, which drains the cells
        )
        self._process = process
        os.sched_setaffinity(process.pid, self._cores)
        self._tell(self._supervisor.settings())
        said: Said | None = None
        with contextlib.suppress(TimeoutError):
            said = await asyncio.wait_for(self._hear(), _START_S)
        if said is None or not said.url:
            await self.stop()
            raise ServeError(f"cell {self._number} does not start", (said and said.error) or "it ended without a word")
        self._listener = asyncio.create_task(self._listen())
        return said.url

    async def keep(self) -> None:
        """Start the process again whenever it ends."""
        loop, pause = asyncio.get_running_loop(), _FIRST_PAUSE_S
        while True:
            began = loop.time()
            assert self._process is not None
            code = await self._process.wait()
            self._forget()
            print(f"cell {self._number} ended with code {code}; it is started again", file=sys.stderr, flush=True)
            pause = _FIRST_PAUSE_S if loop.time() - began > _STEADY_S else pause
            while True:
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_S)
                try:
                    await self.start()
                    break
                except ServeError as error:
                    print(str(error), file=sys.stderr, flush=True)

    async def stop(self) -> None:
        """SIGTERM, so that it drains; SIGKILL if it takes too long."""
        process = self._process
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            try:
                await asyncio.wait_for(process.wait(), _STOP_S)
            except TimeoutError:
                process.kill()
                await process.wait()
        self._forget()

    async def change(self, order: Order) -> str:
        """Make a change in this cell; what went wrong, or nothing. A cell that is down makes it when it starts."""
        if self._process is None or self._process.returncode is not None or self._listener is None:
            return ""
        self._made = asyncio.get_running_loop().create_future()
        self._tell(msgspec.json.encode(order))
        try:
            return await asyncio.wait_for(self._made, _CHANGE_S)
        except TimeoutError:
            return f"cell {self._number} does not answer"

    def _tell(self, line: bytes) -> None:
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(ConnectionError):
                self._process.stdin.write(line + b"\n")

    async def _hear(self) -> Said | None:
        assert self._process is not None
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        try:
            return msgspec.json.decode(line, type=Said) if line else None
        except msgspec.DecodeError:
            return Said()

    async def _listen(self) -> None:
        while (said := await self._hear()) is not None:
            if said.made is not None and self._made is not None and not self._made.done():
                self._made.set_result(said.made)
            if said.ask is not None:
                task = asyncio.create_task(self._ask(said.ask))
                self._asked.add(task)
                task.add_done_callback(self._asked.discard)

    async def _ask(self, change: Change) -> None:
        outcome = await self._supervisor.change(change)
        self._tell(msgspec.json.encode(Order(outcome=outcome)))

    def _forget(self) -> None:
        if self._listener is not None:
            self._listener.cancel()
            self._listener = None
        if self._made is not None and not self._made.done():
            self._made.set_result("")
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()


def reserve(host: str, port: int) -> socket.socket:
    """Take a port for several cells: bound, never listening, so that it stays ours while cells come and go.

    Raises:
        OSError: if another program has it.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    # Without SO_REUSEPORT first: with it, a stranger's cells of the same user would be joined, not noticed.
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(address)
        address = probe.getsockname()
    return join(*address[:2])


def join(host: str, port: int) -> socket.socket:
    """A socket bound to a port that cells share; the kernel gives it connections once it listens.

    Raises:
        OSError: if another program has the port for itself.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    shared = socket.socket(family, kind, protocol)
    try:
        shared.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        shared.bind(address)
    except OSError:
        shared.close()
        raise
    return shared


def pins(cells: int, cores: Sequence[int]) -> list[frozenset[int]]:
    """Which cores each cell may use: shared out evenly in order; all of them where there are more cells than cores."""
    if cells > len(cores):
        return [frozenset(cores)] * cells
    share, extra = divmod(len(cores), cells)
    ends = [0]
    for number in range(cells):
        ends.append(ends[-1] + share + (number < extra))
    return [frozenset(cores[start:end]) for start, end in pairwise(ends)]

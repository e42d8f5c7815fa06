"""Several cells behind one port: one process each, pinned to its own cores, sharing nothing but the port.

The kernel spreads connections over the cells (SO_REUSEPORT). A cell that dies is started again, at once the first
time and with growing pauses after that; only requests in flight on it fail. What must be the same in all cells (a
reload, a region of shared memory) is asked of the supervisor by the cell that was asked, and done in each; what is
asked of all together (statistics, metrics) is added up here, with what dead cells had done.

A cell and its supervisor speak in the words of `orders.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import msgspec

from rushhour.errors import ServeError
from rushhour.serve import log
from rushhour.serve.orders import Count, Done, Load, Log, Order, Register, Said, Speed, Unload, Unregister, Work
from rushhour.serve.settings import ServeSettings
from rushhour.serve.speed import summed
from rushhour.serve.statistics import Report, State, Totals, add_counts, together

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 10.0
_STEADY_S = 30.0
_START_S = 300.0
_STOP_S = 40.0
_WORK_S = 300.0
_COUNT_S = 1.0
_COUNT_EVERY_S = 2.0
"""How often cells are asked without anybody asking: what a cell has done since is lost if it dies."""
_LINE_BYTES = 2**26


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
        self._past: dict[str, Totals] = {}
        self._past_errors: dict[str, int] = {}
        self._model = ""
        self.restarts = 0
        self.changing = asyncio.Lock()
        """Held while something changes that is the same in all cells, and while a cell learns what it is."""

    async def run(self, ready: Callable[[str, str], None]) -> None:
        """Start all cells, and supervise them until SIGTERM or SIGINT.

        Args:
            ready: called once, when all are ready: with the URL, and what serves there.

        Raises:
            ServeError: if a cell cannot start for the first time; the others are stopped.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stopping.set)
        keepers: list[asyncio.Task[None]] = []
        try:
            said = await asyncio.gather(*(cell.start() for cell in self._cells))
            ready(said[0].url, said[0].way)
            keepers = [asyncio.create_task(work) for work in (*(cell.keep() for cell in self._cells), self._watch())]
            await self._stopping.wait()
        finally:
            for keeper in keepers:
                keeper.cancel()
            await asyncio.gather(*keepers, return_exceptions=True)
            await asyncio.gather(*(cell.stop() for cell in self._cells))

    async def do(self, work: Work) -> Done:
        """Have work done in every cell that lives. A cell that is down does it when it starts."""
        if isinstance(work, Count):
            return Done(report=await self._report())
        if isinstance(work, Speed):
            told = await asyncio.gather(*(cell.do(work, _COUNT_S) for cell in self._cells))
            speeds = [done.speeds for done in told if done is not None and done.speeds is not None]
            return Done(speeds=summed(speeds) if speeds else None)
        async with self.changing:
            if isinstance(work, Load):
                work = Load(self._settings.version + 1)
            elif isinstance(work, Log):
                log.set_level(work.level)
            outcomes = await asyncio.gather(*(cell.do(work, _WORK_S) for cell in self._cells))
            wrong = [outcome for outcome in outcomes if outcome is not None and outcome.wrong]
            if not wrong:
                self._settings = _after(work, self._settings)
                return Done()
            if isinstance(work, Register) and work.name not in {region.name for region in self._settings.regions}:
                undone = Unregister(work.name)  # what one cell cannot open, none shall have
                await asyncio.gather(*(cell.do(undone, _WORK_S) for cell in self._cells))
        return Done("; ".join(sorted({outcome.wrong for outcome in wrong})), wrong[0].status)

    async def _report(self) -> Report:
        """Of all cells together, with what those that do not answer had done when they last did."""
        states = await asyncio.gather(*(cell.count() for cell in self._cells))
        known = [cell.last for cell in self._cells if cell.last is not None]
        self._model = known[0].model if known else self._model
        return Report(
            self._model,
            together([self._past, *(last.versions for last in known)]),
            {number: state for number, state in enumerate(states) if state is not None},
            sum(state is None for state in states),
            self.restarts,
            self._errors([last.errors for last in known]),
        )

    def _errors(self, living: list[dict[str, int]]) -> dict[str, int]:
        """Those of the cells that live, and of those that have died."""
        errors = dict(self._past_errors)
        for each in living:
            add_counts(errors, each)
        return errors

    def bury(self, last: Report) -> None:
        """A cell has died: keep what it had done."""
        self._past = together([self._past, last.versions])
        add_counts(self._past_errors, last.errors)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_COUNT_EVERY_S)
            await self._report()

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
        self._given: dict[int, asyncio.Future[Done | None]] = {}
        self._next = 0
        self.last: Report | None = None
        """What it last said that it has done."""

    async def start(self) -> Said:
        """Start the process and wait until it is ready; what it says then.

        Raises:
            ServeError: with the cell's own words, if it does not come up.
        """
        process = await asyncio.create_subprocess_exec(
            *self._supervisor.command(),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=_LINE_BYTES,
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
        return said

    async def keep(self) -> None:
        """Start the process again whenever it ends."""
        loop, pause = asyncio.get_running_loop(), _FIRST_PAUSE_S
        while True:
            began = loop.time()
            assert self._process is not None
            code = await self._process.wait()
            self._forget()
            self._supervisor.restarts += 1
            log.event(logging.ERROR, "cell died", cell=self._number, code=code)
            pause = _FIRST_PAUSE_S if loop.time() - began > _STEADY_S else pause
            while True:
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_S)
                try:
                    async with self._supervisor.changing:
                        await self.start()
                    log.event(logging.INFO, "cell restarted", cell=self._number, pid=self._process.pid)
                    break
                except ServeError as error:
                    log.event(logging.ERROR, "cell does not start", cell=self._number, error=str(error))

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

    async def do(self, work: Work, within_s: float) -> Done | None:
        """Have work done in this cell; None from one that is down."""
        if self._process is None or self._process.returncode is not None or self._listener is None:
            return None
        self._next += 1
        number = self._next
        future: asyncio.Future[Done | None] = asyncio.get_running_loop().create_future()
        self._given[number] = future
        self._tell(msgspec.json.encode(Order(number, work=work)))
        try:
            return await asyncio.wait_for(future, within_s)
        except TimeoutError:
            return Done(f"cell {self._number} does not answer", 503)
        finally:
            del self._given[number]

    async def count(self) -> State | None:
        """How it is, and in `last` what it has done; None if it does not say so soon."""
        done = await self.do(Count(), _COUNT_S)
        return None if done is None or done.report is None else done.report.cells[0]

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
            if said.done is not None:
                self.last = said.done.report or self.last
                given = self._given.get(said.id)
                if given is not None and not given.done():
                    given.set_result(said.done)
            if said.work is not None:
                task = asyncio.create_task(self._ask(said.id, said.work))
                self._asked.add(task)
                task.add_done_callback(self._asked.discard)

    async def _ask(self, number: int, work: Work) -> None:
        self._tell(msgspec.json.encode(Order(number, done=await self._supervisor.do(work))))

    def _forget(self) -> None:
        if self._listener is not None:
            self._listener.cancel()
            self._listener = None
        for given in self._given.values():
            if not given.done():
                given.set_result(None)
        if self.last is not None:
            self._supervisor.bury(self.last)
            self.last = None
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()


def _after(work: Work, settings: ServeSettings) -> ServeSettings:
    """The settings with which a cell begins that is started after this work."""
    match work:
        case Load(version):
            return msgspec.structs.replace(settings, version=version, unloaded=False)
        case Unload():
            return msgspec.structs.replace(settings, unloaded=True)
        case Register():
            return msgspec.structs.replace(settings, regions=(*settings.regions, work))
        case Unregister(name):
            kept = tuple(region for region in settings.regions if name is not None and region.name != name)
            return msgspec.structs.replace(settings, regions=kept)
        case Log(level):
            return msgspec.structs.replace(settings, log_level=level)
    return settings


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

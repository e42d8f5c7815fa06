"""`CellProcess`: one worker process (cell) as its supervisor sees it: started, watched, restarted, stopped."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import signal
from typing import Protocol

import msgspec

from rushhour.errors import ServeError
from rushhour.serve.observability import log
from rushhour.serve.observability.statistics import Report, State
from rushhour.serve.processes.messages import Beat, Command, Count, FromSupervisor, FromWorker, Prepare, Result
from rushhour.serve.seats import Seat

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 10.0
_STEADY_S = 30.0
_START_S = 300.0
COUNT_S = 1.0
"""A cell that does not report its counters within this time is counted as down."""
BEAT_S = 1.0
"""The interval of `Beat` commands, and the time to respond to one."""
_OPENING = 4
"""A cell that opens a model may be silent so many times longer: an import or a compiler may hold the interpreter."""
_LINE_BYTES = 2**26


class Supervision(Protocol):
    """What a cell process needs of its supervisor.

    Attributes:
        changing: held while something changes that is the same in all cells, and while a cell starts.
        restarts: how often cells were restarted.
        frozen: how often cells were killed because they did not respond.
        frozen_s: the time after which such a cell is killed.
        closing_s: how long a cell may take to stop.
    """

    changing: asyncio.Lock
    restarts: int
    frozen: int
    frozen_s: float
    closing_s: float

    def command(self) -> list[str]:
        """The command line of a cell."""
        ...

    def settings(self, seat: Seat) -> bytes:
        """The settings of the cell with this seat, as they are now."""
        ...

    async def execute(self, command: Command) -> Result:
        """Execute a command in all cells."""
        ...

    def keep_counts(self, last: Report) -> None:
        """Keep the counters of a cell that has died."""
        ...

    def vacate(self, number: int) -> None:
        """Have other cells take the connections that were handed to a cell that is down."""
        ...


class CellProcess:
    """One worker process.

    Args:
        supervisor: of all worker processes.
        number: of this one.
        cores: that it may use.
        seat: what it inherits.

    Attributes:
        last: its last report.
    """

    def __init__(self, supervisor: Supervision, number: int, cores: frozenset[int], seat: Seat) -> None:
        self._supervisor = supervisor
        self._number = number
        self._cores = cores
        self._seat = seat
        self._process: asyncio.subprocess.Process | None = None
        self._listener: asyncio.Task[None] | None = None
        self._requests: set[asyncio.Task[None]] = set()
        self._pending: dict[int, asyncio.Future[Result | None]] = {}
        self._next = 0
        self._opening = False
        self._heard = -math.inf
        self.last: Report | None = None

    async def start(self) -> FromWorker:
        """Start the process and wait until it is ready; returns its first message.

        Raises:
            ServeError: with the cell's error, if it does not start.
            OSError: if the system cannot start a process.
        """
        process = await asyncio.create_subprocess_exec(
            *self._supervisor.command(),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            pass_fds=self._seat.files,
            limit=_LINE_BYTES,
            start_new_session=True,  # the terminal's Ctrl-C reaches only the supervisor, which drains the cells
        )
        self._process = process
        try:
            os.sched_setaffinity(process.pid, self._cores)
        except OSError as error:  # the cores may not be available any more; run on others
            log.event(
                logging.WARNING, "cell not pinned", cell=self._number, cores=sorted(self._cores), error=str(error)
            )
        self._send(self._supervisor.settings(self._seat))
        first: FromWorker | None = None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_START_S):
                first = await self._receive()
        if first is None or not first.url:
            self.kill()
            await process.wait()
            self._forget()
            why = (first and first.error) or "it ended without a message"
            raise ServeError(f"worker process (cell) {self._number} does not start", why)
        self._listener = asyncio.create_task(self._listen())
        return first

    async def keep(self) -> None:
        """Restart the process whenever it ends."""
        loop, pause = asyncio.get_running_loop(), _FIRST_PAUSE_S
        while True:
            began = loop.time()
            assert self._process is not None
            code = await self._process.wait()
            self._forget()
            self._supervisor.vacate(self._number)
            self._supervisor.restarts += 1
            log.event(logging.ERROR, "cell died", cell=self._number, code=code)
            pause = _FIRST_PAUSE_S if loop.time() - began > _STEADY_S else pause
            while True:
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_S)
                self._supervisor.vacate(self._number)
                try:
                    async with self._supervisor.changing:
                        await self.start()
                    log.event(logging.INFO, "cell restarted", cell=self._number, pid=self._process.pid)
                    break
                except (ServeError, OSError) as error:
                    log.event(logging.ERROR, "cell does not start", cell=self._number, error=str(error))
                except Exception as error:  # the next try may succeed
                    log.failure("cell does not start", error, cell=self._number)

    async def watch(self) -> None:
        """Kill the process when it has not responded for too long. It is restarted like any that dies.

        The number of missed responses counts, not the clock: a pause of the whole machine, supervisor included, kills
        no cell.
        """
        missed = 0
        while True:
            process = self._process
            answered = await self.execute(Beat(), BEAT_S)
            if answered is None or not answered.wrong or self._heard_within(BEAT_S) or process is not self._process:
                missed = 0
                await asyncio.sleep(BEAT_S)
                continue
            missed += 1
            if missed * BEAT_S >= self._supervisor.frozen_s * (_OPENING if self._opening else 1):
                missed = 0
                self._supervisor.frozen += 1
                pid = None if process is None else process.pid
                silent = round(asyncio.get_running_loop().time() - self._heard, 1)
                log.event(logging.ERROR, "cell frozen", cell=self._number, pid=pid, silent_s=silent)
                self.kill()

    def _heard_within(self, seconds: float) -> bool:
        return asyncio.get_running_loop().time() - self._heard < seconds

    async def stop(self) -> None:
        """Send SIGTERM, so that it drains; SIGKILL if it takes too long."""
        process = self._process
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            try:
                async with asyncio.timeout(self._supervisor.closing_s):
                    await process.wait()
            except TimeoutError:
                log.event(logging.ERROR, "cell killed", cell=self._number, why="it did not end in time")
                self.kill()
                await process.wait()
        self._forget()

    def kill(self) -> None:
        """Kill the process, even a stopped one."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGKILL)

    async def execute(self, command: Command, within_s: float) -> Result | None:
        """Execute a command in this cell; None if it is down."""
        if self._process is None or self._process.returncode is not None or self._listener is None:
            return None
        self._next += 1
        number = self._next
        future: asyncio.Future[Result | None] = asyncio.get_running_loop().create_future()
        self._pending[number] = future
        self._opening = self._opening or isinstance(command, Prepare)
        self._send(msgspec.json.encode(FromSupervisor(number, work=command)))
        try:
            async with asyncio.timeout(within_s):  # `wait_for` may swallow a cancellation (Python 3.11)
                return await future
        except TimeoutError:
            return Result(f"worker process (cell) {self._number} does not respond", 503)
        finally:
            del self._pending[number]
            if isinstance(command, Prepare):
                self._opening = False

    async def count(self) -> State | None:
        """Its state, and in `last` its report; None if it does not respond within a second."""
        result = await self.execute(Count(), COUNT_S)
        return None if result is None or result.report is None else result.report.cells[0]

    def _send(self, line: bytes) -> None:
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(ConnectionError, RuntimeError):  # its pipe is closed when it has died
                self._process.stdin.write(line + b"\n")

    async def _receive(self) -> FromWorker | None:
        assert self._process is not None
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        try:
            return msgspec.json.decode(line, type=FromWorker) if line else None
        except msgspec.DecodeError:
            return FromWorker()

    async def _listen(self) -> None:
        while (message := await self._receive()) is not None:
            self._heard = asyncio.get_running_loop().time()
            if message.done is not None:
                self.last = message.done.report or self.last
                pending = self._pending.get(message.id)
                if pending is not None and not pending.done():
                    pending.set_result(message.done)
            if message.work is not None:
                task = asyncio.create_task(self._answer(message.id, message.work))
                self._requests.add(task)
                task.add_done_callback(self._requests.discard)

    async def _answer(self, number: int, command: Command) -> None:
        self._send(msgspec.json.encode(FromSupervisor(number, done=await self._supervisor.execute(command))))

    def _forget(self) -> None:
        if self._listener is not None:
            self._listener.cancel()
            self._listener = None
        for pending in self._pending.values():
            if not pending.done():
                pending.set_result(None)
        if self.last is not None:
            self._supervisor.keep_counts(self.last)
            self.last = None
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()

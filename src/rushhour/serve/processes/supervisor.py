"""Several cells behind one port: one process each, pinned to its own cores, sharing nothing but the port.

The kernel spreads connections over the cells (SO_REUSEPORT). A cell that dies is started again, at once the first
time and with growing pauses after that; one that does not answer for some seconds, its loop blocked or its process
stopped, is killed and started again. Only requests in flight on it fail. What must be the same in all cells (a
reload, a region of shared memory) is asked of the supervisor by the cell that was asked, and done in each; what is
asked of all together (statistics, metrics) is added up here, with what dead cells had done.

A reload has two phases: all cells open the new version, and only when all have, all serve it. A cell that is started
again opens what the others serve, and nothing else that may lie at the path by then.

A cell and its supervisor speak in the words of `orders.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import signal
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import msgspec

from rushhour.errors import RushhourError, ServeError
from rushhour.serve.observability import log
from rushhour.serve.observability.statistics import Report, State, Totals, add_counts, remembered, together
from rushhour.serve.processes.messages import (
    Abandon,
    Beat,
    Commit,
    Count,
    Done,
    Load,
    Log,
    Order,
    Prepare,
    Register,
    Renew,
    Said,
    Speed,
    Unload,
    Unregister,
    Work,
)
from rushhour.serve.processes.renewal import Renewal
from rushhour.serve.processes.signals import SIGNALS
from rushhour.serve.scheduling.speed import summed
from rushhour.serve.settings import Served, ServeSettings
from rushhour.serve.target import Target

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 10.0
_STEADY_S = 30.0
_START_S = 300.0
_WORK_S = 300.0
_COUNT_S = 1.0
_COUNT_EVERY_S = 2.0
"""How often cells are asked without anybody asking: what a cell has done since is lost if it dies."""
_BEAT_S = 1.0
_OPENING = 4
"""So many times longer may a cell be silent that opens a model: an import or a compiler may hold the interpreter."""
_LINE_BYTES = 2**26


class Supervisor:
    """Keeps a number of cells alive until told to stop.

    Args:
        target: what the cells serve.
        settings: of each cell, with the port they share.
        pins: for each cell, the cores it may use.
        reopen: opens what lies at the target's path by then.
        closing_s: how long a cell may take to stop.
    """

    def __init__(
        self,
        target: Target,
        settings: ServeSettings,
        pins: Sequence[frozenset[int]],
        reopen: Callable[[], Target],
        closing_s: float,
    ) -> None:
        self._target = target.path
        self._settings = msgspec.structs.replace(settings, served=_served(target))
        self._reopen = reopen
        self.closing_s = closing_s
        self._cells = [_Cell(self, number, cores) for number, cores in enumerate(pins)]
        self._stopping = asyncio.Event()
        self._past: dict[str, Totals] = {}
        self._past_dropped = 0
        self._past_errors: dict[str, int] = {}
        self._model = ""
        self.restarts = 0
        self.frozen = 0
        self.frozen_s = settings.frozen_s
        self.changing = asyncio.Lock()
        """Held while something changes that is the same in all cells, and while a cell learns what it is."""

    async def run(self, ready: Callable[[str, str], None]) -> bool:
        """Start all cells, and supervise them until SIGTERM or SIGINT; whether they were ready before that.

        Args:
            ready: called once, when all are ready: with the URL, and what serves there.

        Raises:
            ServeError: if a cell cannot start for the first time; the others are stopped.
        """
        loop = asyncio.get_running_loop()
        say_last = SIGNALS.last_words

        def last_words() -> None:
            for cell in self._cells:
                cell.kill()
            say_last()

        SIGNALS.last_words = last_words
        SIGNALS.stops(lambda: loop.call_soon_threadsafe(self._stopping.set))
        stopping = asyncio.ensure_future(self._stopping.wait())
        starting = asyncio.gather(*(cell.start() for cell in self._cells))
        watching = [asyncio.ensure_future(cell.watch()) for cell in self._cells]
        keeping: list[asyncio.Future[None]] = []
        try:
            await asyncio.wait((starting, stopping), return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():
                return False
            said = starting.result()
            await self._report()  # which learns the version of the bundle
            ready(said[0].url, said[0].way)
            renewal = Renewal(self._settings, self.do)
            SIGNALS.renews(renewal.ask)
            works = (*(cell.keep() for cell in self._cells), self._count(), renewal.run())
            keeping = [asyncio.ensure_future(work) for work in works]
            await stopping
            return True
        finally:
            SIGNALS.bound(self.closing_s + self.frozen_s + _BEAT_S)
            await _cancelled([stopping, starting, *keeping])
            await asyncio.gather(*(cell.stop() for cell in self._cells))
            await _cancelled(watching)
            SIGNALS.last_words = say_last

    async def do(self, work: Work) -> Done:
        """Have work done in every cell that lives. A cell that is down does it when it starts.

        Whatever goes wrong is part of the answer.
        """
        try:
            return await self._done(work)
        except RushhourError as error:
            return Done(str(error))
        except Exception as error:
            log.failure("work failed", error, work=type(work).__name__)
            return Done(f"internal error: {type(error).__name__}", 500)

    async def _done(self, work: Work) -> Done:
        match work:
            case Count():
                return Done(report=await self._report())
            case Speed():
                told = await asyncio.gather(*(cell.do(work, _COUNT_S) for cell in self._cells))
                speeds = [done.speeds for done in told if done is not None and done.speeds is not None]
                return Done(speeds=summed(speeds) if speeds else None)
        async with self.changing:
            if isinstance(work, Load):
                return await self._load()
            if isinstance(work, Log):
                log.set_level(work.level)
            outcome = await self._in_all(work)
            if not outcome.wrong:
                self._settings = _after(work, self._settings)
                return Done()
            if isinstance(work, Register) and work.name not in {region.name for region in self._settings.regions}:
                await self._in_all(Unregister(work.name))  # what one cell cannot open, none shall have
        return outcome

    async def _load(self) -> Done:
        """Have all cells serve what lies at the path now, or none of them.

        Raises:
            RushhourError: if there is nothing that can be opened.
        """
        served = _served(await asyncio.to_thread(self._reopen))
        outcome = await self._in_all(Prepare(self._settings.versions, served.plan, served.folder))
        if outcome.wrong:
            await self._in_all(Abandon())
            return outcome
        # Whoever cannot do this is started again, with these settings: from here on there is one version alone.
        self._settings = msgspec.structs.replace(self._settings, unloaded=False, served=served)
        committed = await asyncio.gather(*(cell.do(Commit(), _WORK_S) for cell in self._cells))
        for cell, done in zip(self._cells, committed, strict=True):
            if done is not None and done.wrong:
                cell.kill()
        self._learn_versions()  # the cells have said them
        return Done()

    async def _in_all(self, work: Work) -> Done:
        """Have work done in all cells that live; what went wrong in any of them."""
        outcomes = await asyncio.gather(*(cell.do(work, _WORK_S) for cell in self._cells))
        wrong = [outcome for outcome in outcomes if outcome is not None and outcome.wrong]
        return Done("; ".join(sorted({outcome.wrong for outcome in wrong})), wrong[0].status) if wrong else Done()

    async def _report(self) -> Report:
        """Of all cells together, with what those that do not answer had done when they last did."""
        states = await asyncio.gather(*(cell.count() for cell in self._cells))
        known = [cell.last for cell in self._cells if cell.last is not None]
        self._learn_versions()
        self._model = known[0].model if known else self._model
        return Report(
            self._model,
            together([self._past, *(last.versions for last in known)]),
            {number: state for number, state in enumerate(states) if state is not None},
            sum(state is None for state in states),
            self.restarts,
            frozen=self.frozen,
            dropped=self._past_dropped + log.dropped() + sum(last.dropped for last in known),
            errors=self._errors([last.errors for last in known]),
        )

    def _errors(self, living: list[dict[str, int]]) -> dict[str, int]:
        """Those of the cells that live, and of those that have died."""
        errors = dict(self._past_errors)
        for each in living:
            add_counts(errors, each)
        return errors

    def _learn_versions(self) -> None:
        """Which version each bundle is, as the cells last said: one that is started again is to say the same."""
        versions = dict(self._settings.versions)
        for cell in self._cells:
            versions |= {} if cell.last is None else cell.last.bundles
        self._settings = msgspec.structs.replace(self._settings, versions=remembered(versions))

    def bury(self, last: Report) -> None:
        """A cell has died: keep what it had done."""
        self._past = together([self._past, last.versions])
        self._past_dropped += last.dropped
        add_counts(self._past_errors, last.errors)

    async def _count(self) -> None:
        while True:
            await asyncio.sleep(_COUNT_EVERY_S)
            try:
                await self._report()
            except Exception as error:  # the next count may go well
                log.failure("cells not counted", error)

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
        self._opening = False
        self._heard = -math.inf
        self.last: Report | None = None
        """What it last said that it has done."""

    async def start(self) -> Said:
        """Start the process and wait until it is ready; what it says then.

        Raises:
            ServeError: with the cell's own words, if it does not come up.
            OSError: if the system starts no process.
        """
        process = await asyncio.create_subprocess_exec(
            *self._supervisor.command(),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=_LINE_BYTES,
            start_new_session=True,  # the terminal's Ctrl-C reaches the supervisor alone, which drains the cells
        )
        self._process = process
        try:
            os.sched_setaffinity(process.pid, self._cores)
        except OSError as error:  # the cores may have been taken away; better on others than not at all
            log.event(
                logging.WARNING, "cell not pinned", cell=self._number, cores=sorted(self._cores), error=str(error)
            )
        self._tell(self._supervisor.settings())
        said: Said | None = None
        with contextlib.suppress(TimeoutError):
            said = await asyncio.wait_for(self._hear(), _START_S)
        if said is None or not said.url:
            self.kill()
            await process.wait()
            self._forget()
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
                except (ServeError, OSError) as error:
                    log.event(logging.ERROR, "cell does not start", cell=self._number, error=str(error))
                except Exception as error:  # whatever it is, the next try may go well
                    log.failure("cell does not start", error, cell=self._number)

    async def watch(self) -> None:
        """Kill the process when it has not answered for too long. It is started again like any that dies.

        What counts is how often it did not answer, not the clock: after a pause of the whole machine, this supervisor
        with it, a cell has as long as before.
        """
        missed = 0
        while True:
            process = self._process
            answered = await self.do(Beat(), _BEAT_S)
            if answered is None or not answered.wrong or self._heard_within(_BEAT_S) or process is not self._process:
                missed = 0
                await asyncio.sleep(_BEAT_S)
                continue
            missed += 1
            if missed * _BEAT_S >= self._supervisor.frozen_s * (_OPENING if self._opening else 1):
                missed = 0
                self._supervisor.frozen += 1
                pid = None if process is None else process.pid
                silent = round(asyncio.get_running_loop().time() - self._heard, 1)
                log.event(logging.ERROR, "cell frozen", cell=self._number, pid=pid, silent_s=silent)
                self.kill()

    def _heard_within(self, seconds: float) -> bool:
        return asyncio.get_running_loop().time() - self._heard < seconds

    async def stop(self) -> None:
        """SIGTERM, so that it drains; SIGKILL if it takes too long."""
        process = self._process
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            try:
                await asyncio.wait_for(process.wait(), self._supervisor.closing_s)
            except TimeoutError:
                log.event(logging.ERROR, "cell killed", cell=self._number, why="it did not end in time")
                self.kill()
                await process.wait()
        self._forget()

    def kill(self) -> None:
        """End the process at once, stopped or not."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGKILL)

    async def do(self, work: Work, within_s: float) -> Done | None:
        """Have work done in this cell; None from one that is down."""
        if self._process is None or self._process.returncode is not None or self._listener is None:
            return None
        self._next += 1
        number = self._next
        future: asyncio.Future[Done | None] = asyncio.get_running_loop().create_future()
        self._given[number] = future
        self._opening = self._opening or isinstance(work, Prepare)
        self._tell(msgspec.json.encode(Order(number, work=work)))
        try:
            return await asyncio.wait_for(future, within_s)
        except TimeoutError:
            return Done(f"cell {self._number} does not answer", 503)
        finally:
            del self._given[number]
            if isinstance(work, Prepare):
                self._opening = False

    async def count(self) -> State | None:
        """How it is, and in `last` what it has done; None if it does not say so soon."""
        done = await self.do(Count(), _COUNT_S)
        return None if done is None or done.report is None else done.report.cells[0]

    def _tell(self, line: bytes) -> None:
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(ConnectionError, RuntimeError):  # it is closed where the process has died
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
            self._heard = asyncio.get_running_loop().time()
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


async def _cancelled(futures: Sequence[asyncio.Future[Any]]) -> None:
    for future in futures:
        future.cancel()
    await asyncio.gather(*futures, return_exceptions=True)


def _served(target: Target) -> Served:
    return Served(msgspec.structs.replace(target.plan, evidence=None), str(target.folder))


def _after(work: Work, settings: ServeSettings) -> ServeSettings:
    """The settings with which a cell begins that is started after this work."""
    match work:
        case Unload():
            return msgspec.structs.replace(settings, unloaded=True)
        case Register():
            return msgspec.structs.replace(settings, regions=(*settings.regions, work))
        case Unregister(name):
            kept = tuple(region for region in settings.regions if name is not None and region.name != name)
            return msgspec.structs.replace(settings, regions=kept)
        case Log(level):
            return msgspec.structs.replace(settings, log_level=level)
        case Renew(keys, identity):
            return msgspec.structs.replace(
                settings,
                api_keys=settings.api_keys if keys is None else keys,
                identity=settings.identity if identity is None else identity,
            )
    return settings


def pins(cells: int, cores: Sequence[int]) -> list[frozenset[int]]:
    """Which cores each cell may use: shared out evenly in order; all of them where there are more cells than cores."""
    if cells > len(cores):
        return [frozenset(cores)] * cells
    share, extra = divmod(len(cores), cells)
    ends = [0]
    for number in range(cells):
        ends.append(ends[-1] + share + (number < extra))
    return [frozenset(cores[start:end]) for start, end in pairwise(ends)]

"""`Supervisor`: several worker processes (cells) behind one port, each pinned to its own cores.

The kernel spreads connections over the cells (SO_REUSEPORT), and a cell that has more than others hands new ones over
(`seats.py`). A cell that dies is restarted, at once the first time and with growing pauses after that. One that does
not respond for some seconds, because its event loop is blocked or its process is stopped, is killed and restarted. Only
requests in flight on it fail. What must be the same in all cells (a reload, a region of shared memory) is sent to the
supervisor by the cell that got the request, and executed in each.
What is asked of all together (statistics, metrics) is added up here, with the counters of dead cells.

A reload has two phases: all cells open the new version, and only when all have, all serve it. A restarted cell opens
what the others serve, whatever is at the path by then.

The messages are in `messages.py`.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import msgspec

from rushhour.errors import RushhourError
from rushhour.serve.hosting import Folder, with_plan
from rushhour.serve.memory.shared_memory import Register
from rushhour.serve.observability import log
from rushhour.serve.observability.statistics import (
    Counted,
    Report,
    Totals,
    add_counts,
    newest_versions,
    sum_by_version,
)
from rushhour.serve.processes.cell_process import BEAT_S, COUNT_S, CellProcess
from rushhour.serve.processes.messages import (
    Abandon,
    Command,
    Commit,
    Count,
    Load,
    Log,
    Prepare,
    Renew,
    Result,
    Speed,
    Unload,
    Unregister,
)
from rushhour.serve.processes.renewal import Renewal
from rushhour.serve.processes.signals import SIGNALS
from rushhour.serve.scheduling.speed import sum_speeds
from rushhour.serve.seats import Seat, Seats
from rushhour.serve.settings import Served, ServeSettings
from rushhour.serve.target import Target

_COMMAND_S = 300.0
_COUNT_EVERY_S = 2.0
"""How often the counters of cells are collected: what a cell has counted since then is lost if it dies."""


class Supervisor:
    """Keeps a number of cells running until a signal to stop.

    Args:
        settings: of each cell, with the port they share and the models they serve. All cells serve all models.
        cores: for each cell, the cores it may use.
        reopen: opens what is at a model's path by then.
        folder: where models are found that the server does not have yet; None where its models are fixed.
        closing_s: how long a cell may take to stop.
    """

    def __init__(
        self,
        settings: ServeSettings,
        cores: Sequence[frozenset[int]],
        reopen: Callable[[Served], Target],
        folder: Folder | None,
        closing_s: float,
    ) -> None:
        self._settings = settings
        self._reopen = reopen
        self._folder = folder
        self.closing_s = closing_s
        self._seats = Seats(len(cores))
        self._cells = [
            CellProcess(self, number, its_cores, self._seats.seat(number)) for number, its_cores in enumerate(cores)
        ]
        self._stopping = asyncio.Event()
        self._past: dict[str, dict[str, Totals]] = {}
        self._past_dropped = 0
        self._past_errors: dict[str, int] = {}
        self.restarts = 0
        self.frozen = 0
        self.frozen_s = settings.frozen_s
        self.changing = asyncio.Lock()
        """Held while something changes that is the same in all cells, and while a cell starts."""

    async def run(self, ready: Callable[[str, str], None]) -> bool:
        """Start all cells, and supervise them until SIGTERM or SIGINT; returns whether they were ready before that.

        Args:
            ready: called once, when all are ready: with the URL, and the variant that is served.

        Raises:
            ServeError: if a cell cannot start for the first time; the others are stopped.
        """
        loop = asyncio.get_running_loop()
        before = SIGNALS.before_exit

        def before_exit() -> None:
            for cell in self._cells:
                cell.kill()
            before()

        SIGNALS.before_exit = before_exit
        SIGNALS.on_stop(lambda: loop.call_soon_threadsafe(self._stopping.set))
        stopping = asyncio.ensure_future(self._stopping.wait())
        starting = asyncio.gather(*(cell.start() for cell in self._cells))
        watching = [asyncio.ensure_future(cell.watch()) for cell in self._cells]
        keeping: list[asyncio.Future[None]] = []
        try:
            await asyncio.wait((starting, stopping), return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():
                return False
            started = starting.result()
            report = await self._report()  # which stores the versions of the bundles
            for model in self._settings.models:
                if model.fit is not None:
                    share = report.plan_share(model.name)
                    log.event(logging.WARNING, model.fit.line(share), model=model.name, share=share)
            ready(started[0].url, started[0].way)
            renewal = Renewal(self._settings, self.execute)
            SIGNALS.on_reload(renewal.request)
            tasks = (*(cell.keep() for cell in self._cells), self._count(), renewal.run())
            keeping = [asyncio.ensure_future(task) for task in tasks]
            await stopping
            return True
        finally:
            SIGNALS.limit_lifetime(self.closing_s + self.frozen_s + BEAT_S)
            await _cancelled([stopping, starting, *keeping])
            await asyncio.gather(*(cell.stop() for cell in self._cells))
            await _cancelled(watching)
            SIGNALS.before_exit = before
            self._seats.close()

    async def execute(self, command: Command) -> Result:
        """Execute a command in every running cell. A cell that is down does so when it starts.

        Errors are part of the result.
        """
        try:
            return await self._executed(command)
        except RushhourError as error:
            return Result(str(error))
        except Exception as error:
            log.failure("work failed", error, work=type(command).__name__)
            return Result(f"internal error: {type(error).__name__}", 500)

    async def _executed(self, command: Command) -> Result:
        match command:
            case Count():
                return Result(report=await self._report())
            case Speed():
                results = await asyncio.gather(*(cell.execute(command, COUNT_S) for cell in self._cells))
                speeds = [result.speeds for result in results if result is not None and result.speeds is not None]
                return Result(speeds=sum_speeds(speeds) if speeds else None)
        async with self.changing:
            if isinstance(command, Load):
                return await self._load(command.model)
            if isinstance(command, Log):
                log.set_level(command.level)
            result = await self._in_all(command)
            if not result.wrong:
                self._settings = _settings_after(command, self._settings)
                return Result()
            if isinstance(command, Register) and command.name not in {region.name for region in self._settings.regions}:
                await self._in_all(Unregister(command.name))  # registered in all cells or in none
        return result

    async def _load(self, name: str) -> Result:
        """Have all cells serve what is at the path of a model now, or none of them.

        Raises:
            RushhourError: if it cannot be opened.
        """
        known = next((model for model in self._settings.models if model.name == name), None)
        if known is None:
            assert self._folder is not None, "a cell knows the models, or finds them there"
            known = (await asyncio.to_thread(self._folder.find, name))[0]
        served = with_plan(known, await asyncio.to_thread(self._reopen, known))
        result = await self._in_all(Prepare(served))
        if result.wrong:
            await self._in_all(Abandon(name))
            return result
        # A cell that fails from here on is restarted with these settings, so that all serve one version.
        self._replace(msgspec.structs.replace(served, unloaded=False))
        committed = await asyncio.gather(*(cell.execute(Commit(name), _COMMAND_S) for cell in self._cells))
        for cell, outcome in zip(self._cells, committed, strict=True):
            if outcome is not None and outcome.wrong:
                cell.kill()
        self._store_versions()  # from the cells' reports
        return Result()

    def _replace(self, served: Served) -> None:
        """Serve a model so from now on, in cells that are restarted too."""
        others = [model for model in self._settings.models if model.name != served.name]
        names = [model.name for model in self._settings.models]
        at = names.index(served.name) if served.name in names else len(others)
        self._settings = msgspec.structs.replace(self._settings, models=(*others[:at], served, *others[at:]))

    async def _in_all(self, command: Command) -> Result:
        """Execute a command in all running cells; returns their errors."""
        results = await asyncio.gather(*(cell.execute(command, _COMMAND_S) for cell in self._cells))
        failed = [result for result in results if result is not None and result.wrong]
        return Result("; ".join(sorted({result.wrong for result in failed})), failed[0].status) if failed else Result()

    async def _report(self) -> Report:
        """The report of all cells together, with the last report of those that do not respond."""
        states = await asyncio.gather(*(cell.count() for cell in self._cells))
        known = [cell.last for cell in self._cells if cell.last is not None]
        self._store_versions()
        return Report(
            self._counted(known),
            {number: state for number, state in enumerate(states) if state is not None},
            sum(state is None for state in states),
            self.restarts,
            frozen=self.frozen,
            dropped=self._past_dropped + log.dropped() + sum(last.dropped for last in known),
            errors=self._errors([last.errors for last in known]),
        )

    def _counted(self, known: Sequence[Report]) -> dict[str, Counted]:
        """The counters of each model, of all cells together."""
        names = [model.name for model in self._settings.models]
        names += [*self._past, *(name for last in known for name in last.models)]
        return {
            name: Counted(
                sum_by_version(
                    [self._past.get(name, {}), *(last.models[name].versions for last in known if name in last.models)]
                )
            )
            for name in dict.fromkeys(names)
        }

    def _errors(self, living: list[dict[str, int]]) -> dict[str, int]:
        """Errors of the running cells, and of those that have died."""
        errors = dict(self._past_errors)
        for each in living:
            add_counts(errors, each)
        return errors

    def _store_versions(self) -> None:
        """Store the version of each bundle from the last reports: a restarted cell must use the same."""
        for model in self._settings.models:
            versions = dict(model.versions)
            for cell in self._cells:
                if cell.last is not None and model.name in cell.last.models:
                    versions |= cell.last.models[model.name].bundles
            if versions != model.versions:
                self._replace(msgspec.structs.replace(model, versions=newest_versions(versions)))

    def keep_counts(self, last: Report) -> None:
        """Keep the counters of a cell that has died."""
        for name, model in last.models.items():
            self._past[name] = sum_by_version([self._past.get(name, {}), model.versions])
        self._past_dropped += last.dropped
        add_counts(self._past_errors, last.errors)

    def vacate(self, number: int) -> None:
        """Have other cells take the connections that were handed to a cell that is down."""
        self._seats.vacate(number)

    async def _count(self) -> None:
        while True:
            await asyncio.sleep(_COUNT_EVERY_S)
            try:
                await self._report()
            except Exception as error:  # the next one may succeed
                log.failure("cells not counted", error)

    def command(self) -> list[str]:
        """The command line of a cell."""
        return [sys.executable, "-m", "rushhour.serve", self._settings.models[0].path, "-"]

    def settings(self, seat: Seat) -> bytes:
        """The settings of the cell with this seat, as they are now; its first line of input."""
        return msgspec.json.encode(msgspec.structs.replace(self._settings, seat=seat))


async def _cancelled(futures: Sequence[asyncio.Future[Any]]) -> None:
    for future in futures:
        future.cancel()
    await asyncio.gather(*futures, return_exceptions=True)


def _settings_after(command: Command, settings: ServeSettings) -> ServeSettings:
    """The settings of a cell that is started after this command."""
    match command:
        case Unload(name):
            models = tuple(
                msgspec.structs.replace(model, unloaded=model.unloaded or model.name == name)
                for model in settings.models
            )
            return msgspec.structs.replace(settings, models=models)
        case Register():
            return msgspec.structs.replace(settings, regions=(*settings.regions, command))
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


def cores_of_each(cells: int, cores: Sequence[int]) -> list[frozenset[int]]:
    """The cores that each cell may use: divided evenly in order.

    More cells than cores take turns, as many on each core; where that does not come out even, each may use all of them.
    """
    if cells > len(cores):
        return [frozenset(cores) if cells % len(cores) else frozenset({cores[n % len(cores)]}) for n in range(cells)]
    share, extra = divmod(len(cores), cells)
    ends = [0]
    for number in range(cells):
        ends.append(ends[-1] + share + (number < extra))
    return [frozenset(cores[start:end]) for start, end in pairwise(ends)]

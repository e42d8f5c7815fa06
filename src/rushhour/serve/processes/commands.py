"""What a cell does when it is told to, by its own clients or by its supervisor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from prometheus_client import ProcessCollector

from rushhour.errors import RushhourError, WireError
from rushhour.serve.observability import log
from rushhour.serve.observability.statistics import Report, State
from rushhour.serve.processes.messages import (
    Abandon,
    Beat,
    Commit,
    Count,
    Done,
    Load,
    Log,
    Prepare,
    Register,
    Renew,
    Speed,
    Unload,
    Unregister,
    Work,
)
from rushhour.serve.protocols.shared_memory import SharedMemory
from rushhour.serve.repository import Repository

_PROCESS = ProcessCollector(registry=None)


class Duties:
    """Does work in this process.

    Args:
        repository: what is served.
        regions: the shared memory of its clients; None where it is switched off.

    Attributes:
        watch: adds what the faces know to the state of the cell.
        renew: has the faces use other keys and another certificate.
    """

    def __init__(self, repository: Repository, regions: SharedMemory | None = None) -> None:
        self._repository = repository
        self._regions = regions
        self.watch: Callable[[State], None] | None = None
        self.renew: Callable[[Renew], None] | None = None

    async def do(self, work: Work) -> Done:
        """Do it. Whatever goes wrong is part of the answer: others wait for one."""
        try:
            match work:
                case Count():
                    return Done(report=self.report())
                case Speed():
                    loaded = self._repository.loaded
                    return Done(speeds=None if loaded is None else loaded.cell.speeds())
                case Load():
                    await self._repository.load()
                case Prepare(versions, plan, folder):
                    await self._repository.prepare(versions, plan, Path(folder))
                case Commit():
                    await self._repository.commit()
                    return Done(report=self.report())
                case Abandon():
                    await self._repository.abandon()
                case Beat():
                    pass
                case Renew():
                    if self.renew is not None:
                        self.renew(work)
                case Unload():
                    await self._repository.unload()
                case Register(name, key, offset, byte_size, access):
                    self._shared().register(name, key, offset, byte_size, access)
                case Unregister(name):
                    self._shared().unregister(name)
                case Log(level):
                    log.set_level(level)
        except RushhourError as error:
            return Done(str(error), error.status if isinstance(error, WireError) else 400)
        except Exception as error:
            log.failure("work failed", error, work=type(work).__name__)
            return Done(f"internal error: {type(error).__name__}", 500)
        return Done()

    def report(self) -> Report:
        """What this cell has done, and how it is. Shares nothing with what goes on."""
        loaded = self._repository.loaded
        state = State(
            ready=loaded is not None,
            process={sample.name: sample.value for family in _PROCESS.collect() for sample in family.samples},
        )
        if loaded is not None:
            cell = loaded.cell
            state.waiting = cell.waiting
            state.batches, state.running = cell.running
            state.speed = cell.speed
            state.base_s = cell.profile.seconds(0)
            state.sample_s = cell.profile.seconds(1) - state.base_s
        if self.watch is not None:
            self.watch(state)
        return Report(
            self._repository.name,
            self._repository.totals(),
            {0: state},
            bundles=dict(self._repository.versions),
            dropped=log.dropped(),
            errors=dict(self._repository.errors),
        )

    def _shared(self) -> SharedMemory:
        if self._regions is None:
            raise WireError("shared memory is switched off on this server", "", "send the tensors", status=501)
        return self._regions

"""`Commands`: what a worker process does when a client or its supervisor tells it to."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import ProcessCollector

from rushhour.errors import RushhourError, WireError
from rushhour.serve.memory.shared_memory import Register, SharedMemory
from rushhour.serve.observability import log
from rushhour.serve.observability.statistics import Counted, Report, State
from rushhour.serve.processes.messages import (
    Abandon,
    Beat,
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
from rushhour.serve.repository import Repository

_PROCESS = ProcessCollector(registry=None)


class Commands:
    """Executes commands in this process.

    Args:
        repository: the models.
        regions: the shared memory of clients; None where it is switched off.

    Attributes:
        describe: adds what the HTTP and gRPC servers know to the state of this process.
        renew: has the HTTP and gRPC servers use other API keys and another certificate.
    """

    def __init__(self, repository: Repository, regions: SharedMemory | None = None) -> None:
        self._repository = repository
        self._regions = regions
        self.describe: Callable[[State], None] | None = None
        self.renew: Callable[[Renew], None] | None = None

    async def execute(self, command: Command) -> Result:
        """Execute a command. Errors are part of the result, because another process waits for it."""
        try:
            match command:
                case Count():
                    return Result(report=self.report())
                case Speed(model):
                    loaded = self._repository.named(model).loaded
                    return Result(speeds=None if loaded is None else loaded.cell.speeds())
                case Load(model):
                    await self._repository.load(model)
                case Prepare(served):
                    await self._repository.prepare(served)
                case Commit(model):
                    await self._repository.named(model).commit()
                    return Result(report=self.report())
                case Abandon(model):
                    await self._repository.abandon(model)
                case Beat():
                    pass
                case Renew():
                    if self.renew is not None:
                        self.renew(command)
                case Unload(model):
                    await self._repository.named(model).unload()
                case Register(name, key, offset, byte_size, access):
                    self._shared().register(name, key, offset, byte_size, access)
                case Unregister(name):
                    self._shared().unregister(name)
                case Log(level):
                    log.set_level(level)
        except RushhourError as error:
            return Result(str(error), error.status if isinstance(error, WireError) else 400)
        except Exception as error:
            log.failure("work failed", error, work=type(command).__name__)
            return Result(f"internal error: {type(error).__name__}", 500)
        return Result()

    def report(self) -> Report:
        """Counters and state of this process. A copy."""
        services = self._repository.services
        state = State(
            ready=self._repository.is_ready,
            process={sample.name: sample.value for family in _PROCESS.collect() for sample in family.samples},
            models={name: loaded.state() for name, each in services.items() if (loaded := each.loaded) is not None},
        )
        if self.describe is not None:
            self.describe(state)
        return Report(
            {name: Counted(each.totals(), dict(each.versions)) for name, each in services.items()},
            {0: state},
            dropped=log.dropped(),
            errors=dict(self._repository.errors),
        )

    def _shared(self) -> SharedMemory:
        if self._regions is None:
            raise WireError("shared memory is switched off on this server", "", "send the tensors", status=501)
        return self._regions

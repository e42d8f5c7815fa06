"""Messages between worker processes and their supervisor: JSON lines over standard input and output.

The same in both directions: a `Command` with a number, later its `Result` under that number. A worker process asks the
supervisor to have a command executed in all worker processes, itself among them; the supervisor sends it to each.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import msgspec

from rushhour.errors import WireError
from rushhour.serve.access.certificates import Identity
from rushhour.serve.memory.shared_memory import Register
from rushhour.serve.observability.log import LogLevel
from rushhour.serve.observability.statistics import Report
from rushhour.serve.scheduling.speed import Speeds
from rushhour.serve.settings import Served


class Load(msgspec.Struct, frozen=True, tag="load"):
    """Open what is at the path of this model now, and serve it."""

    model: str


class Prepare(msgspec.Struct, frozen=True, tag="prepare"):
    """Open what the plan of this model names, beside what is served; nothing else changes yet.

    Attributes:
        served: with its plan, and the versions of the bundles that were served by any worker process.
    """

    served: Served


class Commit(msgspec.Struct, frozen=True, tag="commit"):
    """Serve what was prepared of this model; the result holds a `Report`."""

    model: str


class Abandon(msgspec.Struct, frozen=True, tag="abandon"):
    """Close what was prepared of this model, if anything was."""

    model: str


class Beat(msgspec.Struct, frozen=True, tag="beat"):
    """Respond, to show that the event loop is not blocked."""


class Renew(msgspec.Struct, frozen=True, tag="renew"):
    """Use these from now on; None keeps what is in use."""

    api_keys: tuple[str, ...] | None = None
    identity: Identity | None = None


class Unload(msgspec.Struct, frozen=True, tag="unload"):
    """Accept no more requests for this model."""

    model: str


class Count(msgspec.Struct, frozen=True, tag="count"):
    """Report counters and state; the result holds a `Report`."""


class Speed(msgspec.Struct, frozen=True, tag="speed"):
    """Report the expected and the measured times of this model's batches; the result holds `Speeds`."""

    model: str


class Unregister(msgspec.Struct, frozen=True, tag="unregister"):
    """Remove a region of shared memory, or with None all."""

    name: str | None = None


class Log(msgspec.Struct, frozen=True, tag="log"):
    """Log records of this level and above."""

    level: LogLevel


Command = Load | Prepare | Commit | Abandon | Beat | Renew | Unload | Count | Speed | Register | Unregister | Log


class Result(msgspec.Struct, frozen=True):
    """The result of a command.

    Attributes:
        wrong: the error; empty if there was none.
        status: the HTTP status of the error.
        report: of `Count` and `Commit`.
        speeds: of `Speed`; None where the model is not loaded.
    """

    wrong: str = ""
    status: int = 400
    report: Report | None = None
    speeds: Speeds | None = None


Execute = Callable[[Command], Awaitable[Result]]
"""Executes a command: in this process, or in all worker processes."""


class FromSupervisor(msgspec.Struct, frozen=True):
    """A message to a worker process: a command, or the result of the command that it sent."""

    id: int
    work: Command | None = None
    done: Result | None = None


class FromWorker(msgspec.Struct, frozen=True):
    """A message of a worker process: that it is ready, or a command or a result.

    Attributes:
        url: where it listens for HTTP, once it does.
        grpc: the address for gRPC, where that is served.
        way: the variant that is served, in words.
        error: why it does not start.
    """

    url: str = ""
    grpc: str = ""
    way: str = ""
    error: str = ""
    id: int = 0
    work: Command | None = None
    done: Result | None = None


async def executed(execute: Execute, command: Command) -> Result:
    """Execute a command and wait for its result.

    Raises:
        WireError: with the command's error and its status.
    """
    result = await execute(command)
    if result.wrong:
        raise WireError(result.wrong, status=result.status)
    return result

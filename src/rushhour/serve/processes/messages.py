"""What cells and their supervisor say to each other, in JSON lines over a cell's standard input and output.

Both ways the same: some `Work` with a number, later `Done` under that number. A cell asks the supervisor to have work
done in all cells, itself among them; the supervisor asks a cell to do it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Literal

import msgspec

from rushhour.errors import WireError
from rushhour.plan import Plan
from rushhour.serve.observability.statistics import Report
from rushhour.serve.protocols.limits import Identity
from rushhour.serve.protocols.shared_memory import Access
from rushhour.serve.scheduling.speed import Speeds

LogLevel = Literal["debug", "info", "warning", "error", "critical"]


class Load(msgspec.Struct, frozen=True, tag="load"):
    """Open what lies at the target's path now, and serve it."""


class Prepare(msgspec.Struct, frozen=True, tag="prepare"):
    """Open what this plan says, beside what is served; nothing else changes yet.

    Attributes:
        versions: of the bundles that were served in any cell, by their hashes.
        folder: that the plan's bundles lie in.
    """

    versions: dict[str, int]
    plan: Plan
    folder: str


class Commit(msgspec.Struct, frozen=True, tag="commit"):
    """Serve what was prepared: the work's result is a `Report`."""


class Abandon(msgspec.Struct, frozen=True, tag="abandon"):
    """Close what was prepared, if anything was."""


class Beat(msgspec.Struct, frozen=True, tag="beat"):
    """Answer, to show that the loop turns."""


class Renew(msgspec.Struct, frozen=True, tag="renew"):
    """Use these from now on; None is as before."""

    api_keys: tuple[str, ...] | None = None
    identity: Identity | None = None


class Unload(msgspec.Struct, frozen=True, tag="unload"):
    """Take no more requests."""


class Count(msgspec.Struct, frozen=True, tag="count"):
    """Say what was done, and how things are: the work's result is a `Report`."""


class Speed(msgspec.Struct, frozen=True, tag="speed"):
    """Say how long batches took, against their profile: the work's result is `Speeds`."""


class Register(msgspec.Struct, frozen=True, tag="register"):
    """Open a region of shared memory; see `SharedMemory.register`."""

    name: str
    key: str
    offset: int
    byte_size: int
    access: Access = "write"


class Unregister(msgspec.Struct, frozen=True, tag="unregister"):
    """Forget a region of shared memory, or with None all."""

    name: str | None = None


class Log(msgspec.Struct, frozen=True, tag="log"):
    """Log what is at least so serious."""

    level: LogLevel


Work = Load | Prepare | Commit | Abandon | Beat | Renew | Unload | Count | Speed | Register | Unregister | Log


class Done(msgspec.Struct, frozen=True):
    """How it went.

    Attributes:
        wrong: what went wrong; empty for nothing.
        status: the HTTP status of that.
        report: of `Count` and `Commit`.
        speeds: of `Speed`; None where nothing is loaded.
    """

    wrong: str = ""
    status: int = 400
    report: Report | None = None
    speeds: Speeds | None = None


Do = Callable[[Work], Awaitable[Done]]
"""Does some work: here, or in all cells."""


class Order(msgspec.Struct, frozen=True):
    """What a supervisor tells a cell: to do some work, or how the work went that the cell asked for."""

    id: int
    work: Work | None = None
    done: Done | None = None


class Said(msgspec.Struct, frozen=True):
    """What a cell tells its supervisor: that it is ready, or an `Order` the other way round.

    Attributes:
        url: where it listens for HTTP, once it does.
        grpc: the address for gRPC, where that is served.
        way: what serves, in words.
        error: why it does not start.
    """

    url: str = ""
    grpc: str = ""
    way: str = ""
    error: str = ""
    id: int = 0
    work: Work | None = None
    done: Done | None = None


async def done(do: Do, work: Work) -> Done:
    """Have work done.

    Raises:
        WireError: with what went wrong and its status.
    """
    result = await do(work)
    if result.wrong:
        raise WireError(result.wrong, status=result.status)
    return result

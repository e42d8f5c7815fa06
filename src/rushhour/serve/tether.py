"""A cell's line to whoever started it: their orders, and the end when they are gone."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import threading
from collections.abc import Awaitable, Callable

import msgspec

from rushhour.serve.supervisor import Change, Order, Said

Make = Callable[[Change, int], Awaitable[str]]
"""Makes a change in this cell, to this version of the model; what went wrong, or nothing."""


class Tether:
    """Reads orders from standard input on a thread; when it ends, this process drains and stops.

    Args:
        orders: standard input, unbuffered: a buffer's lock, held by a thread, would bar the way out.
        say: writes a line to the supervisor.
    """

    def __init__(self, orders: io.RawIOBase, say: Callable[[Said], None]) -> None:
        self._input = orders
        self._say = say
        self._loop: asyncio.AbstractEventLoop | None = None
        self._make: Make | None = None
        self._outcome: asyncio.Future[str] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        threading.Thread(target=self._read, name="tether", daemon=True).start()

    def attach(self, make: Make) -> None:
        """Orders are from now on carried out by `make`, on the running loop."""
        self._loop = asyncio.get_running_loop()
        self._make = make

    async def ask(self, change: Change) -> str:
        """Have a change made in all cells, this one among them; what went wrong, or nothing."""
        self._outcome = asyncio.get_running_loop().create_future()
        self._say(Said(ask=change))
        return await self._outcome

    def _read(self) -> None:
        for line in self._input:
            try:
                order = msgspec.json.decode(line, type=Order)
            except msgspec.DecodeError:
                continue
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._obey, order)
        os.kill(os.getpid(), signal.SIGTERM)

    def _obey(self, order: Order) -> None:
        if order.outcome is not None and self._outcome is not None and not self._outcome.done():
            self._outcome.set_result(order.outcome)
        if order.change is not None:
            task = asyncio.get_running_loop().create_task(self._carry_out(order.change, order.version))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _carry_out(self, change: Change, version: int) -> None:
        assert self._make is not None
        self._say(Said(made=await self._make(change, version)))

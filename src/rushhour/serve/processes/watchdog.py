"""A cell's line to whoever started it: their orders, its own wishes, and the end when they are gone."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import msgspec

from rushhour.serve.processes.messages import Count, Do, Done, Order, Said, Speed, Work
from rushhour.serve.processes.signals import SIGNALS

_CHUNK_BYTES = 2**16
_ASK_S, _WORK_S = 5.0, 600.0
"""How long the supervisor may take to answer: to count, and to have all cells do something."""


class Tether:
    """Reads orders from standard input on a thread; when it ends, this process drains and stops.

    Args:
        orders: standard input, unbuffered: a buffer's lock, held by a thread, would bar the way out.
        say: writes a line to the supervisor. Called on threads, one after another.
    """

    def __init__(self, orders: io.RawIOBase, say: Callable[[bytes], None]) -> None:
        self._input = orders
        self._say = say
        self._loop: asyncio.AbstractEventLoop | None = None
        self._do: Do | None = None
        self._speaking = asyncio.Lock()
        self._asked: dict[int, asyncio.Future[Done]] = {}
        self._next = 0
        # Of its own: the loop's threads may all be at work, and a cell that says nothing is taken for frozen.
        self._speaker = ThreadPoolExecutor(1, thread_name_prefix="tether")
        self._tasks: set[asyncio.Task[None]] = set()
        threading.Thread(target=self._read, name="tether", daemon=True).start()

    def attach(self, do: Do) -> None:
        """Orders are from now on carried out by `do`, on the running loop."""
        self._loop = asyncio.get_running_loop()
        self._do = do

    async def ask(self, work: Work) -> Done:
        """Have work done in all cells, this one among them."""
        self._next += 1
        number = self._next
        future: asyncio.Future[Done] = asyncio.get_running_loop().create_future()
        self._asked[number] = future
        try:
            await self._tell(Said(id=number, work=work))
            return await asyncio.wait_for(future, _ASK_S if isinstance(work, Count | Speed) else _WORK_S)
        except TimeoutError:
            return Done("the supervisor of the cells does not answer", 503)
        finally:
            del self._asked[number]

    def _read(self) -> None:
        rest = b""
        while chunk := self._input.read(_CHUNK_BYTES):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                try:
                    order = msgspec.json.decode(line, type=Order)
                except msgspec.DecodeError:
                    continue
                if self._loop is not None:
                    self._loop.call_soon_threadsafe(self._obey, order)
        if not SIGNALS.stopping:  # a second one would end this process at once
            os.kill(os.getpid(), signal.SIGTERM)

    def _obey(self, order: Order) -> None:
        asked = self._asked.get(order.id)
        if order.done is not None and asked is not None and not asked.done():
            asked.set_result(order.done)
        if order.work is not None:
            task = asyncio.get_running_loop().create_task(self._carry_out(order.id, order.work))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _carry_out(self, number: int, work: Work) -> None:
        assert self._do is not None
        await self._tell(Said(id=number, done=await self._do(work)))

    async def _tell(self, said: Said) -> None:
        # A full pipe would stop the loop: it is a thread that waits for the supervisor to read.
        line = msgspec.json.encode(said) + b"\n"
        async with self._speaking:
            await asyncio.get_running_loop().run_in_executor(self._speaker, self._say, line)

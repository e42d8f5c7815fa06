"""Keys and certificates, read again when their files change or at SIGHUP; where that fails the old ones stay."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

from rushhour.errors import ServeError
from rushhour.serve.observability import log
from rushhour.serve.processes.messages import Renew
from rushhour.serve.protocols.limits import Keys, tls
from rushhour.serve.settings import ServeSettings

_LOOK_EVERY_S = 1.0

_State = tuple[tuple[int, int, int] | None, ...]


class Renewal:
    """Watches the files that keys and certificates came from. Must be made on the running loop.

    Args:
        settings: which files.
        renew: puts what was read to use.
    """

    def __init__(self, settings: ServeSettings, renew: Callable[[Renew], Awaitable[object]]) -> None:
        self._keys = None if settings.api_key_file is None else Path(settings.api_key_file)
        pair = settings.tls_certificate, settings.tls_key
        self._certificate, self._key = (None if file is None else Path(file) for file in pair)
        self._files = [file for file in (self._keys, self._certificate, self._key) if file is not None]
        self._renew = renew
        self._loop = asyncio.get_running_loop()
        self._asked = asyncio.Event()

    def ask(self) -> None:
        """Read the files now, changed or not. May be called on any thread, and in a signal's handler."""
        self._loop.call_soon_threadsafe(self._asked.set)

    async def run(self) -> None:
        """Watch until cancelled."""
        used = before = await asyncio.to_thread(self._look)
        while True:
            asked = False
            try:
                await asyncio.wait_for(self._asked.wait(), _LOOK_EVERY_S if self._files else None)
                asked = True
            except TimeoutError:
                pass
            self._asked.clear()
            now = await asyncio.to_thread(self._look)
            # A file that is being written is not read before it has been left alone for as long as a look takes.
            if asked or (now != used and now == before):
                used = now
                await self._once()
            before = now

    async def _once(self) -> None:
        try:
            read = await asyncio.to_thread(self._read)
            await self._renew(read)
        except Exception as error:  # the next renewal may go well
            log.failure("keys and certificates not renewed", error)
            return
        named = [what for what, new in (("keys", read.api_keys), ("certificate", read.identity)) if new is not None]
        log.event(logging.INFO, "renewed", what=named)

    def _look(self) -> _State:
        return tuple(_state(file) for file in self._files)

    def _read(self) -> Renew:
        keys = identity = None
        if self._keys is not None:
            try:
                keys = Keys.read(self._keys)
            except ServeError as error:
                log.event(logging.ERROR, "keys not renewed", error=str(error), instead="the old ones stay")
        try:
            identity = tls(self._certificate, self._key)
        except ServeError as error:
            log.event(logging.ERROR, "certificate not renewed", error=str(error), instead="the old one stays")
        return Renew(keys, identity)


def _state(file: Path) -> tuple[int, int, int] | None:
    try:
        found = os.stat(file)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size

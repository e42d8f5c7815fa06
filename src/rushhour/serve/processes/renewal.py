"""`Renewal`: reads API keys and certificates again when their files change or at SIGHUP; on an error keeps the old."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

from rushhour.errors import ServeError
from rushhour.serve.access.certificates import read_identity
from rushhour.serve.access.keys import Keys
from rushhour.serve.observability import log
from rushhour.serve.processes.messages import Renew
from rushhour.serve.settings import ServeSettings

_POLL_S = 1.0

_State = tuple[tuple[int, int, int] | None, ...]


class Renewal:
    """Watches the files of API keys and certificates. Must be created on the running event loop.

    Args:
        settings: with the paths of the files.
        renew: uses what was read from now on.
    """

    def __init__(self, settings: ServeSettings, renew: Callable[[Renew], Awaitable[object]]) -> None:
        self._keys = None if settings.api_key_file is None else Path(settings.api_key_file)
        pair = settings.tls_certificate, settings.tls_key
        self._certificate, self._key = (None if file is None else Path(file) for file in pair)
        self._files = [file for file in (self._keys, self._certificate, self._key) if file is not None]
        self._renew = renew
        self._loop = asyncio.get_running_loop()
        self._requested = asyncio.Event()

    def request(self) -> None:
        """Read the files now, changed or not. May be called on any thread, and in a signal's handler."""
        self._loop.call_soon_threadsafe(self._requested.set)

    async def run(self) -> None:
        """Watch until cancelled."""
        used = before = await asyncio.to_thread(self._states)
        while True:
            requested = False
            try:
                async with asyncio.timeout(_POLL_S if self._files else None):
                    await self._requested.wait()
                requested = True
            except TimeoutError:
                pass
            self._requested.clear()
            now = await asyncio.to_thread(self._states)
            # A file that is being written is read only when it did not change between two polls.
            if requested or (now != used and now == before):
                used = now
                await self._read_and_use()
            before = now

    async def _read_and_use(self) -> None:
        try:
            read = await asyncio.to_thread(self._read)
            await self._renew(read)
        except Exception as error:  # the next renewal may succeed
            log.failure("keys and certificates not renewed", error)
            return
        named = [what for what, new in (("keys", read.api_keys), ("certificate", read.identity)) if new is not None]
        if named or not self._files:  # else what failed is in the log
            log.event(logging.INFO, "renewed", what=named)

    def _states(self) -> _State:
        return tuple(_state(file) for file in self._files)

    def _read(self) -> Renew:
        keys = identity = None
        if self._keys is not None:
            try:
                keys = Keys.read(self._keys)
            except ServeError as error:
                log.event(logging.ERROR, "keys not renewed", error=str(error), instead="the old ones stay")
        try:
            identity = read_identity(self._certificate, self._key)
        except ServeError as error:
            log.event(logging.ERROR, "certificate not renewed", error=str(error), instead="the old one stays")
        return Renew(keys, identity)


def _state(file: Path) -> tuple[int, int, int] | None:
    try:
        found = os.stat(file)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size

"""The rest of a large request, read by the kernel straight to where its tensors are taken from."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import numpy as np

_SCRATCH_BYTES = 64 * 2**10


class Upload(asyncio.BufferedProtocol):
    """Takes a transport over from its protocol until so many bytes are there, then gives it back.

    A stream's usual way costs four copies: into the event loop's buffer, out of it, through the parser, and into one
    piece. This one costs one, by the kernel.

    Args:
        transport: of the connection.
        usual: its protocol, which is told when the connection ends, and gets the transport back.
        first: what was read already.
        size: of the whole, in bytes; more than is there already.
        done: called once, with the whole.
    """

    def __init__(
        self,
        transport: asyncio.Transport,
        usual: asyncio.Protocol,
        first: bytes,
        size: int,
        done: Callable[[memoryview], None],
    ) -> None:
        self._transport = transport
        self._usual = usual
        self._whole = np.empty(size, np.uint8).data
        self._left = size - len(first)
        self._whole[: len(first)] = first
        self._done = done
        self._dropping = False
        transport.set_protocol(self)

    def drop(self) -> None:
        """Nobody wants it any more: what is still to come is read, and not kept; `done` gets nothing then."""
        self._dropping = True
        self._whole = np.empty(min(self._left, _SCRATCH_BYTES), np.uint8).data

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the next bytes go: never further than this request, the next one's stay in the socket."""
        return self._whole[: self._left] if self._dropping else self._whole[-self._left :]

    def buffer_updated(self, nbytes: int) -> None:
        """So many have come."""
        self._left -= nbytes
        if not self._left:
            self._transport.set_protocol(self._usual)
            self._done(self._whole[:0] if self._dropping else self._whole)

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has gone."""
        self._usual.connection_lost(exc)

    def eof_received(self) -> bool | None:
        """The client sends no more, and what it began is not whole."""
        return self._usual.eof_received()

    def pause_writing(self) -> None:
        """The client does not read its answers."""
        self._usual.pause_writing()

    def resume_writing(self) -> None:
        """It reads again."""
        self._usual.resume_writing()

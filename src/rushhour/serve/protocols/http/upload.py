"""The rest of a large request, received directly into the buffer that its tensors are views of."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import numpy as np

from rushhour.serve.protocols.http.turns import TURN_BYTES

_SCRATCH_BYTES = 64 * 2**10


class Upload(asyncio.BufferedProtocol):
    """Replaces the protocol of a transport until a request is complete, then restores it.

    The usual path costs four copies: into the event loop's buffer, out of it, through the parser, and into one piece.
    This one costs one, by the kernel.

    Args:
        transport: of the connection.
        usual: its protocol, which is restored, and notified if the connection ends.
        first: what was read already.
        size: of the request, in bytes; more than `first`.
        read: called with what has come so far, and the size of its last part, while it is not complete.
        done: called once, with the request.
    """

    def __init__(
        self,
        transport: asyncio.Transport,
        usual: asyncio.Protocol,
        first: bytes,
        size: int,
        read: Callable[[int, int], None],
        done: Callable[[memoryview], None],
    ) -> None:
        self._transport = transport
        self._usual = usual
        self._whole = np.empty(size, np.uint8).data
        self._size = size
        self._unparsed = size - len(first)
        self._whole[: len(first)] = first
        self._read = read
        self._done = done
        self._dropping = False
        transport.set_protocol(self)

    def drop(self) -> None:
        """Read the rest without keeping it; `done` gets an empty view then."""
        self._dropping = True
        self._whole = np.empty(min(self._unparsed, _SCRATCH_BYTES), np.uint8).data

    def get_buffer(self, sizehint: int) -> memoryview:
        """The buffer for the next bytes, up to the end of this request: the next request stays in the socket."""
        begin = 0 if self._dropping else len(self._whole) - self._unparsed
        return self._whole[begin : begin + min(self._unparsed, TURN_BYTES)]

    def buffer_updated(self, nbytes: int) -> None:
        """`nbytes` were received."""
        self._unparsed -= nbytes
        if not self._unparsed:
            self._transport.set_protocol(self._usual)
            self._done(self._whole[:0] if self._dropping else self._whole)
        else:
            self._read(self._size - self._unparsed, nbytes)

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has disconnected."""
        self._usual.connection_lost(exc)

    def eof_received(self) -> bool | None:
        """The client sends no more, and its request is not complete."""
        return self._usual.eof_received()

    def pause_writing(self) -> None:
        """The client does not read its answers."""
        self._usual.pause_writing()

    def resume_writing(self) -> None:
        """The client reads its answers again."""
        self._usual.resume_writing()

"""Closing a listener without a reset: first nobody new is let in, then all who stand inside are taken, then it closes.

A listener that is closed resets the connections whose handshake is under way: the client believes to be connected, has
perhaps sent its request, and gets an error. So the first packet of a handshake is dropped before, by a filter on the
socket; whoever is dropped tries again a second later, and finds another server or a closed port.

Source: Linux, Documentation/networking/filter.rst.
"""

from __future__ import annotations

import contextlib
import ctypes
import socket
import struct

_SO_ATTACH_FILTER = 26
_TCP_FLAGS, _SYN, _ACK = 13, 0x02, 0x10
_LOAD_BYTE, _AND, _JUMP_IF_EQUAL, _RETURN = 0x30, 0x54, 0x15, 0x06
_DROP, _PASS = 0, 0xFFFFFFFF

_NO_SYN = b"".join(
    struct.pack("=HBBI", *step)
    for step in (
        (_LOAD_BYTE, 0, 0, _TCP_FLAGS),
        (_AND, 0, 0, _SYN | _ACK),
        (_JUMP_IF_EQUAL, 0, 1, _SYN),
        (_RETURN, 0, 0, _DROP),
        (_RETURN, 0, 0, _PASS),
    )
)


def let_nobody_in(listener: socket.socket) -> None:
    """Drop the first packet of every new connection; handshakes under way go on. Where that cannot be, do nothing."""
    program = ctypes.create_string_buffer(_NO_SYN)
    header = struct.pack("@HP", len(_NO_SYN) // 8, ctypes.addressof(program))
    with contextlib.suppress(OSError):
        listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, header)

"""Taking ports: on every address of a host's name, alone or together with the other cells, never from a stranger.

A port in use is one on which another program listens or is about to; connections of a program that has ended (in
TIME-WAIT, for a minute) do not keep it. For that they must have come from a listener with SO_REUSEADDR.

Source: socket(7); Linux, net/ipv4/inet_connection_sock.c.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Callable

_NOT_HERE = frozenset((errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT))
"""An address that this machine has not, or of a kind that it has not: IPv6 may be off."""
_TRIES = 20

Take = Callable[[str, int], socket.socket]
"""`claim`, `reserve` or `join`: takes a port of one address, written as numbers."""


def everywhere(take: Take, host: str, port: int) -> list[socket.socket]:
    """Take a port on each address of a host: `localhost` is 127.0.0.1 and ::1. IPv4 comes first.

    Args:
        take: how.
        host: an address or a name.
        port: 0 takes one that is free on all of them.

    Raises:
        OSError: if another program has it on one of them, or none of them is of this machine.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = list(dict.fromkeys(str(address[0]) for *_, address in sorted(found, key=lambda one: one[0])))
    for attempt in range(_TRIES):
        try:
            return _taken(take, addresses, port)
        except OSError as error:
            if port or error.errno != errno.EADDRINUSE or attempt == _TRIES - 1:
                raise
    raise AssertionError("the last try returns or raises")


def _taken(take: Take, addresses: list[str], port: int) -> list[socket.socket]:
    taken: list[socket.socket] = []
    missing: OSError | None = None
    with contextlib.ExitStack() as undone:
        for address in addresses:
            try:
                taken.append(undone.enter_context(take(address, taken[0].getsockname()[1] if taken else port)))
            except OSError as error:
                if error.errno not in _NOT_HERE:
                    raise
                missing = error
        if not taken and missing is not None:
            raise missing
        undone.pop_all()
    return taken


def claim(host: str, port: int) -> socket.socket:
    """Take a port for one listener.

    Raises:
        OSError: if another program has it.
    """
    return _bound(host, port, socket.SO_REUSEADDR)


def reserve(host: str, port: int) -> socket.socket:
    """Take a port for several cells: bound, never listening, so that it stays ours while cells come and go.

    Raises:
        OSError: if another program has it.
    """
    # Without SO_REUSEPORT first: with it, a stranger's cells of the same user would be joined, not noticed.
    with _bound(host, port, socket.SO_REUSEADDR) as probe:
        address, port = probe.getsockname()[:2]
    # And then without SO_REUSEADDR: with it, a stranger's probe would not notice this one, which does not listen.
    return _bound(address, port, socket.SO_REUSEPORT)


def join(host: str, port: int) -> socket.socket:
    """A socket bound to a port that cells share; the kernel gives it connections once it listens.

    Raises:
        OSError: if another program has the port for itself.
    """
    return _bound(host, port, socket.SO_REUSEPORT, socket.SO_REUSEADDR)


def _bound(host: str, port: int, *options: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    bound = socket.socket(family, kind, protocol)
    try:
        for option in options:
            bound.setsockopt(socket.SOL_SOCKET, option, 1)
        bound.bind(address)
    except OSError:
        bound.close()
        raise
    return bound

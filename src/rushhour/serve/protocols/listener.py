"""Listening sockets: binding a port on every address of a host, and closing without a reset.

A port in use is one on which another program listens or is about to. Connections in TIME-WAIT of a program that has
ended do not block it; for that they must have come from a listening socket with SO_REUSEADDR.

A listening socket that is closed resets the connections whose handshake is in progress: the client believes it is
connected, may have sent its request, and gets an error. So a filter on the socket drops new SYN packets before, and the
socket is closed when the handshakes in progress have ended. A dropped SYN is retransmitted after 1 s, and then reaches
another server or a closed port.

Sources: socket(7); Linux, net/ipv4/inet_connection_sock.c, Documentation/networking/filter.rst.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import socket
import struct
from collections.abc import Callable, Iterator

from rushhour.errors import ServeError

_NOT_HERE = frozenset((errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT))
"""An address that this machine does not have, or of a family that it does not support: IPv6 may be off."""
_TRIES = 20

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

Bind = Callable[[str, int], socket.socket]
"""`bind_alone`, `bind_reserved` or `bind_shared`: binds a port of one address, written as numbers."""


def bind_all(bind: Bind, host: str, port: int) -> list[socket.socket]:
    """Bind a port on each address of a host: `localhost` is 127.0.0.1 and ::1. IPv4 comes first.

    Args:
        bind: how.
        host: an address or a name.
        port: 0 takes one that is free on all of them.

    Raises:
        OSError: if another program uses it on one of them, or none of them belongs to this machine.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = list(dict.fromkeys(str(address[0]) for *_, address in sorted(found, key=lambda one: one[0])))
    for attempt in range(_TRIES):
        try:
            return _bind_each(bind, addresses, port)
        except OSError as error:
            if port or error.errno != errno.EADDRINUSE or attempt == _TRIES - 1:
                raise
    raise AssertionError("the last try returns or raises")


def _bind_each(bind: Bind, addresses: list[str], port: int) -> list[socket.socket]:
    bound: list[socket.socket] = []
    missing: OSError | None = None
    with contextlib.ExitStack() as undone:
        for address in addresses:
            try:
                bound.append(undone.enter_context(bind(address, bound[0].getsockname()[1] if bound else port)))
            except OSError as error:
                if error.errno not in _NOT_HERE:
                    raise
                missing = error
        if not bound and missing is not None:
            raise missing
        undone.pop_all()
    return bound


def bind_alone(host: str, port: int) -> socket.socket:
    """Bind a port for one listening socket.

    Raises:
        OSError: if another program uses it.
    """
    return _bound(host, port, socket.SO_REUSEADDR)


def bind_reserved(host: str, port: int) -> socket.socket:
    """Reserve a port for several worker processes: bound, never listening, so that it stays theirs on a restart.

    Raises:
        OSError: if another program uses it.
    """
    # Without SO_REUSEPORT first: with it, the port of another server of the same user would be shared, not noticed.
    with _bound(host, port, socket.SO_REUSEADDR) as probe:
        address, port = probe.getsockname()[:2]
    # And then without SO_REUSEADDR: with it, another server's probe would not notice this one, which does not listen.
    return _bound(address, port, socket.SO_REUSEPORT)


def bind_shared(host: str, port: int) -> socket.socket:
    """A socket bound to a port that worker processes share; the kernel gives it connections once it listens.

    Raises:
        OSError: if another program uses the port alone.
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


def held(stack: contextlib.ExitStack, setting: str, host: str, port: int, bind: Bind) -> list[socket.socket]:
    """Bind a port on all addresses of the host, until `stack` is closed.

    Raises:
        ServeError: if that is not possible; `setting` names the option for another port.
    """
    with explained(setting, host, port):
        return [stack.enter_context(sock) for sock in bind_all(bind, host, port)]


@contextlib.contextmanager
def explained(setting: str, host: str, port: int) -> Iterator[None]:
    """Turn the system's error about an address into what the user can do about it."""
    try:
        yield
    except OSError as error:
        why = {
            errno.EADDRINUSE: "another program listens there",
            errno.EACCES: "ports below 1024 need privileges",
            errno.EADDRNOTAVAIL: "this machine does not have that address",
        }.get(error.errno or 0, str(error))
        option, instead = setting.replace("_", "-"), "--admin-host" if setting == "admin_port" else "--host"
        raise ServeError(
            f"cannot listen on {host}:{port}", why, f"choose another with --{option} (0 takes a free one) or {instead}"
        ) from error


def host_and_port(host: str, port: int) -> str:
    """`host:port`, with brackets around an address of IPv6."""
    return f"{f'[{host}]' if ':' in host else host}:{port}"


def refuse_connections(listener: socket.socket) -> None:
    """Drop the first packet of every new connection; handshakes in progress go on. Without effect beyond Linux."""
    program = ctypes.create_string_buffer(_NO_SYN)
    header = struct.pack("@HP", len(_NO_SYN) // 8, ctypes.addressof(program))
    with contextlib.suppress(OSError):
        listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, header)

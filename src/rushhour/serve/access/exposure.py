"""Whether a server may listen on an address without API keys."""

from __future__ import annotations

import ipaddress
import socket

from rushhour.errors import ServeError


def check_exposure(host: str, keys: tuple[str, ...], *, exposed: bool) -> None:
    """Refuse to listen where other machines can reach the server, unless there are keys or the user confirms it.

    Raises:
        ServeError: if neither holds, or the host is none.
    """
    check_host(host)
    if not (is_loopback(host) or keys or exposed):
        raise ServeError(
            f"cannot listen on {host} without API keys",
            "anyone who can connect could use and reload the model",
            "give --api-key-file, or --expose if a proxy in front of the server controls access",
        )


def check_host(host: str, port_option: str = "--http-port") -> None:
    """Refuse what is no address and no name: otherwise the advice would be to expose the server.

    Args:
        host: to listen on.
        port_option: what sets the port, which many write behind the host.

    Raises:
        ServeError: if it is neither.
    """
    try:
        if not host or not set(host).isdisjoint("/@ []") or (":" in host and not _is_address(host)):
            raise OSError("a name has none of : / @ [ ]" if host else "it is empty")
        socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ServeError(
            f"cannot listen on {host!r}",
            f"it is no address and no host name: {getattr(error, 'strerror', None) or error}",
            f"give one alone, such as 127.0.0.1: a port is {port_option}, and Unix sockets are not served",
        ) from error


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to this address or name."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

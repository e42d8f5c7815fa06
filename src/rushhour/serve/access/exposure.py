"""Whether a server may listen on an address without API keys."""

from __future__ import annotations

import ipaddress

from rushhour.errors import ServeError


def check_exposure(host: str, keys: tuple[str, ...], *, exposed: bool) -> None:
    """Refuse to listen where other machines can reach the server, unless there are keys or the user confirms it.

    Raises:
        ServeError: if neither holds.
    """
    if not (is_loopback(host) or keys or exposed):
        raise ServeError(
            f"cannot listen on {host} without API keys",
            "anyone who can connect could use and reload the model",
            "give --api-key-file, or --expose if a proxy in front of the server controls access",
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to this address or name."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

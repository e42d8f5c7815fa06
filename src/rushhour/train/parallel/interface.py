"""The network interface over which this machine reaches another."""

from __future__ import annotations

import fcntl
import ipaddress
import os
import socket
import struct
from pathlib import Path
from typing import Final

from rushhour.train.parallel.settings import Backend

VARIABLE: Final = "GLOO_SOCKET_IFNAME"
"""The environment variable that gloo reads."""
_GET_ADDRESS: Final = 0x8915
"""SIOCGIFADDR of Linux (netdevice(7))."""
_NAME_BYTES: Final = 16
_INET6: Final = Path("/proc/net/if_inet6")


def choose_interface(backend: Backend, host: str, port: int) -> None:
    """Have gloo listen where workers on other machines reach it, unless the environment names an interface already.

    By itself gloo takes the address that this machine's own name resolves to. In containers, and where /etc/hosts says
    so, that is a loopback address or none, and no other machine can connect.

    Args:
        backend: of torch.distributed; nothing is done for others than gloo.
        host: of the store that all workers connect to.
        port: of the store.
    """
    if backend == "gloo" and VARIABLE not in os.environ and (found := interface_to(host, port)) is not None:
        os.environ[VARIABLE] = found


def interface_to(host: str, port: int) -> str | None:
    """The name of the interface whose address this machine sends from to another one.

    Args:
        host: its name or address; an address of this machine itself gives the interface that has it.
        port: any; nothing is sent.

    Returns:
        None where the host cannot be resolved or reached, is the loopback address, or where the system does not say.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # of a datagram socket: chooses the route, and sends nothing
            own = ipaddress.ip_address(probe.getsockname()[0].partition("%")[0])
    except (OSError, ValueError):
        return None
    if own.is_loopback:
        return None
    return _named_v4(own) if own.version == 4 else _named_v6(own)


def _named_v4(own: ipaddress.IPv4Address) -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[: _NAME_BYTES - 1])
            try:
                answer = fcntl.ioctl(asked, _GET_ADDRESS, request)
            except OSError:  # an interface without an address
                continue
            if answer[20:24] == own.packed:
                return name
    return None


def _named_v6(own: ipaddress.IPv6Address) -> str | None:
    try:
        lines = _INET6.read_text("ascii").splitlines()
    except OSError:
        return None
    return next((fields[5] for fields in map(str.split, lines) if bytes.fromhex(fields[0]) == own.packed), None)

"""Which user runs the program at the other end of a connection within this machine."""

from __future__ import annotations

import ipaddress
import sys

_TIME_WAIT = "06"


def user_of(peer: tuple[str, int], here: tuple[str, int]) -> int | None:
    """The user id of the program at the other end of a connection within this machine; None where it is not known.

    Reads the system's tables of connections, which takes milliseconds where there are many.

    Args:
        peer: address and port of the other end.
        here: of this end.
    """
    try:
        for table, ends in _table_entries(peer, here).items():
            with open(f"/proc/net/{table}", encoding="ascii") as lines:
                for line in lines:
                    fields = line.split(maxsplit=8)
                    if fields[1:3] == ends and fields[3] != _TIME_WAIT:
                        return int(fields[7])
    except (OSError, ValueError, IndexError):
        return None
    return None


def _table_entries(peer: tuple[str, int], here: tuple[str, int]) -> dict[str, list[str]]:
    """Both ends as each table writes them: a socket for IPv6 can have an address of IPv4."""
    tables: dict[str, list[str]] = {}
    for host, port in (peer, here):
        address = ipaddress.ip_address(host)
        wide = address if isinstance(address, ipaddress.IPv6Address) else ipaddress.IPv6Address(f"::ffff:{address}")
        narrow = address if isinstance(address, ipaddress.IPv4Address) else address.ipv4_mapped
        for table, form in (("tcp", narrow), ("tcp6", wide)):
            if form is not None:
                tables.setdefault(table, []).append(f"{_hex_words(form.packed)}:{port:04X}")
    return tables


def _hex_words(packed: bytes) -> str:
    """An address in words of 32 bits, each in the machine's own byte order."""
    return "".join(f"{int.from_bytes(packed[at : at + 4], sys.byteorder):08X}" for at in range(0, len(packed), 4))

"""What a process really sends and keeps, read from the kernel."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from pathlib import Path

_SENT_AT = 200
"""Of `tcpi_bytes_sent` in Linux's `struct tcp_info` (include/uapi/linux/tcp.h); `tcpi_bytes_retrans` comes next."""


def sent_bytes() -> int:
    """Payload that the open TCP sockets of this process have sent so far, what was sent twice counted once.

    Unlike the counters of the loopback, it does not hold what other programs send.

    Raises:
        OSError: on a kernel before Linux 4.19, which does not count it.
    """
    total = 0
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            if not os.readlink(link).startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(link.name))) as one:
                if one.type != socket.SOCK_STREAM or one.family not in (socket.AF_INET, socket.AF_INET6):
                    continue
                told = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _SENT_AT + 16)
            if len(told) < _SENT_AT + 16:
                raise OSError("this kernel does not count the bytes of a socket")
            sent, again = struct.unpack_from("=QQ", told, _SENT_AT)
            total += sent - again
    return total


def loopback_bytes() -> int:
    """Bytes that the loopback has carried, headers included, all programs together, each byte once."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.partition(":")[2].split()[8])


def peak_bytes() -> int:
    """The most memory that this process has had at once."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

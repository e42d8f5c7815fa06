"""Meters of a process's traffic and memory, read from the kernel."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from pathlib import Path

_SENT_AT = 200
"""Of `tcpi_bytes_sent` in Linux's `struct tcp_info` (include/uapi/linux/tcp.h); `tcpi_bytes_retrans` comes next."""


def sent_bytes() -> int:
    """Payload bytes that the open TCP sockets of this process have sent so far, without retransmissions.

    Unlike the counters of the loopback interface, it does not include other programs.

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
                info = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _SENT_AT + 16)
            if len(info) < _SENT_AT + 16:
                raise OSError("this kernel does not count the bytes of a socket")
            sent, again = struct.unpack_from("=QQ", info, _SENT_AT)
            total += sent - again
    return total


def loopback_bytes() -> int:
    """Bytes on the loopback interface, with headers, of all programs, each byte counted once."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.partition(":")[2].split()[8])


def peak_bytes() -> int:
    """The peak resident memory of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

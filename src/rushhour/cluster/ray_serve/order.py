"""`Order`: what is deployed, as plain values: the only thing that crosses from the command line to the replicas."""

from __future__ import annotations

import re
from typing import Final

import msgspec

from rushhour.errors import GoalError

_MOST_REPLICAS: Final = 1000
_LOWEST_PORT: Final = 1024


class Order(msgspec.Struct, frozen=True):
    """A deployment.

    Attributes:
        name: of the deployment.
        run: the SHA-256 of the package of plan and bundles.
        plan: the SHA-256 of the plan's file.
        version: of Rushhour; replicas have the same.
        model: the model's name in requests.
        cpus: of each replica.
        cells: server processes of each replica, as the Plan says; likewise the next two.
        streams: of each cell.
        threads: of each stream.
        limit_s: of the Plan's SLO.
        capacity_rps: of one replica as the Plan knows it; None where it does not.
        replicas: fewest and most; equal where nothing is scaled.
        host: that each replica's server listens on.
        exposed: whether it may listen beyond loopback without keys.
        ports: first and last of those that servers take; None for any free one.
        grpc: whether they serve over gRPC too.
        route: the path of this deployment behind Ray's proxy.
        drain_delay_s: requests are still accepted for so long after a replica is told to stop.
        scale_down_s: the load is so low for so long before a replica is ended.
    """

    name: str
    run: str
    plan: str
    version: str
    model: str
    cpus: int
    cells: int
    streams: int
    threads: int
    limit_s: float
    capacity_rps: float | None
    replicas: tuple[int, int]
    host: str = "127.0.0.1"
    exposed: bool = False
    ports: tuple[int, int] | None = None
    grpc: bool = True
    route: str = "/"
    drain_delay_s: float = 5.0
    scale_down_s: float = 60.0

    @property
    def is_scaled(self) -> bool:
        """Whether the number of replicas follows the load."""
        return self.replicas[0] != self.replicas[1]


def read_replicas(text: str | int) -> tuple[int, int]:
    """Fewest and most replicas: from `2` or `2..8`.

    Raises:
        GoalError: if it is not of that form.
    """
    found = re.fullmatch(r"(\d{1,6})(?:\.\.(\d{1,6}))?", str(text).strip())
    if found:
        least = int(found[1])
        most = int(found[2] or least)
        if 1 <= least <= most <= _MOST_REPLICAS:
            return least, most
    why = f"it is a number, or a range as 2..8, from 1 to {_MOST_REPLICAS:,}"
    raise GoalError(f"cannot use replicas={text!r}", why, "write for example 2 or 2..8")


def read_ports(text: str, *, each: int = 1) -> tuple[int, int]:
    """First and last port: from `9000-9099`.

    Args:
        text: of that form.
        each: ports of one replica.

    Raises:
        GoalError: if it is not, or has fewer ports than one replica needs.
    """
    found = re.fullmatch(r"(\d{1,5})-(\d{1,5})", text.strip())
    if found:
        first, last = int(found[1]), int(found[2])
        if _LOWEST_PORT <= first <= last <= 65_535 and last - first + 1 >= each:
            return first, last
    why = f"it is FIRST-LAST from {_LOWEST_PORT} to 65535, with {each} for each replica of a node"
    raise GoalError(f"cannot use ports={text!r}", why, "write for example 9000-9099")

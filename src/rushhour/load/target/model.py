"""A model on a server: the target of a load test."""

from __future__ import annotations

import dataclasses
import time
import urllib.parse
from collections.abc import Mapping
from typing import Any

import msgspec

from rushhour.errors import LoadError
from rushhour.load.target.endpoint import Endpoint
from rushhour.load.target.interface import Interface, Shape
from rushhour.load.target.queries import error_message, query

_SPEED_TIMEOUT_S = 2.0
"""Short: the host's speed is useful, but not needed."""


@dataclasses.dataclass(frozen=True)
class Target(Endpoint):
    """A model on a server.

    Attributes:
        model: the model's name.
        interface: its inputs and outputs, as the server declares them.
        tells_speed: the server reports how long its batches take against their profile, as Rushhour's do.
        named_rows: requests are rows of named values, and answers are in words.
    """

    model: str
    interface: Interface
    tells_speed: bool = False
    named_rows: bool = False

    @property
    def infer_path(self) -> str:
        """The path of inference requests."""
        return self.prefix + self._path("infer")

    @property
    def rows_path(self) -> str:
        """The path of requests of named rows, at a server of Rushhour."""
        return self.prefix + self._path("rows")

    def sample_rows(self) -> list[dict[str, Any]]:
        """A few real rows that the server has.

        Raises:
            LoadError: if its model takes no rows.
        """
        status, body = query(self, "GET", self._path("rows"))
        try:
            found = msgspec.json.decode(body, type=_Rows).rows if status == 200 else []
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            found = []
        if not found:
            raise LoadError(
                f"{self.model} at {self.url} gives no rows",
                f"the status of GET {self._path('rows')} is {status} {error_message(body)}".strip(),
                "leave out --named-rows",
            )
        return found

    def _path(self, last: str) -> str:
        return f"/v2/models/{urllib.parse.quote(self.model, safe='')}/{last}"

    def speeds(self, since: float, until: float) -> tuple[float, ...]:
        """The host's speed in each 100 ms of an interval in which a batch ended; empty where it is not reported.

        Args:
            since, until: on this machine's monotonic clock (`time.monotonic`).
        """
        if not self.tells_speed:
            return ()
        try:
            status, body = query(self, "GET", self._path("speed"), timeout_s=_SPEED_TIMEOUT_S)
            report = msgspec.json.decode(body, type=_SpeedReport) if status == 200 else _SpeedReport()
        except (LoadError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return ()
        now = time.monotonic()
        return tuple(
            round(expected_s / took_s, 3)
            for age_s, expected_s, took_s in zip(report.age_s, report.expected_s, report.took_s, strict=False)
            if since <= now - age_s <= until and took_s > 0
        )

    @property
    def outputs(self) -> tuple[str, ...] | None:
        """Names of the outputs in an answer; None where answers are in words."""
        return None if self.named_rows else self.interface.outputs

    def shaped(self, shapes: Mapping[str, Shape]) -> Target:
        """The same with shapes of inputs that the server's metadata leaves open.

        Raises:
            LoadError: if the model has no such input.
        """
        return dataclasses.replace(self, interface=self.interface.shaped(shapes, self.model))


class _Rows(msgspec.Struct):
    rows: list[dict[str, Any]]


class _SpeedReport(msgspec.Struct):
    age_s: list[float] = []
    expected_s: list[float] = []
    took_s: list[float] = []

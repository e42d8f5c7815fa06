"""The overhead of serving: what requests cost beside the engine, and how much slower the engine is beside them.

Serving costs CPU: to read and answer requests, and to send them where the load comes from the same machine. Where the
engine uses all cores, this time is taken from it. A batch also takes longer in a server than alone: caches and memory
are shared with all that. The first is seen with a fast engine, the second with a slow one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from rushhour.capacity.profile import ServiceProfile

_LEAST = 0.02
"""The least share of its cores that an engine keeps: below it no prediction is meaningful."""
_MOST_SLOWDOWN = 2.0
_APART = 1.5
"""Engines whose times differ by less than this factor do not show how much slower batches are beside serving."""


@dataclasses.dataclass(frozen=True)
class Saturation:
    """The highest rate that a server was seen to answer, with all its streams busy, as seconds for one request.

    Attributes:
        engine_s: of a stream, in full batches, the engine alone, with what a batch costs beside it.
        stream_s: of a stream, in the server.
        spare_s: of the cores that the engine does not use.
    """

    engine_s: float
    stream_s: float
    spare_s: float = 0.0

    @classmethod
    def at(
        cls,
        profile: ServiceProfile,
        rate_rps: float,
        *,
        streams: int,
        max_batch: int,
        spare: int,
        batch_s: float = 0.0,
    ) -> Saturation:
        """That of a server that answers at most `rate_rps`."""
        alone = profile.throughput(streams, max_batch, batch_s)
        return cls(streams / alone, streams / rate_rps, spare / rate_rps)

    @property
    def total_s(self) -> float:
        """Of all cores."""
        return self.stream_s + self.spare_s


@dataclasses.dataclass(frozen=True)
class Overhead:
    """What serving takes from the cores that the engine computes on.

    Attributes:
        request_s: CPU seconds of a request beside the engine: the server's, and those of a generator on this machine.
        spare: cores that the engine does not use.
        slowdown: the factor by which batches take longer beside serving than alone, at any rate.
        batch_s: seconds of a batch beside the engine, of any size: the event loop is told that it has ended, and starts
            the next; the engine's threads wake up.
    """

    request_s: float = 0.0
    spare: int = 0
    slowdown: float = 1.0
    batch_s: float = 0.0

    def stretch(self, rate_rps: float, streams: int) -> float:
        """The factor by which batches take longer at this rate.

        The work runs on one core at a time, and the stream that computes there waits for it, with all its threads: one
        stream of two threads loses all that time, two streams of one thread each lose half of it.
        """
        taken = max(0.0, rate_rps * self.request_s - self.spare)
        return self.slowdown / max(_LEAST, 1 - taken / streams)

    @classmethod
    def from_throughput(
        cls, profile: ServiceProfile, *, streams: int, max_batch: int, spare: int, most_rps: float
    ) -> Overhead:
        """The overhead that explains a measured throughput `most_rps`, with full batches."""
        return cls.explaining(
            [Saturation.at(profile, most_rps, streams=streams, max_batch=max_batch, spare=spare)], spare=spare
        )

    @classmethod
    def explaining(cls, seen: Sequence[Saturation], *, spare: int, slowdown: float = 1.0) -> Overhead:
        """The overhead that explains the highest rates of servers of one layout.

        A fast engine shows the cost of requests. A much slower one shows the slowdown of the engine as well.

        Args:
            seen: at least one.
            spare: cores that the engine does not use.
            slowdown: of the engine, as other layouts showed it, where these do not.
        """
        fast, slow = min(seen, key=_engine_s), max(seen, key=_engine_s)
        if slow.engine_s >= _APART * fast.engine_s:
            slowdown = (slow.total_s - fast.total_s) / (slow.engine_s - fast.engine_s)
        slowdown = max(1.0, min(_MOST_SLOWDOWN, slowdown, fast.stream_s / fast.engine_s))
        left_s = fast.stream_s - slowdown * fast.engine_s
        return cls(left_s + fast.spare_s if left_s > 1e-9 * fast.stream_s else 0.0, spare, slowdown)


ALONE = Overhead()
"""No overhead: the engine has all of its cores."""


def _engine_s(seen: Saturation) -> float:
    return seen.engine_s

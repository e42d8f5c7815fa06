"""A scenario: a policy on an engine whose times are known."""

from __future__ import annotations

import dataclasses
import math

from rushhour.capacity.overhead import ALONE, Overhead
from rushhour.capacity.profile import ServiceProfile


@dataclasses.dataclass(frozen=True)
class Scenario:
    """What is simulated.

    Attributes:
        profile: seconds of batches on one stream while all are busy.
        streams: batches at the same time, of all worker processes.
        max_batch: requests in one batch, at most.
        overhead: of serving.
        wait_s: how long a batch waits for more requests, at most, where the streams are not busy: the server's
            `Batcher.dispatch_at`.
        wait_for: requests that it waits for; 1 where none waits.
        deadline_s: a request that would be answered later than this after its arrival is shed; infinite for none.
    """

    profile: ServiceProfile
    streams: int
    max_batch: int
    overhead: Overhead = ALONE
    wait_s: float = 0.0
    wait_for: int = 1
    deadline_s: float = math.inf

    @property
    def highest_rps(self) -> float:
        """The rate at which its full batches and the overhead take all cores: an upper bound of what it answers.

        A simulation alone does not show it: above this rate the queue grows, but if few requests are simulated, it may
        not reach the limit before they end.
        """
        overhead = self.overhead
        alone = self.profile.throughput(self.streams, self.max_batch, overhead.batch_s) / overhead.slowdown
        if alone * overhead.request_s <= overhead.spare:
            return alone
        return (self.streams + overhead.spare) / (self.streams / alone + overhead.request_s)

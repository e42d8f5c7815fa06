"""The result of one run of load: when each request was scheduled, taken, sent and answered, and how it ended."""

from __future__ import annotations

import dataclasses
import enum
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray


class Status(enum.IntEnum):
    """How a request ended."""

    UNANSWERED = 0
    """Still in flight; none is left at the end of a run."""
    OK = 1
    """Answered with status 200 and, where answers are compared, the right answer."""
    SHED = 2
    """Shed by the server: status 429 or 503."""
    ERROR = 3
    """Answered with another status, with a wrong answer, or with bytes that are not an answer."""
    LOST = 4
    """Never answered: connection refused or closed, or no answer within the time-out."""


@dataclasses.dataclass(frozen=True)
class Samples:
    """One run of load. All times are seconds from the start of the schedule; all arrays have the shape `(n,)`.

    Attributes:
        scheduled: when the request was due.
        taken: when the generator woke up to send it. `taken - scheduled` is the generator's own delay.
        sent: when its bytes were written to a connection, NaN where they never were. Between `taken` and `sent` it
            waited for a connection.
        done: when the last byte of its answer arrived at this machine, NaN where none did; without receive timestamps
            of the kernel, when it was read.
        status: a `Status` each, uint8.
        warmup: number of requests at the start that warm up the server and are not judged.
        generator_cpu: CPU seconds of the generator per second of wall time: 1.0 is a core.
        canary_p99_s: how much longer than asked for short sleeps took, 99th percentile over time.
        steal: share of the time that the machine did not have: CPU time stolen by its hypervisor, or all tasks
            stalled on memory or disk (PSI).
        connections: the largest number that were open at once.
        starved: requests that waited because the bound on connections was reached.
        timeout_s: after this time from its schedule a request counts as lost.
        first_error: message of the first error; empty where there was none.
        error_kinds: how many requests after the warm-up ended in each kind of error: `mismatch` (an answer that is not
            the expected one), `status 500`, `not an answer`, `time-out`, `closed`, `refused`, ...
    """

    scheduled: NDArray[np.float64]
    taken: NDArray[np.float64]
    sent: NDArray[np.float64]
    done: NDArray[np.float64]
    status: NDArray[np.uint8]
    warmup: int = 0
    generator_cpu: float = 0.0
    canary_p99_s: float = 0.0
    steal: float = 0.0
    connections: int = 0
    starved: int = 0
    timeout_s: float = 5.0
    first_error: str = ""
    error_kinds: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.scheduled)

    def measured(self) -> Samples:
        """The samples without those of the warm-up."""
        if self.warmup == 0:
            return self
        cut = slice(self.warmup, None)
        return dataclasses.replace(
            self,
            scheduled=self.scheduled[cut],
            taken=self.taken[cut],
            sent=self.sent[cut],
            done=self.done[cut],
            status=self.status[cut],
            warmup=0,
        )

    def latencies(self) -> NDArray[np.float64]:
        """Seconds from the scheduled arrival to the last byte; infinite for all that did not end `OK`."""
        return np.where(self.status == Status.OK, self.done - self.scheduled, np.inf)

    def count(self, status: Status) -> int:
        """Number of requests that ended so."""
        return int(np.count_nonzero(self.status == status))


def joined(runs: Sequence[Samples]) -> Samples:
    """Several runs, one after the other, as one run without a warm-up.

    Of generator CPU, canary and steal the largest counts: quiet runs do not dilute a disturbance in one.
    """
    if len(runs) == 1:
        return runs[0].measured()
    parts, offset = [], 0.0
    for run in runs:
        part = run.measured()
        parts.append((part, offset - float(part.scheduled[0])))
        offset += float(part.scheduled[-1] - part.scheduled[0])
    each = [part for part, _ in parts]

    def shifted(name: str) -> NDArray[np.float64]:
        return np.concatenate([getattr(part, name) + by for part, by in parts])

    return Samples(
        scheduled=shifted("scheduled"),
        taken=shifted("taken"),
        sent=shifted("sent"),
        done=shifted("done"),
        status=np.concatenate([part.status for part in each]),
        generator_cpu=max(part.generator_cpu for part in each),
        canary_p99_s=max(part.canary_p99_s for part in each),
        steal=max(part.steal for part in each),
        connections=max(part.connections for part in each),
        starved=sum(part.starved for part in each),
        timeout_s=each[0].timeout_s,
        first_error=next((part.first_error for part in each if part.first_error), ""),
        error_kinds=sum((Counter(part.error_kinds) for part in each), Counter[str]()),
    )

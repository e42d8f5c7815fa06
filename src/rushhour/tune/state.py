"""The state of a candidate in the search."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from rushhour.errors import RushhourError, StorageError
from rushhour.measurement import Accuracy, Measurement
from rushhour.plan import Fate
from rushhour.tune.space import Candidate


@dataclasses.dataclass(frozen=True, eq=False)
class Sent:
    """What is sent to a candidate under load.

    Attributes:
        samples: input name -> array of shape `(n, *shape)`.
    """

    samples: Mapping[str, NDArray[Any]]

    @property
    def content_key(self) -> str:
        """Equal for equal samples only."""
        digest = hashlib.sha256()
        for name, array in sorted(self.samples.items()):
            digest.update(f"{name} {array.dtype} {array.shape} ".encode())
            digest.update(array.tobytes())
        return digest.hexdigest()


@dataclasses.dataclass
class CandidateState:
    """A candidate and what is known of it so far.

    Attributes:
        accuracy: on the validation part.
        predicted: capacity in requests per second, by simulation.
        bounds: batch bounds that its capacity was simulated with.
        throughput: answers in time per second, of a closed loop.
        capacity: requests per second, measured.
        p99_ms: at the proven capacity.
        speed: of the host beside its last load test, relative to when the first engine was timed.
        windows: of open-loop load, in the order measured in this process, also those answered from the journal.
        fate: None while it is in the search.
        why: in words.
        sent: under load; the bundle's own samples where it is None.
        is_judged: whether its accuracy was judged on both parts, unless it ended before.
        rule: why it is loaded although its prediction does not ask for it; empty where it does.
    """

    candidate: Candidate
    accuracy: Accuracy | None = None
    predicted: float | None = None
    bounds: tuple[int, ...] = ()
    throughput: float | None = None
    capacity: float | None = None
    p99_ms: float | None = None
    speed: float = 1.0
    windows: list[Measurement] = dataclasses.field(default_factory=list)
    fate: Fate | None = None
    why: str = ""
    rule: str = ""
    sent: Sent | None = None
    is_judged: bool = True

    def ahead_of(self, measured: CandidateState) -> float:
        """Its predicted capacity over that of one that was under load, or over its throughput where that is less."""
        known = min(measured.predicted_rps, measured.throughput or 0.0)
        return self.predicted_rps / known if known else math.inf

    @property
    def predicted_rps(self) -> float:
        """Its predicted capacity in requests per second; 0 where there is none yet, or none holds."""
        return self.predicted or 0.0

    def end(self, fate: Fate, why: str) -> None:
        """It leaves the search."""
        self.fate, self.why = fate, why


def failure_reason(error: Exception) -> str:
    """Why a candidate failed, in one line.

    Raises:
        StorageError: if the error is one: without a journal the search cannot continue.
    """
    if isinstance(error, StorageError):
        raise error
    return str(error) if isinstance(error, RushhourError) else " ".join(f"{type(error).__name__}: {error}".split())

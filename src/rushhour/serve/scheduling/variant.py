"""`Variant`: one thing that can answer the requests of a cell, while requests arrive."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rushhour.engines import Engine
from rushhour.measurement import BatchCost
from rushhour.serve.scheduling.admission import Admission, Profile
from rushhour.serve.scheduling.batcher import Part
from rushhour.serve.scheduling.job import Job
from rushhour.serve.scheduling.speed import expected_seconds
from rushhour.serve.scheduling.stream import Stream


class Variant:
    """An engine, and what is known of its batches. A cell has one, or several of which one is active.

    Args:
        engine: compiled and warm.
        profile: how long its batches take; updated by every batch.
        name: of the variant in the plan.
        cost: CPU time of its batches; None where no batch waits for more samples.
        max_batch: samples in one batch, at most; None is the engine's bound.
        is_sure: whether nothing else computed while its times were measured.

    Attributes:
        admission: predicts when a request would be answered by it.
        expected_s: seconds of a batch by its work, as before the first request: the host's speed is measured by that.
        free: its streams without a batch.
        samples: that it has computed.
        threads: of each stream: cores that one of its batches occupies.
        keeps: whether requests keep their tensors until they are answered: in a cascade others may need them.
    """

    __slots__ = (
        *("admission", "cost", "engine", "free", "is_sure", "keeps", "max_batch"),
        *("expected_s", "name", "profile", "samples", "threads"),
    )

    def __init__(
        self,
        engine: Engine,
        profile: Profile,
        *,
        name: str = "",
        cost: BatchCost | None = None,
        max_batch: int | None = None,
        is_sure: bool = True,
    ) -> None:
        self.name = name
        self.engine = engine
        self.threads = engine.config.threads
        self.is_sure = is_sure
        self.profile = profile
        self.cost = cost
        self.max_batch = min(max_batch or engine.config.max_batch, engine.config.max_batch)
        self.admission = Admission(profile, self.max_batch)
        self.expected_s = expected_seconds(profile.times)
        self.free: list[Stream] = []
        self.samples = 0
        self.keeps = False

    def bound(self, seconds: float) -> int:
        """Samples of its largest batch that takes no longer than so, one at least; admission predicts with them."""
        fits = self.max_batch if seconds == math.inf else max(1, self.profile.rows_within(seconds))
        self.admission.max_batch = min(self.max_batch, fits)
        return self.admission.max_batch

    def ended(self, stream: Stream, parts: Sequence[Part[Job]], now: float, since: float) -> None:
        """A batch has been computed: learn from its times.

        Args:
            stream: that it ran on.
            parts: of the batch.
            now: the time.
            since: requests that arrived earlier were predicted for another variant.
        """
        last = parts[-1]
        if len(parts) > 1 and last.first + last.rows < last.ticket.rows:
            last = parts[-2]  # the last request whose end is in this batch
        ticket = last.ticket
        comparable = ticket.arrived >= since and last.first + last.rows == ticket.rows
        self.profile.update(stream.work, now - stream.started)
        self.samples += stream.rows
        self.admission.record(stream.work, ticket.item.expected_s if comparable else 0.0, now - ticket.arrived)

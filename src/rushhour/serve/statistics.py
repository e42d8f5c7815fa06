"""Where the time goes, as the protocol's statistics extension counts it.

Counted once per batch, in the cell. A request's durations are those of the batch it was in: each of ten requests that
shared a batch of 3 ms has waited 3 ms for the engine, so ten are counted with 30 ms together, and `ns / count` is what
one request saw. A request that was split over several batches counts once, with the durations of all of them.

Source: triton-inference-server/server, docs/protocol/extension_statistics.md.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from rushhour.clock import Clock


class Duration:
    """How often something happened, and how long it took altogether."""

    __slots__ = ("count", "seconds")

    def __init__(self) -> None:
        self.count = 0
        self.seconds = 0.0

    def add(self, count: int, seconds: float) -> None:
        """It happened `count` times, and took `seconds` altogether."""
        self.count += count
        self.seconds += seconds

    def shown(self) -> dict[str, int]:
        """As the protocol says it."""
        return {"count": self.count, "ns": round(self.seconds * 1e9)}


class Batch(Protocol):
    """The times of a batch, in seconds of the statistics' clock.

    Attributes:
        rows: samples in it.
        taken: when it left the queue.
        started: when its inputs were written and the engine began.
        ended: when the engine was done.
    """

    rows: int
    taken: float
    started: float
    ended: float


class Statistics:
    """Of one version of a model, since it was loaded.

    Args:
        clock: on which all times are read.

    Attributes:
        success: requests answered, from arrival to answer.
        fail: requests answered with an error, from arrival to answer; those turned away at once among them.
        samples: computed by the engine.
        batches: run by the engine.
    """

    def __init__(self, clock: Clock) -> None:
        self.success = Duration()
        self.fail = Duration()
        self.samples = 0
        self.batches = 0
        self._clock = clock
        self._queue = Duration()
        self._stages = _Stages()
        self._of_size: dict[int, _Stages] = {}
        self._last: float | None = None

    def count(self, batch: Batch, requests: int, begun: Sequence[float], answered: Sequence[float]) -> None:
        """A batch has been computed and answered, just now.

        Args:
            batch: its times.
            requests: of which some or all samples were in it.
            begun: arrivals of the requests whose first samples were in it.
            answered: arrivals of the requests that it brought the last missing samples for.
        """
        now = self._clock.now()
        self.batches += 1
        self.samples += batch.rows
        self._last = batch.taken
        self._queue.add(len(begun), len(begun) * batch.taken - sum(begun))
        self.success.add(len(answered), len(answered) * now - sum(answered))
        self._stages.add(len(begun), requests, batch, now)
        of_size = self._of_size.get(batch.rows)
        if of_size is None:
            of_size = self._of_size[batch.rows] = _Stages()
        of_size.add(1, 1, batch, now)

    def shown(self, name: str, version: str) -> dict[str, Any]:
        """As the protocol says it: an entry of `model_stats`."""
        last = 0.0 if self._last is None else time.time() - (self._clock.now() - self._last)
        durations = {"success": self.success, "fail": self.fail, "queue": self._queue, **dict(self._stages.named())}
        never = Duration()
        return {
            "name": name,
            "version": version,
            "last_inference": round(last * 1e3),
            "inference_count": self.samples,
            "execution_count": self.batches,
            "inference_stats": {
                stage: duration.shown()
                for stage, duration in {**durations, "cache_hit": never, "cache_miss": never}.items()
            },
            "batch_stats": [
                {"batch_size": rows, **{stage: duration.shown() for stage, duration in stages.named()}}
                for rows, stages in sorted(self._of_size.items())
            ],
        }


class _Stages:
    """The three stages of a batch on its stream."""

    __slots__ = ("computing", "filling", "replying")

    def __init__(self) -> None:
        self.filling = Duration()
        self.computing = Duration()
        self.replying = Duration()

    def add(self, count: int, times: int, batch: Batch, now: float) -> None:
        """Count a batch's durations, each as often as it was waited for."""
        self.filling.add(count, times * (batch.started - batch.taken))
        self.computing.add(count, times * (batch.ended - batch.started))
        self.replying.add(count, times * (now - batch.ended))

    def named(self) -> Iterator[tuple[str, Duration]]:
        yield "compute_input", self.filling
        yield "compute_infer", self.computing
        yield "compute_output", self.replying

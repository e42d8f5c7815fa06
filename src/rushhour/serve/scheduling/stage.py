"""`Stage`: what answers the requests of a model, as the protocols and the repository see it.

A `Cell` is one: engines behind a batcher. Others are made of stages, and look the same from outside.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from rushhour.plan import Policy
from rushhour.serve.observability.statistics import Batch, ModelState, Totals
from rushhour.serve.scheduling.admission import Profile
from rushhour.serve.scheduling.decoding import Decoder
from rushhour.serve.scheduling.job import Job, Reply, Shed
from rushhour.serve.scheduling.speed import Speeds
from rushhour.serve.scheduling.tabulating import Tabulator
from rushhour.serve.scheduling.tokenising import Tokeniser
from rushhour.wire import Codec, InferRequest, Layout


class Stage(Protocol):
    """Answers requests. Everything is called on the event loop's thread."""

    @property
    def codec(self) -> Codec:
        """Of the model: its name, its version and its signature. Another object after a reload."""
        ...

    @property
    def policy(self) -> Policy:
        """Of the plan: the bound of the queue, and the deadline."""
        ...

    @property
    def profile(self) -> Profile:
        """How long the batches take that requests join now."""
        ...

    @property
    def decoder(self) -> Decoder | Tabulator | Tokeniser | None:
        """Of encoded pictures, of texts, or of rows; None where the codec takes none."""
        ...

    @property
    def answering(self) -> Batch | None:
        """The batch whose requests are being answered, during a call of a `Reply`."""
        ...

    @property
    def idle(self) -> bool:
        """Whether nothing waits, nothing runs, and no answer is being written."""
        ...

    @property
    def waiting(self) -> int:
        """Samples in the queue."""
        ...

    @property
    def running(self) -> tuple[int, int]:
        """Batches in flight, and their samples."""
        ...

    @property
    def batches(self) -> int:
        """Batches that have begun until now."""
        ...

    @property
    def longest_batch_s(self) -> float:
        """Seconds that the largest batch takes."""
        ...

    @property
    def waits_for(self) -> tuple[int, float]:
        """Samples that a batch waits for under light load, and seconds, at most, where the plan has a deadline."""
        ...

    @property
    def progress(self) -> tuple[int, ...]:
        """Changes whenever a request or a batch begins or ends; if it does not change for long, the engine is stuck."""
        ...

    @property
    def speed(self) -> float | None:
        """The host's speed over the last ten seconds of work, relative to the profile; None before the first batch."""
        ...

    def speeds(self) -> Speeds:
        """The expected and the measured times of the batches of the last minutes."""
        ...

    def totals(self) -> Totals:
        """The counters up to now. Not a copy."""
        ...

    def describe(self, state: ModelState) -> None:
        """Write what is known of this stage into the state of its model."""
        ...

    def shown(self) -> Mapping[str, Any]:
        """What `/config` shows of this stage beside its policy and its engine."""
        ...

    def submit(self, request: InferRequest, reply: Reply) -> Job | Shed:
        """Queue a request, or shed it. `reply` is called later, never from within this call."""
        ...

    def shed_early(self, layout: Layout | InferRequest | None) -> Shed | None:
        """Shed a request before its tensors are read, if `submit` would shed it now.

        Args:
            layout: of its header; None where that is not known, and a single sample is assumed.
        """
        ...

    def refuse(self, status: int, seconds: float) -> None:
        """Count a request that was answered with an error outside the stage, `seconds` after its arrival."""
        ...

    def written(self, request: InferRequest, status: int | None) -> None:
        """The answer to a request whose reply returned `LATER` is written, or an error of this status instead."""
        ...

    def cancel(self, job: Job) -> None:
        """The client has disconnected: drop what waits, and the answer to what runs."""
        ...

    def distrust(self) -> None:
        """The profiles may be wrong: they were measured while something else computed."""
        ...

    def abandon(self, error: Exception) -> None:
        """Answer all requests in the stage with `error`: the engine does not finish its batches."""
        ...

    def close(self) -> None:
        """Stop what the stage does beside requests: threads that decode, a controller."""
        ...

"""The time of a training on this machine: measured once, and kept in the journal."""

from __future__ import annotations

from typing import Any

from rushhour.data import Dataset
from rushhour.measurement import ServiceTimes
from rushhour.progress import Progress
from rushhour.records.journal import Journal
from rushhour.train import TrainingJob, fingerprint_of, step_seconds


def epoch_seconds(journal: Journal, dataset: Dataset, job: TrainingJob, progress: Progress) -> float:
    """The seconds of one pass over the training part, from the time of a few steps.

    Raises:
        RushhourError: as `train`.
    """
    batch = job.settings.batch
    steps = max(1, len(dataset.train) // batch)

    def take(facts: dict[str, Any]) -> ServiceTimes:
        progress.start("Timing a few steps of training")
        seconds = step_seconds(dataset, job)
        progress.done(f"{steps * seconds:,.0f} s for one pass over the data")
        return ServiceTimes((batch,), (seconds,), (batch / seconds,))

    facts = fingerprint_of(dataset, job).facts
    taken = journal.measure("training step", job.source.factory, f"batch {batch}", ServiceTimes, take, facts=facts)
    return steps * taken.seconds[0]

"""The time of a training on this machine: measured once, and kept in the journal."""

from __future__ import annotations

import math
from typing import Any, Final

from rushhour.data import Dataset
from rushhour.measurement import ServiceTimes
from rushhour.progress import Progress
from rushhour.records import identity
from rushhour.records.journal import Journal
from rushhour.train import TrainingJob, fingerprint_of, step_seconds
from rushhour.tune.priors import Experience

_WEAK: Final = 0.5
"""Weight of earlier runs beside the few steps of this one."""
_LENGTH: Final = ("epochs", "lr", "seed", "schedule", "warmup", "patience", "weights", "fingerprint", "samples")
"""Facts of a training that do not change the time of a step."""


def epoch_seconds(
    journal: Journal,
    dataset: Dataset,
    job: TrainingJob,
    progress: Progress,
    *,
    experience: Experience,
) -> float:
    """The seconds of one pass over the training part, from the time of a few steps.

    Args:
        journal: of the run.
        dataset: trained on.
        job: the training.
        progress: receives the result.
        experience: earlier runs weigh less than the steps that are taken now; it receives what these took.

    Raises:
        RushhourError: as `train`.
    """
    batch = min(job.settings.batch, len(dataset.train))
    steps = max(1, len(dataset.train) // batch)

    def take(facts: dict[str, Any]) -> ServiceTimes:
        progress.start("Timing a few steps of training")
        seconds = step_seconds(dataset, job)
        progress.done(f"{steps * seconds:,.0f} s for one pass over the data")
        return ServiceTimes((batch,), (seconds,), (batch / seconds,))

    facts = {name: fact for name, fact in fingerprint_of(dataset, job).facts.items() if name not in _LENGTH}
    taken = journal.measure("training step", job.source.factory, f"batch {batch}", ServiceTimes, take, facts=facts)
    (seconds,), name = taken.seconds, f"step/{identity.key(facts=facts)[:16]}"
    experience.learnt[name] = seconds
    earlier = experience.priors.values.get(name, seconds)
    if earlier > 0:
        seconds = math.exp((math.log(seconds) + _WEAK * math.log(earlier)) / (1 + _WEAK))
    return steps * seconds

"""What a training is given: the network, the settings, and how and where it runs."""

from __future__ import annotations

from pathlib import Path

import msgspec

from rushhour.bundle import Bundle, Source
from rushhour.train.parallel import ParallelSettings
from rushhour.train.settings import TrainSettings
from rushhour.train.tracking import Tracking


class TrainingJob(msgspec.Struct, frozen=True):
    """What `train`, `trained_weights` and `step_seconds` have in common. It can be pickled for worker processes.

    Attributes:
        source: the network.
        settings: how it is trained.
        work: folder of the checkpoints of this training.
        trusted: factories that may be imported besides those of `rushhour.models`.
        checkpoint_every_s: seconds between checkpoints inside an epoch, 0 for one after every step; more where writing
            one takes long. There is always one at the end of an epoch.
        tracking: where curves are kept; None: nowhere.
        workers: processes that share every batch; under torchrun, its number counts. The order of the data and the
            checkpoint are the same for any number, so a training may be resumed with another.
        parallel: how the workers share it. With compressed gradients, relaxed workers or local batch normalisation it
            is another training, which can be resumed with the same number of workers only.
        initial: the bundle of this network whose weights the training begins with, and whose input and lineage its
            result has; None for fresh weights.
        calibrate: whether the bundle's probabilities are calibrated on the validation part; see
            `rushhour.train.temperature`. It changes no weight.
    """

    source: Source
    settings: TrainSettings
    work: Path
    trusted: tuple[str, ...] = ()
    checkpoint_every_s: float = 15.0
    tracking: Tracking | None = None
    workers: int = 1
    parallel: ParallelSettings = ParallelSettings()
    initial: Path | None = None
    calibrate: bool = False

    @property
    def model(self) -> str:
        """The short name of the network, for messages."""
        if self.initial is not None:
            return Bundle.open(self.initial).manifest.name
        return self.source.factory.rpartition(":")[2]

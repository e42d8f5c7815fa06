"""Whether a network takes pictures of a shape and answers as a task needs, before any pictures are read."""

from __future__ import annotations

import numpy as np
import torch

from rushhour.bundle import Preprocessing, Source
from rushhour.models.deployed import Deployed
from rushhour.models.source import build
from rushhour.task import Task


def check_fits(source: Source, task: Task, picture: tuple[int, ...], model: str, trusted: tuple[str, ...] = ()) -> None:
    """Raise unless the network takes pictures and gives as many numbers as the task has.

    Args:
        source: the network; it is built for this alone.
        task: what its answers are for.
        picture: height, width, channels of a picture in uint8.
        model: its name, for messages.
        trusted: as for `build`.

    Raises:
        ModelError: if it cannot be built, or does not take such pictures.
        TaskError: if its answers do not fit.
    """
    with torch.random.fork_rng(devices=[]):
        deployed = Deployed(build(source, trusted), task, Preprocessing(1 / 255, layout="NHWC->NCHW"))
        task.check_output(deployed.answer_shape(np.zeros((2, *picture), np.uint8), model), model, picture)

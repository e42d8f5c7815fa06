"""Small data sets for the networks of the gallery."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rushhour.bundle import Preprocessing
from rushhour.data.dataset import Dataset, Split
from rushhour.task import Task

CLASSES = 4
Data = Literal["pictures", "series", "signals", "volumes", "rows", "values", "pairs"]
"""uint8 `(12, 12, 3)`; float32 `(6, 8)`, `(3, 16)`, `(1, 4, 6, 6)` and `(10,)`, each in 4 classes; rows with a value to
regress; and two inputs."""


def data(kind: Data, n: int = 96) -> Dataset:
    """Noise with a weak signal of the class, three quarters of it for training."""
    random = np.random.default_rng(0)
    labels = np.arange(n) % CLASSES
    shapes: dict[Data, tuple[int, ...]] = {
        "series": (6, 8), "signals": (3, 16), "volumes": (1, 4, 6, 6), "rows": (10,), "values": (10,), "pairs": (6,),
    }  # fmt: skip
    inputs: NDArray[Any]
    targets: NDArray[Any] = labels
    task, preprocessing = Task.classification(tuple("abcd")), Preprocessing()
    if kind == "pictures":
        inputs = random.integers(0, 128, (n, 12, 12, 3), dtype=np.uint8)
        for picture, label in zip(inputs, labels, strict=True):
            picture[label * 3 : label * 3 + 3, :, label % 3] += 100
        preprocessing = Preprocessing(1 / 255, (0.3, 0.3, 0.3), (0.2, 0.2, 0.2), "NHWC->NCHW")
    else:
        inputs = random.normal(size=(n, *shapes[kind])).astype(np.float32)
        inputs += labels.reshape(-1, *([1] * (inputs.ndim - 1))) / 2
    if kind == "values":
        task, targets = Task("regression"), inputs[:, :1] * 2
    if kind == "pairs":
        inputs = np.rec.fromarrays([inputs[:, :3], inputs[:, 3:]], dtype=[("left", "f4", (3,)), ("right", "f4", (3,))])
    train, validation, test = (
        Split(inputs[at], targets[at]) for at in np.split(np.arange(n), [n * 3 // 4, n * 7 // 8])
    )
    return Dataset(kind, task, train, validation, test, preprocessing, f"gallery-{kind}-{n}")

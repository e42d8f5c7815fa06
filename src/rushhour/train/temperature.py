"""Calibration: the one number that a classifier's logits are divided by, so that its probabilities can be believed.

Temperature scaling (Guo et al., On Calibration of Modern Neural Networks, ICML 2017). It changes no answer's class.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from rushhour.cascade import fit_temperature, relative_logits
from rushhour.data.dataset import Dataset, Split
from rushhour.errors import DataError, TaskError
from rushhour.models import Deployed, tensors_of
from rushhour.records.classified import Calibration, Classified

_FEWEST: Final = 50
"""Labelled samples of the validation part that one number is fitted to, at least."""
_LARGEST: Final = 20.0
"""The temperature is from 1 over this to this: where every answer is right, the likeliest is 0."""


def check_calibration(dataset: Dataset) -> None:
    """Raise unless a classifier of these data can be calibrated.

    Raises:
        TaskError: if the task is no classification of one label.
        DataError: if the validation part has too few samples.
    """
    if dataset.task.kind != "classification":
        raise TaskError(
            f"cannot calibrate a model for {dataset.task.kind}",
            "a temperature is of probabilities of which one class is right",
            "leave out --calibrate",
        )
    if len(dataset.validation) < _FEWEST:
        raise DataError(
            f"cannot calibrate on {len(dataset.validation)} validation samples of {dataset.name}",
            f"at least {_FEWEST} are needed",
            "give more data, or leave out --calibrate",
        )


def calibration_of(deployed: Deployed, dataset: Dataset, batch: int) -> Calibration:
    """The temperature that fits the validation part, and what it changes there.

    Each half of the part is judged with the temperature of the other half, so that no sample is judged by what was
    fitted to it.

    Args:
        deployed: settled; it is left in evaluation mode.
        dataset: of `check_calibration`.
        batch: samples at once.
    """
    logits, labels = _logits(deployed, dataset.validation, batch), np.asarray(dataset.validation.targets)
    before = _probabilities(logits, 1.0)
    after = np.empty_like(before)
    half = np.arange(len(labels)) % 2 == 0
    for own in (half, ~half):
        after[own] = _probabilities(logits[own], _temperature(logits[~own], labels[~own]))
    classes = dataset.task.classes
    return Calibration(
        _temperature(logits, labels),
        Classified.of(before, labels, classes),
        Classified.of(after, labels, classes),
    )


def _temperature(logits: NDArray[Any], labels: NDArray[Any]) -> float:
    return min(max(fit_temperature(logits, labels, logits=True), 1 / _LARGEST), _LARGEST)


def _logits(deployed: Deployed, split: Split, batch: int) -> NDArray[np.float32]:
    deployed.eval()
    with torch.no_grad():
        parts = [
            deployed.logits(*tensors_of(split.inputs[at : at + batch])).float().numpy()
            for at in range(0, len(split), batch)
        ]
    return np.concatenate(parts)


def _probabilities(logits: NDArray[Any], temperature: float) -> NDArray[np.float64]:
    powers = np.exp(relative_logits(logits, logits=True) / temperature)
    shares: NDArray[np.float64] = powers / powers.sum(axis=1, keepdims=True)
    return shares

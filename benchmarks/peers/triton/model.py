"""Triton's Python backend: the requests of one dynamic batch, run by OpenVINO together, or one after the other."""

from __future__ import annotations

import os
import sys
from typing import Any

# Triton's Python does not read PYTHONPATH, and would take the packages of whatever Python it was linked with.
sys.path.insert(0, os.environ["BENCH_PACKAGES"])
sys.path.insert(0, os.environ["PYTHONPATH"])

import numpy as np
import triton_python_backend_utils as pb_utils
from bench_model import CLASSES, MAX_BATCH, SHAPE, WAY, Model


class TritonPythonModel:
    """3 KB of pixels in, 10 floats out."""

    def initialize(self, args: dict[str, str]) -> None:
        """In the instance's process."""
        self.noop = args["model_name"] == "noop"
        self.model = Model()
        self.batch = np.zeros((MAX_BATCH, *SHAPE), np.uint8)
        self.zeros = np.zeros((MAX_BATCH, CLASSES), np.float32)

    def execute(self, requests: list[Any]) -> list[Any]:
        """One batch."""
        if self.noop:
            return [_response(self.zeros[:1]) for _ in requests]
        if WAY == "examples":
            return [_response(self.model.infer(_image(request))) for request in requests]
        at = 0
        for request in requests:
            image = _image(request)
            self.batch[at : at + len(image)] = image
            at += len(image)
        answers = self.model.infer(self.batch[:at])
        return [_response(answers[row : row + 1]) for row in range(at)]


def _image(request: Any) -> np.ndarray:
    image: np.ndarray = pb_utils.get_input_tensor_by_name(request, "image").as_numpy()
    return image


def _response(answer: np.ndarray) -> Any:
    return pb_utils.InferenceResponse([pb_utils.Tensor("probabilities", answer)])

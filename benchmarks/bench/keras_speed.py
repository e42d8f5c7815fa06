"""Are networks that came from Keras as fast as the same networks written in torch?"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import rushhour
from bench.keras_models import CLASSES
from bench.record import Check, judged
from rushhour.bundle import Bundle, Preprocessing, TensorSpec
from rushhour.models import article, export
from rushhour.system.telemetry import disable_telemetry
from rushhour.task import Task

_TARGET = "<= 1.05"
_OPTIONS = {"INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": 1}


class _Block(nn.Module):
    """An inverted residual of MobileNetV2."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        inner = 4 * inputs
        self.body = nn.Sequential(
            *_convolution(inputs, inner, 1),
            *_convolution(inner, inner, 3, stride, groups=inner),
            *(nn.Conv2d(inner, outputs, 1, bias=False), nn.BatchNorm2d(outputs)),
        )
        self.is_residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """`(n, inputs, h, w)` -> `(n, outputs, h / stride, w / stride)`."""
        y: Tensor = self.body(x)
        return x + y if self.is_residual else y


def _convolution(inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    uneven = [nn.ZeroPad2d((0, 1, 0, 1))] if stride == 2 else []  # as Keras pads, which is not what torch does
    padding = 0 if uneven else size // 2
    convolution = nn.Conv2d(inputs, outputs, size, stride, padding, groups=groups, bias=False)
    return [*uneven, convolution, nn.BatchNorm2d(outputs), nn.ReLU6()]


def mobilenet() -> nn.Module:
    """`bench.keras_models.mobilenet` as it is written in torch."""
    blocks, inputs = [], 16
    for outputs, stride in ((16, 1), (24, 2), (24, 1), (32, 2), (32, 1)):
        blocks.append(_Block(inputs, outputs, stride))
        inputs = outputs
    head = [*_convolution(inputs, 128, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, CLASSES)]
    return nn.Sequential(*_convolution(3, 16, 3, 2), *blocks, *head)


def speed(folder: Path, side: int, rounds: int, seconds: float, batch: int = 8) -> tuple[list[Check], dict[str, Any]]:
    """The time of a batch in each round, of the import as a share of that of the torch network.

    Args:
        folder: with `article.keras` and `mobilenet.keras`; gets the bundles.
        side: of the pictures.
        rounds: blocks of each, in alternating order.
        seconds: of a block.
        batch: samples.
    """
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    pictures = random.integers(0, 256, (400, side, side, 3), dtype=np.uint8)
    labels = np.arange(400) % CLASSES
    written: dict[str, tuple[nn.Module, Preprocessing]] = {
        "article": (article(side, 3, CLASSES, width=0.5, dense=128), Preprocessing(1 / 255, layout="NHWC->NCHW")),
        "mobilenet": (
            mobilenet(),
            Preprocessing(1 / 127.5, (1.0,) * 3, (1.0,) * 3, "NHWC->NCHW"),
        ),
    }
    checks, measured = [], {}
    for name, (network, preprocessing) in written.items():
        scale = 1 / 255 if name == "article" else None
        imported = rushhour.import_model(
            folder / f"{name}.keras", data=(pictures, labels), out=folder / f"{name}-import", scale=scale, force=True
        ).bundle
        own = export(
            network.eval(), name=name, task=Task.classification(tuple(map(str, range(CLASSES)))),
            sample_spec=TensorSpec("image", "uint8", (side, side, 3)), preprocessing=preprocessing, source=None,
            lineage=(), samples=pictures[:16], path=folder / f"{name}-torch",
        )  # fmt: skip
        times = _in_turn((imported, own), pictures[:batch], rounds, seconds)
        ratios = [first / second for first, second in zip(*times, strict=True)]
        what = f"time of a batch of {batch}, {name} from Keras against the same in torch, OpenVINO, one thread"
        checks.append(judged(f"3.{name}", what, _TARGET, ratios))
        measured[name] = {"keras_s": times[0], "torch_s": times[1]}
    return checks, measured


def _in_turn(bundles: Sequence[Bundle], batch: NDArray[Any], rounds: int, seconds: float) -> list[list[float]]:
    """The median time of a batch, for each bundle and round."""
    disable_telemetry()
    import openvino

    requests = []
    for bundle in bundles:
        compiled = openvino.Core().compile_model(str(bundle.model), "CPU", _OPTIONS)
        requests.append(compiled.create_infer_request())
        _median(requests[-1], batch, seconds)
    found: list[list[float]] = [[] for _ in bundles]
    for number in range(rounds):
        for at in range(len(bundles))[:: 1 if number % 2 == 0 else -1]:
            found[at].append(_median(requests[at], batch, seconds))
    return found


def _median(request: Any, batch: NDArray[Any], seconds: float) -> float:
    times: list[float] = []
    until = time.perf_counter() + seconds
    while not times or time.perf_counter() < until:
        began = time.perf_counter()
        request.infer([batch])
        times.append(time.perf_counter() - began)
    return float(np.median(times))

"""Line 3 of `make bench-fields`: networks for places in a picture, trained here, answer alike on all engines.

The pictures are made: bright discs and squares on noise. What they show is the way from torch to an answer, not how
good the networks are.
"""

from __future__ import annotations

import base64
import io
import json
import shutil
import urllib.request
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
from bench.parts import Part, say
from bench.record import Check, Table, verdict
from numpy.typing import NDArray
from PIL import Image

import rushhour
from rushhour.bundle import Bundle
from rushhour.compress.judge import outputs_of
from rushhour.data.dataset import Split
from rushhour.engines import EngineConfig
from rushhour.plan import EngineName
from rushhour.task import overlaps

SIDES = 48, 64
MOST = 3
"""Objects in a picture."""
SAME = 0.6
"""Boxes of one class that overlap by more are one object, found twice."""
_ROUNDING = 1e-3
"""Of an overlap that the graph computes in float32."""
POINTS = "<= 0.1"
LEAST = 0.5
"""Of the metric: below, a network has not learnt what it is for."""
ENGINES: tuple[EngineName, ...] = ("openvino", "onnxruntime")
LARGER = 3, 2
"""How many times as wide and as high the pictures are that are sent."""
_COLUMNS = ("task", "network", "metric", "torch", *ENGINES, "test pictures")


class Scale(msgspec.Struct, frozen=True):
    """How much is trained and tested."""

    train: int = 600
    test: int = 300
    map_epochs: int = 4
    box_epochs: int = 12
    sent: int = 100


def scenes(n: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.float32]]:
    """Pictures `(n, 48, 64, 3)` of discs and squares, their class maps (0 is the ground), and their boxes."""
    draw, (height, width) = np.random.default_rng(seed), SIDES
    pictures = draw.integers(0, 60, (n, height, width, 3)).astype(np.uint8)
    maps, boxes = np.zeros((n, height, width), np.uint8), np.zeros((n, MOST, 5), np.float32)
    boxes[..., 4] = -1
    down, across = np.mgrid[:height, :width]
    for row in range(n):
        for number in range(int(draw.integers(1, MOST + 1))):
            kind, r = int(draw.integers(0, 2)), int(draw.integers(5, 9))
            y, x = int(draw.integers(r, height - r)), int(draw.integers(r, width - r))
            where = np.maximum(abs(down - y), abs(across - x)) <= r
            if kind == 0:
                where &= (down - y) ** 2 + (across - x) ** 2 <= r * r
            pictures[row][where] = draw.integers(140, 255, 3)
            maps[row][where] = 1 + kind
            boxes[row, number] = x - r, y - r, x + r + 1, y + r + 1, kind
    return pictures, maps, boxes


def places_part(work: Path, scale: Scale) -> Part:
    """Train a network of each kind, and compare what its compiled graph answers with what torch answers.

    Args:
        work: where the bundles are made.
        scale: of data and training.
    """
    shutil.rmtree(work, ignore_errors=True)
    pictures, maps, boxes = scenes(scale.train, seed=0)
    held, held_maps, held_boxes = scenes(scale.test, seed=1)
    say("training unet and detector")
    segmenter, finder = (
        rushhour.train(
            network,
            (pictures, targets),
            out=work / network,
            task=task,
            epochs=epochs,
            batch=16,
            lr=5e-3,
            augment="flip",
        ).bundle
        for network, task, targets, epochs in (
            ("unet", "segmentation", maps, scale.map_epochs),
            ("detector", "detection", boxes, scale.box_epochs),
        )
    )
    mapped, found = answers(segmenter, held), answers(finder, held)
    checks = (
        agreement("3.segmentation", segmenter, mapped, held_maps),
        agreement("3.detection", finder, found, held_boxes),
        suppression(finder, found),
        original_pixels(finder, found["torch"], held, held_boxes, scale.sent),
    )
    rows: tuple[tuple[str | float | None, ...], ...] = tuple(
        (bundle.manifest.task.kind, name, bundle.manifest.task.metric,
         *(bundle.manifest.task.evaluate(given[engine], targets)[0] for engine in ("torch", *ENGINES)), len(held))
        for bundle, name, given, targets in (
            (segmenter, "unet", mapped, held_maps), (finder, "detector", found, held_boxes),
        )
    )  # fmt: skip
    note = f"{scale.train} made pictures of discs and squares, {SIDES[1]} x {SIDES[0]} pixels."
    return Part(checks, (Table("Networks for places, compiled", _COLUMNS, rows, note),), msgspec.to_builtins(scale))


def answers(bundle: Bundle, pictures: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
    """Of torch and of each engine, in float32."""
    split = Split(pictures, np.zeros(len(pictures)))
    engines: tuple[EngineName, ...] = ("torch", *ENGINES)
    return {engine: outputs_of(bundle, EngineConfig(engine, "f32", max_batch=8), split) for engine in engines}


def agreement(id: str, bundle: Bundle, given: dict[str, NDArray[Any]], targets: NDArray[Any]) -> Check:
    """The largest difference between an engine's metric and torch's, in points; torch has learnt something."""
    task = bundle.manifest.task
    values = {engine: task.evaluate(answer, targets)[0] for engine, answer in given.items()}
    worst = max(abs(values[engine] - values["torch"]) * 100 for engine in ENGINES)
    learnt = values["torch"] > LEAST
    what = (
        f"{task.kind}: difference between {task.metric} of the graph on OpenVINO or ONNX Runtime, whichever is larger, "
        f"and {task.metric} in torch"
    )
    check = verdict(id, what, POINTS, worst, None, len(targets), unit="points")
    if not learnt:
        why = f"torch has {task.metric} {values['torch']:.3f}: of an untrained network the difference says nothing"
        check = msgspec.structs.replace(check, holds=False, why=why)
    return check


def suppression(bundle: Bundle, given: dict[str, NDArray[Any]]) -> Check:
    """Boxes that should have been dropped and are in an engine's answer, where the graph drops by itself."""
    twice = sum(pairs(answer) for engine in ENGINES for answer in given[engine])
    operators = {node.op_type for node in onnx.load(bundle.model).graph.node}
    inside = {"MaxPool", "TopK"} <= operators
    what = f"detection: pairs of boxes of one class that overlap by more than {SAME:g}, of either engine"
    check = verdict("3.suppression", what, "<= 0", twice, None, len(given["torch"]), unit="pairs")
    return check if inside else msgspec.structs.replace(check, holds=False, why="the graph does not suppress them")


def pairs(boxes: NDArray[Any]) -> int:
    """Of one answer, those of a class that overlap by more than `SAME`."""
    boxes = boxes[boxes[:, 4] > 0]
    double = (overlaps(boxes, boxes) > SAME + _ROUNDING) & (boxes[:, None, 5] == boxes[None, :, 5])
    return int(np.triu(double, 1).sum())


def original_pixels(
    bundle: Bundle, expected: NDArray[Any], pictures: NDArray[np.uint8], boxes: NDArray[np.float32], sent: int
) -> Check:
    """What AP50 loses where larger pictures are sent as PNG, and answers are compared in their pixels."""
    across, down = LARGER
    grown = boxes[:sent] * np.array([across, down, across, down, 1], np.float32)
    most = expected.shape[1]
    with rushhour.serve(bundle.path, http_port=0, grpc_port=None) as server:
        served = np.stack([asked(server, picture, most) for picture in pictures[:sent]])
    task = bundle.manifest.task
    before, after = task.evaluate(expected[:sent], boxes[:sent])[0], task.evaluate(served, grown)[0]
    lost = (before - after) * 100
    what = (
        f"detection: points of AP50 that are lost where pictures {across} times as wide and {down} times as high are "
        "sent as PNG, and boxes are compared in their pixels"
    )
    return verdict("3.pixels", what, "<= 1", lost, None, sent, unit="points")


def asked(server: Any, picture: NDArray[np.uint8], most: int) -> NDArray[np.float32]:
    """The boxes that a server finds in the enlarged picture, in as many rows as a tensor's answer has."""
    across, down = LARGER
    file = io.BytesIO()
    large = Image.fromarray(picture).resize((SIDES[1] * across, SIDES[0] * down), Image.Resampling.NEAREST)
    large.save(file, "PNG")
    data = [base64.b64encode(file.getvalue()).decode()]
    body = {"inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "data": data}]}
    request = urllib.request.Request(f"{server.url}/v2/models/{server.model}/infer", json.dumps(body).encode())
    with urllib.request.urlopen(request) as response:
        (output,) = json.load(response)["outputs"]
    found = np.array(output["data"], np.float32).reshape(-1, 6)
    assert len(found) == most
    return found

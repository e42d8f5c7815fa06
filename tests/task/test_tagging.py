"""Tagging, a class for each token: the metric, the loss, the data, and the whole way from arrays to a client."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn import functional

import rushhour
from rushhour.compress.judge import outputs_of
from rushhour.data import Split
from rushhour.data.arrays import from_arrays
from rushhour.engines import EngineConfig
from rushhour.errors import DataError, ModelError, TaskError
from rushhour.models import source_for, tagger
from rushhour.task import PADDING, Tagging, Task
from rushhour.testing.kinds import check_kind
from rushhour.train.loss import imitation_for, loss_for

NAMES = ("O", "PERSON", "PLACE")


def sentences(n: int, seed: int = 0, length: int = 12) -> tuple[NDArray[np.int64], NDArray[np.str_]]:
    """Ids of words, 0 behind the end. A person follows a title, 1, and the two words after `in`, 2, are a place."""
    draw = np.random.default_rng(seed)
    x, y = draw.integers(3, 40, (n, length)), np.full((n, length), "O", dtype="U6")
    for row in range(n):
        end = int(draw.integers(6, length + 1))
        at = draw.permutation(end - 2)[:2]
        for place, (word, label, count) in zip(sorted(at), ((1, "PERSON", 1), (2, "PLACE", 2)), strict=True):
            x[row, place] = word
            y[row, place] = "O"
            y[row, place + 1 : place + 1 + count] = label
        for place in np.flatnonzero(x[row] < 3):  # a later word may have fallen into an earlier name
            y[row, place] = "O"
        x[row, end:], y[row, end:] = 0, ""
    return x, y


def test_the_kind_keeps_the_promises_of_the_seam() -> None:
    draw = np.random.default_rng(0)
    targets = draw.integers(-1, 3, (40, 9))
    answers = np.where(draw.random((40, 9)) < 0.7, np.maximum(targets, 0), 2).astype(np.uint8)
    for classes in ((), NAMES):
        check_kind(Tagging(3, classes), answers, targets)


def test_f1_is_of_all_but_outside_and_padding_does_not_count() -> None:
    targets = np.array([[0, 1, 1, 2, PADDING], [0, 0, 0, 2, PADDING]])
    answers = np.array([[0, 1, 0, 1, 1], [0, 2, 0, 2, 2]], np.uint8)
    names, plain = Tagging(3, NAMES), Tagging(3)
    assert (names.metric, plain.metric) == ("f1", "accuracy")
    assert names.reduce(names.statistics(answers, targets)) == pytest.approx(2 * 2 / (2 * 2 + 2 + 2))
    assert plain.reduce(plain.statistics(answers, targets)) == pytest.approx(5 / 8)
    value, interval = Task("tagging", NAMES, 3).evaluate(answers, targets)
    assert interval[0] <= value <= interval[1]
    assert "run from 0 to 3" in names.why_wrong(np.array([[0, 3]]))
    assert names.why_wrong(np.full((2, 2), PADDING))


def test_losses_are_of_tokens_that_count() -> None:
    torch.manual_seed(0)
    task, logits = Task("tagging", NAMES, 3), torch.randn(2, 4, 3)
    targets = torch.tensor([[0, 1, PADDING, PADDING], [PADDING] * 4])
    found = loss_for(task, "none")(logits, targets)
    assert found[0] == pytest.approx(float(functional.cross_entropy(logits[0, :2], targets[0, :2])))
    assert found[1] == 0
    assert imitation_for(task, 2.0)(logits, logits) == pytest.approx(0, abs=1e-6)
    assert imitation_for(task, 2.0)(logits, -logits) > 0.1


def test_labels_are_read_by_name_or_number() -> None:
    x, y = sentences(200)
    data = from_arrays({"x": x, "y": y}, name="n", seed=0, kind="tagging")
    assert data.task == Task("tagging", NAMES, 3)
    assert (data.train.inputs.dtype, data.train.targets.dtype) == (np.int64, np.int64)
    numbers = np.select([y == "", y == "O", y == "PERSON"], [-100, 0, 1], 2)
    other = from_arrays({"x": x, "y": numbers}, name="n", seed=0, kind="tagging", classes=NAMES)
    assert np.array_equal(other.train.targets, data.train.targets)
    assert (other.train.targets == PADDING).any()
    floats = from_arrays({"x": x[..., None].astype(np.float64), "y": y}, name="n", seed=0, kind="tagging")
    assert floats.preprocessing.mean == ()
    assert source_for("tagger", floats.sample_shape, floats.task).arguments == {"channels": 1, "classes": 3}
    for wrong_x, wrong_y, says in (
        (x, numbers[:, :5], "12 tokens"), (x, x.astype(float) / 2, "each token has one"),
        (np.zeros((200, 4, 4, 3), np.uint8), y, "tagging is of sequences"), (x, numbers * 0, "2 to 255"),
    ):  # fmt: skip
        if says == "2 to 255":
            wrong_y = np.where(y == "", "", "O")
        with pytest.raises(DataError, match=says):
            from_arrays({"x": wrong_x, "y": wrong_y}, name="n", seed=0, kind="tagging")
    with pytest.raises(ModelError, match="one answer for the whole sample"):
        source_for("mlp", (12,), data.task)
    with pytest.raises(TaskError, match="tagging of 3 classes"):
        data.task.check_output((12, 3), "m", (12,))
    with pytest.raises(ModelError, match="every size is at least 1"):
        tagger(3, width=0)


def asked(address: str, sample: NDArray[Any], **parameters: object) -> dict[str, Any]:
    body = {
        "inputs": [{"name": "input", "datatype": "INT64", "shape": [1, 12], "data": sample.tolist()}],
        "outputs": [{"name": "tags", "parameters": parameters}],
    }
    request = urllib.request.Request(f"{address}/infer", json.dumps(body).encode())
    with urllib.request.urlopen(request) as answer:
        (output,) = json.load(answer)["outputs"]
    return dict(output)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(900)
def test_tags_go_all_the_way(tmp_path: Path) -> None:
    """Trained from arrays, quantised, tuned and served: a client reads numbers, or names."""
    x, y = sentences(1_500)
    trained = rushhour.train("tagger", (x, y), out=tmp_path / "model", task="tagging", epochs=4, lr=5e-3).bundle
    (output,) = trained.manifest.signature.outputs
    assert (output.places, output.dtype, output.shape) == ("tokens", "uint8", (12,))
    assert "the class of each token: O, PERSON, PLACE" in (trained.path / "README.md").read_text()
    held_x, held_y = sentences(200, seed=1)
    task = trained.manifest.task
    wanted = np.select([held_y == "", held_y == "O", held_y == "PERSON"], [PADDING, 0, 1], 2)
    held = Split(held_x, wanted)
    for engine in ("openvino", "onnxruntime"):
        answers = outputs_of(trained, EngineConfig(engine, "f32", max_batch=64), held)
        assert task.evaluate(answers, wanted)[0] > 0.95
    small = rushhour.compress(trained, (x, y), out=tmp_path / "small", max_accuracy_drop="10%", recipe="int8")
    assert small.bundle is not None
    assert (
        task.evaluate(outputs_of(small.bundle, EngineConfig("onnxruntime", "int8", max_batch=64), held), wanted)[0]
        > 0.9
    )
    plan = rushhour.tune(
        trained, (x, y), out=tmp_path / "run", slo="p99<500ms", max_accuracy_drop="10%", budget="15s", recipes="none"
    ).plan
    assert plan.evidence is not None
    assert plan.evidence.metric == "f1"
    with rushhour.serve(tmp_path / "run", http_port=0, grpc_port=None) as server:
        address = f"{server.url}/v2/models/{server.model}"
        numbers, names = asked(address, held_x[0]), asked(address, held_x[0], classification=1)
    assert (numbers["datatype"], numbers["shape"]) == ("UINT8", [1, 12])
    assert (names["datatype"], names["shape"]) == ("BYTES", [1, 12])
    assert names["data"] == [f"{label}:{NAMES[label]}" for label in numbers["data"]]

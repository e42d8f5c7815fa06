"""Kinds of tasks: metrics with intervals, paired, by group; a kind of a user's own from training to its plan."""

from __future__ import annotations

import json
import re
import urllib.request
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

import rushhour
from rushhour.api.inputs import load_data
from rushhour.bundle import Bundle, Source
from rushhour.compress import Recipe, Store, apply
from rushhour.compress.judge import outputs_of
from rushhour.data.dataset import Split
from rushhour.data.spatial_targets import PLACES
from rushhour.engines import EngineConfig
from rushhour.errors import DataError, TaskError
from rushhour.plan import Precision
from rushhour.progress import Silent
from rushhour.task import Kind, Scaling, Task
from rushhour.task.kinds import BUILT_IN, Classification, Multilabel, Ranking
from rushhour.testing.kinds import check_kind

random = np.random.default_rng(0)
SMALL = "prune:0.5,distil:6,int8"


def logits(n: int, k: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(n, k)).astype(np.float32)


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_kinds_of_rushhour_keep_the_promises_of_the_seam(name: str) -> None:
    if name in PLACES or name == "tagging":
        pytest.skip("answers about places: see test_places.py and test_tagging.py")
    outputs = 1 if name == "ranking" else 3
    answers = logits(60, outputs)
    if name in ("multilabel", "ranking"):
        answers = 1 / (1 + np.exp(-answers))
    kind = BUILT_IN[name](outputs, ("a", "b", "c"))
    assert isinstance(kind, Kind)
    check_kind(kind, answers, kind.as_targets(answers + 0.3 * logits(60, outputs, 1)))


def test_auc_is_the_share_of_pairs_in_the_right_order() -> None:
    scores, wanted = np.array([0.1, 0.4, 0.4, 0.8, 0.3]), np.array([0, 1, 0, 1, 0])
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[wanted == 1] for b in scores[wanted == 0]]
    kind = Ranking(1)
    assert kind.reduce(kind.statistics(scores[:, None], wanted)) == pytest.approx(np.mean(pairs))
    assert Ranking(1).why_wrong(np.array([0, 1, 2])), "three values are no yes or no"
    assert Ranking(1).why_wrong(np.array([1.0, 1.0])), "there is nothing to put behind"


def test_f1_counts_labels_and_not_their_absence() -> None:
    targets = np.zeros((100, 5))
    targets[:10, 0] = 1
    kind = Multilabel(5)
    assert kind.reduce(kind.statistics(np.zeros((100, 5)), targets)) == 0.0, "a model that gives no label"
    given = targets.copy()
    given[20:30, 1] = 1
    assert kind.reduce(kind.statistics(given, targets)) == pytest.approx(2 * 10 / (2 * 10 + 10))


def test_intervals_of_groups_are_wider() -> None:
    """All samples of a person are right, or none: 500 samples of 10 persons tell as much as 10 samples."""
    persons = np.repeat(np.arange(10), 50)
    right = np.isin(persons, (0, 1, 2, 3, 4, 5, 6))
    outputs = np.stack([right, ~right], axis=1).astype(np.float32)
    task, targets = Task.classification(("a", "b")), np.zeros(500, np.int64)
    value, (low, high) = task.evaluate(outputs, targets)
    grouped, (low_, high_) = task.evaluate(outputs, targets, persons)
    assert value == grouped == pytest.approx(0.7)
    assert high_ - low_ > 4 * (high - low)
    assert low_ < 0.5 < high_


@pytest.mark.slow
def test_the_interval_of_a_paired_drop_covers_it() -> None:
    """In 60 repetitions the 95% interval of a drop in AUC misses the true drop in about 3."""
    missed = 0
    for seed in range(60):
        draw = np.random.default_rng(seed)
        wanted = draw.integers(0, 2, 100)
        before = wanted + draw.normal(size=100)
        after = before + 0.5 * draw.normal(size=100)
        found, (low, high) = Task("ranking").compare(before[:, None], after[:, None], wanted)
        missed += not low <= _DROP <= high
        assert low <= found <= high
    assert missed <= 9


_DROP = 0.760250 - 0.736481
"""Of AUC: normal scores a standard deviation apart, Phi(1 / sqrt(2)), with noise added, Phi(1 / sqrt(2.5))."""


@pytest.mark.parametrize("kind", ["", "ranks", "a:b:c", "a b:c", ":x", "os.system"])
def test_a_bundle_with_an_unknown_kind_is_refused(kind: str) -> None:
    with pytest.raises(msgspec.ValidationError, match="kind"):
        msgspec.convert({"kind": kind}, type=Task)


def test_an_own_kind_is_not_imported_by_a_name_alone() -> None:
    task = msgspec.convert({"kind": "antigravity_of_a_stranger:Kind", "outputs": 2}, type=Task)
    with pytest.raises(TaskError, match="--trust"):
        task.evaluate(logits(10, 2), np.zeros(10))


def test_scaling_needs_a_number_for_each_output() -> None:
    with pytest.raises(ValueError, match="each of 2 outputs"):
        Task("regression", outputs=2, scaling=Scaling((1.0,), (1.0,)))


# Data.


NETWORK = Source("rushhour.models:mlp", {"inputs": 6, "outputs": 1, "hidden": 64, "depth": 2})


def smaller(bundle: Bundle, data: tuple[NDArray[Any], NDArray[Any]], store: Path) -> Bundle:
    """Pruned, distilled, in int8."""
    dataset = load_data(data, Silent(), bundle)
    *_, last = apply(Recipe.parse(SMALL), bundle, dataset, Store(store), progress=Silent())
    return last


def accuracy(bundle: Bundle, x: NDArray[Any], y: NDArray[Any]) -> float:
    """On the compiled graph."""
    precision: Precision = "int8" if bundle.manifest.precision == "int8" else "f32"
    answers = outputs_of(bundle, EngineConfig("openvino", precision, max_batch=64), Split(x, y))
    return bundle.manifest.task.evaluate(answers, y)[0]


def table(n: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(n, 6)).astype(np.float32)


@pytest.mark.slow
def test_values_of_any_size_are_learnt(tmp_path: Path) -> None:
    """Prices of 300,000 +- 50,000: without scaling a network was at 0 after any usual number of steps."""
    x = table(1200)
    prices = 300_000 + 50_000 * (x[:, 0] - 0.5 * x[:, 1])
    bundle = rushhour.train(NETWORK, (x, prices), out=tmp_path / "prices", epochs=25, lr=0.01).bundle
    assert accuracy(bundle, x, prices) > 0.9
    answers = bundle.answers()
    assert answers is not None
    assert 100_000 < answers["values"].mean() < 500_000, "the served graph gives prices"
    small = smaller(bundle, (x, prices), tmp_path / "small")
    assert accuracy(small, x, prices) > 0.8


@pytest.mark.slow
def test_rows_of_zeros_and_ones_are_several_labels(tmp_path: Path) -> None:
    x = table(1500)
    y = (x[:, :3] + 0.1 * logits(1500, 3) > 0).astype(np.int64)
    network = msgspec.structs.replace(NETWORK, arguments={**NETWORK.arguments, "outputs": 3})
    bundle = rushhour.train(network, (x, y), out=tmp_path / "labels", epochs=25, lr=0.01).bundle
    assert bundle.manifest.task == Task.multilabel(("0", "1", "2"))
    assert bundle.manifest.task.metric == "f1"
    assert accuracy(bundle, x, y) > 0.85
    answers = bundle.answers()
    assert answers is not None
    assert ((answers["probabilities"] >= 0) & (answers["probabilities"] <= 1)).all()
    small = smaller(bundle, (x, y), tmp_path / "small")
    assert accuracy(small, x, y) > 0.8


def test_a_ranking_is_judged_by_auc(tmp_path: Path) -> None:
    x = table(1500)
    y = (x[:, 0] + logits(1500, 1)[:, 0] > 1).astype(np.int64)
    bundle = rushhour.train(NETWORK, (x, y), out=tmp_path / "scores", epochs=6, task="ranking").bundle
    assert bundle.manifest.task.metric == "auc"
    assert 0.7 < accuracy(bundle, x, y) < 0.99
    assert bundle.manifest.signature.outputs[0].name == "score"


def test_a_group_is_in_one_part_only() -> None:
    from rushhour.data.arrays import from_arrays

    x, persons = table(400), np.repeat([f"person {k}" for k in range(20)], 20)
    data = from_arrays({"x": x, "y": random.integers(0, 2, 400), "groups": persons}, name="watch", seed=0)
    parts = [
        set(np.unique(part.groups).tolist())
        for part in (data.train, data.validation, data.test)
        if part.groups is not None
    ]
    assert len(parts) == 3
    assert all(parts)
    assert not parts[0] & parts[1]
    assert not parts[0] & parts[2]
    assert not parts[1] & parts[2]
    assert sum(map(len, parts)) == 20
    with pytest.raises(DataError, match="person 3"):
        from_arrays(
            {"x_train": x[:200], "y_train": np.zeros(200, int), "groups_train": persons[:200], "x_test": x[60:260],
             "y_test": np.zeros(200, int), "groups_test": persons[60:260]},
            name="watch", seed=0,
        )  # fmt: skip


def test_samples_of_later_times_are_held_out() -> None:
    from rushhour.data.arrays import from_arrays

    times = random.permutation(1000) // 10
    x = times[:, None].astype(np.float32)
    data = from_arrays({"x": x, "y": random.integers(0, 2, 1000), "times": times}, name="shop", seed=0)
    assert data.train.inputs.max() < data.validation.inputs.min()
    assert data.validation.inputs.max() < data.test.inputs.min()
    assert any("in time" in note for note in data.notes)


def test_samples_in_two_parts_are_said() -> None:
    from rushhour.data.arrays import from_arrays

    x, y = table(300), random.integers(0, 2, 300)
    data = from_arrays({"x_train": x[:250], "y_train": y[:250], "x_test": x[200:], "y_test": y[200:]}, name="n", seed=0)
    assert any("50 of 100 test samples are in train" in note for note in data.notes)


# A user's own.


PAGE = Path(__file__).resolve().parents[2] / "docs" / "tasks.md"


(CODE,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
"""The class on the page: the 90% quantile of a value."""
NAMES: dict[str, Any] = {}
exec(CODE, NAMES)
Quantile: Any = NAMES["Quantile"]


def test_an_own_kind_keeps_the_promises() -> None:
    answers = logits(50, 1)
    check_kind(Quantile(1, ()), answers, answers[:, 0] + logits(50, 1, 1)[:, 0])
    with pytest.raises(AssertionError, match="one row for each"):
        check_kind(Wrong(1, ()), answers, answers[:, 0])


class Wrong(Quantile):
    """Gives one number for all samples."""

    def statistics(self, outputs: NDArray[Any], targets: NDArray[Any]) -> NDArray[np.float64]:
        return super().statistics(outputs, targets).sum(axis=0, keepdims=True)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(600)
def test_an_own_kind_goes_all_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained by two workers, compressed, tuned, served: no part of Rushhour knows what it is for."""
    (tmp_path / "mytasks.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    name = "mytasks:Quantile"
    x = table(1500)
    y = (2 * x[:, 0] + np.abs(x[:, 1]) * logits(1500, 1)[:, 0]).astype(np.float32)
    trained = rushhour.train("mlp", (x, y), out=tmp_path / "quantile", epochs=12, task=name, workers=2).bundle
    assert trained.manifest.task.metric == "pinball skill"
    assert accuracy(trained, x, y) > 0.3
    small = rushhour.compress(trained, (x, y), out=tmp_path / "small", max_accuracy_drop="20%", recipe=SMALL)
    assert accuracy(small.bundle, x, y) > 0.2
    goal = {"slo": "p99<200ms", "max_accuracy_drop": "20%"}
    plan = rushhour.tune(trained, (x, y), out=tmp_path / "run", **goal, budget="20s", recipes="none").plan
    assert plan.evidence is not None
    assert plan.evidence.metric == "pinball skill"
    with rushhour.serve(tmp_path / "run", http_port=0, grpc_port=None) as server:
        body = {"inputs": [{"name": "input", "datatype": "FP32", "shape": [1, 6], "data": x[0].tolist()}]}
        request = urllib.request.Request(f"{server.url}/v2/models/{server.model}/infer", json.dumps(body).encode())
        (answer,) = json.load(urllib.request.urlopen(request))["outputs"]
    assert answer["name"] == "quantile"
    assert np.isfinite(answer["data"]).all()


@pytest.mark.slow
def test_a_binary_classifier_takes_data_of_two_classes(tmp_path: Path) -> None:
    """One sigmoid at the end, as most Keras examples have it: it was imported as a regression."""
    import torch
    from torch import nn

    x = table(600)
    names = np.where(x[:, 0] > 0, "dog", "cat")
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 1), nn.Sigmoid())
    optimizer = torch.optim.Adam(network.parameters(), 0.02)
    for _ in range(200):
        loss = nn.functional.binary_cross_entropy(
            network(torch.from_numpy(x))[:, 0], torch.from_numpy((names == "dog").astype(np.float32))
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    alone = rushhour.import_model(network, out=tmp_path / "alone", example=x[:4]).bundle
    assert alone.manifest.task.is_binary
    brought = rushhour.import_model(network, out=tmp_path / "binary", data=(x, names))
    assert "one output: the probability of dog" in dict(brought.lines)["task"]
    found = brought.bundle
    assert found.manifest.task == Task.multilabel(("dog",))
    small = smaller(found, (x, names), tmp_path / "small")
    assert small.manifest.task.metric == "accuracy"
    assert accuracy(small, x, (names == "dog").astype(np.float32)[:, None]) > 0.9
    assert small.manifest.task.is_binary
    assert Classification(2).why_wrong(np.array([0, 1, 2])), "and other tasks say what does not fit"

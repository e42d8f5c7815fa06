"""Recipes: what they say, what their steps do to networks, and that a killed one ends as if nothing had happened."""

from __future__ import annotations

import dataclasses
import re
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from rushhour.bundle import Bundle, Preprocessing, Source, TensorSpec
from rushhour.compress import (
    Distil,
    LowRank,
    Prune,
    Quantize,
    Recipe,
    ReducedPrecision,
    Store,
    apply,
    compress,
    default_recipes,
    judge,
    outputs_of,
    quantize,
    too_few,
    why_outside,
)
from rushhour.compress.evaluation import Evaluation
from rushhour.compress.speed import Artefact, Bench, Ratio, Speed
from rushhour.data.augment import Augmentation
from rushhour.data.dataset import Dataset, Split
from rushhour.engines import EngineConfig
from rushhour.errors import DataError, GoalError, ModelError
from rushhour.goal import AccuracyBudget
from rushhour.measurement import Accuracy
from rushhour.models import build, export, load_deployed, split_dense
from rushhour.progress import Silent
from rushhour.records.compression import Compression
from rushhour.task import Task

ARTICLE = Source("rushhour.models:article", {"input_size": 12, "channels": 1, "classes": 4, "width": 0.5, "dense": 64})
RESIDUAL = Source("rushhour.models:residual", {"input_size": 12, "channels": 1, "classes": 4, "blocks": 1})
PICTURES = Preprocessing(1 / 255, (0.25,), (0.2,), "NHWC->NCHW")
ALL = Recipe((Prune(epochs=1, iterations=2, round_to=4), LowRank(keep=0.3), Distil(2), Quantize(20)))


def pictures(labelled: bool = True) -> Dataset:
    """One bright quarter in noise: which one is the class."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 4, 480)
    inputs = random.integers(0, 120, (480, 12, 12, 1), dtype=np.uint8)
    for picture, label in zip(inputs, labels, strict=True):
        top, left = 6 * (label // 2), 6 * (label % 2)
        picture[top : top + 6, left : left + 6] += 60
    targets = labels if labelled else np.empty((480, 0), np.float32)
    parts = [Split(inputs[at], targets[at]) for at in (slice(0, 320), slice(320, 400), slice(400, None))]
    return Dataset("quarters", Task.classification(("a", "b", "c", "d")), *parts, PICTURES, f"sum {labelled}")


def bundle_at(path: Path, source: Source, data: Dataset, epochs: int = 4, trusted: tuple[str, ...] = ()) -> Bundle:
    """A network trained for a moment, without the loop's files."""
    torch.manual_seed(0)
    network = build(source, trusted)
    pixels = torch.from_numpy(data.train.inputs).permute(0, 3, 1, 2).float() / 255
    inputs = (pixels - 0.25) / 0.2
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    for _ in range(epochs):
        for at in range(0, len(inputs), 32):
            optimizer.zero_grad()
            labels = torch.from_numpy(pictures().train.targets[at : at + 32])
            functional.cross_entropy(network(inputs[at : at + 32]), labels).backward()
            optimizer.step()
    return export(
        network.eval(),
        name="quarters",
        task=data.task,
        sample_spec=TensorSpec("image", "uint8", data.sample_shape),
        preprocessing=PICTURES,
        source=source,
        lineage=(),
        samples=data.validation.inputs[:4],
        path=path,
    )


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return bundle_at(tmp_path_factory.mktemp("recipe") / "parent", ARTICLE, pictures())


@pytest.fixture(scope="module")
def stages(parent: Bundle) -> list[Bundle]:
    return list(apply(ALL, parent, pictures(), Store(parent.path.with_name("whole")), progress=Silent()))


# What a recipe says.


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("prune:0.5,lowrank:0.1,distil:3,int8", (Prune(0.5), LowRank(0.1), Distil(3), Quantize())),
        ("lowrank:32", (LowRank(rank=32),)),
        ("lowrank:energy=0.9:layers=13+16,f16", (LowRank(energy=0.9, layers=("13", "16")), ReducedPrecision("f16"))),
        ("prune:parameters=0.9:ignored=0:epochs=4", (Prune(parameters=0.9, ignored=("0",), epochs=4),)),
        ("distil:2:augment=flip+crop=0.1:dropout=true", (Distil(2, augment=Augmentation(True, 0.1), dropout=True),)),
        ("int8:50", (Quantize(50),)),
        ('[{"step": "prune", "limits": {"0": 0.1}}, {"step": "int8"}]', (Prune(limits={"0": 0.1}), Quantize())),
    ],
)
def test_a_recipe_is_read_and_said(text: str, steps: tuple[object, ...]) -> None:
    recipe = Recipe.parse(text)
    assert recipe.steps == steps
    assert msgspec.json.decode(msgspec.json.encode(recipe), type=Recipe) == recipe
    if not text.startswith("["):
        assert Recipe.parse(str(recipe)) == recipe


def test_a_recipe_may_lie_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_bytes(msgspec.json.encode(ALL.steps))
    assert Recipe.parse(str(tmp_path / "r.json")) == ALL
    with pytest.raises(GoalError, match="cannot read the recipe"):
        Recipe.parse(str(tmp_path / "none.json"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "has no steps"),
        ("shrink:0.5", "the steps are prune"),
        ("int8,prune:0.5", "cannot prune:0.5 after int8"),
        ("int8,f16", "cannot f16 after int8"),
        ("prune:half", "cannot read the step"),
        ("prune:0.5:ratio=0.4", "it is given twice"),
        ("prune:0.5:speed=2", "prune has ratio"),
        ("distil:3:student=x", "JSON only"),
        ("f16:3", "f16 takes no settings"),
        ('[{"step": "prune", "ratio": "x"}]', "JSON"),
        ('[{"step": "int8"}, {"step": "distil"}]', "after int8"),
        ('[{"step": "prune"}, {"step": "distil", "student": {"factory": "a:b"}}]', "first step"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused(text: str, says: str) -> None:
    with pytest.raises(GoalError, match=says):
        Recipe.parse(text)


@pytest.mark.parametrize("text", ["prune:1.5", "prune:0", "lowrank:energy=2", "lowrank:keep=0.1:rank=3", "distil:0"])
def test_settings_out_of_bounds_are_refused(text: str) -> None:
    with pytest.raises(ModelError, match="cannot"):
        Recipe.parse(text)


# What steps do.


def test_each_step_gives_a_bundle_that_is_smaller_and_opens_again(parent: Bundle, stages: list[Bundle]) -> None:
    pruned, low, distilled, small = stages
    sizes = [each.manifest.parameters for each in (parent, *stages)]
    assert sizes[0] > sizes[1] > sizes[2] == sizes[3] == sizes[4]
    assert small.model_bytes < distilled.model_bytes
    samples = torch.from_numpy(pictures().test.inputs)
    for each in (pruned, low, distilled):
        opened = Bundle.open(each.path)
        module = load_deployed(opened)
        assert sum(parameter.numel() for parameter in module.parameters()) == each.manifest.parameters
        with torch.inference_mode():
            assert module(samples).shape == (80, 4)
    assert [step.what for step in small.manifest.lineage] == ["prune", "lowrank", "distil", "quantize"]
    assert small.manifest.precision == "int8"


def test_nothing_is_computed_twice(parent: Bundle, stages: list[Bundle]) -> None:
    again = list(apply(ALL, parent, pictures(), Store(parent.path.with_name("whole")), progress=_Never()))
    assert [each.manifest.hash for each in again] == [each.manifest.hash for each in stages]
    other = dataclasses.replace(pictures(), fingerprint="other")
    with pytest.raises(ModelError, match="AssertionError: prune quarters"):
        next(apply(ALL, parent, other, Store(parent.path.with_name("whole")), progress=_Never()))


class _Never(Silent):
    def start(self, what: str, total: float | None = None) -> None:
        raise AssertionError(what)


@pytest.mark.slow
def test_distillation_learns_what_the_teacher_knows_without_labels(parent: Bundle, tmp_path: Path) -> None:
    data = pictures(labelled=False)
    student = Source("rushhour.models:mlp", {"inputs": 144, "outputs": 4})
    step = Distil(12, student=student, batch=32, lr=2e-3)
    (made,) = apply(Recipe((step,)), parent, data, Store(tmp_path), progress=Silent())
    assert made.manifest.source == student
    samples = torch.from_numpy(data.test.inputs)
    with torch.inference_mode():
        agree = load_deployed(made)(samples).argmax(1) == load_deployed(parent)(samples).argmax(1)
    assert float(agree.float().mean()) > 0.9


def plain_student() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(144, 32), nn.ReLU(), nn.Linear(32, 4))


def softmaxed_student() -> nn.Sequential:
    return plain_student().append(nn.Softmax(dim=1))


@pytest.mark.slow
def test_a_student_that_ends_in_a_softmax_learns_as_the_one_without(parent: Bundle, tmp_path: Path) -> None:
    """Its probabilities were taken for logits, and a second softmax of them learnt to answer as the teacher does."""
    data, answers = pictures(labelled=False), []
    for student in (Source("test_recipe:plain_student"), Source("test_recipe:softmaxed_student")):
        step, trusted = Distil(6, student=student, batch=32, lr=2e-3), (student.factory,)
        (made,) = apply(Recipe((step,)), parent, data, Store(tmp_path), progress=Silent(), trusted=trusted)
        with torch.inference_mode():
            answers.append(load_deployed(made, trusted)(torch.from_numpy(data.test.inputs)))
    torch.testing.assert_close(answers[0], answers[1], rtol=0, atol=1e-3)


@pytest.mark.slow
def test_a_graph_teaches_as_its_module_does(parent: Bundle, tmp_path: Path) -> None:
    """A bundle without torch module is a teacher too; the answers it gives are the same."""
    bare = msgspec.structs.replace(parent.manifest, source=None, files={})
    graph = Bundle.create(
        tmp_path / "graph", bare, lambda file: file.write_bytes(parent.model.read_bytes()) and None,
        samples=parent.samples(),
    )  # fmt: skip
    student = Source("rushhour.models:mlp", {"inputs": 144, "outputs": 4})
    step = Distil(4, student=student, batch=32, augment=Augmentation(crop=0.05))
    answers = []
    for teacher in (parent, graph):
        (made,) = apply(Recipe((step,)), teacher, pictures(), Store(tmp_path), progress=Silent())
        with torch.inference_mode():
            answers.append(load_deployed(made)(torch.from_numpy(pictures().test.inputs)))
    # the module answers in bf16 where the processor has it
    assert float((answers[0] - answers[1]).abs().mean()) < 0.05


@pytest.mark.slow
def test_regression_is_distilled_too(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    inputs = random.normal(size=(900, 8)).astype(np.float32)
    values = np.stack([inputs.sum(1), inputs[:, 0] * 2], 1).astype(np.float32)
    parts = [Split(inputs[at], values[at]) for at in (slice(0, 800), slice(800, 850), slice(850, None))]
    data = Dataset("sums", Task("regression", outputs=2), *parts, Preprocessing(), "sum")
    torch.manual_seed(0)
    network = build(source := Source("rushhour.models:mlp", {"inputs": 8, "outputs": 2, "hidden": 64, "depth": 2}))
    teacher = export(
        network, name="sums", task=data.task, sample_spec=TensorSpec("input", "float32", (8,)),
        preprocessing=Preprocessing(), source=source, lineage=(), samples=inputs[:4], path=tmp_path / "teacher",
    )  # fmt: skip
    step = Distil(
        15,
        student=Source("rushhour.models:mlp", {"inputs": 8, "outputs": 2, "hidden": 32, "depth": 2}),
        batch=32,
        alpha=1,
    )
    (made,) = apply(Recipe((step,)), teacher, data, Store(tmp_path / "store"), progress=Silent())
    samples = torch.from_numpy(data.test.inputs)
    with torch.inference_mode():
        asked, answered = load_deployed(teacher)(samples), load_deployed(made)(samples)
    assert float(((asked - answered) ** 2).mean()) < 0.3 * float(asked.var())


def test_low_rank_keeps_what_the_layer_gives_on_data(parent: Bundle) -> None:
    """Outputs that lie in a few directions are kept whole, whatever the weights are elsewhere."""
    from rushhour.compress.lowrank import split

    deployed = load_deployed(parent)
    dense = deployed.network[13]
    assert isinstance(dense, nn.Linear)
    with torch.no_grad():
        dense.weight.copy_(torch.randn(64, 5) @ torch.randn(5, dense.in_features) / dense.in_features**0.5)
        samples = torch.from_numpy(pictures().test.inputs)
        before = deployed(samples)
        ranks = split(deployed, pictures(), LowRank(energy=0.99999), seed=0, name="x")
        assert ranks["13"] in (4, 8)
        assert torch.allclose(deployed(samples), before, atol=2e-3)


class Encoder(nn.Module):
    """A small transformer: rows of a picture are tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(12, 32)
        self.query, self.key, self.value, self.mix = (nn.Linear(32, 32) for _ in range(4))
        self.norm, self.last = nn.LayerNorm(32), nn.LayerNorm(32)
        self.up, self.down = nn.Linear(32, 128), nn.Linear(128, 32)
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.flatten(1, 2))
        normed = self.norm(x)
        soft = torch.softmax(self.query(normed) @ self.key(normed).transpose(1, 2) / 32**0.5, dim=-1)
        x = x + self.mix(soft @ self.value(normed))
        x = x + self.down(functional.gelu(self.up(self.last(x))))
        out: Tensor = self.head(x.mean(1))
        return out


class Branching(nn.Module):
    """Its way depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(144, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        if x.sum() > 0:
            x = x * 2
        out: Tensor = self.dense(x)
        return out


@pytest.mark.parametrize(
    "source",
    [
        pytest.param(RESIDUAL, marks=pytest.mark.slow),
        pytest.param(Source("test_recipe:Encoder"), marks=pytest.mark.slow),
    ],
    ids=["residual", "transformer"],
)
def test_residual_networks_and_transformers_are_pruned(source: Source, tmp_path: Path) -> None:
    trusted = ("test_recipe:Encoder",)
    before = bundle_at(tmp_path / "before", source, pictures(), trusted=trusted)
    step = Prune(parameters=0.4, round_to=4, epochs=2, lr=2e-3)
    (made,) = apply(Recipe((step,)), before, pictures(), Store(tmp_path / "store"), progress=Silent(), trusted=trusted)
    assert made.manifest.parameters <= 0.65 * before.manifest.parameters
    widths = [module.out_features for module in load_deployed(made, trusted).modules() if isinstance(module, nn.Linear)]
    assert widths[-1] == 4, "answers are not pruned"


def test_layers_that_must_stay_stay(parent: Bundle, tmp_path: Path) -> None:
    step = Prune(0.5, ignored=("0",), limits={"6": 0.25}, round_to=2, epochs=0)
    (made,) = apply(Recipe((step,)), parent, pictures(), Store(tmp_path), progress=Silent())
    before, after = (load_deployed(each).network.state_dict() for each in (parent, made))
    assert after["0.weight"].shape[0] == before["0.weight"].shape[0]
    assert after["6.weight"].shape[0] >= 0.75 * before["6.weight"].shape[0]
    assert after["2.weight"].shape[0] < before["2.weight"].shape[0]
    for name in ("ignored", "limits"):
        wrong = Prune(**{name: {"99": 0.5} if name == "limits" else ("99",)})
        with pytest.raises(ModelError, match="there is no layer '99'"):
            next(apply(Recipe((wrong,)), parent, pictures(), Store(tmp_path), progress=Silent()))
    everything = Prune(ignored=_layers(parent))
    with pytest.raises(ModelError, match="nothing of quarters can be pruned"):
        next(apply(Recipe((everything,)), parent, pictures(), Store(tmp_path), progress=Silent()))


def _layers(bundle: Bundle) -> tuple[str, ...]:
    network = load_deployed(bundle).network
    return tuple(name for name, module in network.named_modules() if isinstance(module, nn.Conv2d | nn.Linear))


def test_a_split_layer_is_split_again_from_its_record() -> None:
    network = build(ARTICLE)
    split_dense(network, "13", 8)
    with pytest.raises(ModelError, match="rank 999"):
        split_dense(network, "16", 999)


def test_a_chain_of_dense_layers_in_int8_answers_alike_on_one_thread(tmp_path: Path) -> None:
    """OpenVINO 2026.4 fuses it on machines with AMX, and answered at random; only batches of 16 and more were right."""
    data = pictures()
    torch.manual_seed(0)
    layers = nn.Linear(144, 16, bias=False), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)
    chain = export(
        nn.Sequential(nn.Flatten(), *layers),
        name="chain",
        task=data.task,
        sample_spec=TensorSpec("image", "uint8", (12, 12, 1)),
        preprocessing=PICTURES,
        source=None,
        lineage=(),
        samples=data.train.inputs[:4],
        path=tmp_path / "chain",
    )
    small = quantize(chain, data, tmp_path / "small", calibration=20, progress=Silent())
    expected = outputs_of(small, EngineConfig("onnxruntime", "int8"), data.test)
    for batch in (1, 3, 8, 16):
        answers = outputs_of(small, EngineConfig("openvino", "int8", max_batch=batch), data.test)
        assert np.allclose(answers, expected, atol=0.02)


# Killed and run again.

_KILLED = """
import os, signal, sys
sys.path.insert(0, "tests/compress")
from pathlib import Path
import test_recipe as t

class Deadly(t.Silent):
    left = int(sys.argv[3])
    doing = ""
    def start(self, what, total=None):
        self.doing = what
    def advance(self, by=1.0, note=""):
        self.happened()
    def done(self, note=""):
        self.happened()
    def happened(self):
        if self.doing.startswith(sys.argv[4]):
            Deadly.left -= 1
            if not Deadly.left:
                os.kill(os.getpid(), signal.SIGKILL)

made = list(t.apply(t.ALL, t.Bundle.open(Path(sys.argv[1])), t.pictures(), t.Store(Path(sys.argv[2])),
                    progress=Deadly(), checkpoint_every_s=0))
print(made[-1].manifest.hash)
"""


@pytest.mark.long
@pytest.mark.slow
def test_killed_in_any_step_it_ends_as_if_left_alone(parent: Bundle, stages: list[Bundle], tmp_path: Path) -> None:
    def run(left: int, doing: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", _KILLED, str(parent.path), str(tmp_path), str(left), doing]
        return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])

    # in pruning's second training, in low rank, in distillation, in calibration
    for left, doing in ((4, "distil from quarters on"), (1, "low rank"), (3, "distil from quarters on"), (7, "quanti")):
        assert run(left, doing).returncode == -signal.SIGKILL, doing
    last = run(-1, "")
    assert last.stdout.strip() == stages[-1].manifest.hash, last.stderr


# The verb.


SHORT = {"quantize": "int8", "halve_weights": "f16", "prune": "pruned", "precision": "bf16"}


def last(bundle: Bundle) -> str:
    """What was done to it last: `f16`."""
    lineage = bundle.manifest.lineage
    return SHORT.get(lineage[-1].what, lineage[-1].what) if lineage else ""


def _bench(speeds: dict[str, float]) -> Bench:
    """Engines that take as long as is said of what was done to a bundle; 1.0 of any other."""

    def timed(parent: Artefact, children: dict[str, Artefact]) -> dict[str, Speed]:
        def rate(artefact: Artefact) -> float:
            lineage = artefact[0].manifest.lineage
            name = "-".join(SHORT.get(step.what, step.what) for step in lineage)
            return next((value for end, value in speeds.items() if name.endswith(end)), 1.0)

        found = {}
        for name, child in children.items():
            value = rate(child) / rate(parent)
            ratio = Ratio(value, 0.99 * value, 1.01 * value, 6)
            found[name] = Speed(ratio, ratio, 1, 1, rate(child), rate(parent), 1.0, 1.0)
        return found

    return timed  # type: ignore[return-value]


def _compressed(
    parent: Bundle, tmp_path: Path, recipes: list[str], budget: str, speeds: dict[str, float]
) -> Compression:
    return compress(
        parent,
        pictures(),
        [Recipe.parse(recipe) for recipe in recipes],
        budget=AccuracyBudget.parse(budget),
        out=tmp_path / "out",
        steps=tmp_path / "steps",
        bench=_bench(speeds),
        progress=Silent(),
        force=True,
    )


@pytest.mark.slow
def test_what_is_slower_than_its_parent_is_never_the_best(parent: Bundle, tmp_path: Path) -> None:
    made = _compressed(parent, tmp_path, ["f16", "int8:20"], "50%", {"f16": 1.5, "int8": 0.9})
    assert (made.verdict, made.best) == ("best", (0, 0))
    assert Bundle.open(tmp_path / "out").manifest.name == "quarters"
    # faster than the reference, but slower than what the step began with
    speeds = {"lowrank": 3.0, "lowrank-int8": 2.0}
    made = _compressed(parent, tmp_path, ["lowrank:0.3,int8:20"], "100%", speeds)
    assert made.attempts[0].stages[1].slower
    assert made.answer.step.startswith("lowrank")
    assert Compression.load(tmp_path / "steps") == made


def test_where_everything_is_slower_the_bundle_stays_as_it_was(parent: Bundle, tmp_path: Path) -> None:
    made = _compressed(parent, tmp_path, ["f16", "int8:20"], "100%", {"f16": 0.9, "int8": 0.5})
    assert (made.verdict, made.best) == ("no gain", None)
    assert Bundle.open(tmp_path / "out").manifest.hash == parent.manifest.hash
    assert made.test == made.reference_test


def test_a_budget_that_nothing_meets_leaves_the_nearest_miss(parent: Bundle, tmp_path: Path) -> None:
    worse = "prune:0.9:limit=0.95:epochs=0:round_to=1:importance=magnitude"
    made = _compressed(parent, tmp_path, [worse, "int8:20"], "0%", {"int8": 2.0, "pruned": 3.0})
    assert made.verdict == "nearest miss"
    assert "nothing is inside the budget of 0%" in made.summary
    assert len(made.attempts) == 1, "after a training that missed, nothing stronger is tried"
    left = Bundle.open(tmp_path / "out").manifest
    assert left.metrics["test"] == made.test
    assert left.metrics["test"].drop_interval[1] >= made.test.drop > 0


def test_a_recipe_that_cannot_be_done_does_not_stop_the_others(parent: Bundle, tmp_path: Path) -> None:
    made = _compressed(parent, tmp_path, ["lowrank:layers=99", "f16"], "50%", {"f16": 1.2})
    assert "there is no dense layer '99'" in made.attempts[0].why
    assert made.best == (1, 0)
    with pytest.raises(ModelError, match="no dense layer '99'"):
        _compressed(parent, tmp_path, ["lowrank:layers=99"], "50%", {})


def test_default_recipes_fit_the_bundle(parent: Bundle, stages: list[Bundle]) -> None:
    recipes = [str(one) for one in default_recipes(parent, epochs=2)]
    assert recipes[0] == "int8"
    assert all("prune" in one and "lowrank" in one and "distil:2" in one for one in recipes[1:])
    graph_alone = Bundle(parent.path, msgspec.structs.replace(parent.manifest, source=None))
    assert [str(one) for one in default_recipes(graph_alone)] == ["int8", "w8", "f16"]
    with pytest.raises(ModelError, match=r"cannot compress quarters: it is quantised already; name the bundle that"):
        default_recipes(stages[-1])


def test_whatever_goes_wrong_in_one_recipe_ends_that_recipe_only(
    parent: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An IndexError in one threw away what the one before it had finished."""

    def fails(*_: object, **__: object) -> None:
        raise IndexError("index 1 is out of bounds\nand a second line")

    monkeypatch.setattr(sys.modules["rushhour.compress.run"], "prune", fails)
    made = _compressed(parent, tmp_path, ["f16", "prune:0.5,int8:20", "bf16"], "50%", {"f16": 1.5})
    assert [attempt.recipe for attempt in made.attempts] == ["f16", "prune:0.5,int8:20", "bf16"]
    assert made.attempts[1].why == (
        "cannot prune:0.5 quarters: IndexError: index 1 is out of bounds; leave that step out of the recipe"
    )
    assert (made.verdict, made.best) == ("best", (0, 0))
    with pytest.raises(ModelError, match=r"cannot prune:0\.5 quarters: IndexError"):
        _compressed(parent, tmp_path / "alone", ["prune:0.5"], "50%", {})


# The verdict: what is shown, and not what happened to come out.


def _spread(interval: tuple[float, float], value: float) -> Bench:
    """Every child is `value` times as fast as its parent, with this interval."""

    def timed(parent: Artefact, children: dict[str, Artefact]) -> dict[str, Speed]:
        ratio = Ratio(value, *interval, 6)
        return dict.fromkeys(children, Speed(ratio, ratio, 1, 1, value, 1.0, 1.0, 1.0))

    return timed  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("recipe", "value", "interval", "verdict", "says"),
    [
        (
            "bf16",
            1.23,
            (0.83, 1.82),
            "no gain",
            r"no gain is shown: the best is bf16, 1\.23x \(0\.83 to 1\.82\)",
        ),
        ("f16", 1.23, (0.83, 1.82), "no gain", "no gain is shown"),
        ("bf16", 1.01, (0.99, 1.03), "no gain", "the bundle is unchanged"),
        ("bf16", 1.23, (1.02, 1.4), "best", r"^bf16: 1\.23x \(1\.02 to 1\.40\) the throughput$"),
        ("f16", 1.0, (0.98, 1.02), "best", r"^f16: \d\.\dx smaller on disk and no slower, 1\.00x"),
        ("f16", 0.9, (0.85, 0.95), "no gain", "slower than the bundle that they were made from"),
    ],
)
def test_no_proven_gain_is_no_gain(
    parent: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recipe: str,
    value: float,
    interval: tuple[float, float],
    verdict: str,
    says: str,
) -> None:
    """It said "best: int8, up to its step int8" of 1.23x, with an interval from 0.83 to 1.82."""

    def accuracy(self: object, bundle: Bundle, part: str) -> Accuracy:
        return Accuracy("accuracy", 0.9, (0.8, 1.0), 1000, part)

    monkeypatch.setattr(Evaluation, "accuracy", accuracy)
    made = compress(
        parent,
        pictures(),
        [Recipe.parse(recipe)],
        budget=AccuracyBudget.parse("1%"),
        out=tmp_path / "out",
        steps=tmp_path / "steps",
        bench=_spread(interval, value),
        progress=Silent(),
    )
    assert made.verdict == verdict
    assert re.search(says, made.summary), made.summary


def test_the_interval_of_the_drop_has_to_be_inside_the_budget() -> None:
    """Judged by the drop alone, an artefact whose true drop is the whole budget passes every other time."""
    random, budget, n, passed = np.random.default_rng(0), AccuracyBudget(0.01), 2_000, 0
    targets, right = np.zeros(n, np.int64), np.eye(2, dtype=np.float32)[np.zeros(n, int)]
    for _ in range(1_000):
        lost, won = random.random(n) < 0.02, random.random(n) < 0.01  # of all, so that the true drop is the budget
        before, after = right.copy(), right.copy()
        before[won & ~lost], after[lost] = (0.0, 1.0), (0.0, 1.0)
        judged = judge(Task.classification(("a", "b")), "validation", targets, after, before)
        passed += not why_outside(judged, budget)
    assert passed <= 40, "one in forty"


def test_too_few_samples_say_how_many_would_do_or_which_budget() -> None:
    random, task = np.random.default_rng(0), Task.classification(("a", "b"))

    def judged(n: int, lost: int) -> Accuracy:
        before = np.eye(2, dtype=np.float32)[np.zeros(n, int)]
        after = np.clip(before + random.normal(0, 0.05, before.shape), 0, 1).astype(np.float32)
        after[:lost] = 0.0, 1.0
        return judge(task, "validation", np.zeros(n, np.int64), after, before)

    said = why_outside(judged(80, 0), AccuracyBudget(0.01))
    assert "drops by 0.00 points on 80 samples" in said
    assert said.endswith("about 194 samples in that part would show it, or a budget of 2.4%")
    assert why_outside(judged(194, 0), AccuracyBudget(0.01)) == ""
    assert why_outside(judged(80, 0), AccuracyBudget(0.024)) == ""
    assert "no number of samples" in why_outside(judged(80, 0), AccuracyBudget(0.0))
    over = why_outside(judged(500, 20), AccuracyBudget(0.01))
    assert over.endswith("and 1% is allowed"), "more samples would not help"
    near = why_outside(judged(1000, 7), AccuracyBudget(0.01))
    found = re.search(r"about ([\d,]+) samples", near)
    assert found is not None
    enough = int(found[1].replace(",", ""))
    assert why_outside(judged(enough, int(0.007 * enough)), AccuracyBudget(0.01)) == ""
    assert "194 or more, or a budget of 2.4%" in too_few(task, "test", pictures().test, AccuracyBudget(0.01))
    assert too_few(task, "test", pictures().test, AccuracyBudget(0.03)) == ""


def test_answers_that_differ_by_rounding_alone_are_inside_on_any_number_of_samples() -> None:
    random, task = np.random.default_rng(0), Task.classification(("a", "b"))
    before = random.random((20, 2)).astype(np.float32)
    after = before + random.normal(0, 1e-6, before.shape).astype(np.float32)
    judged = judge(task, "validation", np.zeros(20, np.int64), after, before)
    assert (judged.drop, judged.drop_interval) == (0.0, (0.0, 0.0))
    bare = judge(task, "validation", np.empty((20, 0), np.float32), after, before)
    assert (bare.value, bare.drop_interval) == (1.0, (0.0, 0.0))


DROPS = {"f16": (0.001, 0.001), "bf16": (0.002, 0.002), "w8": (0.003, 0.003)}


@pytest.mark.parametrize(
    ("missing", "verdict", "name", "tried"),
    [
        ((), "best", "bf16", ["f16", "bf16"]),
        (("bf16",), "best", "f16", ["f16", "bf16"]),
        (("f16",), "nearest miss", "f16", ["f16"]),
        (("f16", "bf16"), "nearest miss", "f16", ["f16"]),
    ],
)
def test_a_miss_on_the_test_part_has_a_gentler_runner_up(
    parent: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: tuple[str, ...], verdict: str, name: str,
    tried: list[str],
) -> None:  # fmt: skip
    """The best on the validation part was all that was tried: where it missed, nothing was left."""

    def accuracy(self: object, bundle: Bundle, part: str) -> Accuracy:
        step = last(bundle)
        drop, most = DROPS.get(step, (0.0, 0.0))
        if step in missing and part == "test":
            most += 0.02
        return Accuracy("accuracy", 0.9 - drop, (0.8, 1.0), 1000, part, drop, (-most, most))

    monkeypatch.setattr(Evaluation, "accuracy", accuracy)
    made = _compressed(parent, tmp_path, ["bf16", "f16"], "1%", {"bf16": 2.0, "f16": 1.5})
    assert made.verdict == verdict
    assert last(Bundle.open(tmp_path / "out")) == name
    assert [made.stage(each.stage).step for each in made.confirmations] == tried
    assert made.test.drop_interval[1] == max(each.accuracy.drop_interval[1] for each in made.confirmations
                                             if each.stage == made.best and each.accuracy)  # fmt: skip
    assert Compression.load(tmp_path / "steps") == made
    if verdict == "best" and missing:
        assert (
            "bf16 is better on the validation part, but on the test part accuracy drops by 0.20 points" in made.summary
        )


def test_answers_that_are_no_numbers_on_the_test_part_leave_the_runner_up(
    parent: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def accuracy(self: object, bundle: Bundle, part: str) -> Accuracy:
        if part == "test" and last(bundle) == "bf16":
            raise ModelError("answers of it are no numbers")
        most = 0.002 if last(bundle) == "bf16" else 0.0
        return Accuracy("accuracy", 0.9, (0.8, 1.0), 1000, part, 0.0, (-most, most))

    monkeypatch.setattr(Evaluation, "accuracy", accuracy)
    made = _compressed(parent, tmp_path, ["bf16", "f16"], "1%", {"bf16": 2.0, "f16": 1.5})
    assert (made.verdict, made.answer.step) == ("best", "f16")
    assert made.confirmations[-1].why == "answers of it are no numbers"


# Bad input: one line, and nothing lost.


def test_bad_data_is_said_before_any_work(parent: Bundle, tmp_path: Path) -> None:
    data, store = pictures(), Store(tmp_path / "store")
    wrong = dataclasses.replace(
        data, **{part: Split(np.zeros((8, 9, 9, 1), np.uint8), np.zeros(8, np.int64)) for part in _PARTS}
    )
    with pytest.raises(DataError, match=r"takes samples of uint8\(12, 12, 1\), but these are uint8\(9, 9, 1\)"):
        next(apply(ALL, parent, wrong, store, progress=_Never()))
    values = np.zeros((480, 2), np.float32)
    values[330, 1] = np.nan
    parts = {
        part: Split(getattr(data, part).inputs, values[at])
        for part, at in zip(_PARTS, (slice(0, 320), slice(320, 400), slice(400, None)), strict=True)
    }
    broken = dataclasses.replace(data, task=Task("regression", outputs=2), **parts)
    with pytest.raises(DataError, match="sample 10 of the validation part"):
        next(apply(ALL, parent, broken, store, progress=_Never()))
    assert not (tmp_path / "store").exists()


_PARTS = ("train", "validation", "test")


def test_a_student_that_cannot_be_exported_is_refused_before_it_is_trained(parent: Bundle, tmp_path: Path) -> None:
    step = Distil(3, student=Source("test_recipe:Branching"))
    made = apply(
        Recipe((step,)), parent, pictures(), Store(tmp_path), progress=_Never(), trusted=("test_recipe:Branching",)
    )
    with pytest.raises(ModelError, match="cannot export quarters to ONNX"):
        next(made)
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == []


def test_steps_that_train_need_a_module(parent: Bundle, stages: list[Bundle], tmp_path: Path) -> None:
    for step in (Prune(), LowRank(), Distil()):
        with pytest.raises(ModelError, match="carries only its graph"):
            next(apply(Recipe((step,)), stages[-1], pictures(), Store(tmp_path), progress=Silent()))


def test_bf16_is_said_in_the_bundle(parent: Bundle, tmp_path: Path) -> None:
    (made,) = apply(Recipe.parse("bf16"), parent, pictures(), Store(tmp_path), progress=Silent())
    assert made.manifest.precision == "bf16"
    assert made.model.read_bytes() == parent.model.read_bytes()
    assert load_deployed(made) is not None

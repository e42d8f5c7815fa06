"""A network is looked at before it is trained: what cannot work is said in a line, and what plain torch runs, runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from rushhour.bundle import Bundle, Source, TensorSpec
from rushhour.compress.teacher import teaching
from rushhour.data.dataset import Dataset
from rushhour.errors import ModelError
from rushhour.models import Deployed, build, export, from_onnx, load_deployed
from rushhour.models.source import make_contiguous
from rushhour.progress import Silent
from rushhour.records.curves import Epoch
from rushhour.task import Task
from rushhour.testing import gallery
from rushhour.testing.gallery import GALLERY, Specimen, data, specimen
from rushhour.testing.matrix import WORKS, cells
from rushhour.train import TrainingJob, TrainSettings, train, trained_weights
from rushhour.train.preflight import Inspected, Steps, inspect
from rushhour.train.samples import sample_spec

PLAIN = TrainSettings(epochs=2, batch=24, lr=0.02, bf16=False)
HERE = __name__


class _Fn(nn.Module):
    """A network whose forward is given: `f(body, x)` on features `(n, 16)`, or on pictures."""

    def __init__(self, f: Callable[[nn.Module, Tensor], Any], body: nn.Module | None = None) -> None:
        super().__init__()
        self.body = body or nn.Sequential(nn.Flatten(), nn.Linear(432, 4))
        self.f = f

    def forward(self, x: Tensor) -> Any:
        return self.f(self.body, x)


def looked_at(
    network: Callable[[], nn.Module],
    dataset: Dataset | None = None,
    steps: Steps | None = None,
    *,
    settings: TrainSettings = PLAIN,
    exported: bool = False,
) -> Inspected:
    dataset = dataset or data("pictures")

    def make(other: bool) -> Deployed:
        torch.manual_seed(int(other))
        np.random.seed(int(other))
        built = network()
        make_contiguous(built)
        return Deployed(built, dataset.task, dataset.preprocessing)

    sample = sample_spec(dataset)
    return inspect(make, dataset, sample, settings, steps or Steps(24), name="net", export=exported)


def trained(
    name: str, folder: Path, dataset: Dataset | None = None, settings: TrainSettings = PLAIN, **more: Any
) -> Bundle:
    factory = name if ":" in name else f"{gallery.__name__}:{name}"
    progress, on_epoch = more.pop("progress", None) or Silent(), more.pop("on_epoch", None)
    job = TrainingJob(Source(factory), settings, folder / "work", (factory,), **more)
    dataset = dataset or data(specimen(name).data)
    return train(dataset, job, out=folder / "bundle", progress=progress, on_epoch=on_epoch)


class Said(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []
        self.steps = 0.0

    def advance(self, by: float = 1.0, note: str = "") -> None:
        self.steps += by

    def done(self, note: str = "", *, good: bool = True) -> None:
        self.said.append(note)


def factory_of(name: str) -> Callable[[], nn.Module]:
    made: Callable[[], nn.Module] = getattr(gallery, name)
    return made


# What must not be trained


@pytest.mark.parametrize("one", [one for one in GALLERY if one.refused], ids=lambda one: one.name)
def test_what_cannot_be_trained_or_served_is_refused_in_one_line(one: Specimen) -> None:
    with pytest.raises(ModelError, match=one.refused) as refused:
        looked_at(factory_of(one.name), data(one.data), exported=one.name == "branching")
    assert len(str(refused.value).splitlines()) == 1
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize(
    ("mixes", "body"),
    [
        (lambda body, x: body(x) - body(x).mean(0), None),
        (lambda body, x: body(x) / body(x).abs().max(), None),
        (lambda body, x: body(x).cumsum(0), None),
        (lambda body, x: body(x).view(4, -1).t().reshape(-1, 4), None),
        (lambda body, x: body(x.flatten(1))[0], nn.GRU(432, 4)),
        (lambda body, x: body(x.flatten(1)[:, None])[0][:, 0], nn.GRU(432, 4)),
        (lambda body, x: body(x) + 1e-3 * body(x).flip(0), None),
        (lambda body, x: body(x) + torch.arange(len(x))[:, None], None),
    ],
    ids=[
        "mean",
        "maximum",
        "running sum",
        "reshaped",
        "time is the batch",
        "GRU",
        "a little",
        "the place in the batch",
    ],
)
def test_samples_that_mix_are_refused(mixes: Callable[..., Any], body: nn.Module | None) -> None:
    with pytest.raises(ModelError, match=r"cannot train net: .*(depends on the others|one sample alone|other numbers)"):
        looked_at(lambda: _Fn(mixes, body))


def test_what_mixes_is_named_where_it_is_known() -> None:
    with pytest.raises(ModelError, match=r"set batch_first=True in TransformerEncoderLayer 'layers.layers.0'"):
        looked_at(factory_of("mixing_encoder"), data("series"))
    with pytest.raises(ModelError, match=r"BatchNorm2d '1' .*track_running_stats=True"):
        looked_at(factory_of("no_running_statistics"))


def test_one_that_mixes_only_once_trained_is_not_sealed(tmp_path: Path) -> None:
    """The look before training finds it as well; here the graph itself is asked."""
    network = factory_of("mixing_later")()
    with torch.no_grad():
        network.get_parameter("share").fill_(0.5)
    dataset = data("pictures")
    with pytest.raises(ModelError, match="cannot seal mixer: its answer to a sample depends on the others"):
        export(
            network, name="mixer", task=dataset.task, sample_spec=TensorSpec("image", "uint8", (12, 12, 3)),
            preprocessing=dataset.preprocessing, source=None, lineage=(), samples=dataset.train.inputs[:16],
            path=tmp_path / "bundle",
        )  # fmt: skip
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("one", [one for one in GALLERY if not one.refused], ids=lambda one: one.name)
def test_ordinary_networks_pass(one: Specimen) -> None:
    looked_at(factory_of(one.name), data(one.data), settings=TrainSettings(batch=24, bf16=False))


@pytest.mark.parametrize("several", [False, True])
def test_nothing_to_learn_is_refused(several: bool) -> None:
    with pytest.raises(ModelError, match=r"cannot train net: all of its .* are frozen \(requires_grad is False\)"):
        looked_at(factory_of("all_frozen"), steps=Steps(24, workers=2 if several else 1))
    with pytest.raises(ModelError, match="it has no parameters"):
        looked_at(lambda: _Fn(lambda body, x: x.mean((2, 3)), nn.Identity()))


def test_a_state_that_cannot_be_kept_is_refused() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Flatten(), nn.Linear(432, 4))

        def get_extra_state(self) -> dict[str, int]:
            return {"steps": 3}

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.body(x)
            return out

    with pytest.raises(ModelError, match="its state holds _extra_state, a dict"):
        looked_at(Odd)


# What is no part of the state, and what is no number


class _Chance(nn.Module):
    """Something random beside its weights, which a second network of the factory does not have."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.out = kind, nn.Linear(10, 4)
        self.layers = [nn.Linear(10, 10)] if kind == "layers in a list" else {}
        self.order = torch.randperm(10)
        self.numbers = tuple(np.random.permutation(10).tolist())
        self.register_buffer("noise", torch.randn(10), persistent=kind == "stored buffer")

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        if "buffer" in self.kind:
            x = x * self.get_buffer("noise")
        if self.kind == "tensor":
            x = x[:, self.order]
        if self.kind == "numbers":
            x = x[:, list(self.numbers)]
        out: Tensor = self.out(x)
        return out


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("layers in a list", r"weights: .*layers \(a list of layers\)"),
        ("tensor", "weights: .*order"),
        ("buffer", "weights: noise"),
        ("numbers", "gives other answers with the same weights"),
    ],
)
def test_what_is_no_part_of_the_state_is_refused(kind: str, said: str) -> None:
    """The bundle is made from the stored weights in a new network: it would answer at random."""
    with pytest.raises(ModelError, match=f"cannot train net: a second network of its factory .*{said}"):
        looked_at(lambda: _Chance(kind), data("rows"))


def test_random_values_in_the_state_are_no_fault() -> None:
    looked_at(lambda: _Chance("stored buffer"), data("rows"))


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        (lambda body, x: body(x.log()), "; the first are those of Linear 'body'"),
        (lambda body, x: body(x).sqrt(), ";"),
        (lambda body, x: body(x) / (x[:, :1] - x[:, :1]), ";"),
        (lambda body, x: body(x) * body(x).exp().exp().exp().exp().exp(), ";"),
    ],
    ids=["logarithm", "root", "division", "overflow"],
)
def test_answers_that_are_not_numbers_are_called_so(answers: Callable[..., Tensor], said: str) -> None:
    with pytest.raises(ModelError, match=f"its answers are NaN or infinite before the first step{said}"):
        looked_at(lambda: _Fn(answers, nn.Linear(10, 4)), data("rows"))


def test_a_weight_that_is_not_a_number_is_named() -> None:
    def broken() -> nn.Module:
        layer = nn.Linear(10, 4)
        nn.init.constant_(layer.bias, float("nan"))
        return nn.Sequential(layer)

    with pytest.raises(ModelError, match=r"before the first step, as 0\.bias is; check it for"):
        looked_at(broken, data("rows"))


def test_a_class_may_be_ruled_out_by_minus_infinity() -> None:
    forbidden = torch.tensor([0.0, 0.0, 0.0, -torch.inf])
    looked_at(lambda: _Fn(lambda body, x: body(x) + forbidden, nn.Linear(10, 4)), data("rows"))


def test_answers_that_change_slowly_are_not_said_to_mix() -> None:
    calls = iter(range(1, 10_000))
    with pytest.raises(ModelError, match="its answers change from call to call"):
        looked_at(lambda: _Fn(lambda body, x: body(x) * (1 + 4e-4 * next(calls)), nn.Linear(10, 4)), data("rows"))


@pytest.mark.parametrize("cut", [Tensor.detach, lambda out: functional.one_hot(out.argmax(-1), 4).float()])
def test_answers_without_a_gradient_are_called_so(cut: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(ModelError, match="let its answer depend on its parameters: no detach"):
        looked_at(lambda: _Fn(lambda body, x: cut(body(x)), nn.Linear(10, 4)), data("rows"))


def test_complex_parameters_are_refused() -> None:
    class Waves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.turn = nn.Parameter(torch.randn(10, 4, dtype=torch.complex64))

        def forward(self, x: Tensor) -> Tensor:
            return (x.to(torch.complex64) @ self.turn).abs()

    with pytest.raises(ModelError, match=r"its parameter turn is complex, .*view_as_complex"):
        looked_at(Waves, data("rows"))


def test_a_graph_that_no_engine_runs_is_refused_in_one_line() -> None:
    def half(body: nn.Module, x: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return body(x)

    with pytest.raises(ModelError, match=r"ONNX Runtime cannot run the graph of net: .*in float32: no autocast"):
        looked_at(lambda: _Fn(half, nn.Linear(10, 4)), data("rows"), exported=True)


def test_weights_that_are_computed_are_exported_as_they_are() -> None:
    """ONNX has no operation for the products of an orthogonal weight."""
    orthogonal = nn.utils.parametrizations.orthogonal
    looked_at(lambda: nn.Sequential(orthogonal(nn.Linear(10, 8)), nn.Linear(8, 4)), data("rows"), exported=True)


def test_its_own_train_may_fail() -> None:
    class Stubborn(nn.Linear):
        def train(self, mode: bool = True) -> Stubborn:
            raise RuntimeError("only evaluation")

    with pytest.raises(ModelError, match="only evaluation"):
        looked_at(lambda: Stubborn(10, 4), data("rows"))


# Batches of one


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        (Steps(1), "a batch of 1 leads to that"),
        (Steps(8, parts=8), "a batch of 8 in 8 parts leads to that.*accumulate"),
        (Steps(3, parts=2), "a batch of 3 in 2 parts"),
        (Steps(3, workers=2, whole_batch_norm=False), "on 2 workers"),
    ],
)
def test_a_single_sample_under_batch_norm_is_found_before_training(steps: Steps, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        looked_at(factory_of("normed_rows"), data("rows"), steps)
    looked_at(factory_of("experts"), data("rows"), steps)


def test_batch_norm_over_two_workers_takes_a_sample_of_each() -> None:
    looked_at(factory_of("normed_rows"), data("rows"), Steps(3, workers=2))


def test_parts_say_what_they_do_to_batch_norm() -> None:
    notes = looked_at(factory_of("residual"), steps=Steps(24, parts=4)).notes
    assert any("batch normalisation sees 6 samples at a time (batch 24 in 4 parts)" in note for note in notes)
    assert not looked_at(factory_of("residual")).notes
    assert not looked_at(factory_of("group_normed"), steps=Steps(24, parts=4)).notes


# What networks answer


@pytest.mark.parametrize(
    ("name", "main"),
    [("double_headed", "logits"), ("named_outputs", "out"), ("several_outputs", "0"), ("listed_outputs", "0")],
)
def test_of_several_outputs_the_main_one_is_trained_and_it_is_said(name: str, main: str) -> None:
    (note,) = looked_at(factory_of(name)).notes
    assert note.startswith("it gives 2 outputs (")
    assert f"): {main} is trained" in note


@pytest.mark.slow
def test_a_second_head_in_training_is_trained_without(tmp_path: Path) -> None:
    bundle = trained("double_headed", tmp_path)
    before, after = build(specimen("double_headed").source, (specimen("double_headed").source.factory,)), bundle.weights
    assert after is not None
    assert load_file(after).keys() == before.state_dict().keys()


@pytest.mark.parametrize(
    ("ends", "meaning"),
    [
        (lambda body, x: body(x).softmax(-1), "probabilities"),
        (lambda body, x: functional.normalize(body(x).relu() + 1e-3, p=1.0), "probabilities"),
        (lambda body, x: torch.sigmoid(body(x))[:, :], "chances"),
        (lambda body, x: body(x).log_softmax(-1), "logits"),
        (lambda body, x: body(x).clamp(0, 1), "logits"),
    ],
    ids=["softmax", "shares", "sigmoid", "log-softmax", "clamped"],
)
def test_what_numbers_mean_is_found(ends: Callable[..., Tensor], meaning: str) -> None:
    found = looked_at(lambda: _Fn(ends))
    assert found.meaning == meaning
    assert bool(found.notes) == (meaning != "logits")


def test_a_softmax_in_a_regression_is_left_alone() -> None:
    dataset = data("values")
    dataset = dataclasses.replace(
        dataset,
        task=Task("regression", outputs=2),
        **{
            part: dataclasses.replace(split, targets=np.repeat(split.targets, 2, 1) / 9)
            for part in ("train", "validation", "test")
            for split in (getattr(dataset, part),)
        },
    )
    network = lambda: nn.Sequential(nn.Linear(10, 2), nn.Softmax(-1))  # noqa: E731
    assert looked_at(network, dataset).meaning == "logits"


@pytest.fixture(scope="module")
def soft(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Said]:
    said = Said()
    settings = TrainSettings(epochs=20, batch=24, lr=0.05, bf16=False)
    return trained("softmaxed", tmp_path_factory.mktemp("soft"), settings=settings, progress=said), said


def test_a_network_that_ends_in_softmax_is_served_with_one(soft: tuple[Bundle, Said]) -> None:
    bundle, said = soft
    assert any("ends in a softmax" in line for line in said.said)
    answers = bundle.answers()
    assert answers is not None
    assert answers["probabilities"].max() > 0.8, "twice through a softmax of 4 classes nothing is above 0.48"
    assert np.allclose(answers["probabilities"].sum(1), 1, atol=1e-4)
    opened = load_deployed(bundle, (f"{gallery.__name__}:softmaxed",))
    assert opened.meaning == "probabilities"
    samples = torch.from_numpy(bundle.samples()["image"])
    with torch.no_grad():
        assert torch.allclose(opened(samples), torch.from_numpy(answers["probabilities"]), atol=1e-4)
        assert torch.allclose(opened.logits(samples).softmax(1), opened(samples), atol=1e-4)


# Modes, and what does not lie in one piece


@pytest.mark.slow
def test_frozen_parts_stay_as_the_factory_left_them(tmp_path: Path) -> None:
    said = Said()
    bundle = trained("frozen", tmp_path, progress=said)
    assert any("0 stays in evaluation mode, as the factory left it" in line for line in said.said)
    factory = (f"{gallery.__name__}:frozen",)
    before = build(Source(*factory), factory).state_dict()
    assert bundle.weights is not None
    after = load_file(bundle.weights)
    for name, tensor in after.items():
        is_frozen = name.startswith("0.")
        assert torch.equal(tensor, before[name]) == is_frozen or "weight" in name, name
        if "running" in name or "tracked" in name:
            assert torch.equal(tensor, before[name]), name
    opened = load_deployed(bundle, factory).train()
    resting = {name for name, module in opened.network.named_modules() if not module.training}
    assert "0.0.1" in resting, "a training that goes on from the bundle keeps them too"
    assert "1" not in resting


def test_a_network_left_in_evaluation_mode_stays_so_and_it_is_said() -> None:
    (note,) = looked_at(lambda: gallery.residual().eval()).notes
    assert "leaves it in evaluation mode" in note
    dropout = nn.Sequential(nn.Flatten(), nn.Dropout(0.5).eval(), nn.Linear(432, 4))
    deployed = Deployed(dropout, data("pictures").task, data("pictures").preprocessing).eval().train()
    assert [module.training for module in dropout] == [True, False, True]
    assert deployed.training


@pytest.mark.parametrize("name", ["viewed", "rotary", "lazy", "non_contiguous", "weight_normed_by_hooks"])
def test_what_plain_torch_trains_can_be_trained_and_exported(name: str) -> None:
    of_gallery = hasattr(gallery, name)
    factory = getattr(gallery, name) if of_gallery else globals()[name]
    looked_at(factory, data(specimen(name).data if of_gallery else "pictures"), exported=True)


@pytest.mark.parametrize(
    "name",
    [
        "tutorial",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("viewed", "rotary", "lazy", "non_contiguous", "weight_normed_by_hooks")
        ),
    ],
)
def test_what_plain_torch_trains_is_trained_killed_and_gone_on_with(name: str, tmp_path: Path) -> None:
    class Stopped(Exception): ...

    def stop(epoch: Epoch) -> None:
        if len(seen) == 1:
            raise Stopped
        seen.append(epoch)

    name = f"{HERE}:{name}" if name in globals() else name
    dataset = data("pictures" if ":" in name else specimen(name).data)
    whole, seen = trained(name, tmp_path / "whole", dataset), []
    with pytest.raises(Stopped):
        trained(name, tmp_path, dataset, on_epoch=stop)
    assert trained(name, tmp_path, dataset).manifest.hash == whole.manifest.hash
    load_deployed(whole, (whole.manifest.source.factory,) if whole.manifest.source else ())


def weight_normed_by_hooks() -> nn.Module:
    """The older form, whose weights are computed before each call: it cannot be copied."""
    with pytest.warns(FutureWarning):
        conv = nn.utils.weight_norm(nn.Conv2d(3, 16, 3))
    return nn.Sequential(conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))


# The export


def test_what_cannot_be_exported_is_refused_before_the_first_step(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    said = Said()
    with pytest.raises(ModelError, match=r"cannot export branching to ONNX: .*depends on the values of a tensor") as no:
        trained("branching", tmp_path, progress=said)
    assert "(refused.py, line " in str(no.value), "where it is"
    assert said.steps == 0
    assert not list(tmp_path.glob("work/*"))
    out = capfd.readouterr()
    assert out.err + out.out == ""


@pytest.mark.parametrize(
    "fails",
    [
        lambda body, x: torch.cat([body(row[None]) for row in x]),
        lambda body, x: body(x) if bool((x > 0).any()) else x,
    ],
    ids=["row by row", "a choice"],
)
def test_further_code_that_cannot_be_exported(fails: Callable[..., Tensor]) -> None:
    with pytest.raises(ModelError, match=r"cannot export net to ONNX: |the ONNX graph of net does not") as refused:
        looked_at(lambda: _Fn(fails), exported=True)
    assert len(str(refused.value)) < 500


def test_what_fails_in_training_only_is_refused_before_the_first_step() -> None:
    with pytest.raises(ModelError, match=r"its first step fails: RuntimeError: .*\(test_preflight.py, line "):
        looked_at(lambda: _Fn(lambda body, x: body(x.flatten(1)[:, :5]) if body.training else body(x)))
    with pytest.raises(ModelError, match="another output in training: for 3 samples it gives shape"):
        looked_at(lambda: _Fn(lambda body, x: body(x)[:, :2] if body.training else body(x)))
    with pytest.raises(ModelError, match="its first step fails"):
        looked_at(lambda: _Fn(lambda body, x: body(x).detach()))


# Targets of a factory's own data


@pytest.mark.parametrize("form", ["int32", "uint8", "bool", "float64", "column"])
def test_labels_of_any_number_are_labels(form: str) -> None:
    dataset = data("rows")
    kind = "int16" if form == "column" else form
    parts = {}
    for part in ("train", "validation", "test"):
        split = getattr(dataset, part)
        labels = (split.targets % 2 if form == "bool" else split.targets).astype(kind)
        parts[part] = dataclasses.replace(split, targets=labels[:, None] if form == "column" else labels)
    task = Task.classification(("no", "yes")) if form == "bool" else dataset.task
    made = dataclasses.replace(dataset, task=task, **parts)
    assert made.train.targets.dtype == np.int64
    assert made.train.targets.shape == (72,)
    if form == "int32":
        looked_at(factory_of("experts"), made)


def test_values_of_any_number_are_float32() -> None:
    dataset = data("values")
    doubled = {
        part: dataclasses.replace(getattr(dataset, part), targets=getattr(dataset, part).targets.astype(np.float64))
        for part in ("train", "validation", "test")
    }
    assert dataclasses.replace(dataset, **doubled).train.targets.dtype == np.float32


# The moving average


@pytest.mark.slow
def test_the_moving_average_forgets_the_first_weights_and_has_the_buffers_too(tmp_path: Path) -> None:
    settings = TrainSettings(epochs=4, batch=24, lr=0.05, bf16=False, optimizer="sgd", schedule="constant")
    averaging = msgspec.structs.replace(settings, ema=0.999)

    source, dataset = specimen("residual").source, data("pictures")

    def weights(folder: Path, settings: TrainSettings, **more: Any) -> dict[str, Tensor]:
        job = TrainingJob(source, settings, folder, (source.factory,))
        return trained_weights(dataset, job, progress=Silent(), **more)

    last, mean = weights(tmp_path / "last", settings), weights(tmp_path / "mean", averaging)
    torch.manual_seed(0)
    first = gallery.residual().state_dict()
    name = "3.2.weight"
    assert (mean[name] - last[name]).norm() < (mean[name] - first[name]).norm()
    running = "0.1.running_mean"
    assert not torch.equal(mean[running], last[running])
    assert (mean[running] - last[running]).norm() < (mean[running] - first[running]).norm()

    class Stopped(Exception): ...

    def stop(epoch: Epoch) -> None:
        if epoch.epoch == 3:
            raise Stopped

    with pytest.raises(Stopped):
        weights(tmp_path, averaging, on_epoch=stop)
    again = weights(tmp_path, averaging)
    assert all(torch.equal(again[key], mean[key]) for key in mean)


# A teacher that is a graph


@pytest.mark.parametrize("gives", ["logits", "probabilities"])
def test_a_graph_that_answers_logits_teaches_logits(gives: str, tmp_path: Path) -> None:
    x, y = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", size])
        for name, size in (("x", 10), ("y", 4))
    )
    weight = onnx.numpy_helper.from_array(np.random.default_rng(0).normal(size=(10, 4)).astype(np.float32), "w")
    nodes = [onnx.helper.make_node("MatMul", ["x", "w"], ["z" if gives == "probabilities" else "y"])]
    if gives == "probabilities":
        nodes.append(onnx.helper.make_node("Softmax", ["z"], ["y"], axis=1))
    graph = onnx.helper.make_graph(nodes, "teacher", [x], [y], [weight])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)]), tmp_path / "t.onnx")
    dataset = data("rows")
    teacher = from_onnx(tmp_path / "t.onnx", dataset.task, tmp_path / "teacher")
    samples = torch.from_numpy(dataset.train.inputs[:8])
    logits = samples @ torch.from_numpy(onnx.numpy_helper.to_array(weight).copy())
    with teaching(teacher, dataset, 24, (), bf16=False) as answers:
        taught = answers(samples)
    assert torch.allclose(taught.softmax(1), logits.softmax(1), atol=1e-4)
    if gives == "logits":
        assert torch.allclose(taught, logits, atol=1e-4)


# The gallery in the cells of the matrix; `make bench-zoo` has them all


@pytest.mark.slow
def test_a_slice_of_the_matrix(tmp_path: Path) -> None:
    assert cells(specimen("tutorial"), tmp_path / "one", ("export", "serve")) == {
        "train": WORKS, "export": WORKS, "serve": WORKS,
    }  # fmt: skip
    refused = cells(specimen("squeezed"), tmp_path / "two", ("export",))
    assert refused["train"] == refused["export"]
    assert "one sample alone" in refused["train"]


@pytest.mark.slow
@pytest.mark.long
def test_a_whole_row_of_two_inputs(tmp_path: Path) -> None:
    assert set(cells(specimen("pair"), tmp_path).values()) == {WORKS}


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("name", ["buffered", "frozen"])
def test_whole_rows_of_the_matrix(name: str, tmp_path: Path) -> None:
    outcomes = cells(specimen(name), tmp_path)
    pruned = outcomes.pop("prune")
    assert "can be pruned" in pruned, "what is frozen, or counted on by a buffer, is left as it is and named"
    assert set(outcomes.values()) == {WORKS}, outcomes

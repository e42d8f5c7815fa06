"""What 8 bits and smaller shapes buy on networks that nobody trains for it: the second half of `make bench-compress`.

A residual network, trained on Fashion-MNIST. The pretrained sentence encoder MiniLM-L6, judged without labels on
sentences of Python's own reference manual (`pydoc_data.topics`, which every Python carries). And the shapes that the
article's network takes at 224x224 when it is pruned, cut to low rank and quantised: there only the shapes are measured,
on random weights, because speed hardly depends on their values.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pydoc_data.topics
import re
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import torch
from torch import nn

from bench.models import pictures
from bench.record import Check, Table, verdict
from rushhour.bundle import Bundle, Preprocessing, Source, TensorSpec
from rushhour.compress import Speed, bench_artefacts, compress_weights, halve_weights, judge, outputs_of, quantize
from rushhour.compress.speed import Artefact, reason
from rushhour.data import Dataset, Split, load
from rushhour.data.arrays import from_splits
from rushhour.data.text import sentences
from rushhour.engines import EngineConfig
from rushhour.errors import BundleError
from rushhour.models import article, export, minilm_bundle
from rushhour.plan import EngineName, Precision
from rushhour.progress import Silent
from rushhour.system.machine import cores
from rushhour.task import Task
from rushhour.train import TrainingJob, TrainSettings, train

SEED = 0
_BUDGET = 0.01
_FASTER = ">= 1.5"
_TOKENS = 64
_RUNS: dict[str, tuple[tuple[EngineName, Precision], ...]] = {
    "f32": (("openvino", "f32"), ("openvino", "bf16"), ("onnxruntime", "f32")),
    "int8": (("openvino", "int8"), ("onnxruntime", "int8")),
    "int8 weights": (("openvino", "f32"), ("onnxruntime", "f32")),
    "f16 weights": (("openvino", "f32"), ("onnxruntime", "f32")),
}
"""Of each child, how it can be run."""


class Scale(msgspec.Struct, frozen=True):
    """How much of everything.

    Attributes:
        epochs: of the residual network's training.
        samples: of each part of the data, at most.
        calibration: samples.
        blocks: of every comparison of speed.
        seconds: of each artefact in each.
        batch: the largest that is tried.
        side: of the pictures that the article's network takes.
    """

    epochs: int = 2
    samples: int = 60_000
    calibration: int = 300
    blocks: int = 8
    seconds: float = 0.4
    batch: int = 16
    side: int = 224


class Measured(msgspec.Struct, frozen=True):
    """One artefact beside its parent on the same engine.

    Attributes:
        drop: of the metric or of fidelity on the test part, with its interval; None where weights are random.
    """

    name: str
    engine: str
    precision: str
    megabytes: float
    speed: Speed | None
    metric: str | None = None
    drop: float | None = None
    drop_interval: tuple[float, float] | None = None


def residual(at: Path, scale: Scale) -> tuple[list[Check], list[Measured]]:
    """Trained on Fashion-MNIST, judged by its labels."""
    data = cut(load("fashion-mnist"), scale.samples)
    source = Source("rushhour.models:residual", {"input_size": 28, "channels": 1, "classes": 10})
    settings = TrainSettings(epochs=scale.epochs, seed=SEED)
    job = TrainingJob(source, settings, at / ".checkpoints")
    parent = train(data, job, out=at / "residual", progress=Silent())
    return _children("residual", "the residual network on Fashion-MNIST", parent, data, at, scale)


def minilm(at: Path, scale: Scale) -> tuple[list[Check], list[Measured]]:
    """As published, judged by the cosine to its own answers in f32."""
    data = cut(sentences("python-reference", manual(), length=_TOKENS, seed=SEED), scale.samples)
    parent = _kept(at / "minilm", lambda path: minilm_bundle(path, data.validation.inputs[:32]))
    return _children("minilm", "MiniLM-L6 on sentences of 64 tokens", parent, data, at, scale)


def manual() -> list[str]:
    """Sentences of the Python reference manual, as this Python carries it."""
    text = re.split(r"(?<=[.!?])\s+|\n\n+", "\n\n".join(pydoc_data.topics.topics.values()))
    lines = [" ".join(line.split()) for line in text]
    return [line for line in dict.fromkeys(lines) if 40 < len(line) < 300 and line[0].isupper()]


def shapes(at: Path, scale: Scale) -> tuple[list[Check], list[Measured]]:
    """The article's network and what becomes of it, on random weights."""
    side = scale.side
    train, validation, test = (_random(side, seed) for seed in range(3))
    data = from_splits("random", train, validation, test, _classes(1000))

    def half() -> nn.Sequential:
        return article(input_size=side, width=0.5, dense=256)

    def whole() -> nn.Sequential:
        return article(input_size=side)

    made = {
        "f32": _shape(at / f"article-{side}", whole, side),
        "half the channels": _shape(at / f"article-{side}-pruned", half, side),
        "dense layer of rank 32": _shape(at / f"article-{side}-rank", lambda: _low_rank(whole(), 32), side),
    }
    both = _shape(at / f"article-{side}-both", lambda: _low_rank(half(), 32), side)
    for name, parent in (("int8", made["f32"]), ("all three", both)):
        path = parent.path.with_name(f"{parent.path.name}-int8")
        made[name] = quantize(parent, data, path, calibration=min(16, scale.calibration), progress=Silent())
    found: list[Measured] = []
    checks: list[Check] = []
    for engine in ("openvino", "onnxruntime"):
        artefacts = {
            name: (bundle, _config(engine, bundle.manifest.precision, min(8, scale.batch)))
            for name, bundle in made.items()
        }
        speeds = _timed(artefacts, scale)
        found += [_measured(name, artefacts[name], speeds.get(name)) for name in artefacts]
        checks += [
            _speed_check(f"1.{side}.{engine}.{short}", f"the article's network at {side}x{side}, shapes on random "
                         f"weights: throughput of {name} over f32 on {engine}", target, artefacts, name, speeds)
            for short, name, target in (("int8", "int8", _FASTER), ("all", "all three", ">= 10"))
        ]  # fmt: skip
    smaller = made["f32"].model_bytes / made["all three"].model_bytes
    what = f"the article's network at {side}x{side}: size on disk over that of half the channels, rank 32 and int8"
    checks.append(verdict(f"1.{side}.size", what, ">= 49", smaller, None, 1))
    return checks, found


def _children(
    short: str, title: str, parent: Bundle, data: Dataset, at: Path, scale: Scale
) -> tuple[list[Check], list[Measured]]:
    """Everything that needs no training, judged and timed; the checks are of int8."""
    made = {
        "f32": parent,
        "int8": quantize(
            parent, data, at / f"{short}-int8", calibration=scale.calibration, max_drop=_BUDGET, progress=Silent()
        ),
        "int8 weights": compress_weights(parent, at / f"{short}-w8", progress=Silent()),
        "f16 weights": halve_weights(parent, at / f"{short}-f16", progress=Silent()),
    }
    artefacts = {
        (name, engine, precision): (bundle, _config(engine, precision, scale.batch))
        for name, bundle in made.items()
        for engine, precision in _RUNS[name]
    }
    expected = outputs_of(*artefacts["f32", "openvino", "f32"], data.test)
    checks: list[Check] = []
    found: list[Measured] = []
    for engine in ("openvino", "onnxruntime"):
        here = {
            f"{name} {precision}": artefacts[name, of, precision] for name, of, precision in artefacts if of == engine
        }
        speeds = _timed(here, scale)
        for label, artefact in here.items():
            outputs = outputs_of(*artefact, data.test)
            accuracy = judge(data.task, "test", data.test.targets, outputs, expected)
            found.append(
                msgspec.structs.replace(
                    _measured(f"{title}: {label.rpartition(' ')[0]}", artefact, speeds.get(label)),
                    metric=accuracy.metric,
                    drop=accuracy.drop,
                    drop_interval=accuracy.drop_interval,
                )
            )
            if label == "int8 int8":
                what = f"{title}: throughput of int8 over f32 on {engine}"
                checks.append(_speed_check(f"3.{short}.{engine}", what, _FASTER, here, label, speeds))
                checks.append(
                    verdict(
                        f"3.{short}.{engine}.drop",
                        f"{title}: fall of {accuracy.metric} by int8 on {engine}, test part",
                        f"<= {100 * _BUDGET:g}",
                        100 * accuracy.drop,
                        (100 * accuracy.drop_interval[0], 100 * accuracy.drop_interval[1]),
                        accuracy.n,
                        unit="points",
                    )
                )
    return checks, found


def _timed(artefacts: dict[str, Artefact], scale: Scale) -> dict[str, Speed]:
    """The first is the parent of the others."""
    parent, *children = artefacts
    return bench_artefacts(
        artefacts[parent], {name: artefacts[name] for name in children}, blocks=scale.blocks, seconds=scale.seconds
    )


def _speed_check(
    id: str, what: str, target: str, artefacts: dict[str, Artefact], name: str, speeds: dict[str, Speed]
) -> Check:
    ratio = speeds[name].throughput
    check = verdict(id, what, target, ratio.value, ratio.interval, ratio.n)
    if check.holds:
        return check
    parent = next(iter(artefacts.values()))
    return msgspec.structs.replace(check, why=f"{check.why}; {reason(parent, artefacts[name])}")


def _measured(name: str, artefact: Artefact, speed: Speed | None) -> Measured:
    bundle, config = artefact
    return Measured(name, config.engine, config.precision, bundle.model_bytes / 1e6, speed)


def tables(found: list[Measured]) -> tuple[Table, ...]:
    """Everything beside its parent."""
    rows = tuple(
        (
            each.name,
            f"{each.engine} {each.precision}",
            each.megabytes,
            each.speed.samples_per_s if each.speed else None,
            f"{each.speed.throughput.value:.3g} [{each.speed.throughput.low:.3g}, {each.speed.throughput.high:.3g}]"
            if each.speed
            else "parent",
            1e3 * each.speed.latency_s if each.speed else None,
            each.metric,
            100 * each.drop if each.drop is not None else None,
            100 * each.drop_interval[1] if each.drop_interval else None,
        )
        for each in found
    )
    columns = (
        "what", "engine", "MB on disk", "samples/s", "over its parent", "ms alone", "metric", "falls by (points)",
        "at most",
    )  # fmt: skip
    note = (
        "Engine alone, one stream for each core, each at its best batch, in interleaved blocks. The fall is measured "
        "on the test part against f32 on OpenVINO; without labels it is what the cosine to these lacks to 1."
    )
    return (Table("What needs no training", columns, rows, note),)


def _config(engine: EngineName, precision: Precision, batch: int) -> EngineConfig:
    return EngineConfig(engine, precision, streams=cores(), threads=1, max_batch=batch)


def cut(data: Dataset, samples: int) -> Dataset:
    """At most so many samples of each part."""
    if samples >= len(data.train):
        return data
    parts = {part: getattr(data, part).head(samples) for part in ("train", "validation", "test")}
    return dataclasses.replace(data, **parts, fingerprint=f"{data.fingerprint}:{samples}")


def _shape(path: Path, network: Callable[[], nn.Module], side: int) -> Bundle:
    def made(path: Path) -> Bundle:
        torch.manual_seed(SEED)
        return export(
            network(),
            name=path.name,
            task=Task.classification(_classes(1000)),
            sample_spec=TensorSpec("image", "uint8", (side, side, 3)),
            preprocessing=Preprocessing(scale=1 / 255, layout="NHWC->NCHW"),
            source=None,
            lineage=(),
            samples=pictures(side, 16),
            path=path,
        )

    return _kept(path, made)


def _low_rank(network: nn.Sequential, rank: int) -> nn.Sequential:
    """The same with its large dense layer as a product of two, as a truncated SVD leaves it."""
    (index, dense), *_ = ((at, layer) for at, layer in enumerate(network) if isinstance(layer, nn.Linear))
    layers = list(network)
    layers[index : index + 1] = [
        nn.Linear(dense.in_features, rank, bias=False),
        nn.Linear(rank, dense.out_features),
    ]
    return nn.Sequential(*layers)


def _random(side: int, seed: int) -> Split:
    return Split(pictures(side, 16, seed), np.arange(16, dtype=np.int64))


def _classes(count: int) -> tuple[str, ...]:
    return tuple(f"class {index}" for index in range(count))


def _kept(path: Path, make: Callable[[Path], Bundle]) -> Bundle:
    with contextlib.suppress(BundleError):
        return Bundle.open(path)
    return make(path)

"""The article's script in Keras and its service with `model.predict`, against the Plan of what it saved."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import msgspec
import numpy as np

import rushhour
from bench.contest import capacities_in_turn, served_plan
from bench.keras_service import keras_python, keras_service, run_script, write_models, write_pictures
from bench.parts import Part, say
from bench.record import Table, judged, verdict
from rushhour.bundle import Bundle
from rushhour.data.dataset import Split
from rushhour.data.fashion import fashion_mnist
from rushhour.engines import EngineConfig
from rushhour.engines.openvino import OpenVINOEngine
from rushhour.engines.service import time_service
from rushhour.goal import SLO
from rushhour.plan import PLAN, Plan, Precision
from rushhour.system.machine import cores

_SLO = "p99<100ms"
_SPEED = re.compile(r"model\.predict, batch (\d+): (\d+) images/s")


class ExampleScale(msgspec.Struct, frozen=True):
    """How much of everything.

    Attributes:
        side: of the pictures in the contest.
        images: of training and validation in Keras.
        tests: pictures that neither has seen, by which the Plan's accuracy is confirmed.
        script_epochs: in Keras.
        budget: of the tuning.
        rounds: of capacities.
        seconds: of a window of load.
        own_side: the article's own size, for speeds alone.
        speed_side: of networks from Keras and in torch.
    """

    side: int = 28
    images: int = 20_000
    tests: int = 4_000
    script_epochs: int = 1
    budget: str = "15m"
    rounds: int = 3
    seconds: float = 3.0
    own_side: int = 224
    speed_side: int = 96


def example(scale: ExampleScale, work: Path, bench: Path) -> Part:
    """Train by the script, import and tune the file, then load both services in turn.

    Args:
        scale: how much.
        work: a folder for pictures, model and run; what is there is used again.
        bench: where the environment with Keras is made.

    Raises:
        CannotInstall: if that fails, or the script does.
    """
    python = keras_python(bench)
    photos, model, run = work / "photos", work / "article.keras", work / "tuned"
    said = _trained(python, scale, photos, model)
    tuned = rushhour.tune(
        model, photos, out=run, slo=_SLO, max_accuracy_drop="1%", budget=scale.budget, size=(scale.side, scale.side)
    )
    samples = next(iter(Bundle.open(run / tuned.plan.variants[0].bundle).samples().values()))
    contestants = {"plan": partial(served_plan, run), "keras": partial(keras_service, python, model, samples)}
    capacities = capacities_in_turn(contestants, SLO.parse(_SLO), scale.rounds, seconds=scale.seconds)
    evidence = Plan.load(run / PLAN).evidence
    assert evidence is not None
    drop = 100 * ((evidence.reference_accuracy or 0.0) - (evidence.accuracy or 0.0))
    ratios = [ours / keras for ours, keras in zip(capacities["plan"], capacities["keras"], strict=True)]
    checks = [
        judged("2.capacity", f"capacity at {_SLO}, Plan against FastAPI + model.predict", ">= 20", ratios),
        verdict(
            "2.accuracy", "accuracy of the Plan below the Keras model's, unseen pictures", "<= 1", drop, None,
            scale.tests, unit="points",
        ),
    ]  # fmt: skip
    rows: list[tuple[str | float | None, ...]] = [
        (f"model.predict in the script, batch {batch}", float(rate)) for batch, rate in _SPEED.findall(said)
    ]
    rows += [(f"{name} behind its server", float(np.mean(found))) for name, found in capacities.items()]
    table = Table(f"The article's script at {scale.side} x {scale.side}", ("what", "images/s"), tuple(rows))
    measured = {"capacities": capacities, "drop_points": drop, "script": said.splitlines()[-3:]}
    return Part(tuple(checks), (table,), measured)


def _trained(python: Path, scale: ExampleScale, photos: Path, model: Path) -> str:
    """What the script said, kept beside its model; the pictures are written first."""
    log = model.with_suffix(".log")
    if model.is_file() and log.is_file():
        return log.read_text()
    data = fashion_mnist()
    seen = _first(data.train, scale.images)
    write_pictures(photos / "train", seen.inputs, seen.targets.tolist(), data.task.classes)
    unseen = _first(data.test, scale.tests)
    write_pictures(photos / "test", unseen.inputs, unseen.targets.tolist(), data.task.classes)
    say(f"{scale.images} pictures; training by the article's script")
    said = run_script(python, photos / "train", model, side=scale.side, epochs=scale.script_epochs)
    log.write_text(said)
    return said


def _first(split: Split, count: int) -> Split:
    return Split(split.inputs[:count], split.targets[:count])


def own_size(scale: ExampleScale, work: Path, bench: Path) -> Part:
    """The network at the article's own size, by shapes alone: speeds hardly depend on the weights.

    Raises:
        CannotInstall: as `example`.
    """
    python, side = keras_python(bench), scale.own_side
    random = np.random.default_rng(0)
    photos, model = work / f"photos-{side}", work / f"article-{side}.keras"
    pictures = random.integers(0, 256, (200, side, side, 3), dtype=np.uint8)
    labels = np.arange(200) % 4
    write_pictures(photos, pictures, labels.tolist(), ["a", "b", "c", "d"])
    said = run_script(python, photos, model, side=side, epochs=1, batch=16)
    predicted = {int(batch): float(rate) for batch, rate in _SPEED.findall(said)}
    imported = rushhour.import_model(model, data=(pictures, labels), out=work / "own", force=True).bundle
    bundles = {"imported, f32": imported}
    for recipe in ("int8", "prune:0.75,lowrank:0.1,int8"):
        bundles[recipe] = rushhour.compress(
            imported, (pictures, labels), out=work / f"own-{len(bundles)}", recipe=recipe,
            max_accuracy_drop="100%", force=True,
        ).bundle  # fmt: skip
    speeds = {name: _images_per_s(bundle, scale.seconds) for name, bundle in bundles.items()}
    rows = [(f"model.predict, batch {batch}", rate) for batch, rate in predicted.items()]
    rows += [(f"{name}, OpenVINO, all cores", rate) for name, rate in speeds.items()]
    ratio = max(speeds.values()) / predicted[1]
    check = verdict(
        "2.own-size", f"images/s at {side} x {side}, fastest shape against model.predict of one picture", ">= 20",
        ratio, None, 1,
    )  # fmt: skip
    table = Table(f"At the article's own size, {side} x {side}", ("what", "images/s"), tuple(rows))
    return Part((check,), (table,), {"engine": speeds, "predict": predicted})


def import_speed(scale: ExampleScale, work: Path, bench: Path) -> Part:
    """Imports from Keras against the same networks in torch.

    Raises:
        CannotInstall: as `example`.
    """
    from bench.keras_speed import speed  # the module builds torch networks

    work.mkdir(parents=True, exist_ok=True)
    write_models(keras_python(bench), work, scale.speed_side)
    checks, measured = speed(work, scale.speed_side, 3 * scale.rounds, scale.seconds)
    return Part(tuple(checks), (), measured)


def _images_per_s(bundle: Bundle, seconds: float) -> float:
    """Of the engine alone, a stream on each core, at its best batch."""
    precision: Precision = "int8" if bundle.manifest.precision == "int8" else "f32"
    engine = OpenVINOEngine(bundle, EngineConfig("openvino", precision, streams=cores(), max_batch=8))
    try:
        return max(time_service(engine, bundle, limit_s=10.0, seconds_per_size=seconds).throughput)
    finally:
        engine.close()

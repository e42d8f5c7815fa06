"""`make bench-compress`: what compression buys and what it costs, on real data, judged on the compiled artefact.

fashion   the article's network at 28x28 on Fashion-MNIST: pruned, cut to low rank, distilled, quantised
elpv      the same at 96x96 on photographs of solar cells, 18.9M parameters
large     the same at 224x224, 103M parameters; one training
distil    one small network, trained alone and distilled, on all data and on a tenth, several seeds
residual, minilm, shapes   what 8 bits and smaller shapes buy without training

In parts; each stays in the record with the commit that it was measured at. What is trained lies in `.bench/compress`
and is not trained again: a second run only measures. A first one takes about an hour and a half on 2 cores.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
from bench.graphs import Measured, Scale, cut, minilm, residual, shapes, tables
from bench.parts import Part, run_parts, say, scale_of, scale_options
from bench.record import Check, Table, verdict
from scipy import stats

from rushhour.bundle import Bundle, Source
from rushhour.cli.terminal import TerminalProgress
from rushhour.compress import Distil, Recipe, Store, apply, compress, judge, outputs_of
from rushhour.data import Dataset, load
from rushhour.data.augment import Augmentation
from rushhour.engines import EngineConfig
from rushhour.goal import AccuracyBudget
from rushhour.models import source_for
from rushhour.records.compression import Compression
from rushhour.system.machine import cores
from rushhour.train import TrainingJob, TrainSettings, train

RESULTS = Path(__file__).parent / "results" / "compress.json"
BENCH = Path(__file__).resolve().parent.parent / ".bench"
SEED = 0
_BUDGET = AccuracyBudget(0.01)


@dataclasses.dataclass(frozen=True)
class Case:
    """The article's network on some data: how the reference is trained, and how it is made smaller.

    Attributes:
        recipe: after the training; `distil` keeps the small one at the reference's answers.
        smaller: on disk, at least.
        faster: the compiled artefact over the reference in f32 on the same engine, at least.
    """

    name: str
    data: str
    side: int
    training: TrainSettings
    recipe: str
    smaller: float = 40.0
    faster: float = 6.0


_AUGMENT = Augmentation(flip=True, crop=0.05, rotate=5.0)
CASES = {
    case.name: case
    for case in (
        Case(
            *("fashion", "fashion-mnist", 28),
            TrainSettings(epochs=5, seed=SEED),
            "prune:0.5:epochs=1,lowrank:0.1,distil:8,int8",
        ),
        Case(
            *("elpv", "elpv", 96),
            TrainSettings(epochs=20, lr=5e-4, batch=32, augment=_AUGMENT, seed=SEED),
            "prune:0.5:epochs=1,lowrank:0.1,distil:40:batch=32:augment=flip+crop=0.05+rotate=5,bf16",
        ),
        Case(
            *("large", "elpv", 224),
            TrainSettings(epochs=3, lr=5e-4, batch=32, augment=_AUGMENT, seed=SEED),
            "prune:0.5:epochs=1,lowrank:0.05,distil:8:batch=32,int8",
            smaller=49.0,
            faster=10.0,
        ),
    )
}
SMALL = {"width": 0.25, "dense": 64}
"""Of the article's network, in the part on distillation."""


def data_of(case: Case) -> Dataset:
    """Its data; only pictures in files have a size to choose."""
    return load(case.data, size=None if case.data == "fashion-mnist" else (case.side, case.side))


def article_case(case: Case, at: Path, share: float, samples: int) -> Part:
    """Train, compress by the verb, and judge its answer.

    Args:
        case: which.
        at: where everything is kept.
        share: of the epochs that the case says.
        samples: of each part of the data, at most.
    """
    data = cut(data_of(case), samples)
    reference = reference_of(case, data, at, share)
    recipe = _shortened(Recipe.parse(case.recipe), share)
    found = compress(
        reference,
        data,
        [recipe],
        budget=_BUDGET,
        out=at / f"{case.name}-small",
        steps=at / f"{case.name}-steps",
        seed=SEED,
        progress=TerminalProgress(),
    )
    parameters = f"{reference.manifest.parameters:,}"
    title = f"the article's network at {case.side}x{case.side} ({parameters} parameters) on {data.name}"
    return Part(_article_checks(case, title, found), (_stages(title, recipe, found),), found)


def _article_checks(case: Case, title: str, found: Compression) -> tuple[Check, ...]:
    before, after, test = found.reference, found.answer, found.test
    low, high = (100 * end for end in test.drop_interval)
    speed = after.throughput
    fewer, smaller = before.parameters / after.parameters, before.bytes / after.bytes
    drop = 100 * test.drop
    said = "" if found.verdict == "best" else f"{found.verdict}: {found.summary}"
    where = f"on {test.n:,} samples that no decision has seen"
    checks = (
        verdict(f"1.{case.name}.parameters", f"{title}: parameters, before over after", ">= 10", fewer, None, 1),
        verdict(f"1.{case.name}.size", f"{title}: bytes on disk, before over after", f">= {case.smaller:g}", smaller,
                None, 1),
        Check(f"1.{case.name}.drop", f"{title}: fall of {test.metric}, {where}", "points", "<= 1", drop, (low, high),
              test.n, drop <= 1, f"judged by its value; the upper end of its 95% interval is {high:.2f} points"),
    )  # fmt: skip
    what = f"{title}: throughput of the compiled artefact over that of the reference in f32, {found.engine}"
    id, target = f"1.{case.name}.throughput", f">= {case.faster:g}"
    if speed is None:
        return (*checks, Check(id, what, "x", target, 1.0, None, 0, False, said))
    return (*checks, verdict(id, what, target, speed.value, speed.interval, speed.n, why=said))


def _stages(title: str, recipe: Recipe, found: Compression) -> Table:
    rows: list[tuple[str | float | None, ...]] = []
    for stage in (found.reference, *found.attempts[0].stages):
        drop, high = 100 * stage.accuracy.drop, 100 * stage.accuracy.drop_interval[1]
        ratio = stage.throughput
        mark = " (the answer)" if stage == found.answer else ""
        rows.append(
            (
                f"{stage.step or 'as it was'}{mark}",
                float(stage.parameters),
                stage.bytes / 1e6,
                100 * stage.accuracy.value,
                drop if ratio else None,
                high if ratio else None,
                f"{ratio.value:.3g} [{ratio.interval[0]:.3g}, {ratio.interval[1]:.3g}]" if ratio else None,
                stage.samples_per_s,
            )
        )
    metric = found.reference.accuracy.metric
    columns = ("step", "parameters", "MB on disk", f"{metric}, validation (%)", "falls by (points)", "at most",
               "throughput over the reference", "samples/s")  # fmt: skip
    test, before = found.test, found.reference_test
    note = (
        f"`{recipe}`. Each step's compiled artefact on {found.engine}, in interleaved blocks. On the test part "
        f"{metric} is {100 * test.value:.2f}% against {100 * before.value:.2f}%."
    )
    return Table(title, columns, tuple(rows), note)


def distillation(at: Path, share: float, samples: int, most: int) -> Part:
    """The same small network with the same steps, alone and distilled; the teacher is the reference of `fashion`.

    On all of its data, and on a tenth, as of one who got the teacher from others. Alone is the labels' part of the
    same loss; a third training has dropout too, as the network would be trained by itself.

    Args:
        at: where everything is kept.
        share: of the epochs.
        samples: of each part of the data, at most.
        most: seeds of each comparison; at least two, for an interval.
    """
    case = CASES["fashion"]
    whole = cut(data_of(case), samples)
    teacher = reference_of(case, whole, at, share)
    found = source_for("article", whole.train.inputs.shape[1:], whole.task)
    student = Source(found.factory, {**found.arguments, **SMALL})
    store, progress = Store(at / "distil-steps"), TerminalProgress()
    rows: list[tuple[str | float | None, ...]] = []
    checks = []
    for id, part, epochs, seeds in (("tenth", 10, 40, 5), ("all", 1, 8, 3)):
        train_on = whole.train.head(len(whole.train) // part)
        data = dataclasses.replace(whole, train=train_on, fingerprint=f"{whole.fingerprint}/{part}")
        taught = Distil(max(1, round(epochs * share)), student, batch=min(128, len(train_on)))
        labels = msgspec.structs.replace(taught, alpha=0.0)
        variants = (msgspec.structs.replace(labels, dropout=True), labels, taught)
        gains = []
        for seed in range(min(seeds, most)):
            made = [
                bundle
                for step in variants
                for bundle in apply(Recipe((step,)), teacher, data, store, seed=seed, progress=progress)
            ]
            values = [100 * _accuracy(bundle, data) for bundle in made]
            gains.append(values[2] - max(values[:2]))
            rows.append((float(len(train_on)), float(taught.epochs), float(seed), *values, gains[-1]))
            say(f"distil  {len(train_on):,} samples, seed {seed}: alone {values[1]:.2f}, distilled {values[2]:.2f}")
        reach = float(stats.t.ppf(0.975, len(gains) - 1) * np.std(gains, ddof=1) / len(gains) ** 0.5)
        mean, parameters = float(np.mean(gains)), f"{made[-1].manifest.parameters:,}"
        checks.append(
            verdict(
                f"2.gain.{id}",
                f"accuracy that distillation adds to the article's network with {parameters} "
                f"parameters on {len(train_on):,} samples of Fashion-MNIST, test part, paired by seed",
                ">= 0",
                mean,
                (mean - reach, mean + reach),
                len(gains),
                unit="points",
            )
        )
    note = (
        f"All: {taught.schedule} to {taught.lr:g}, batches of {taught.batch}, compiled by OpenVINO. The teacher, with "
        f"{teacher.manifest.parameters:,} parameters, has {100 * _accuracy(teacher, whole):.2f}%. The gain is over the "
        "better of the two that were trained alone."
    )
    columns = ("samples", "epochs", "seed", "alone, dropout (%)", "alone (%)", "distilled (%)", "gain (points)")
    return Part(tuple(checks), (Table("A small network, alone and distilled", columns, tuple(rows), note),), rows)


def graphs(measured: Callable[[Path, Scale], tuple[list[Check], list[Measured]]], at: Path, scale: Scale) -> Part:
    """What needs no training."""
    checks, found = measured(at, scale)
    return Part(tuple(checks), tables(found), found)


def reference_of(case: Case, data: Dataset, at: Path, share: float) -> Bundle:
    """The trained network of a case, or as it was trained before; `share` of the epochs that the case says."""
    settings = msgspec.structs.replace(case.training, epochs=max(1, round(case.training.epochs * share)))
    source = source_for("article", data.train.inputs.shape[1:], data.task)
    job = TrainingJob(source, settings, at / ".checkpoints")
    return train(data, job, out=at / case.name, progress=TerminalProgress())


def _shortened(recipe: Recipe, share: float) -> Recipe:
    return Recipe(
        tuple(
            msgspec.structs.replace(step, epochs=max(1, round(step.epochs * share)))
            if isinstance(step, Distil)
            else step
            for step in recipe.steps
        )
    )


def _accuracy(bundle: Bundle, data: Dataset) -> float:
    config = EngineConfig("openvino", bundle.manifest.precision, cores(), 1, 16)
    return judge(data.task, "test", data.test.targets, outputs_of(bundle, config, data.test), None).value


PARTS = (*CASES, "distil", "residual", "minilm", "shapes")


def main(given: list[str] | None = None) -> int:
    """Measure what is missing, and write the record after each part."""
    arguments = _arguments(given)
    whole = arguments == _arguments(["--only", arguments.only])
    at = arguments.work
    short = (at, arguments.share, arguments.samples)
    scale = scale_of(arguments, Scale)
    measured: dict[str, Callable[[], Part]] = {
        **{name: partial(article_case, case, *short) for name, case in CASES.items()},
        "distil": partial(distillation, *short, arguments.seeds),
        **{part.__name__: partial(graphs, part, at, scale) for part in (residual, minilm, shapes)},
    }
    return run_parts(
        measured,
        Path(arguments.out or (RESULTS if whole else BENCH / "compress-smoke.json")),
        kept=whole,
        only={name for name in arguments.only.split(",") if name},
        timed=set(PARTS),
        seeds={"first": SEED},
    )


def _arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What compression buys and costs, on the compiled artefact.")
    parser.add_argument("--only", default="", help=f"parts, of {','.join(PARTS)}, measured anew; the rest is kept")
    parser.add_argument("--work", type=Path, default=BENCH / "compress", help="where everything trained is kept")
    parser.add_argument("--share", type=float, default=1.0, help="of the epochs of the article's networks")
    parser.add_argument("--seeds", type=int, default=5, help="of each comparison in the part distil, at most")
    scale_options(parser, Scale())
    parser.add_argument("--out", help="the record; by default results/compress.json of a whole run, .bench/ of others")
    return parser.parse_args(given)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)

"""Evaluates bundles beside a reference, all compiled alike: accuracy, speed and size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
from numpy.typing import NDArray

from rushhour.bundle import Bundle
from rushhour.compress.judge import judge, outputs_of, why_outside
from rushhour.compress.quantize import COSTLY, Quantize
from rushhour.compress.recipe import Recipe
from rushhour.compress.run import UNCHANGED
from rushhour.compress.speed import Artefact, Bench, Ratio, Speed
from rushhour.data.dataset import Dataset, Split
from rushhour.engines import EngineConfig, full_range
from rushhour.errors import RushhourError, StorageError
from rushhour.goal import AccuracyBudget
from rushhour.measurement import Accuracy
from rushhour.plan import EngineName
from rushhour.progress import Progress
from rushhour.records.compression import Compression, Confirmation, Factor, Stage
from rushhour.system.machine import cores, describe

_TIE: Final = 0.02
"""A bundle that is slower by less than this, and not shown to be slower, counts as equally fast."""
_BATCH: Final = 16


class Evaluation:
    """Evaluates bundles beside a reference.

    Args:
        reference: the bundle that all recipes begin with.
        dataset: validation judges every stage, test confirms.
        engine: that compiles everything.
        bench: times bundles.
        progress: receives every step.
        budget: the largest accuracy drop allowed.

    Attributes:
        reference_stage: the reference, with its figures.
        reference_test: its accuracy on the test part.
    """

    def __init__(
        self,
        reference: Bundle,
        dataset: Dataset,
        engine: EngineName,
        bench: Bench,
        progress: Progress,
        budget: AccuracyBudget,
    ) -> None:
        self._reference = reference
        self._dataset = dataset
        self._engine = engine
        self._bench = bench
        self._progress = progress
        self._budget = budget
        self._answers: dict[str, NDArray[Any]] = {}
        self._known: dict[tuple[str, str], Stage] = {}
        self.reference_stage = self._stage("", reference, self.accuracy(reference, "validation"))
        self.reference_test = self.accuracy(reference, "test")

    def accuracy(self, bundle: Bundle, part: str) -> Accuracy:
        """Of the compiled bundle on a part of the data, paired with the reference."""
        split: Split = getattr(self._dataset, part)
        if part not in self._answers:
            self._answers[part] = outputs_of(*self._artefact(self._reference), split)
        expected = self._answers[part]
        if bundle is self._reference:
            return judge(self._dataset.task, part, split.targets, expected, None, split.groups)
        outputs = outputs_of(*self._artefact(bundle), split)
        return judge(self._dataset.task, part, split.targets, outputs, expected, split.groups)

    def confirmation(self, place: tuple[int, int], found: Compression) -> Confirmation:
        """The accuracy of a stage on the test part, which no other decision uses."""
        bundle = Bundle.open(Path(found.stage(place).bundle))
        self._progress.start(f"confirm {bundle.manifest.name} on the test part", len(self._dataset.test))
        try:
            accuracy = self.accuracy(bundle, "test")
        except StorageError:
            raise
        except RushhourError as error:
            self._progress.done(str(error), good=False)
            return Confirmation(place, None, str(error))
        why = why_outside(accuracy, self._budget)
        self._progress.done(why or f"{accuracy.metric} {accuracy.value:.4f}", good=not why)
        return Confirmation(place, accuracy, why)

    def stage(self, step: str, bundle: Bundle, before: Bundle) -> Stage:
        """The bundle that a step made from `before`, with all its figures; recipes that begin alike share them."""
        known = self._known.get((bundle.manifest.hash, before.manifest.hash))
        if known is not None:
            return msgspec.structs.replace(known, step=step)
        self._progress.start(f"judge {bundle.manifest.name}")
        accuracy = self.accuracy(bundle, "validation")
        speed = self._speed(self._reference, bundle)
        over_parent = speed if before is self._reference else self._speed(before, bundle)
        stage = msgspec.structs.replace(
            self._stage(step, bundle, accuracy),
            throughput=_factor(speed.throughput),
            over_parent=_factor(over_parent.throughput),
            latency=_factor(speed.latency),
            samples_per_s=speed.samples_per_s,
            slower=_is_slower(speed.throughput) or _is_slower(over_parent.throughput),
            kept=str(bundle.manifest.lineage[-1].settings.get(UNCHANGED, "")) if bundle.manifest.lineage else "",
        )
        self._progress.done(
            f"{accuracy.metric} {accuracy.value:.4f}, {speed.throughput.value:.2f}x the reference's throughput"
        )
        self._known[bundle.manifest.hash, before.manifest.hash] = stage
        return stage

    def with_all_bits(self, recipe: Recipe, stages: Sequence[Stage]) -> Recipe | None:
        """The same recipe with 8-bit weights, if 7 bits cost too much and this machine can judge it; else None."""
        last = recipe.steps[-1]
        if not isinstance(last, Quantize) or last.target != "any" or len(stages) != len(recipe.steps):
            return None
        before = stages[-2] if len(stages) > 1 else self.reference_stage
        cost = stages[-1].accuracy.drop - before.accuracy.drop
        return recipe.for_machines("vnni") if cost > COSTLY and not describe().saturates else None

    def _speed(self, parent: Bundle, child: Bundle) -> Speed:
        return self._bench(self._artefact(parent), {"child": self._artefact(child)})["child"]

    def _artefact(self, bundle: Bundle) -> Artefact:
        precision = bundle.manifest.precision
        return bundle, EngineConfig(self._engine, precision, streams=cores(), threads=1, max_batch=_BATCH)

    def _stage(self, step: str, bundle: Bundle, accuracy: Accuracy) -> Stage:
        manifest = bundle.manifest
        return Stage(
            step=step,
            bundle=str(bundle.path),
            hash=manifest.hash,
            parameters=manifest.parameters,
            bytes=bundle.model_bytes,
            precision=manifest.precision,
            accuracy=accuracy,
            needs="vnni" if full_range(bundle) else "",
        )


def _is_slower(ratio: Ratio) -> bool:
    """Whether it is shown to be slower, or slower by more than a tie."""
    return ratio.high < 1 or ratio.value < 1 - _TIE


def _factor(ratio: Ratio) -> Factor:
    return Factor(ratio.value, ratio.interval, ratio.n)

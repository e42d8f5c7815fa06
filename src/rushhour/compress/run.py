"""Applies a recipe to a bundle: a bundle for each step, kept in a store.

The store keeps every bundle under the key of all that decides its content: the bundle before, the recipe's first
bundle, the step, the data, the seed and the versions of the tools. Nothing is computed twice, and a killed run resumes
inside its step and ends with the same bytes as an undisturbed one.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import torch
from torch import nn

from rushhour.bundle import SAMPLES, Bundle, Source, Step
from rushhour.compress.distil import Distil, distil
from rushhour.compress.judge import named_inputs
from rushhour.compress.lowrank import LowRank, split
from rushhour.compress.prune import Prune, prune
from rushhour.compress.quantize import Quantize, check_plain, quantize
from rushhour.compress.recipe import TRAINS, AnyStep, Recipe, name_of_step, step_text
from rushhour.compress.store import ANSWERS, Store, key_of
from rushhour.compress.weights import ReducedPrecision, compress_weights, halve_weights
from rushhour.data.dataset import Dataset
from rushhour.errors import DataError, ModelError, RushhourError
from rushhour.models import (
    Deployed,
    build,
    export,
    forward_names,
    load_deployed,
    resized,
    tensors_of,
    trusted_factories,
)
from rushhour.progress import Progress
from rushhour.system.faults import summary_of
from rushhour.train.checkpoint import Checkpoint

UNCHANGED: Final = "left as it is"
"""The setting of a step in the lineage that is a result: layers that it could not change, and why."""
_NAMED: Final = 4
"""Layers named with one reason, at most."""


class NothingToDo(ModelError):
    """A step that would not change this network: the other steps of the recipe may still be done."""


def apply(
    recipe: Recipe,
    bundle: Bundle,
    dataset: Dataset,
    store: Store,
    *,
    seed: int = 0,
    max_drop: float | None = None,
    progress: Progress,
    trusted: tuple[str, ...] = (),
    checkpoint_every_s: float = 15.0,
) -> Iterator[Bundle]:
    """The bundle after each step, from the store or made now.

    Equal arguments give equal bundles on equal machines, also if the process was killed in between.

    Args:
        recipe: the steps.
        bundle: what they are applied to, and the teacher of `distil`.
        dataset: to train and calibrate with; labels are used where there are any.
        store: of bundles that were made before.
        seed: of all that is random.
        max_drop: the accuracy budget of int8; see `quantize`.
        progress: receives every step.
        trusted: factories that may be imported besides those of `rushhour.models`.
        checkpoint_every_s: seconds between checkpoints while training; 0 for one after every step.

    Raises:
        DataError: if the data does not fit the bundle, or holds NaN; before any work.
        ModelError: if a step cannot be applied to this network. The bundles before it stay in the store.
        StorageError: if the disk does not take it.
    """
    dataset = dataset.fitted_to(bundle.manifest.signature, bundle.manifest.name)
    check_data(bundle, dataset)
    before, trusted = bundle, trusted_factories(bundle, trusted)
    for step in recipe.steps:
        key = key_of(step, before, bundle, dataset, seed, max_drop, trusted)
        result = store.find(key)
        if result is None:
            run = _StepRun(store, key, dataset, bundle, seed, max_drop, progress, trusted, checkpoint_every_s)
            result = run.result(step, before)
        yield result
        before = result


def check_data(bundle: Bundle, dataset: Dataset) -> None:
    """Raise unless every part of the data fits the bundle and is finite.

    Raises:
        DataError: if not.
    """
    for part in ("train", "validation", "test"):
        split_ = getattr(dataset, part)
        named_inputs(bundle, split_.inputs)
        targets = split_.targets
        if targets.dtype.kind == "f" and not np.isfinite(targets).all():
            row = int((~np.isfinite(targets.reshape(len(targets), -1)).all(axis=1)).argmax())
            raise DataError(
                f"the targets of {dataset.name} hold NaN or infinity",
                f"sample {row} of the {part} part is the first that does",
                "remove or fill such samples",
            )


class _StepRun:
    """One step on one bundle."""

    def __init__(
        self,
        store: Store,
        key: str,
        dataset: Dataset,
        first: Bundle,
        seed: int,
        max_drop: float | None,
        progress: Progress,
        trusted: tuple[str, ...],
        checkpoint_every_s: float,
    ) -> None:
        self._store = store
        self._key = key
        self._out = store.path(key)
        self._dataset = dataset
        self._first = first
        self._seed = seed
        self._max_drop = max_drop
        self._progress = progress
        self._trusted = trusted
        self._every_s = checkpoint_every_s
        self._checkpoints: list[Checkpoint] = []

    def result(self, step: AnyStep, before: Bundle) -> Bundle:
        """The bundle that the step makes, sealed in the store; its checkpoints are deleted.

        Raises:
            RushhourError: whatever goes wrong: a user's network may fail in any way.
        """
        try:
            result = self._apply(step, before)
        except (RushhourError, OSError):
            raise
        except Exception as error:
            raise ModelError(
                f"cannot {step_text(step)} {before.manifest.name}",
                summary_of(error),
                "leave that step out of the recipe",
            ) from error
        for checkpoint in self._checkpoints:
            checkpoint.remove()
        return result

    def _apply(self, step: AnyStep, before: Bundle) -> Bundle:
        match step:
            case Prune():
                return self._prune(step, before)
            case LowRank():
                return self._split(step, before)
            case Distil():
                return self._distil(step, before)
            case Quantize():
                return quantize(
                    before,
                    self._dataset,
                    self._out,
                    calibration=step.calibration,
                    seed=self._seed,
                    max_drop=self._max_drop,
                    target=step.target,
                    progress=self._progress,
                )
            case ReducedPrecision():
                return self._reduce_precision(step, before)

    def _prune(self, step: Prune, before: Bundle) -> Bundle:
        deployed, source = self._open(before, "prune")
        name, whole = before.manifest.name, _count(deployed)
        kept: dict[str, str] = {}
        # pruning takes seconds and is repeated after a kill; its training resumes from a checkpoint
        for iteration in range(step.iterations):
            self._progress.start(f"prune {name}, {iteration + 1} of {step.iterations}")
            kept = prune(deployed, self._dataset, step, iteration, seed=self._seed, name=name)
            unchanged = f"; unchanged: {_listed(kept)}" if kept else ""
            self._progress.done(f"{whole:,} -> {_count(deployed):,} parameters{unchanged}")
            if _count(deployed) == whole:
                continue
            _check_rebuilt(deployed, self._resized(source, deployed), before, self._trusted)
            if step.epochs:
                self._teach(before, deployed, Distil(step.epochs, lr=step.lr), iteration)
        if _count(deployed) == whole:
            raise NothingToDo(
                f"nothing of {name} can be pruned",
                _listed(kept) or "no layer has enough channels that can be removed independently, within its limit",
                "leave the step out; int8, f16 and w8 need no pruning"
                if kept
                else "use a higher ratio, a smaller round_to, or leave the step out",
            )
        notes = {UNCHANGED: _listed(kept)} if kept else {}
        return self._seal(step, before, deployed, self._resized(source, deployed), notes)

    def _split(self, step: LowRank, before: Bundle) -> Bundle:
        deployed, source = self._open(before, "split layers of")
        name, whole = before.manifest.name, _count(deployed)
        self._progress.start(f"low rank: {name}")
        ranks = split(deployed, self._dataset, step, seed=self._seed, name=name)
        if not ranks:
            dense = [layer for layer, module in deployed.network.named_modules() if isinstance(module, nn.Linear)]
            raise NothingToDo(
                f"no dense layer of {name} becomes smaller by splitting",
                f"it has {', '.join(sorted(dense)) or 'none'}; by default those with a quarter of all parameters are "
                "split",
                "name layers, keep less of them, or leave lowrank out of the recipe",
            )
        self._progress.done(f"{whole:,} -> {_count(deployed):,} parameters")
        changed = self._resized(source, deployed, ranks)
        _check_rebuilt(deployed, changed, before, self._trusted)
        return self._seal(step, before, deployed, changed)

    def _resized(self, source: Source, deployed: Deployed, ranks: Mapping[str, int] | None = None) -> Source:
        return resized(source, deployed.network, ranks, self._trusted)

    def _distil(self, step: Distil, before: Bundle) -> Bundle:
        if step.student is None:
            deployed, source = self._open(before, "train")
        else:
            check_plain(before)
            _check_sizes(before, "distil")
            source, manifest = step.student, before.manifest
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self._seed)
                deployed = Deployed(build(source, self._trusted), manifest.task, manifest.preprocessing)
            _check_order(deployed.network, before)
            deployed.settle(before.sample_rows(), manifest.name)
            self._check_export(step, before, deployed, source)
        # a second distillation of the same network gets the samples in another order
        self._teach(self._first, deployed, step, sum(done.what == "distil" for done in before.manifest.lineage))
        return self._seal(step, before, deployed, source)

    def _reduce_precision(self, step: ReducedPrecision, before: Bundle) -> Bundle:
        if step.form == "w8":
            return compress_weights(before, self._out, progress=self._progress)
        if step.form == "f16":
            return halve_weights(before, self._out, progress=self._progress)
        check_plain(before)
        manifest = msgspec.structs.replace(
            before.manifest,
            precision="bf16",
            lineage=(*before.manifest.lineage, self._lineage(step)),
            metrics={},
            files={},
        )
        weights = before.weights
        return Bundle.create(
            self._out,
            manifest,
            lambda file: _copied(before.model, file),
            None if weights is None else lambda file: _copied(weights, file),
            before.samples() if SAMPLES in before.manifest.files else None,
            before.read_tokenizer(),
        )

    def _open(self, before: Bundle, doing: str) -> tuple[Deployed, Source]:
        """The torch module of a bundle, to be changed."""
        _check_sizes(before, doing)
        manifest = before.manifest
        if manifest.precision == "bf16":
            raise ModelError(
                f"cannot {doing} {manifest.name}",
                "it is for computing in bf16, and training would make an f32 bundle of it",
                f"{doing.split()[0]} the bundle that it was made from, and make bf16 the last step",
            )
        if manifest.source is None or before.weights is None or manifest.precision != "f32":
            raise ModelError(
                f"cannot {doing} {manifest.name}",
                "it carries only its graph, and no torch module that could be changed",
                "use int8, f16 or w8, or distil it into a student of your own",
            )
        return load_deployed(before, self._trusted), manifest.source

    def _check_export(self, step: Distil, before: Bundle, deployed: Deployed, source: Source) -> None:
        """Raise before training if the student could not be sealed."""
        at = self._out.with_name(f".{self._out.name}.trial")
        try:
            self._export(step, before, deployed, source, at)
        finally:
            shutil.rmtree(at, ignore_errors=True)

    def _teach(self, teacher: Bundle, deployed: Deployed, step: Distil, part: int) -> None:
        self._checkpoints.append(self._store.checkpoint(self._key, part))
        distil(
            teacher,
            deployed,
            self._dataset,
            step,
            seed=self._seed + part,
            checkpoint=self._checkpoints[-1],
            progress=self._progress,
            trusted=self._trusted,
            checkpoint_every_s=self._every_s,
            answers=self._store.folder / ANSWERS,
        )

    def _seal(
        self, step: AnyStep, before: Bundle, deployed: Deployed, source: Source, notes: Mapping[str, str] | None = None
    ) -> Bundle:
        self._progress.start(f"export {before.manifest.name}")
        result = self._export(step, before, deployed, source, self._out, notes)
        self._progress.done(f"{result.manifest.parameters:,} parameters, {result.model_bytes / 1e6:.2f} MB")
        return result

    def _export(
        self,
        step: AnyStep,
        before: Bundle,
        deployed: Deployed,
        source: Source,
        out: Path,
        notes: Mapping[str, str] | None = None,
    ) -> Bundle:
        manifest = before.manifest
        return export(
            deployed.network,
            name=manifest.name,
            task=manifest.task,
            sample_spec=manifest.signature.inputs,
            preprocessing=manifest.preprocessing,
            source=source,
            lineage=(*manifest.lineage, self._lineage(step, notes)),
            samples=before.sample_rows(),
            path=out,
        )

    def _lineage(self, step: AnyStep, notes: Mapping[str, str] | None = None) -> Step:
        settings: dict[str, int | float | str | bool] = {
            name: value if isinstance(value, int | float | str) else msgspec.json.encode(value).decode()
            for name, value in msgspec.to_builtins(step).items()
            if name != "step" and value not in (None, {}, [], ())
        }
        if isinstance(step, TRAINS):
            data = self._dataset
            settings |= {"dataset": data.name, "fingerprint": data.fingerprint, "marks": data.marks, "seed": self._seed}
        return Step(name_of_step(step), {**settings, **(notes or {}), "key": self._key[:24]})


def _listed(kept: Mapping[str, str]) -> str:
    """Layers and why they keep all their channels, grouped by reason."""
    layers: dict[str, list[str]] = {}
    for layer, why in kept.items():
        layers.setdefault(why, []).append(layer)
    reasons = [
        f"{', '.join(names[:_NAMED])}{f' and {len(names) - _NAMED} more' * (len(names) > _NAMED)} ({why})"
        for why, names in layers.items()
    ]
    return ", ".join(reasons)


def _check_rebuilt(deployed: Deployed, source: Source, before: Bundle, trusted: tuple[str, ...]) -> None:
    """Raise before training unless building from the recorded sizes gives the network that was changed."""
    name, samples = before.manifest.name, tensors_of(before.sample_rows()[:2])
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            again = Deployed(build(source, trusted), before.manifest.task, before.manifest.preprocessing).eval()
            again.meaning = deployed.meaning
            again.network.load_state_dict(deployed.network.state_dict(), strict=True)
            same = torch.allclose(again(*samples), deployed.eval()(*samples), atol=1e-4, equal_nan=True)
    except RushhourError:
        raise
    except Exception:  # a layer may keep sizes of its own
        same = False
    if not same:
        raise ModelError(
            f"cannot record how {name} was changed",
            "the network that its factory builds, brought to the new sizes, answers differently",
            "leave prune and lowrank out of the recipe, or name the layers to keep: prune:0.5:ignored=a+b",
        )


def _check_sizes(before: Bundle, doing: str) -> None:
    """Raise if samples of a bundle differ in size."""
    if before.manifest.signature.dimensions:
        raise ModelError(
            f"cannot {doing} {before.manifest.name}",
            f"its {before.manifest.signature.dimensions[0].name} is open, and training takes samples of one size",
            "use int8, f16 or w8, which need no training; or `rushhour train` first, which fixes the size of its data",
        )


def _check_order(student: nn.Module, teacher: Bundle) -> None:
    """Raise if a student takes the inputs of its teacher in another order: they are given by their place."""
    wanted = [spec.name for spec in teacher.manifest.signature.inputs]
    taken = list(forward_names(student))[: len(wanted)]
    if len(wanted) > 1 and taken != wanted and sorted(taken) == sorted(wanted):
        raise ModelError(
            f"cannot distil {teacher.manifest.name} into this student",
            f"its forward takes {', '.join(taken)}, and the bundle {', '.join(wanted)}",
            "give its forward the same order",
        )


def _count(deployed: Deployed) -> int:
    return sum(parameter.numel() for parameter in deployed.network.parameters())


def _copied(source: Path, to: Path) -> None:
    shutil.copyfile(source, to)

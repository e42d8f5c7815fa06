"""The fingerprint of a training: all that decides its result, by name, and how two of them are compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec
import torch

from rushhour.bundle import WEIGHTS, Bundle, Preprocessing, Source, Step
from rushhour.data.dataset import Dataset
from rushhour.models import Preprocess, Structure, structure_of
from rushhour.records import identity
from rushhour.task import Task
from rushhour.train.job import TrainingJob

_CALIBRATE: Final = "calibrate"
_RESUMABLE: Final = {"epochs", "weights", _CALIBRATE}
"""A checkpoint may be resumed where these differ; weights are compared apart, because they may be unknown."""

_DIGITS: Final = 16
_PLANNED, SEARCH, _MARKS = "planned epochs", "search", "marks"
_LINEAGE_ONLY: Final = {_PLANNED, SEARCH, _MARKS}
"""Settings in the lineage that are no part of the fingerprint: how the training came to its end, and marks of the data,
whose hash is a part already."""


class Fingerprint(msgspec.Struct, frozen=True):
    """All that decides the result of a training.

    Attributes:
        step: of the bundle's lineage.
        facts: name -> value, as JSON has it.
        before: the lineage of the bundle that the training begins with; empty where it begins with fresh weights.
    """

    step: Step
    facts: dict[str, Any]
    before: tuple[Step, ...] = ()

    @property
    def key(self) -> str:
        """SHA-256, equal for trainings of which one can resume from the checkpoint of the other."""
        return identity.key(**{name: value for name, value in self.facts.items() if name not in _RESUMABLE})

    def lineage_step(self, planned: Sequence[tuple[int, int]], search: str = "") -> Step:
        """The step of the lineage, with how the training came to its end.

        Args:
            planned: numbers of epochs that were planned before, each with the step until which it was.
            search: the study that it was a trial of.
        """
        epochs = ", ".join(f"{epochs} until step {step}" for epochs, step in planned)
        ending = {name: text for name, text in ((_PLANNED, epochs), (SEARCH, search)) if text}
        return msgspec.structs.replace(self.step, settings={**self.step.settings, **ending})

    def differs_from(self, bundle: Bundle) -> str:
        """Why a bundle is not of this training, in words; empty if it is."""
        manifest = bundle.manifest
        if not manifest.lineage or manifest.lineage[:-1] != self.before or manifest.source is None:
            return "its lineage, which is not one training" if not self.before else "its lineage"
        before = _facts(manifest.lineage[-1], manifest.source, manifest.task, manifest.preprocessing)
        now = dict(self.facts)
        if not before.get("weights") or not now.get("weights"):
            before["weights"] = now["weights"] = ""
        return ", ".join(identity.changes(before, now))

    def same_weights(self, facts: dict[str, Any]) -> bool:
        """Whether another training's network began with the same weights, as far as both are known."""
        before, now = facts.get("weights"), self.facts.get("weights")
        return not before or not now or before == now


def fingerprint_of(dataset: Dataset, job: TrainingJob) -> Fingerprint:
    """The fingerprint of a training.

    Raises:
        ModelError: if the network cannot be built.
        BundleError: if the bundle that it begins with cannot be opened.
    """
    settings, parallel = job.settings, job.parallel
    prepare = Preprocess(dataset.preprocessing)
    structure = structure_of(job.source, dataset.train.inputs, prepare, seed=settings.seed, trusted=job.trusted)
    shared: dict[str, Any] = {}
    if job.workers > 1 and not parallel.exact:
        shared = {"workers": job.workers, "compression": parallel.compression}
        shared |= {} if parallel.batch_norm == "whole" else {"batch_norm": parallel.batch_norm}
        shared |= {} if parallel.relaxed is None else msgspec.to_builtins(parallel.relaxed)
    chosen = msgspec.structs.asdict(settings.resolved)
    del chosen["channels_last"]  # it only changes rounding: the training may be resumed without it
    chosen["augment"] = None if settings.augment is None else str(settings.augment)
    initial = None if job.initial is None else Bundle.open(job.initial)
    begun = {} if initial is None else {"begins with": initial.manifest.files[WEIGHTS].sha256[:_DIGITS]}
    step = Step(
        "train",
        {
            **{name: value for name, value in chosen.items() if value is not None},
            **shared,
            **begun,
            **({_CALIBRATE: True} if job.calibrate else {}),
            **_named(structure),
            "dataset": dataset.name,
            "samples": len(dataset.train),
            "fingerprint": dataset.fingerprint,
            _MARKS: dataset.marks,
            "torch": str(torch.__version__),
        },
    )
    facts = _facts(step, job.source, dataset.task, dataset.preprocessing)
    return Fingerprint(step, facts, () if initial is None else initial.manifest.lineage)


def _named(structure: Structure) -> dict[str, str]:
    code = " ".join(f"{module}={digest}" for module, digest in structure.code.items())
    named = {"graph": structure.graph, "code": code, "weights": structure.weights}
    return {name: value for name, value in named.items() if value}


def _facts(step: Step, source: Source, task: Task, preprocessing: Preprocessing) -> dict[str, Any]:
    """By name: what a bundle says of itself too, so that both can be compared."""
    return {
        **{name: value for name, value in step.settings.items() if name not in _LINEAGE_ONLY},
        "weights": step.settings.get("weights", ""),
        "factory": source.factory,
        "arguments": source.arguments,
        "task": msgspec.to_builtins(task.uncalibrated),
        "preprocessing": msgspec.to_builtins(preprocessing),
    }

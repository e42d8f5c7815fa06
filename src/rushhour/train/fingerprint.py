"""What a training is made of: all that decides its result, by name, and how that is compared with another's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec
import torch

from rushhour.bundle import Bundle, Preprocessing, Source, Step
from rushhour.data.dataset import Dataset
from rushhour.models import Preprocess, Structure, structure_of
from rushhour.records import identity
from rushhour.task import Task
from rushhour.train.parallel.division import Division
from rushhour.train.settings import TrainSettings

_GOES_ON: Final = {"epochs", "weights"}
"""A checkpoint is gone on from where these differ; whether weights do is looked at apart, as they may be unknown."""

_PLANNED, SEARCH, _MARKS = "planned epochs", "search", "marks"
_BESIDE: Final = {_PLANNED, SEARCH, _MARKS}
"""In the lineage: how the training came to its end, which is no part of what it was made of, and what the data's hash
says already."""


class Made(msgspec.Struct, frozen=True):
    """What a training is made of.

    Attributes:
        step: as the bundle's lineage tells it.
        facts: all of it, by name, in values that JSON has.
    """

    step: Step
    facts: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """The same for trainings of which one can go on where the other stopped."""
        return identity.key(**{name: value for name, value in self.facts.items() if name not in _GOES_ON})

    def told(self, planned: Sequence[tuple[int, int]], search: str = "") -> Step:
        """The lineage's step, with how the training came to its end.

        Args:
            planned: numbers of epochs that it was planned for before, each with the step until which it was.
            search: the study that it was a trial of.
        """
        epochs = ", ".join(f"{epochs} until step {step}" for epochs, step in planned)
        beside = {name: said for name, said in ((_PLANNED, epochs), (SEARCH, search)) if said}
        return msgspec.structs.replace(self.step, settings={**self.step.settings, **beside})

    def differs_from(self, bundle: Bundle) -> str:
        """In words, why a bundle is not this training's; empty if it is."""
        manifest = bundle.manifest
        if len(manifest.lineage) != 1 or manifest.source is None:
            return "how it was made, which was not by training alone"
        before = _facts(manifest.lineage[0], manifest.source, manifest.task, manifest.preprocessing)
        now = dict(self.facts)
        if not before.get("weights") or not now.get("weights"):
            before["weights"] = now["weights"] = ""
        return ", ".join(identity.changes(before, now))

    def same_weights(self, facts: dict[str, Any]) -> bool:
        """Whether another training's network began with the same weights, as far as both are known."""
        before, now = facts.get("weights"), self.facts.get("weights")
        return not before or not now or before == now


def made_of(
    dataset: Dataset,
    source: Source,
    settings: TrainSettings,
    division: Division,
    workers: int,
    trusted: tuple[str, ...],
) -> Made:
    """What a training is made of; arguments are those of `train`.

    Raises:
        ModelError: if the network cannot be built.
    """
    prepare = Preprocess(dataset.preprocessing)
    structure = structure_of(source, dataset.train.inputs, prepare, seed=settings.seed, trusted=trusted)
    shared: dict[str, Any] = {}
    if workers > 1 and not division.exact:
        shared = {"workers": workers, "compression": division.compression}
        shared |= {} if division.batch_norm == "whole" else {"batch_norm": division.batch_norm}
        shared |= {} if division.relaxed is None else msgspec.to_builtins(division.relaxed)
    chosen = msgspec.structs.asdict(settings.resolved)
    del chosen["channels_last"]  # it rounds otherwise and is the same training, which may go on without it
    chosen["augment"] = None if settings.augment is None else str(settings.augment)
    step = Step(
        "train",
        {
            **{name: value for name, value in chosen.items() if value is not None},
            **shared,
            **_told(structure),
            "dataset": dataset.name,
            "samples": len(dataset.train),
            "fingerprint": dataset.fingerprint,
            _MARKS: dataset.marks,
            "torch": str(torch.__version__),
        },
    )
    return Made(step, _facts(step, source, dataset.task, dataset.preprocessing))


def _told(structure: Structure) -> dict[str, str]:
    code = " ".join(f"{module}={digest}" for module, digest in structure.code.items())
    told = {"graph": structure.graph, "code": code, "weights": structure.weights}
    return {name: value for name, value in told.items() if value}


def _facts(step: Step, source: Source, task: Task, preprocessing: Preprocessing) -> dict[str, Any]:
    """All of it, by name: what a bundle says of itself, so that it can be compared with what is asked for."""
    return {
        **{name: value for name, value in step.settings.items() if name not in _BESIDE},
        "weights": step.settings.get("weights", ""),
        "factory": source.factory,
        "arguments": source.arguments,
        "task": msgspec.to_builtins(task),
        "preprocessing": msgspec.to_builtins(preprocessing),
    }

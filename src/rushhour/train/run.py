"""One training run: its network is inspected and prepared, and its steps are taken in this process or in several."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from rushhour.bundle import Bundle, Source, TensorSpec
from rushhour.data.dataset import Dataset
from rushhour.errors import DataError, ModelError
from rushhour.models import Deployed, build
from rushhour.models.deployed import Meaning, load_weights
from rushhour.models.structure import seeded
from rushhour.progress import Progress, Silent
from rushhour.records.curves import Epoch
from rushhour.system.storage import write_whole
from rushhour.task import Task
from rushhour.train.checkpoint import Checkpoint, shapes
from rushhour.train.feed import Feed
from rushhour.train.fingerprint import Fingerprint
from rushhour.train.job import TrainingJob
from rushhour.train.loop import TrainingLoop
from rushhour.train.memory_format import NOTE, MemoryFormat, choose
from rushhour.train.parallel import (
    Layer,
    ParallelPlan,
    choose_plan,
    record_layers,
    record_step,
    run_on_leader,
    with_lookups,
)
from rushhour.train.parallel_stepper import ParallelStepper
from rushhour.train.preflight import Steps, inspect
from rushhour.train.samples import check_data, sample_spec
from rushhour.train.stepper import SingleStepper, Stepper

PARALLEL_PLAN = "workers.json"
"""The file of the parallel plan: in the folder beside the checkpoint, and in that of the tracking."""

_WARM_UP, _TIMED = 2, 7
"""Steps before and in the measurement of the time of a step."""

_OURS = "rushhour.models:"
_EXPORTABLE: list[tuple[Source, tuple[TensorSpec, ...], Task]] = []
"""Networks that this process has exported on trial: a search trains the same one many times."""


class TrainingRun(msgspec.Struct, frozen=True):
    """One training, as it can be pickled for another process; called there, it does a worker's part of it.

    Attributes:
        job: what is trained, and how.
        fingerprint: of the training.
        meaning: of the network's outputs; None until `inspected`.
    """

    job: TrainingJob
    fingerprint: Fingerprint
    meaning: Meaning | None = None

    def inspected(self, dataset: Dataset, progress: Progress, *, export: bool = True) -> TrainingRun:
        """The same with the meaning of the network's outputs.

        Args:
            export: of a network that is not of `rushhour.models`, try the export too.

        Raises:
            RushhourError: if the network cannot be trained, exported or served; before any work.
        """
        job = self.job
        settings, batch = job.settings, min(job.settings.batch, len(dataset.train))
        if job.workers > batch:
            raise ModelError(
                f"cannot train on {job.workers} workers",
                f"a step has {batch} samples, and each worker needs one",
                "use fewer workers, or a larger batch",
            )
        check_data(dataset, settings)
        sample = self.sample(dataset)
        is_foreign = not job.source.factory.startswith(_OURS)
        tried = (job.source, sample, dataset.task)
        if is_foreign:
            progress.start(f"check {job.model}")
        with torch.random.fork_rng(devices=[]):
            found = inspect(
                lambda other: self._built(dataset, other=other),
                dataset,
                sample,
                settings.resolved,
                Steps(
                    batch,
                    settings.accumulate,
                    job.workers,
                    whole_batch_norm=job.parallel.batch_norm == "whole" and job.parallel.relaxed is None,
                ),
                name=job.model,
                export=export and is_foreign and tried not in _EXPORTABLE,
            )
        if export and is_foreign:
            _EXPORTABLE.append(tried)
        if is_foreign or found.notes:
            progress.done("; ".join(found.notes) or "it can be trained, exported and served")
        return msgspec.structs.replace(self, meaning=found.meaning)

    def sample(self, dataset: Dataset) -> tuple[TensorSpec, ...]:
        """One sample on the wire, each input: as of the data, or of the bundle that the training begins with.

        Raises:
            DataError: if the data is not as that bundle takes it.
        """
        specs = sample_spec(dataset)
        if self.job.initial is None:
            return specs
        own = Bundle.open(self.job.initial).manifest.signature.inputs
        if [(each.dtype, each.shape) for each in own] != [(each.dtype, each.shape) for each in specs]:
            sample, taken = (" and ".join(f"{each.dtype}{each.shape}" for each in some) for some in (specs, own))
            raise DataError(
                f"{dataset.name} does not fit {self.job.initial}",
                f"a sample is {sample}, and the model takes {taken}",
                "give data that it was made for",
            )
        return own

    def in_this_process(
        self,
        dataset: Dataset,
        progress: Progress,
        tracking: bool = True,
        on_epoch: Callable[[Epoch], None] | None = None,
    ) -> dict[str, Tensor]:
        """Train on one worker, from the last checkpoint; return the weights to be sealed.

        Args:
            tracking: whether curves are kept.
            on_epoch: see `TrainingLoop`.
        """
        form, deployed, stepper = self._single(dataset, progress)
        with form.active():
            return self._loop(
                dataset, stepper, deployed.head, shapes(deployed.network.state_dict()), form, progress, on_epoch
            ).run(self.job.tracking if tracking else None)

    def step_seconds(self, dataset: Dataset) -> float:
        """The median seconds of a few steps on one worker."""
        settings = self.job.settings.resolved
        form, _, stepper = self._single(dataset, Silent())
        optimizer = settings.make_optimizer(stepper.parameters())
        taken = []
        with self._feed(dataset, (0, 1)) as feed, form.active():
            for batch in itertools.islice(feed.epoch(0), _WARM_UP + _TIMED):
                began = time.perf_counter()
                stepper.step(batch)
                optimizer.step()
                taken.append(time.perf_counter() - began)
        return statistics.median(taken[_WARM_UP:] or taken)

    def __call__(self, dataset: Dataset, progress: Progress) -> None:
        """Do the part of this worker, one of the default group of processes."""
        record_step(0)
        form = run_on_leader(lambda: self._format(dataset, self._prepared(dataset), progress))
        with form.active():
            self._share(dataset, form, progress)

    def checkpoint(self) -> Checkpoint:
        """The checkpoint of this training."""
        return Checkpoint(self.job.work, self.fingerprint.key, self.fingerprint.facts)

    def folder(self) -> Path:
        """The folder beside the checkpoint, for all else that several workers need."""
        return self.checkpoint().path.with_suffix("")

    def _single(self, dataset: Dataset, progress: Progress) -> tuple[MemoryFormat, Deployed, SingleStepper]:
        settings = self.job.settings.resolved
        form = self._format(dataset, self._prepared(dataset), progress)
        deployed = self._prepared(dataset)  # built anew: the first may have kept something of the samples it was given
        form.apply(deployed)
        stepper = SingleStepper(deployed, dataset.task, accumulate=settings.accumulate, bf16=bool(settings.bf16))
        return form, deployed, stepper

    def _share(self, dataset: Dataset, form: MemoryFormat, progress: Progress) -> None:
        job = self.job
        size = min(job.settings.batch, len(dataset.train))
        plan = choose_plan(
            job.source,
            sample_spec(dataset),
            dataset.task.outputs if dataset.task.places is None else dataset.task.raw_shape(dataset.sample_shape),
            settings=job.parallel,
            batch=size,
            trusted=job.trusted,
            path=self.folder() / PARALLEL_PLAN,
            progress=progress,
            looked_up=lambda layers: self._looked_up(dataset, layers),
            prepare=lambda plan: self._trial_step(dataset, plan, form),
            steps=job.settings.epochs * (len(dataset.train) // size),
        )
        deployed = self._prepared(dataset)
        form.apply(deployed)
        expected, head = shapes(deployed.network.state_dict()), deployed.head
        record_layers(deployed.network)
        stepper = ParallelStepper(deployed, dataset.task, plan, settings=job.settings.resolved, parallel=job.parallel)
        del deployed  # frees the parts that other workers hold
        if stepper.is_leader and job.tracking is not None:
            write_whole(job.tracking.folder / PARALLEL_PLAN, msgspec.json.format(msgspec.json.encode(plan)))
        self._loop(dataset, stepper, head, expected, form, progress, None).run(job.tracking)

    def _looked_up(self, dataset: Dataset, layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
        """A layer table with the rows that the first batch looks up in embedding tables."""
        deployed = self._prepared(dataset)
        with self._feed(dataset, (0, 1)) as feed:
            batch = next(feed.epoch(0))
        return with_lookups(layers, deployed.network, deployed.prepared(*batch.inputs))

    def _feed(self, dataset: Dataset, part: tuple[int, int]) -> Feed:
        settings = self.job.settings
        return Feed(
            dataset.train,
            seed=settings.seed,
            batch=settings.batch,
            augment=settings.augment,
            places=dataset.task.places,
            part=part,
        )

    def _trial_step(self, dataset: Dataset, plan: ParallelPlan, form: MemoryFormat) -> Callable[[], object]:
        """The training's first step by a plan, which may be repeated, with a network of its own."""
        settings = self.job.settings
        deployed = self._prepared(dataset)
        form.apply(deployed)
        stepper = ParallelStepper(deployed, dataset.task, plan, settings=settings.resolved, parallel=self.job.parallel)
        optimizer = settings.make_optimizer(stepper.parameters())
        with self._feed(dataset, stepper.part) as feed:
            batch = next(feed.epoch(0))

        def step() -> None:
            stepper.step(batch)
            if settings.clip is not None:
                stepper.clip(settings.clip)
            optimizer.step()

        return step

    def _built(self, dataset: Dataset, *, other: bool = False) -> Deployed:
        """The network as its factory leaves it, by the seed of the training or by another; with the initial weights."""
        with seeded(self.job.settings.seed + other):
            network = build(self.job.source, self.job.trusted)
            state = torch.get_rng_state()
        torch.set_rng_state(state)  # lazy layers draw their weights later
        if self.job.initial is not None:
            load_weights(network, Bundle.open(self.job.initial))
        return Deployed(network, dataset.task, dataset.preprocessing)

    def _prepared(self, dataset: Dataset) -> Deployed:
        """The network as training begins with it."""
        deployed = self._built(dataset)
        deployed.meaning = self.meaning or "logits"
        if any(map(is_lazy, (*deployed.network.parameters(), *deployed.network.buffers()))):
            deployed.answer_shape(np.array(dataset.train.inputs[:2]), self.job.model)
        return deployed.train()

    def _format(self, dataset: Dataset, deployed: Deployed, progress: Progress) -> MemoryFormat:
        """The memory format of pictures: that of the checkpoint, or else chosen now, with the reason as progress."""
        settings, size = self.job.settings, min(self.job.settings.batch, len(dataset.train))
        form = choose(
            deployed,
            dataset.train.inputs[: max(2, size // (self.job.workers * settings.accumulate))],
            bf16=bool(settings.resolved.bf16),
            steps=settings.epochs * (len(dataset.train) // size),
            allowed=settings.channels_last,
            kept=self.checkpoint().notes().get(NOTE),
        )
        if form.why:
            progress.start("choose a memory format")
            progress.done(str(form))
        return form

    def _loop(
        self,
        dataset: Dataset,
        stepper: Stepper,
        head: nn.Module,
        expected: dict[str, tuple[int, ...]],
        form: MemoryFormat,
        progress: Progress,
        on_epoch: Callable[[Epoch], None] | None,
    ) -> TrainingLoop:
        return TrainingLoop(
            dataset,
            self.job.settings,
            stepper,
            self.checkpoint(),
            progress,
            model=self.job.model,
            head=head,
            expected=expected,
            form=form,
            checkpoint_every_s=self.job.checkpoint_every_s,
            on_epoch=on_epoch,
        )

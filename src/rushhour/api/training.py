"""The verb `train`: a network and data become a trained bundle."""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from rushhour.api.importing import Known, brought_of, imported_for
from rushhour.api.inputs import REFERENCES, load_data, read_logs, read_model, source_of
from rushhour.api.settings import fitted, settings_of
from rushhour.api.values import StrPath, check_choice, check_name, read_path
from rushhour.bundle import Bundle, Source, check_folder, is_bundle
from rushhour.errors import GoalError, ModelError
from rushhour.progress import Progress, Silent
from rushhour.system.extras import require
from rushhour.system.storage import try_building, try_folder

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from rushhour.api.inputs import Data, GivenColumns
    from rushhour.data import Dataset
    from rushhour.data.augment import Augmentation
    from rushhour.models.doors import Brought
    from rushhour.train import ParallelSettings
    from rushhour.train.search import SearchResult


_FINE = 0.1
"""Share of the default learning rate with which a network with weights of its own is trained further."""


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """A finished training. It is a path too: that of its bundle.

    Attributes:
        bundle: the trained network: ONNX, safetensors and JSON.
        logs: the folder of its curves, from which `rushhour.report` draws a page.
        plan: how several workers shared the network; None on one worker.
        search: the trials, where hyper-parameters were searched.
    """

    bundle: Bundle
    logs: Path
    plan: dict[str, Any] | None = None
    search: SearchResult | None = None

    def __fspath__(self) -> str:
        return str(self.bundle.path)

    def __repr__(self) -> str:
        """Short, for a notebook."""
        manifest = self.bundle.manifest
        return f"<TrainResult {manifest.name}: {manifest.parameters:,} parameters, {self.bundle.path}>"

    def as_dict(self) -> dict[str, Any]:
        """What `rushhour train --json` writes: the bundle's manifest, the workers' plan and the search."""
        plan = {} if self.plan is None else {"plan": self.plan}
        search = {} if self.search is None else {"search": msgspec.to_builtins(self.search)}
        return {**msgspec.to_builtins(self.bundle.manifest), **plan, **search}


def train(
    model: StrPath | Source | Callable[..., Any],
    data: StrPath | Dataset | tuple[ArrayLike | Mapping[str, ArrayLike], ArrayLike] | Mapping[str, ArrayLike],
    *,
    out: StrPath,
    epochs: int | None = None,
    batch: int | None = None,
    lr: float | None = None,
    seed: int = 0,
    optimizer: Literal["adam", "adamw", "sgd"] = "adam",
    schedule: Literal["one-cycle", "cosine", "constant", "step"] = "one-cycle",
    warmup: float = 0.05,
    weight_decay: float = 0.0,
    momentum: float = 0.9,
    clip: float | None = None,
    accumulate: int = 1,
    ema: float | None = None,
    patience: int | None = None,
    augment: str | Augmentation | None = None,
    bf16: bool | None = None,
    calibrate: bool = False,
    channels_last: bool = True,
    workers: int = 1,
    parallel: Literal["auto", "data", "model", "pipeline", "hybrid", "sharded", "tables"] | ParallelSettings = "auto",
    search: int | None = None,
    pruner: Literal["median", "hyperband"] = "median",
    logs: StrPath | None = None,
    tensorboard: bool = True,
    wandb: str | None = None,
    task: str | None = None,
    columns: GivenColumns = None,
    size: str | tuple[int, int] | None = None,
    skip_corrupt: bool = False,
    trust: str | Sequence[str] = (),
    name: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> TrainResult:
    """Train a network and write it as a bundle: ONNX, safetensors and JSON, which open without Rushhour too.

    An interrupted training continues at its last checkpoint when it is called again with the same arguments, and ends
    with the same weights.

        rushhour.train("article", "photos/", out="runs/photos", size="224x224", augment="flip,crop", epochs=20)
        rushhour.train(mynet.build, (x, y), out="runs/mine", optimizer="adamw", weight_decay=0.01, patience=5)

    Args:
        model: `article`, `residual`, `signal`, `kernels`, `mlp`, `tabular`, `deepfm`, `unet`, `detector` or `tagger`
            (reference networks), `module:factory`, or the factory itself: a function or class in a module that returns
            a `torch.nn.Module`. Its parameters `classes` and `input` get the number of outputs and the shape of a
            sample. A model from elsewhere, as of `rushhour.import_model`, or a bundle that was imported from one, is
            trained further from its own weights, at a tenth of the learning rate.
        data: `fashion-mnist`, a folder with one folder of pictures per class, a `.npz` file, a `.csv` or `.parquet`
            table, `module:factory`, a `Dataset`, arrays `(x, y)`, or arrays by name as in a `.npz` file:
            `{"x_train": ..., "y_train": ..., ...}`, of several inputs `{"user": ..., "item": ..., "y": ...}`;
            or a table of pandas, a `Dataset` or `DataLoader` of torch, or a dictionary of them: `{"train": ...,
            "validation": ...}`.
        out: the bundle's folder.
        epochs: passes over the training data; by default 3, and more of little data: enough for 600 steps.
        batch: samples in an optimizer step; by default 128, and less of little data.
        lr: the largest learning rate; by default 0.002, and less for smaller batches.
        seed: of weights, dropout, the order of the data and augmentation.
        optimizer: `adam`, `adamw` or `sgd` (with Nesterov momentum).
        schedule: of the learning rate.
        warmup: share of the steps in which `cosine` rises.
        weight_decay: of all weights.
        momentum: of `sgd`.
        clip: bound on the norm of the gradient.
        accumulate: parts of a batch, one after another, to need less memory.
        ema: decay per step of an exponential moving average of the weights, for example 0.999.
        patience: epochs without a better validation metric after which training ends; the best epoch is kept.
        augment: random changes of pictures: `flip,crop,rotate=10,scale=0.1,colour=0.2`.
        bf16: compute in bfloat16; by default where the CPU has instructions for it.
        calibrate: divide a classifier's logits by the temperature that fits the validation part, in the served graph,
            so that its probabilities agree with shares of right answers.
        channels_last: pictures may lie channels-last in memory, where that is safe and faster.
        workers: processes that share every batch. Any number continues a training that another number began.
        parallel: how the workers share the network: `auto` takes the fastest plan for this machine.
            `rushhour.train.ParallelSettings` also have backend, memory, gradient compression, local SGD and DiLoCo.
        search: train so many times with different hyper-parameters, and keep the best.
        pruner: ends unpromising trials of the search early.
        logs: folder of the curves; `OUT-training` by default.
        tensorboard: write TensorBoard files too.
        wandb: the project in Weights & Biases to track to; offline without a key.
        task: what targets are, where that cannot be seen from them: `classification` (one label of several),
            `multilabel` (each label holds or not), `ranking` (0 or 1, judged by AUC), `regression` (values),
            `segmentation`, `detection`, `tagging` (a class for each token), or a class of your own, `module:Class`: see
            `rushhour.task.Kind`.
        columns: what is what in a table: `{"target": "sold", "group": "customer", "time": "day"}`, see
            `rushhour.data.Columns`; or the name of the target alone.
        size: height and width that pictures of a folder are brought to: `224x224` or `(224, 224)`.
        skip_corrupt: leave out pictures that cannot be read instead of raising.
        trust: the path of a model from elsewhere, where reading it runs its code.
        name: the model's name, which it keeps through compression and tuning; by default that of the folder `out`.
        force: replace another bundle at `out`, or the checkpoint of another training.
        progress: gets the progress, and notes on what was left out or chosen.

    Raises:
        RushhourError: if the model, the data or a setting cannot be used; the message says what to do.
    """
    require("train")
    from rushhour.train import PARALLEL_PLAN, ParallelSettings, Tracking, TrainingJob
    from rushhour.train import train as train_network
    from rushhour.train.parallel import under_torchrun
    from rushhour.train.search import search as search_hyper_parameters

    settings: dict[str, Any] = {
        "epochs": epochs, "batch": batch, "lr": lr, "seed": seed, "optimizer": optimizer, "schedule": schedule,
        "warmup": warmup, "weight_decay": weight_decay, "momentum": momentum, "clip": clip, "accumulate": accumulate,
        "ema": ema, "patience": patience, "augment": augment, "bf16": bf16, "channels_last": channels_last,
    }  # fmt: skip
    progress, path = progress or Silent(), read_path(out)
    try_building(path)
    folder = read_logs(logs, path, "training")
    try_folder(folder)
    check_choice("pruner", pruner, ("median", "hyperband"))
    if isinstance(parallel, str) or parallel is None:
        check_choice("parallel", parallel, ("auto", "data", "model", "pipeline", "hybrid", "sharded", "tables"))
    if not isinstance(workers, int) or isinstance(workers, bool) or workers < 1:
        raise GoalError(f"cannot train on {workers!r} workers", "their number is a whole number above 0", "change it")
    if search is not None and workers > 1:
        raise GoalError(
            f"cannot search on {workers} workers",
            "a trial is ended early by the process it runs in",
            "leave out --workers",
        )
    shared = ParallelSettings(parallel) if isinstance(parallel, str) else parallel
    torchrun = under_torchrun()
    workers = int(os.environ["WORLD_SIZE"]) if torchrun else workers
    if workers == 1 and not shared.exact:
        raise GoalError(
            "one worker has nothing to exchange",
            "--compress-gradients, --batch-norm local, --local-sgd and --diloco are for several workers",
            "set --workers, or leave them out",
        )
    if calibrate and search is not None:
        raise GoalError(
            "cannot calibrate a search", "it compares networks, and a temperature is of one", "leave out --calibrate"
        )
    settings_of(settings)  # errors in them are raised before data is loaded
    name = check_name(name)
    check_folder(path)  # before pictures are decoded for minutes
    begin = _imported(model)
    if begin is not None and search is not None:
        raise GoalError(
            "cannot search from the weights of an imported model",
            "a search trains networks from fresh weights",
            "leave out --search",
        )
    source: Source | Bundle | None
    if begin is None:
        read = model if isinstance(model, str) and model in REFERENCES else read_model(model)
        dataset = load_data(data, progress, read, skip_corrupt=skip_corrupt, size=size, task=task, columns=columns)
        source, trusted = source_of(read, dataset)
    else:
        reading: dict[str, Any] = {"skip_corrupt": skip_corrupt, "size": size, "task": task, "columns": columns}
        begin, dataset = _begun(begin, data, path, progress, Known(trust), **reading)
        source, trusted = begin.manifest.source, ()
        name = name or begin.manifest.name
    assert isinstance(source, Source)
    settings = fitted(
        settings, len(dataset.train), progress, workers=workers, largest=dataset.fitting_batch(sys.maxsize)
    )
    if begin is not None and lr is None:
        settings["lr"] = float(f"{settings['lr'] * _FINE:.2g}")
        progress.note(f"it begins with the weights of {begin.manifest.name}: learning rate {settings['lr']:g}")
    chosen = settings_of(settings)
    tracking = Tracking(folder, tensorboard=tensorboard, wandb=wandb)
    if search is None:
        job = TrainingJob(
            source,
            chosen,
            path.with_name(f".{path.name}.checkpoints"),
            trusted,
            tracking=tracking,
            workers=workers,
            parallel=shared,
            initial=None if begin is None else begin.path,
            calibrate=calibrate,
        )
        bundle = train_network(dataset, job, out=path, progress=progress, name=name, force=force)
        shutil.rmtree(_place(path), ignore_errors=True)
        plan = msgspec.json.decode((folder / PARALLEL_PLAN).read_bytes()) if torchrun or workers > 1 else None
        return TrainResult(bundle, folder, plan)
    bundle, found = search_hyper_parameters(
        dataset,
        source,
        chosen,
        trials=search,
        pruner=pruner,
        out=path,
        work=folder,
        progress=progress,
        trusted=trusted,
        tracking=tracking,
        name=name,
        force=force,
    )
    return TrainResult(bundle, folder, search=found)


def _imported(model: Any) -> Brought | Bundle | None:
    """A model from elsewhere, or a bundle that was imported from one; None where the model is something else.

    Raises:
        ModelError: if it is another bundle.
        BundleError: if it is a damaged one.
    """
    if (brought := brought_of(model)) is not None:
        return brought
    if not isinstance(model, Bundle):
        is_place = isinstance(model, str | os.PathLike) and model not in REFERENCES
        if not (is_place and is_bundle(read_path(model))):
            return None
    from rushhour.models import is_imported

    bundle = model if isinstance(model, Bundle) else Bundle.open(read_path(model))
    if is_imported(bundle):
        return bundle
    raise ModelError(f"{model} is a bundle", "it is trained already", "name a network: article, module:factory")


def _begun(
    begin: Brought | Bundle, data: Data, path: Path, progress: Progress, known: Known, **reading: Any
) -> tuple[Bundle, Dataset]:
    """The bundle that a training begins with, and the data scaled as it is.

    Raises:
        ModelError: if a model from elsewhere cannot be trained.
    """
    if isinstance(begin, Bundle):
        dataset = load_data(data, progress, begin, **reading)
        return begin, dataclasses.replace(dataset, preprocessing=begin.manifest.preprocessing)
    result, dataset = imported_for(begin, data, _place(path), progress, known=known, one_size=True, **reading)
    if result.understood.why_untrainable:
        raise ModelError(
            f"cannot train {begin.shown}",
            result.understood.why_untrainable,
            "import it to serve it, or name its torch module as module:factory",
        )
    return result.bundle, dataset


def _place(path: Path) -> Path:
    """Where a model file is imported to, until its training is done."""
    return path.with_name(f".{path.name}.imported")

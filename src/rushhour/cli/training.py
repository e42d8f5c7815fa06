"""`rushhour train` at work: its options, one training or a search for the best, and what is said of it at the end."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
import msgspec
from rich.console import Console
from rich.table import Table

from rushhour.cli.places import Place
from rushhour.cli.terminal import TerminalProgress
from rushhour.errors import GoalError, ModelError
from rushhour.system.storage import try_folder

if TYPE_CHECKING:
    from rushhour.bundle import Bundle, Source
    from rushhour.data import Dataset, Kind
    from rushhour.task import Task
    from rushhour.train import ParallelSettings, TrainSettings
    from rushhour.train.search import Found

# Only what options need is imported here; training takes seconds to import.

C = TypeVar("C", bound=Callable[..., Any])

_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,62}[A-Za-z0-9])?")

_MOST_CORRUPT = 5
"""Corrupt pictures that are named, at most."""
_SMALLEST_BATCH, _BATCHES = 8, 12
"""By default: samples in a batch at least, and batches in an epoch where data is too little for those of usual size."""
_STEPS, _MOST_EPOCHS = 600, 100
"""By default: steps of a training at least, as far as so many epochs give them."""


_SHARING = ("parallel", "backend", "memory", "compress_gradients", "batch_norm", "shared_memory", "local_sgd", "diloco")
"""Options on how workers share a training."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a training came to: its bundle, the search if it was one, the plan of its workers if there were several."""

    bundle: Bundle
    found: Found | None = None
    plan: dict[str, Any] | None = None


def progress_of_training() -> TerminalProgress:
    """Progress in the terminal; of all the workers that torchrun starts, only the first one's is seen."""
    return TerminalProgress(Console(stderr=True, quiet=os.environ.get("RANK", "0") != "0"))


def data_options(command: C) -> C:
    """Those on how data is read, of every command that reads some."""
    for option in (
        click.option("--task", "kind", type=click.Choice(["classification", "regression"]),
                     help="What whole numbers in a .npz file are: labels of classes, or values."),
        click.option("--skip-corrupt", is_flag=True, help="Leave out pictures that cannot be read, and name them."),
        click.option("--size", metavar="HxW",
                     help="Bring the pictures of a folder to this size; a bundle knows its own."),
    ):  # fmt: skip
        command = option(command)
    return command


def basic_options(command: C) -> C:
    """Those of every command that trains."""
    for option in (
        click.option("--channels-last/--no-channels-last", default=True, show_default=True,
                     help="Pictures may lie channels-last in memory, where that is safe and faster."),
        click.option("--seed", default=0, show_default=True, help="Of the weights and the order of the data."),
        click.option("--batch", type=int, help="Samples in one training step; 128 by default, fewer of little data."),
        click.option("--lr", type=float, help="The largest learning rate; 0.002 by default, less for smaller batches."),
        click.option("--epochs", type=int,
                     help="Passes over the training data; 3 by default, and of little data enough for 600 steps."),
    ):  # fmt: skip
        command = option(command)
    return command


def train_options(command: C) -> C:
    """Those of `rushhour train` alone, below the basic ones."""
    on_off = {"default": None}
    for option in (
        click.option("--pruner", default="median", show_default=True, type=click.Choice(["median", "hyperband"]),
                     help="How --search ends what is hopeless."),
        click.option("--search", type=click.IntRange(1), metavar="N",
                     help="Train N times with other hyper-parameters, end the hopeless early, keep the best."),
        click.option("--wandb", metavar="PROJECT", help="Track with Weights & Biases too; offline without a key."),
        click.option("--tensorboard/--no-tensorboard", default=True, show_default=True, help="Write DIR/tensorboard."),
        *place_options(),
        click.option("--logs", type=Place(try_folder), metavar="DIR",
                     help="Where curves are kept; BUNDLE-training by default."),
        click.option("--augment", metavar="LIST",
                     help="Change pictures at random: flip,crop,rotate=10,scale=0.1,colour=0.2."),
        click.option("--bf16/--no-bf16", **on_off, help="Compute in bfloat16; where the CPU has it by default."),
        click.option("--patience", type=int, metavar="N",
                     help="End after N epochs without a better validation metric; keep the best."),
        click.option("--ema", type=float, metavar="DECAY", help="Keep a moving average of weights and buffers: 0.999."),
        click.option("--accumulate", type=int, default=1, show_default=True,
                     help="Parts of a batch, to need less memory; batch normalisation sees each alone."),
        click.option("--clip", type=float, metavar="NORM", help="Bound the norm of the gradient."),
        click.option("--momentum", default=0.9, show_default=True, help="Of sgd."),
        click.option("--weight-decay", default=0.0, show_default=True, help="Pull weights towards 0."),
        click.option("--warmup", default=0.05, show_default=True, help="Share of the steps in which cosine rises."),
        click.option("--schedule", default="one-cycle", show_default=True,
                     type=click.Choice(["one-cycle", "cosine", "constant", "step"]), help="Of the learning rate."),
        click.option("--diloco", type=click.IntRange(1), metavar="N",
                     help="Workers meet only every N steps, and an outer optimizer takes their mean change."),
        click.option("--local-sgd", type=click.IntRange(1), metavar="N",
                     help="Workers meet only every N steps, and average their weights."),
        click.option("--batch-norm", default="whole", show_default=True, type=click.Choice(["whole", "local"]),
                     help="Whose samples it sees: the whole batch's, or each worker's own, which is faster."),
        click.option("--compress-gradients", default="none", show_default=True,
                     type=click.Choice(["none", "fp16", "bf16", "powersgd"]),
                     help="Send less between replicas, and train a little differently."),
        click.option("--shared-memory/--no-shared-memory", default=True, show_default=True,
                     help="Add up gradients in memory that workers share, where they are on one machine."),
        click.option("--memory", type=float, metavar="GB",
                     help="What each worker may use; its share of this machine's by default."),
        click.option("--backend", default="gloo", show_default=True, type=click.Choice(["gloo", "nccl", "mpi"]),
                     help="What the workers talk over."),
        click.option("--parallel", default="auto", show_default=True,
                     type=click.Choice(["auto", "data", "model", "pipeline", "hybrid", "sharded"]),
                     help="How the workers share the network; auto measures this machine and takes the fastest."),
        click.option("--workers", default=1, show_default=True, type=click.IntRange(1, 1024), metavar="K",
                     help="Processes that share every batch; any number goes on where another stopped."),
        click.option("--optimizer", default="adam", show_default=True, type=click.Choice(["adam", "adamw", "sgd"]),
                     help="Which steps are taken."),
    ):  # fmt: skip
        command = option(command)
    return command


def place_options() -> tuple[Callable[[C], C], ...]:
    """Those of every command that leaves a bundle or a run."""
    return (
        click.option("--force", is_flag=True,
                     help="Replace the bundle or run that another command left there. Nothing else is ever replaced."),
        click.option("--name", metavar="NAME",
                     help="The model's name, which it keeps through compression and tuning; by default that of the "
                     "folder it is first made in."),
    )  # fmt: skip


def name_given(name: str | None) -> str | None:
    """A name that a user chose for a model.

    Raises:
        GoalError: if a URL cannot have it as it is.
    """
    if name is not None and not _NAME.fullmatch(name):
        raise GoalError(
            f"cannot name a model {name!r}",
            "clients ask for it in a URL: letters, digits, and . _ - between them, 64 at most",
            "write for example parts-2026",
        )
    return name


def settings_of(training: dict[str, Any]) -> TrainSettings:
    """The settings that options name; `augment` is still text, and what nobody named is as usual."""
    from rushhour.data.augment import Augmentation
    from rushhour.train import TrainSettings

    named = {name: value for name, value in training.items() if value is not None or name == "bf16"}
    augment = named.pop("augment", None)
    return TrainSettings(**named, augment=None if augment is None else Augmentation.parse(augment))


def fitted(training: dict[str, Any], samples: int, *, workers: int = 1) -> dict[str, Any]:
    """The options, with batch, learning rate and epochs chosen by the data where nobody named them, and a line on it.

    Steps decide, not epochs: three passes over little data are a few steps, after which nothing is learned.

    Args:
        training: the options; None where nobody named one.
        samples: in the training part.
        workers: that share a batch.
    """
    usual = settings_of({})
    chosen = dict(training)
    if chosen.get("batch") is None:
        least = max(_SMALLEST_BATCH, workers, chosen.get("accumulate") or 1)
        fits = 2 ** int(math.log2(max(1, samples / _BATCHES)))
        chosen["batch"] = max(least, min(usual.batch, fits))
    if chosen.get("lr") is None:
        smaller = min(1.0, chosen["batch"] / usual.batch)
        chosen["lr"] = float(f"{usual.lr * math.sqrt(smaller):.2g}")
    in_epoch = max(1, samples // min(chosen["batch"], samples))
    if chosen.get("epochs") is None:
        chosen["epochs"] = max(usual.epochs, min(_MOST_EPOCHS, math.ceil(_STEPS / in_epoch)))
    own = [name for name in ("batch", "epochs", "lr") if training.get(name) is None]
    if any(chosen[name] != getattr(usual, name) for name in own):
        said = {
            "batch": f"batches of {chosen['batch']}",
            "epochs": f"{chosen['epochs']} epochs",
            "lr": f"learning rate {chosen['lr']:g}",
        }
        say(
            f"fitted to {samples:,} training samples: {', '.join(said[name] for name in own)}, "
            f"{chosen['epochs'] * in_epoch:,} steps in all; "
            f"{', '.join(f'--{name}' for name in own)} say otherwise"
        )
    return chosen


def say(line: str) -> None:
    """A line for the person at the terminal; of the workers that torchrun starts, only the first one's."""
    if os.environ.get("RANK", "0") == "0":
        click.echo(line, err=True)


def parallel_of(sharing: dict[str, Any]) -> ParallelSettings:
    """How workers share a training, as options name it.

    Raises:
        GoalError: if two options contradict each other.
    """
    from rushhour.train import ParallelSettings, Relaxed

    local, diloco, memory = sharing["local_sgd"], sharing["diloco"], sharing["memory"]
    if local is not None and diloco is not None:
        raise GoalError("workers cannot meet in two ways", "--local-sgd and --diloco were given", "leave out one")
    relaxed = None
    if local is not None:
        relaxed = Relaxed(local)
    elif diloco is not None:
        relaxed = Relaxed(diloco, outer_lr=0.7, outer_momentum=0.9)
    if memory is not None and not 0 < memory < 1e6:
        raise GoalError(f"a worker cannot use {memory:g} GB", "memory is above 0", "leave out --memory, or change it")
    return ParallelSettings(
        sharing["parallel"],
        memory_bytes=None if memory is None else int(memory * 1e9),
        compression=sharing["compress_gradients"],
        relaxed=relaxed,
        batch_norm=sharing["batch_norm"],
        shared_memory=sharing["shared_memory"],
        backend=sharing["backend"],
    )


def load_data(
    spec: str,
    progress: TerminalProgress,
    model: str = "",
    *,
    skip_corrupt: bool = False,
    size: str | None = None,
    kind: Kind | None = None,
) -> Dataset:
    """The data set that a user named, with a line on how it went, and one on each thing done that nobody asked for.

    Args:
        spec: as of `rushhour.data.load`.
        progress: hears of it.
        model: what MODEL says: pictures are brought to a bundle's input and labels to its classes; a network is tried
            before pictures are decoded, which may take long.
        skip_corrupt: leave out pictures that cannot be read, and name them.
        size: of pictures, as the option says.
        kind: of targets, as the option says.

    Raises:
        RushhourError: as `rushhour.data.load`, and if the network does not fit the data.
    """
    from rushhour.bundle import Bundle
    from rushhour.data import load
    from rushhour.data.lineage import compared

    heard: list[str] = []
    path = Path(model)
    bundle = Bundle.open(path) if model and path.is_dir() else None
    sides = None if size is None else _size(size)
    decoded = 0

    def on_decoded(done: int, total: int) -> None:
        nonlocal decoded
        if not decoded:
            progress.start(f"Decoding the pictures of {spec}", total)
        progress.advance(done - decoded)
        decoded = done

    progress.start(f"Loading {spec}")
    dataset = load(
        spec,
        size=sides,
        on_corrupt=(lambda error: heard.append(f"{error.what}: {error.why}")) if skip_corrupt else None,
        kind=kind,
        bundle=bundle,
        square=model == "article",
        before_reading=None if bundle is not None or not model else partial(_try_network, model),
        on_decoded=on_decoded,
    )
    sizes = f"{len(dataset.train):,} + {len(dataset.validation):,} + {len(dataset.test):,} samples"
    progress.done(f"{sizes} of {'x'.join(map(str, dataset.sample_shape)) or 'several inputs'}")
    for line in heard[:_MOST_CORRUPT]:
        say(f"left out: {line}")
    for note in (*dataset.notes, *([compared(bundle, dataset)] if bundle is not None else [])):
        if note:
            say(note)
    return dataset


def _try_network(model: str, task: Task, shape: tuple[int, ...]) -> None:
    """Raise, before any picture is decoded, if a network that the user named does not take such pictures."""
    from rushhour.models import check_fits, source_for

    check_fits(source_for(model, shape, task), task, shape, model, (model,))


def model_of(model: str, dataset: Dataset) -> tuple[Source | Bundle, tuple[str, ...]]:
    """What MODEL names, and the factories that the user has thereby said may be imported."""
    from rushhour.bundle import Bundle

    if (path := Path(model)).is_dir():
        bundle = Bundle.open(path)
        for spec in bundle.manifest.signature.outputs[:1]:
            dataset.task.check_output(spec.shape, model)
        return bundle, ()
    from rushhour.models import source_for

    source = source_for(model, dataset.sample_shape, dataset.task, dataset.preprocessing)
    return source, ((model,) if ":" in model else ())


def run(
    model: str,
    data: str,
    out: Path,
    progress: TerminalProgress,
    *,
    logs: Path | None,
    tensorboard: bool,
    wandb: str | None,
    search: int | None,
    pruner: Any,
    workers: int,
    skip_corrupt: bool,
    size: str | None,
    name: str | None,
    force: bool,
    kind: Kind | None,
    **training: Any,
) -> Outcome:
    """Train once, on one worker or several, or search.

    Raises:
        GoalError: if a search is asked for on several workers, or options contradict each other.
        ModelError: if MODEL is a bundle.
        RushhourError: as `rushhour.train.train`.
    """
    from rushhour.bundle import Bundle, check_folder
    from rushhour.train import PARALLEL_PLAN, Tracking, TrainingJob, train
    from rushhour.train.parallel import under_torchrun
    from rushhour.train.search import search as search_best

    folder = logs or out.with_name(f"{out.name}-training")
    try_folder(folder)
    if search is not None and workers > 1:
        raise GoalError(
            f"cannot search on {workers} workers",
            "a trial is ended early by the process it runs in",
            "leave out --workers",
        )
    parallel = parallel_of({name: training.pop(name) for name in _SHARING})
    workers = int(os.environ["WORLD_SIZE"]) if under_torchrun() else workers
    if workers == 1 and not parallel.exact:
        raise GoalError(
            "one worker sends nothing and meets nobody",
            "--compress-gradients, --batch-norm local, --local-sgd and --diloco are for several",
            "say --workers, or leave them out",
        )
    settings_of(training)  # what is wrong with them is said before data is loaded
    name = name_given(name)
    check_folder(out)  # before pictures are decoded for minutes
    if Path(model).is_dir():
        raise ModelError(f"{model} is a bundle", "it is trained already", "name a network: article, module:factory")
    dataset = load_data(data, progress, model, skip_corrupt=skip_corrupt, size=size, kind=kind)
    source, trusted = model_of(model, dataset)
    assert not isinstance(source, Bundle)
    settings = settings_of(fitted(training, len(dataset.train), workers=workers))
    tracking = Tracking(folder, tensorboard=tensorboard, wandb=wandb)
    if search is None:
        job = TrainingJob(
            source,
            settings,
            out.with_name(f".{out.name}.checkpoints"),
            trusted,
            tracking=tracking,
            workers=workers,
            parallel=parallel,
        )
        bundle = train(dataset, job, out=out, progress=progress, name=name, force=force)
        shared = under_torchrun() or workers > 1
        return Outcome(bundle, plan=msgspec.json.decode((folder / PARALLEL_PLAN).read_bytes()) if shared else None)
    bundle, found = search_best(
        dataset,
        source,
        settings,
        trials=search,
        pruner=pruner,
        out=out,
        work=folder,
        progress=progress,
        trusted=trusted,
        tracking=tracking,
        name=name,
        force=force,
    )
    return Outcome(bundle, found)


def print_found(console: Console, found: Found) -> None:
    """The trials of a search as a table, the best one marked."""
    names = sorted({name for tried in found.trials for name in tried.chosen})
    table = Table("", "trial", *names, "epochs", f"{found.metric} (validation)", "", title="What was tried")
    for tried in found.trials:
        is_best = tried.number == found.best.number
        table.add_row(
            "★" if is_best else "",
            str(tried.number),
            *(f"{tried.chosen[name]:.4g}" if name in tried.chosen else "" for name in names),
            str(tried.epochs),
            "" if tried.value is None else f"{tried.value:.4f}",
            "best" if is_best else {"pruned": "ended early"}.get(tried.fate, tried.fate),
            style="bold" if is_best else None,
        )
    console.print(table)


def result(outcome: Outcome) -> dict[str, Any]:
    """What `--json` holds: the bundle's manifest, the workers' plan, and the search."""
    shared = {} if outcome.plan is None else {"plan": outcome.plan}
    searched = {} if outcome.found is None else {"search": msgspec.to_builtins(outcome.found)}
    return {**msgspec.to_builtins(outcome.bundle.manifest), **shared, **searched}


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.lower().partition("x")
    if not (height.isdecimal() and width.isdecimal() and 1 <= int(height) <= 10_000 and 1 <= int(width) <= 10_000):
        raise GoalError(f"cannot use the size {text!r}", "it is height x width in pixels", "write for example 224x224")
    return int(height), int(width)

"""`rushhour train`: a network and data become a trained bundle."""

from __future__ import annotations

import faulthandler
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table

from rushhour.cli.command import Command, option, options
from rushhour.cli.options import (
    data_options,
    force_option,
    name_option,
    training_options,
    trust_option,
    with_columns,
)
from rushhour.cli.places import Named, Place
from rushhour.cli.quantities import size_text
from rushhour.cli.results import json_option, write_json
from rushhour.cli.terminal import TerminalProgress, result_console
from rushhour.errors import GoalError
from rushhour.system.storage import try_building, try_folder

if TYPE_CHECKING:
    from rushhour.train import ParallelSettings
    from rushhour.train.search import SearchResult

_METHOD, _WORKERS, _SEARCH, _TRACKING = "Training", "Parallel training", "Hyper-parameter search", "Tracking"

_method_options = options(
    option("--optimizer", default="adam", show_default=True, type=click.Choice(["adam", "adamw", "sgd"]),
           section=_METHOD, help="The optimizer. sgd has Nesterov momentum."),
    option("--schedule", default="one-cycle", show_default=True, section=_METHOD,
           type=click.Choice(["one-cycle", "cosine", "constant", "step"]), help="Schedule of the learning rate."),
    option("--warmup", default=0.05, show_default=True, metavar="SHARE", section=_METHOD,
           help="Share of the steps in which the cosine schedule rises."),
    option("--weight-decay", default=0.0, show_default=True, metavar="DECAY", section=_METHOD,
           help="Weight decay of all weights."),
    option("--momentum", default=0.9, show_default=True, metavar="MOMENTUM", section=_METHOD, help="Momentum of sgd."),
    option("--clip", type=float, metavar="NORM", section=_METHOD, help="Clip the gradient to this norm."),
    option("--accumulate", type=int, default=1, show_default=True, metavar="N", section=_METHOD,
           help="Compute each batch in N parts, to need less memory. Batch normalisation sees each part alone."),
    option("--ema", type=float, metavar="DECAY", section=_METHOD,
           help="Keep an exponential moving average of the weights, for example 0.999."),
    option("--patience", type=int, metavar="N", section=_METHOD,
           help="Stop after N epochs without a better validation metric, and keep the best epoch."),
    option("--augment", metavar="LIST", section=_METHOD,
           help="Change pictures at random: flip,crop,rotate=10,scale=0.1,colour=0.2."),
    option("--calibrate", is_flag=True, section=_METHOD,
           help="Divide the logits by the temperature that fits the validation part, so that probabilities agree with "
                "shares of right answers (classification)."),
    option("--bf16/--no-bf16", default=None, section=_METHOD,
           help="Compute in bfloat16. By default where the CPU has instructions for it."),
)  # fmt: skip

_worker_options = options(
    option("--workers", default=1, show_default=True, type=click.IntRange(1, 1024), metavar="K", section=_WORKERS,
           help="Processes that share every batch. Any number continues a training that another number began."),
    option("--parallel", default="auto", show_default=True, section=_WORKERS,
           type=click.Choice(["auto", "data", "model", "pipeline", "hybrid", "sharded", "tables"]),
           help="How the workers share the network. auto takes the fastest plan for this machine."),
    option("--backend", default="gloo", show_default=True, type=click.Choice(["gloo", "nccl", "mpi"]),
           section=_WORKERS, help="The torch.distributed backend."),
    option("--memory", type=float, metavar="GB", section=_WORKERS,
           help="Memory that each worker may use. Its share of this machine's by default."),
    option("--shared-memory/--no-shared-memory", default=True, show_default=True, section=_WORKERS,
           help="Add up gradients in shared memory where all workers are on one machine."),
    option("--compress-gradients", default="none", show_default=True, section=_WORKERS,
           type=click.Choice(["none", "fp16", "bf16", "powersgd"]),
           help="Send fewer bytes between replicas. The result differs slightly."),
    option("--batch-norm", default="whole", show_default=True, type=click.Choice(["whole", "local"]),
           section=_WORKERS,
           help="Statistics of batch normalisation: of the whole batch, or of each worker's part, which is faster."),
    option("--local-sgd", type=click.IntRange(1), metavar="N", section=_WORKERS,
           help="Synchronise only every N steps, by averaging the weights (local SGD)."),
    option("--diloco", type=click.IntRange(1), metavar="N", section=_WORKERS,
           help="Synchronise only every N steps, with an outer optimizer on the mean change (DiLoCo)."),
)  # fmt: skip

_tracking_options = options(
    option("--search", type=click.IntRange(1), metavar="N", section=_SEARCH,
           help="Train N times with different hyper-parameters, stop unpromising trials early, keep the best."),
    option("--pruner", default="median", show_default=True, type=click.Choice(["median", "hyperband"]),
           section=_SEARCH, help="Decides which trials of --search stop early."),
    option("--logs", type=Place(try_folder), metavar="DIR", section=_TRACKING,
           help="Folder of the curves. BUNDLE-training by default."),
    option("--tensorboard/--no-tensorboard", default=True, show_default=True, section=_TRACKING,
           help="Write TensorBoard files to DIR/tensorboard."),
    option("--wandb", metavar="PROJECT", section=_TRACKING,
           help="Track with Weights & Biases too; offline without a key (extra: wandb)."),
)  # fmt: skip


@click.command(
    "train",
    cls=Command,
    short_help="Train a network and write a bundle.",
    how_to_continue=lambda _: "the same command continues at its last checkpoint",
)
@click.argument("model", type=Named())
@option("--out", required=True, type=Place(try_building), metavar="BUNDLE", help="The bundle's folder.")
@name_option
@force_option
@trust_option
@json_option
@data_options
@training_options
@_method_options
@_worker_options
@_tracking_options
def command(model: str, data: str, json_file: Path | None, **options: Any) -> None:
    """Train MODEL and write a bundle: ONNX, safetensors and JSON, which open without Rushhour too.

    MODEL is article, residual, signal, kernels, mlp, tabular, deepfm, unet, detector, tagger, or your own
    module:factory (a callable that returns a torch.nn.Module); or a model from elsewhere (ONNX, Keras and others:
    `rushhour import --help`), or a bundle that was imported from one, which is trained further from its own weights. An
    interrupted training continues at its last checkpoint when the same command is run again, and ends with the same
    weights. With --workers the network is shared by a parallel plan, which is shown with the predicted cost of the
    others; the result is that of one worker, up to rounding.

    \b
    Examples:
      rushhour train article --data photos/ --size 224x224 --augment flip,crop --epochs 20 --out runs/photos
      rushhour train mynet:build --data photos/ --optimizer adamw --weight-decay 0.01 --patience 5 --out runs/mine
      rushhour train deepfm --data ratings.csv --target liked --task ranking --time day --out runs/ratings
      rushhour train article --data photos/ --workers 4 --out runs/photos
      rushhour train article --data photos/ --workers 8 --parallel pipeline --memory 2 --out runs/photos
      torchrun --nnodes 2 --max-restarts 3 --rdzv-backend c10d --rdzv-endpoint HOST:29400 -m rushhour train ...
      rushhour train article --data photos/ --search 20 --epochs 10 --out runs/best
      rushhour report runs/photos-training
    """
    from rushhour.api import train

    if not faulthandler.is_enabled():
        faulthandler.enable(2)  # with one worker, a signal may end this very process: show at least where
    # Of all the workers that torchrun starts, only the first one's progress is shown.
    with TerminalProgress(Console(stderr=True, quiet=os.environ.get("RANK", "0") != "0")) as progress:
        result = train(model, data, progress=progress, **_with_parallel(with_columns(options)))
    write_json(json_file, result.as_dict())
    if result.search is not None:
        print_search(result_console(), result.search)
    bundle = result.bundle
    click.echo(f"{bundle.path}: {bundle.manifest.parameters:,} parameters, {size_text(bundle.model_bytes)}")


def _with_parallel(options: dict[str, Any]) -> dict[str, Any]:
    """The options, with those of parallel training as one value."""
    names = (
        "parallel",
        "backend",
        "memory",
        "compress_gradients",
        "batch_norm",
        "shared_memory",
        "local_sgd",
        "diloco",
    )
    rest = {name: value for name, value in options.items() if name not in names}
    return {**rest, "parallel": parallel_of({name: options[name] for name in names})}


def parallel_of(sharing: dict[str, Any]) -> ParallelSettings:
    """How workers share a training, from the options of parallel training by name.

    Raises:
        GoalError: if two of them contradict each other.
    """
    from rushhour.train import ParallelSettings, Relaxed

    local, diloco, memory = sharing["local_sgd"], sharing["diloco"], sharing["memory"]
    if local is not None and diloco is not None:
        raise GoalError(
            "workers cannot synchronise in two ways", "--local-sgd and --diloco were given", "leave out one"
        )
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


def print_search(console: Console, search: SearchResult) -> None:
    """The trials of a search as a table, the best one marked."""
    names = sorted({name for trial in search.trials for name in trial.chosen})
    table = Table("", "trial", *names, "epochs", f"{search.metric} (validation)", "", title="Trials of the search")
    for trial in search.trials:
        is_best = trial.number == search.best.number
        table.add_row(
            "★" if is_best else "",
            str(trial.number),
            *(f"{trial.chosen[name]:.4g}" if name in trial.chosen else "" for name in names),
            str(trial.epochs),
            "" if trial.value is None else f"{trial.value:.4f}",
            "best" if is_best else {"pruned": "stopped early"}.get(trial.fate, trial.fate),
            style="bold" if is_best else None,
        )
    console.print(table)

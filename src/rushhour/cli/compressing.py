"""`rushhour compress` at work: its options, and what is said of its result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
import msgspec
from rich.console import Console
from rich.table import Table

from rushhour.cli.places import Named, Place
from rushhour.cli.terminal import TerminalProgress
from rushhour.cli.training import load_data, name_given, place_options
from rushhour.goal import AccuracyBudget
from rushhour.records.compression import Compression, Factor, Stage
from rushhour.system.storage import check_claim, try_folder

if TYPE_CHECKING:
    from rushhour.compress import Target
    from rushhour.data import Kind
    from rushhour.plan import EngineName

# Only what options need is imported here; training takes seconds to import.

C = TypeVar("C", bound=Callable[..., Any])


def compress_options(command: C) -> C:
    """Those of `rushhour compress` alone."""
    for option in (
        *place_options(),
        click.option("--trust", multiple=True, metavar="MODULE:FACTORY",
                     help="A factory of yours that may be imported, to train what it builds."),
        click.option("--engine", default="openvino", show_default=True, type=click.Choice(["openvino", "onnxruntime"]),
                     help="Compiles what is judged."),
        click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**32 - 1),
                     help="Of all that is random."),
        click.option("--epochs", default=5, show_default=True, type=click.IntRange(1),
                     help="Of distillation, in the recipes of auto."),
        click.option("--steps", type=Place(try_folder), metavar="DIR",
                     help="Where all bundles on the way are kept, and the report; OUT-steps by default."),
        click.option("--for", "target", default=None, type=click.Choice(["any", "avx2", "vnni", "amx"]),
                     help="Machines that int8 must be right on. any, the default, keeps to 7 bits of the weights, "
                     "which is right on all; where that costs more than 0.3 points, 8 bits are tried beside it."),
        click.option("--recipe", type=Named(), default="auto", show_default=True, metavar="RECIPE",
                     help="prune:0.5,lowrank:0.1,distil:3,int8 or the like, or a .json file; auto tries some."),
    ):  # fmt: skip
        command = option(command)
    return command


def run(
    bundle: Path,
    data: str,
    budget: AccuracyBudget,
    out: Path,
    progress: TerminalProgress,
    *,
    recipe: str,
    steps: Path | None,
    epochs: int,
    seed: int,
    engine: EngineName,
    trust: tuple[str, ...],
    target: Target | None,
    name: str | None,
    force: bool,
    size: str | None = None,
    skip_corrupt: bool = False,
    kind: Kind | None = None,
) -> tuple[Compression, Path]:
    """Compress, and write the report; the result, and the file of the report.

    Raises:
        RushhourError: as `rushhour.compress.compress`.
    """
    from rushhour.bundle import Bundle, check_folder
    from rushhour.compress import Recipe, compress, default_recipes
    from rushhour.report import write_compression_report

    folder = steps or out.with_name(f"{out.name}-steps")
    try_folder(folder)
    asked = None if recipe.strip() == "auto" else Recipe.parse(recipe)
    if asked is not None and not recipe.strip().endswith(".json"):
        trust = (*trust, *asked.factories)  # named on the very same command line
    parent, name = Bundle.open(bundle), name_given(name)
    check_folder(out)  # before data is loaded
    check_claim(folder)
    dataset = load_data(data, progress, str(bundle), size=size, skip_corrupt=skip_corrupt, kind=kind)
    recipes = default_recipes(parent, dataset, epochs=epochs, trusted=trust) if asked is None else (asked,)
    if target is not None:
        recipes = tuple(recipe.for_machines(target) for recipe in recipes)
    found = compress(
        parent,
        dataset,
        recipes,
        budget=budget,
        out=out,
        steps=folder,
        seed=seed,
        engine=engine,
        progress=progress,
        trusted=trust,
        name=name,
        force=force,
    )
    return found, write_compression_report(folder)


def print_compression(console: Console, found: Compression) -> None:
    """What each step of each recipe cost and bought, as a table; the answer is marked."""
    metric = found.reference.accuracy.metric
    table = Table(title=f"{found.model}, compressed; compiled by {found.engine}")
    for column in ("", "step", "parameters", "on disk", f"{metric} (validation)", "falls by, points", "throughput"):
        table.add_column(column, justify="left" if column in ("", "step") else "right")
    table.add_row("", "as it was", *_figures(found.reference))
    for at, attempt in enumerate(found.attempts):
        table.add_section()
        for index, stage in enumerate(attempt.stages):
            is_best = found.best == (at, index)
            table.add_row("★" if is_best else "", stage.step, *_figures(stage), style="bold" if is_best else None)
    console.print(table)
    for attempt in found.attempts:
        for stage in attempt.stages:
            if stage.kept:
                console.print(f"{stage.step} left as it was: {stage.kept}", highlight=False, markup=False)
        if attempt.why:
            console.print(f"{attempt.recipe} was not finished: {attempt.why}", highlight=False, markup=False)
    for confirmation in found.confirmations:
        stage = found.stage(confirmation.stage)
        said = confirmation.why or "inside the budget"
        console.print(f"test part, {stage.step}: {said}", highlight=False, markup=False)
    test, answer = found.test, found.answer
    low, high = test.drop_interval
    before = found.reference
    console.print(
        f"{found.verdict}: {found.said}\n"
        f"{before.parameters / max(1, answer.parameters):.1f}x fewer parameters, "
        f"{before.bytes / answer.bytes:.1f}x smaller on disk; on the test part {test.metric} {test.value:.4f} against "
        f"{found.reference_test.value:.4f}, a fall of {test.drop * 100:.2f} points ({low * 100:.2f} to "
        f"{high * 100:.2f})",
        highlight=False,
        markup=False,
    )


def result(found: Compression, out: Path, report: Path) -> dict[str, Any]:
    """What `--json` holds."""
    return {
        **msgspec.to_builtins(found),
        "bundle": str(out),
        "report": str(report),
        "accuracy": msgspec.to_builtins(found.test),
        "bytes": found.answer.bytes,
    }


def _figures(stage: Stage) -> tuple[str, ...]:
    low, high = stage.accuracy.drop_interval
    drop = f"{stage.accuracy.drop * 100:.2f} ({low * 100:.2f} to {high * 100:.2f})" if stage.throughput else ""
    size = f"{stage.bytes / 1e6:.2f} MB" if stage.bytes >= 1e5 else f"{stage.bytes / 1e3:.1f} kB"
    slower = ", slower" if stage.slower else ""
    return f"{stage.parameters:,}", size, f"{stage.accuracy.value:.4f}", drop, _times(stage.throughput) + slower


def _times(factor: Factor | None) -> str:
    return "" if factor is None else f"{factor.value:.2f}x ({factor.interval[0]:.2f} to {factor.interval[1]:.2f})"

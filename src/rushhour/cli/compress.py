"""`rushhour compress`: a bundle becomes a smaller, faster one inside an accuracy budget."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from rushhour.cli.command import Command, option
from rushhour.cli.options import (
    accuracy_option,
    cluster_option,
    data_options,
    force_option,
    name_option,
    trust_option,
    with_columns,
)
from rushhour.cli.places import Named, Place
from rushhour.cli.quantities import size_text
from rushhour.cli.results import json_option, write_json
from rushhour.cli.terminal import TerminalProgress, result_console
from rushhour.records.compression import Compression, Factor, Stage
from rushhour.system.storage import try_building, try_folder


@click.command(
    "compress",
    cls=Command,
    short_help="Make a bundle smaller and faster.",
    how_to_continue=lambda _: "the same command continues, and computes nothing twice",
)
@click.argument("bundle", type=Place())
@option("--out", required=True, type=Place(try_building), metavar="DIR", help="The new bundle's folder.")
@accuracy_option
@option(
    "--recipe",
    type=Named(),
    default="auto",
    show_default=True,
    metavar="RECIPE",
    help="A list of steps such as prune:0.5,lowrank:0.1,distil:3,int8, or a .json file. auto tries several.",
)
@option(
    "--for",
    "target",
    type=click.Choice(["any", "avx2", "vnni", "amx"]),
    help="Class of processors on which int8 has to be exact. any uses 7 bits of the weights, which is exact on all of "
    "them. By default 8 bits are tried as well where 7 cost more than 0.3 points.",
)
@option(
    "--steps",
    type=Place(try_folder),
    metavar="DIR",
    help="Folder of all bundles on the way and of the report. OUT-steps by default.",
)
@option(
    "--epochs",
    default=5,
    show_default=True,
    type=click.IntRange(1),
    metavar="N",
    help="Epochs of distillation in the recipes of auto.",
)
@option(
    "--seed",
    default=0,
    show_default=True,
    type=click.IntRange(0, 2**32 - 1),
    metavar="N",
    help="Seed of everything random.",
)
@option(
    "--engine",
    default="openvino",
    show_default=True,
    type=click.Choice(["openvino", "onnxruntime"]),
    help="Compiles what is judged.",
)
@cluster_option
@name_option
@force_option
@trust_option
@json_option
@data_options
def command(bundle: Path, data: str, out: Path, json_file: Path | None, **options: Any) -> None:
    """Make BUNDLE smaller and faster inside an accuracy budget, judged on the compiled artefact of every step.

    BUNDLE is a trained bundle, or a model from elsewhere (`rushhour import --help`), which is imported first.

    A recipe is a list of steps: prune (channels), lowrank (dense layers), distil (train on BUNDLE's answers), then
    int8, bf16, f16 or w8. DIR is the best result: inside the budget, and never slower than BUNDLE. An interrupted
    compression continues when the same command is run again. Exit code 1 if nothing better is inside the budget.

    \b
    Examples:
      rushhour compress runs/photos --data photos/ --max-accuracy-drop 1% --out runs/small
      rushhour compress runs/photos --data photos/ --recipe prune:0.5,lowrank:0.1,distil:10,int8 --out runs/small
      rushhour compress runs/photos --data /shared/photos --out runs/small --cluster 10.0.0.5:6379
      rushhour compress runs/photos --data photos/ --recipe prune:0.3:ignored=0+2:epochs=3,int8 --out runs/small
    """
    from rushhour.api import compress

    with TerminalProgress() as progress:
        result = compress(bundle, data, out=out, progress=progress, **with_columns(options))
    write_json(json_file, result.as_dict())
    print_compression(result_console(), result.record)
    click.echo(f"{out}; what each step cost and gained: {result.report}")
    if result.verdict != "best":
        click.echo(f"{result.verdict}: {result.record.summary}", err=True)
        sys.exit(1)


def print_compression(console: Console, record: Compression) -> None:
    """What each step of each recipe cost and gained, as a table; the answer is marked."""
    metric = record.reference.accuracy.metric
    table = Table(title=f"{record.model}, compressed, compiled by {record.engine}")
    for column in (
        "",
        "step",
        "parameters",
        "on disk",
        f"{metric} (validation)",
        "accuracy drop, points",
        "throughput",
    ):
        table.add_column(column, justify="left" if column in ("", "step") else "right")
    table.add_row("", "original", *_figures(record.reference))
    for at, attempt in enumerate(record.attempts):
        table.add_section()
        for index, stage in enumerate(attempt.stages):
            is_best = record.best == (at, index)
            table.add_row("★" if is_best else "", stage.step, *_figures(stage), style="bold" if is_best else None)
    console.print(table)
    for attempt in record.attempts:
        for stage in attempt.stages:
            if stage.kept:
                console.print(f"{stage.step} left unchanged: {stage.kept}", highlight=False, markup=False)
        if attempt.why:
            console.print(f"{attempt.recipe} was not finished: {attempt.why}", highlight=False, markup=False)
    for confirmation in record.confirmations:
        stage = record.stage(confirmation.stage)
        result = confirmation.why or "inside the budget"
        console.print(f"test part, {stage.step}: {result}", highlight=False, markup=False)
    test, answer = record.test, record.answer
    low, high = test.drop_interval
    before = record.reference
    console.print(
        f"{record.verdict}: {record.summary}\n"
        f"{before.parameters / max(1, answer.parameters):.1f}x fewer parameters, "
        f"{before.bytes / answer.bytes:.1f}x smaller on disk; on the test part {test.metric} {test.value:.4f} against "
        f"{record.reference_test.value:.4f}, a drop of {test.drop * 100:.2f} points ({low * 100:.2f} to "
        f"{high * 100:.2f})",
        highlight=False,
        markup=False,
    )


def _figures(stage: Stage) -> tuple[str, ...]:
    low, high = stage.accuracy.drop_interval
    drop = f"{stage.accuracy.drop * 100:.2f} ({low * 100:.2f} to {high * 100:.2f})" if stage.throughput else ""
    slower = ", slower" if stage.slower else ""
    return (
        f"{stage.parameters:,}",
        size_text(stage.bytes),
        f"{stage.accuracy.value:.4f}",
        drop,
        _times(stage.throughput) + slower,
    )


def _times(factor: Factor | None) -> str:
    return "" if factor is None else f"{factor.value:.2f}x ({factor.interval[0]:.2f} to {factor.interval[1]:.2f})"

"""`rushhour import`: a model file becomes a bundle, and what was understood of it is shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.table import Table

from rushhour.cli.command import Command, option
from rushhour.cli.options import force_option, name_option, optional_data_options
from rushhour.cli.places import Place
from rushhour.cli.results import json_option, write_json
from rushhour.cli.terminal import TerminalProgress, result_console
from rushhour.system.storage import try_building

_SCALING = "Preprocessing"


@click.command("import", cls=Command, short_help="Make a bundle of a model file: ONNX.")
@click.argument("model", type=Place())
@option("--out", required=True, type=Place(try_building), metavar="BUNDLE", help="The bundle's folder.")
@option(
    "--classes",
    metavar="NAMES",
    help="Names of the classes, with commas between them, or their number. The data has them too.",
)
@option(
    "--scale", type=float, metavar="FACTOR", section=_SCALING, help="Multiply samples by this: 0.00392157 is 1/255."
)
@option("--mean", metavar="LIST", section=_SCALING, help="Subtract this from each channel: 0.485,0.456,0.406.")
@option("--std", metavar="LIST", section=_SCALING, help="Divide each channel by this: 0.229,0.224,0.225.")
@name_option
@force_option
@json_option
@optional_data_options
def command(model: Path, json_file: Path | None, **options: Any) -> None:
    """Make a bundle of MODEL, an .onnx file, and show what was understood: inputs, layout, task, scaling, operators.

    The torch network is rebuilt from the graph with the weights of the file, and its answers are compared with ONNX
    Runtime's; then train (from these weights), compress and tune take BUNDLE as any other. What cannot be trained is
    said with its reason, and can still be served and made int8. Nothing in the file is run.

    \b
    Examples:
      rushhour import model.onnx --out runs/imported
      rushhour import model.onnx --data photos/ --out runs/imported
      rushhour import model.onnx --classes cat,dog --mean 0.5,0.5,0.5 --std 0.5,0.5,0.5 --out runs/imported
      rushhour train runs/imported --data photos/ --epochs 5 --out runs/finer
    """
    from rushhour.api import import_model

    with TerminalProgress() as progress:
        result = import_model(model, progress=progress, **options)
    write_json(json_file, result.as_dict())
    table = Table(title=f"{model.name} -> {result.bundle.path}", show_header=False)
    for about, sentence in result.lines:
        table.add_row(about, sentence)
    result_console().print(table)

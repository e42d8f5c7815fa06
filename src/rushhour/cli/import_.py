"""`rushhour import`: a model from elsewhere becomes a bundle, and what was understood of it is shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.table import Table

from rushhour.cli.command import Command, option
from rushhour.cli.options import force_option, name_option, optional_data_options, trust_option, with_columns
from rushhour.cli.places import Place
from rushhour.cli.results import json_option, write_json
from rushhour.cli.terminal import TerminalProgress, result_console
from rushhour.system.storage import try_building

_SCALING = "Preprocessing"


@click.command("import", cls=Command, short_help="Make a bundle of a model from elsewhere.")
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
@option(
    "--length",
    type=click.IntRange(1, 100_000),
    metavar="N",
    help="Tokens of every text, for a network that takes any number; without it the length stays open where it can.",
)
@option(
    "--tiles",
    metavar="MERGE[,overlap=N]",
    help="Cut pictures or recordings larger than the input, and merge the answers: mean, max, crop, blend or boxes. "
    "Pictures are brought to the input's size by default.",
)
@option(
    "--tensorflow-python",
    type=Place(),
    metavar="PYTHON",
    help="A Python with TensorFlow and tf2onnx, for models that only these can read.",
)
@trust_option
@name_option
@force_option
@json_option
@optional_data_options
def command(model: Path, json_file: Path | None, **options: Any) -> None:
    """Make a bundle of MODEL and show what was understood: inputs, layout, task, scaling, operators.

    MODEL is an ONNX file, a .keras or .h5 file of Keras, a SavedModel folder, a folder of Hugging Face transformers, a
    .pt2 file of torch.export, or a .joblib file of an estimator; it is recognised by what it holds.

    MODEL becomes an ONNX graph, whose answers are compared with its own. The torch network is rebuilt from the graph
    with its weights; then train (from these weights), compress and tune take BUNDLE as any other, and take MODEL itself
    too. What cannot be trained is said with its reason, and can still be served and made int8. No code of MODEL is run
    without --trust.

    \b
    Examples:
      rushhour import model.onnx --out runs/imported
      rushhour import model.onnx --data photos/ --out runs/imported
      rushhour import model.onnx --classes cat,dog --mean 0.5,0.5,0.5 --std 0.5,0.5,0.5 --out runs/imported
      rushhour import model.keras --data photos/ --out runs/imported
      rushhour import model.onnx --tiles mean,overlap=32 --out runs/scans
      rushhour import saved/ --tensorflow-python tf/bin/python --trust saved/ --out runs/imported
      rushhour import forest.joblib --trust forest.joblib --out runs/forest
      rushhour train runs/imported --data photos/ --epochs 5 --out runs/finer
    """
    from rushhour.api import import_model

    with TerminalProgress() as progress:
        result = import_model(model, progress=progress, **with_columns(options))
    write_json(json_file, result.as_dict())
    table = Table(title=f"{model.name} -> {result.bundle.path}", show_header=False)
    for about, sentence in result.lines:
        table.add_row(about, sentence)
    result_console().print(table)

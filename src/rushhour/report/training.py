"""How a training went, as a page: `rushhour report` of the folder that `rushhour train` tracked into."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from rushhour.curves import read_curves
from rushhour.report import wording
from rushhour.report.page import page_style
from rushhour.storage import write_whole


def write_training_report(folder: Path) -> Path:
    """Render `report.html` of a training's folder from its `curves.jsonl`. The file loads nothing from anywhere.

    Returns:
        The path of the file.

    Raises:
        DataError: if there are no curves, or they are damaged.
        StorageError: if the disk does not give or take the files.
    """
    from rushhour.report import charts  # matplotlib takes a second to import

    epochs = read_curves(folder)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.globals["say"] = wording
    template = environment.from_string(resources.files(__package__).joinpath("training.html").read_text("utf-8"))
    path = folder / "report.html"
    page = template.render(
        style=page_style(),
        name=folder.resolve().name,
        epochs=epochs,
        best=max(epochs, key=lambda epoch: epoch.value),
        loss=charts.in_both_widths(lambda narrow: charts.training_loss(epochs, narrow)),
        metric=charts.in_both_widths(lambda narrow: charts.training_metric(epochs, narrow)),
    )
    write_whole(path, page.encode("utf-8", "replace"))
    return path

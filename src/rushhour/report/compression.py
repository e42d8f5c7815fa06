"""What each step of a compression cost and bought, as a page: in the folder that `rushhour compress` keeps."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from rushhour.records.compression import Compression
from rushhour.report import wording
from rushhour.report.page import is_page, page_style
from rushhour.system.storage import write_own


def write_compression_report(folder: Path, file: Path | None = None) -> Path:
    """Render `report.html` from the folder's `compression.json`. The file loads nothing from anywhere.

    Args:
        folder: what it is about.
        file: where it is written; in that folder by default.

    Returns:
        The path of the file.

    Raises:
        DataError: if what was found is damaged.
        StorageError: if the disk does not give or take the files.
    """
    from rushhour.report import charts  # matplotlib takes a second to import

    found = Compression.load(folder)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.globals["say"] = wording
    template = environment.from_string(resources.files(__package__).joinpath("compression.html").read_text("utf-8"))
    path = file or folder / "report.html"
    page = template.render(
        style=page_style(),
        found=found,
        trade=charts.in_both_widths(lambda narrow: charts.compression_trade(found, narrow)),
        sizes=charts.in_both_widths(lambda narrow: charts.compression_sizes(found, narrow)),
    )
    write_own(path, page.encode("utf-8", "replace"), is_page)
    return path

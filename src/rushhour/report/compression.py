"""What each step of a compression cost and gained, as a page: in the folder that `rushhour compress` keeps."""

from __future__ import annotations

from pathlib import Path

from rushhour.records.compression import Compression
from rushhour.report.page import is_page, render
from rushhour.system.storage import write_own


def write_compression_report(folder: Path, file: Path | None = None) -> Path:
    """Render `report.html` from the folder's `compression.json`. The file loads nothing from anywhere.

    Args:
        folder: the folder of the compression.
        file: where it is written; in that folder by default.

    Returns:
        The path of the file.

    Raises:
        DataError: if the record is damaged.
        StorageError: if the files cannot be read or written.
    """
    from rushhour.report import charts  # matplotlib takes a second to import

    found = Compression.load(folder)
    path = file or folder / "report.html"
    page = render(
        "compression.html",
        found=found,
        trade_off=charts.wide_and_narrow(lambda narrow: charts.compression_trade_off(found, narrow)),
        sizes=charts.wide_and_narrow(lambda narrow: charts.compression_sizes(found, narrow)),
    )
    write_own(path, page, is_page)
    return path

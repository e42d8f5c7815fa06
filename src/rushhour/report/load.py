"""What `rushhour load` measured, as a picture: latency against rate, in one offline HTML file or as a PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rushhour.errors import LoadError
from rushhour.goal import SLO
from rushhour.measurement import Measurement
from rushhour.report.page import MARKS, is_page, render
from rushhour.system.storage import check_own_file, write_own

FORMATS = (".html", ".png")


def check_plot_name(file: Path) -> None:
    """Check, before anything is measured, that a plot can be written to this file.

    Raises:
        LoadError: if its name has none of the formats' endings.
        StorageError: if another file is there that is no plot of Rushhour's.
    """
    if file.suffix.lower() not in FORMATS:
        raise LoadError(
            f"cannot plot to {file}", f"plots are {' or '.join(FORMATS)} files", "name it for example load.png"
        )
    check_own_file(file, _is_plot)


def _is_plot(content: bytes) -> bool:
    return is_page(content) or (content.startswith(b"\x89PNG") and b"rushhour" in content[:1000])


def write_load_plot(file: Path, name: str, windows: Sequence[Measurement], slo: SLO, headline: str) -> None:
    """Draw the windows of load of one server.

    Args:
        file: `.html` (with the table of windows; loads nothing from anywhere) or `.png`.
        name: of the server or model.
        windows: in the order in which they ran.
        slo: of their verdicts.
        headline: the result in one sentence.

    Raises:
        LoadError: if the name has neither ending, or no window has a latency to draw.
        StorageError: if the file cannot be written.
    """
    from rushhour.report import charts  # matplotlib takes a second to import

    check_plot_name(file)
    series = [charts.Series(name, True, windows, None)]
    content: bytes | None
    if file.suffix.lower() == ".png":
        content = charts.latency_against_rate_png(series, slo)
    else:
        chart = charts.wide_and_narrow(lambda narrow: charts.latency_against_rate(series, slo, narrow))
        content = (
            None
            if chart is None
            else render("load.html", name=name, headline=headline, chart=chart, windows=windows, marks=MARKS)
        )
    if content is None:
        raise LoadError(f"cannot plot to {file}", "no window has a p99: there is nothing to draw", "load for longer")
    write_own(file, content, _is_plot)

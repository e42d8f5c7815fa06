"""What `rushhour load` measured, as a picture: latency against rate, in one offline HTML file or as a PNG."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from rushhour.errors import LoadError
from rushhour.goal import SLO
from rushhour.measurement import Measurement
from rushhour.report import wording
from rushhour.report.page import MARKS, is_page, page_style
from rushhour.system.storage import check_own_file, write_own

FORMATS = (".html", ".png")


def check_plot_name(file: Path) -> None:
    """Raise, before anything is measured for it, unless a plot can be written to this file.

    Raises:
        LoadError: if its name says none of the formats.
        StorageError: if there is a file that is no plot of Rushhour's.
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
        windows: in the order asked.
        slo: what they were judged by.
        headline: the result in one sentence.

    Raises:
        LoadError: if the name says neither, or no window has a latency to draw.
        StorageError: if the disk does not take it.
    """
    from rushhour.report import charts  # matplotlib takes a second to import

    check_plot_name(file)
    sides = [charts.Side(name, True, windows, None)]
    content: bytes | None
    if file.suffix.lower() == ".png":
        content = charts.latency_against_rate_png(sides, slo)
    else:
        environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
        environment.globals["say"] = wording
        template = environment.from_string(resources.files(__package__).joinpath("load.html").read_text("utf-8"))
        chart = charts.in_both_widths(lambda narrow: charts.latency_against_rate(sides, slo, narrow))
        content = (
            None
            if chart is None
            else template.render(
                style=page_style(), name=name, slo=slo, headline=headline, chart=chart, windows=windows, marks=MARKS
            ).encode("utf-8", "replace")
        )
    if content is None:
        raise LoadError(f"cannot plot to {file}", "no window has a p99: there is nothing to draw", "load for longer")
    write_own(file, content, _is_plot)

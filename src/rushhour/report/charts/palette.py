"""The colours and the style of all charts.

Drawings use colours by name. In SVG they are marker colours, each of which becomes a CSS variable of the page, so that
one file serves light and dark; in PNG they are the page's light ones. Shape and line style always repeat what colour
says.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Final

import matplotlib.colors
import matplotlib.style

INK, SOFT, GRID, PAPER = "rushhour:ink", "rushhour:soft", "rushhour:grid", "rushhour:paper"
PLAN, BASELINE, LIMIT = "rushhour:plan", "rushhour:baseline", "rushhour:limit"
DASHED: Final = (0, (5, 3))
DOTTED: Final = (0, (1.5, 1.8))

LIGHT: Final[Mapping[str, str]] = {
    INK: "#1d2126",
    SOFT: "#5c6570",
    GRID: "#e3e4e6",
    PAPER: "#ffffff",
    PLAN: "#0067a6",
    BASELINE: "#b85300",
    LIMIT: "#a5346f",
}
"""The page's light colours, as style.css has them."""

_MARKERS: Final[Mapping[str, str]] = {
    INK: "#010203",
    SOFT: "#010204",
    GRID: "#010205",
    PAPER: "#010206",
    PLAN: "#010207",
    BASELINE: "#010208",
    LIMIT: "#010209",
}
_STYLE: Final[Mapping[str, Any]] = {
    "svg.fonttype": "none",
    "font.size": 10,
    "text.color": INK,
    "text.parse_math": False,
    "axes.labelcolor": SOFT,
    "axes.edgecolor": GRID,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "figure.facecolor": "none",
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": SOFT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "lines.linewidth": 1.8,
}


@contextlib.contextmanager
def style(name: str, palette: Mapping[str, str] = _MARKERS) -> Iterator[None]:
    """Draw in the report's style whatever the user's matplotlibrc says, with ids that are the same every time.

    A glyph that matplotlib's own font lacks is ignored: the reader's browser sets the text.

    Args:
        name: of the chart; the ids in its SVG derive from it.
        palette: colour name -> colour.
    """
    names = matplotlib.colors.get_named_colors_mapping()
    for colour_name, colour in palette.items():
        names[colour_name] = colour  # one by one: `update` keeps colours that matplotlib has cached
    with matplotlib.style.context(["default", {**_STYLE, "svg.hashsalt": name}]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def light_css() -> str:
    """The CSS variables of all colours, light."""
    return " ".join(f"--{name.removeprefix('rushhour:')}: {colour};" for name, colour in LIGHT.items())


def themed(css: str) -> str:
    """An SVG style with the page's CSS variables for marker colours, and without a font, which the page decides."""
    rules = [rule for rule in css.split("; ") if not rule.startswith("font-family:")]
    result = "; ".join(rules)
    for name, marker in _MARKERS.items():
        result = result.replace(marker, f"var(--{name.removeprefix('rushhour:')})")
    return result

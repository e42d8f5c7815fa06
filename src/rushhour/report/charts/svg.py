"""A drawing as an `<svg>` element that stands in a page."""

from __future__ import annotations

import io
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping
from typing import Any

from markupsafe import Markup

from rushhour.report.charts.axes import short
from rushhour.report.charts.palette import light_css, themed


def wide_and_narrow(draw: Callable[[bool], Markup | None]) -> Markup | None:
    """A chart as a page holds it: once for a desktop and once, with letters of the same size, for a phone.

    The style sheet shows one of the two.

    Args:
        draw: draws the chart; its argument is true for a phone.

    Returns:
        None where there is nothing to draw.
    """
    wide, narrow = draw(False), draw(True)
    if wide is None or narrow is None:
        return None
    return Markup('<div class="on-wide">{}</div><div class="on-narrow">{}</div>').format(wide, narrow)


def chart_id(chart: str, narrow: bool) -> str:
    """Unique in a page that holds the chart in both widths."""
    return f"{chart}-narrow" if narrow else chart


def svg(figure: Any, name: str, label: str, tips: Mapping[str, str] | None = None) -> Markup:
    """The drawing as an `<svg>` that stands in a page.

    Args:
        figure: the drawing.
        name: unique in the page; starts every id, because ids of a page share one name space.
        label: the text for readers who cannot see the chart.
        tips: gid of an artist -> the text that the pointer shows over it.
    """
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None})
    root = ET.fromstring(drawn.getvalue())
    referenced = {value for element in root.iter() for value in _references(element)}
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.text, element.tail = (element.text or "").strip(), None
        element.attrib = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
        tip = (tips or {}).get(element.get("id", ""))
        if element.get("id") in referenced:
            element.set("id", f"{name}-{element.get('id')}")
        else:
            element.attrib.pop("id", None)
        for key in ("href", "clip-path"):
            if key in element.attrib:
                element.set(key, element.attrib[key].replace("#", f"#{name}-"))
        if "d" in element.attrib:
            element.set("d", " ".join(element.attrib["d"].split()))
        if "style" in element.attrib:
            element.set("style", themed(element.attrib["style"]))
        if tip is not None:
            title = ET.Element("title")
            title.text = short(tip, 300)
            element.insert(0, title)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in ("metadata", "style"):
                parent.remove(child)
    del root.attrib["width"], root.attrib["height"], root.attrib["version"]
    root.set("role", "img")
    root.set("aria-label", short(label, 2000))
    return Markup(ET.tostring(root, encoding="unicode"))  # ElementTree has escaped every text in it


def standalone(chart: Markup) -> str:
    """A chart as an SVG file of its own: in light colours, on white.

    Args:
        chart: made by `svg`, in one width.
    """
    root = ET.fromstring(str(chart))
    _, _, width, height = root.attrib["viewBox"].split()
    root.attrib |= {"xmlns": "http://www.w3.org/2000/svg", "width": width, "height": height}
    style = ET.Element("style")
    style.text = f"svg {{ {light_css()} background: var(--paper); font-family: system-ui, sans-serif; }}"
    root.insert(0, style)
    return ET.tostring(root, encoding="unicode") + "\n"


def _references(element: ET.Element) -> list[str]:
    values = (value for key, value in element.attrib.items() if key.endswith(("href", "clip-path")))
    return [value.removeprefix("url(").removesuffix(")").removeprefix("#") for value in values]

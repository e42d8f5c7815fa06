"""The names of points, written beside them where they overlap neither each other nor other points."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any, Final, Literal, NamedTuple

from matplotlib.transforms import Bbox

_LINE: Final = 36  # characters of a name in one line
_CUT_WEIGHT: Final = 4  # a part of a name outside the axes costs this many times what an overlap costs
_DISTANCES: Final = (11, 27, 43, 59)  # points between a name and its point

_Side = Literal["right", "left", "center"]


class Label(NamedTuple):
    """A name beside a point.

    Attributes:
        text: the name; broken into lines.
        notes: further lines below it.
        colour: of the text.
        at: the point, in the units of the data.
    """

    text: str
    notes: tuple[str, ...]
    colour: str
    at: tuple[float, float]


def write_labels(axes: Any, labels: Sequence[Label], marks: Sequence[tuple[float, float, float]]) -> None:
    """Write each label inside the axes, where it overlaps the least of the other labels, texts and `marks`.

    Call it last: a legend that is added later moves the axes, and the points towards each other.

    Args:
        axes: the axes, complete but for the labels.
        labels: in the order of importance.
        marks: other points, in the units of the data, with half the size of their markers in points.
    """
    axes.figure.draw_without_rendering()  # only now is it known where the axes lie
    inside = axes.get_window_extent()
    points = [axes.transData.transform(each.at) for each in labels]
    drawn = [(9.0, point) for point in points]
    drawn += [(1.4 * half, axes.transData.transform((x, y))) for x, y, half in marks]  # at 100 pixels an inch
    taken = [Bbox.from_extents(x - half, y - half, x + half, y + half) for half, (x, y) in drawn]
    taken += [text.get_window_extent() for text in axes.texts]
    for each, (across, _) in zip(labels, points, strict=True):
        sides: list[_Side] = ["left", "right", "center"]
        if across > inside.x0 + inside.width / 2:
            sides = ["right", "left", "center"]
        text = axes.annotate(
            "\n".join([*textwrap.wrap(each.text, _LINE, break_on_hyphens=False), *each.notes]),
            each.at,
            xytext=(0, 0),
            textcoords="offset points",
            color=each.colour,
            fontweight="bold",
            zorder=6,
            in_layout=False,
        )

        def cost(place: tuple[_Side, bool, float], text: Any = text) -> float:
            box = _move(text, *place)
            overlap = sum(_area(Bbox.intersection(box, other)) for other in taken)
            return overlap + _CUT_WEIGHT * (_area(box) - _area(Bbox.intersection(box, inside)))

        places = [(side, above, away) for away in _DISTANCES for above in (True, False) for side in sides]
        taken.append(_move(text, *min(places, key=cost)))


def _move(text: Any, side: _Side, is_above: bool, away: float) -> Bbox:
    """Put a text `away` points above or below its point, with this side of it at the point; returns its box."""
    text.set_position(({"right": 4, "left": -4, "center": 0}[side], away if is_above else -away))
    text.set_horizontalalignment(side)
    text.set_verticalalignment("bottom" if is_above else "top")
    box: Bbox = text.get_window_extent().padded(2)
    return box


def _area(box: Bbox | None) -> float:
    return 0.0 if box is None else float(box.width * box.height)

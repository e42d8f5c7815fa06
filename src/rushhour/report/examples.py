"""Example pictures with what a model answers for their places: a bundle's own samples, with boxes or class maps."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image

from rushhour.bundle import SAMPLES, Bundle
from rushhour.errors import BundleError

_MOST: Final = 4
_LARGEST: Final = 320
"""The longer side of a picture in the page, in pixels: keeps the file under 2 MB."""
_SHOWN: Final = 0.3
"""The score from which on a box is drawn."""
_MOST_BOXES: Final = 30
_COLOURS: Final = (
    "#0067a6", "#b85300", "#a5346f", "#00796b", "#7a5af5", "#9a6700", "#c62828", "#2e7d32", "#5d4037", "#546e7a",
)  # fmt: skip
"""Of classes, in turn. The name in the list below, or beside a box, says the same."""


def examples_of(folder: Path) -> list[Markup]:
    """Drawings of the answers that a bundle recorded for its samples; none where it has none about places.

    Args:
        folder: of the bundle.
    """
    try:
        bundle = Bundle.open(folder)
    except BundleError:
        return []
    signature = bundle.manifest.signature
    spec, picture = signature.outputs[0], signature.picture
    answers = bundle.answers() if SAMPLES in bundle.manifest.files else None
    if picture is None or answers is None or isinstance(spec.places, msgspec.UnsetType):
        return []
    classes, samples = bundle.manifest.task.classes, bundle.samples()[picture.name]
    draw = _boxes if spec.places == "boxes" else _map
    return [
        draw(sample, answer, classes)
        for sample, answer in zip(samples[:_MOST], answers[spec.name][:_MOST], strict=False)
        if answer.ndim == 2
    ]


def _boxes(sample: NDArray[Any], answer: NDArray[Any], classes: tuple[str, ...]) -> Markup:
    width = sample.shape[1]
    drawn, named = [], []
    line = max(1.0, width / 240)
    for x1, y1, x2, y2, score, label in answer[answer[:, 4] >= _SHOWN][:_MOST_BOXES].tolist():
        colour, name = _COLOURS[int(label) % len(_COLOURS)], _name(classes, int(label))
        named.append(f"{name} {score:.2f}")
        drawn.append(
            Markup(
                '<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" fill="none" stroke="{}" '
                'stroke-width="{:.1f}"><title>{} {:.2f}</title></rect>'
            ).format(x1, y1, x2 - x1, y2 - y1, colour, line, name, score)
        )
    return _drawing(sample, Markup("").join(drawn), ", ".join(named) or f"nothing above {_SHOWN:g}")


def _map(sample: NDArray[Any], answer: NDArray[Any], classes: tuple[str, ...]) -> Markup:
    colours = np.array([[int(each[at : at + 2], 16) for at in (1, 3, 5)] for each in _COLOURS], np.uint8)
    labels, counts = np.unique(answer, return_counts=True)
    usual = labels[counts.argmax()]
    painted = np.zeros((*answer.shape, 4), np.uint8)
    painted[..., :3] = colours[answer.astype(int) % len(colours)]
    painted[..., 3] = np.where(answer == usual, 0, 150)
    over = Markup('<image href="{}" width="{}" height="{}" preserveAspectRatio="none"/>').format(
        _encoded(Image.fromarray(painted), "PNG"), sample.shape[1], sample.shape[0]
    )
    shares = [
        f"{_name(classes, int(label))} {count / answer.size:.0%}" for label, count in zip(labels, counts, strict=True)
    ]
    return _drawing(sample, over, ", ".join(shares))


def _drawing(sample: NDArray[Any], over: Markup, caption: str) -> Markup:
    height, width = sample.shape[:2]
    picture = Image.fromarray(sample[..., 0] if sample.shape[2] == 1 else sample)
    picture.thumbnail((_LARGEST, _LARGEST))
    return Markup(
        '<figure class="example"><svg viewBox="0 0 {w} {h}" role="img" aria-label="{caption}" width="{shown}">'
        '<image href="{data}" width="{w}" height="{h}" preserveAspectRatio="none"/>{over}</svg>'
        "<figcaption>{caption}</figcaption></figure>"
    ).format(w=width, h=height, shown=_LARGEST, data=_encoded(picture, "JPEG"), over=over, caption=caption)


def _encoded(picture: Image.Image, form: str) -> str:
    file = io.BytesIO()
    picture.save(file, form, **({"quality": 80} if form == "JPEG" else {}))
    return f"data:image/{form.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def _name(classes: tuple[str, ...], label: int) -> str:
    return classes[label] if label < len(classes) else str(label)

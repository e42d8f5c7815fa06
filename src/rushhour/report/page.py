"""What all pages share: template, style sheet, marks, and the sign by which a page of Rushhour's is recognised."""

from __future__ import annotations

from importlib import resources
from typing import Any, Final

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from rushhour.report import wording

MARKS: Final = {
    "won": "★", "baseline": "■", "tied": "=", "beaten": "●", "over budget": "▽", "dominated": "○",
    "not preferred": "◇", "skipped": "…", "failed": "✕",
    "pass": "✓", "fail": "✕", "inconclusive": "◌", "unstable": "△", "generator_limited": "⊘", "void": "⊘",
}  # fmt: skip
"""A sign for each fate of a candidate and each outcome of a window, so that colour is not needed to tell them apart."""


def render(template: str, **values: Any) -> bytes:
    """One of the templates beside this file, as UTF-8. The page loads nothing from anywhere.

    Args:
        template: its file name.
        values: what it names, beside `style` (the style sheet) and `say` (`wording`).
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.globals |= {"say": wording, "style": Markup(_read("style.css"))}
    return environment.from_string(_read(template)).render(**values).encode("utf-8", "replace")


def is_page(content: bytes) -> bool:
    """Whether a file of this content is a page of Rushhour's."""
    return b'<meta name="generator" content="Rushhour">' in content[:1000]


def _read(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text("utf-8")

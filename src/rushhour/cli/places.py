"""Paths on the command line: `~` is the home folder, a URL is refused, output paths are checked before work begins."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rushhour.errors import StorageError
from rushhour.system.storage import ELSEWHERE

if TYPE_CHECKING:
    _Path = click.ParamType[Path]
    _Text = click.ParamType[str]
else:
    _Path = _Text = click.ParamType  # older versions cannot be subscripted

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)


class Place(_Path):
    """A path.

    Args:
        tried: checks an output path: `try_file`, `try_folder` or `try_building`.
    """

    name = "path"

    def __init__(self, tried: Callable[[Path], None] | None = None) -> None:
        self.tried = tried

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """The path with `~` expanded; an output path gets a name of its own."""
        if isinstance(value, Path):
            return value
        if not value:
            self.fail("a path is not empty", param, ctx)
        if value == "-":
            streams = (
                "write /dev/stdout for standard output" if self.tried is not None else "standard input is not read"
            )
            self.fail(f"'-' is no path: {streams}, ./- for a file of that name", param, ctx)
        path = Path(_expanded(self, value, param, ctx))
        return Path(os.path.abspath(path)) if self.tried is not None and path.name in ("", "..") else path


class Named(_Text):
    """A name that may also be a path: of data, a model, a recipe."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The text, with `~` expanded."""
        return _expanded(self, str(value), param, ctx)


@contextlib.contextmanager
def advised(option: str) -> Iterator[None]:
    """Add to disk errors the option that chooses another place."""
    try:
        yield
    except StorageError as error:
        if not error.fix.endswith(ELSEWHERE) or error.what.startswith("cannot read"):
            raise
        raise StorageError(error.what, error.why, f"{error.fix} with {option}") from error


def try_places(ctx: click.Context) -> None:
    """Check all output paths of the command, before it begins.

    Raises:
        StorageError: if one cannot be written.
    """
    for param in ctx.command.params:
        place = ctx.params.get(param.name or "")
        if isinstance(param.type, Place) and param.type.tried is not None and place is not None:
            with advised(param.opts[0]):
                param.type.tried(place)


def _expanded(kind: _Path | _Text, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
    url = _URL.match(value)
    if url is not None and url[1].lower() == "file":
        kind.fail(f"{value!r} is a URL, not a path: write /{url[2].lstrip('/')}", param, ctx)
    if url is not None:
        kind.fail(f"{value!r} is a URL, not a path: fetch it first, and name the file or folder", param, ctx)
    if not value.startswith("~"):
        return value
    home = os.path.expanduser(value)
    if home == value and not os.path.lexists(value):
        kind.fail(f"there is no home folder for {value.partition('/')[0]!r}: write the whole path", param, ctx)
    return home

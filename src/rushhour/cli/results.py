"""`--json FILE`: the result of a command for machines. Only a file that Rushhour wrote itself is replaced."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import click
import msgspec

from rushhour.cli.command import option
from rushhour.cli.places import Place, advised
from rushhour.system.storage import check_own_file, try_file, write_whole

_MADE_BY: Final = "made_by"
_US: Final = "rushhour"


def write_json(file: Path | None, result: Any) -> None:
    """Write a result, if a file was given.

    Raises:
        StorageError: if it cannot be written.
    """
    if file is not None:
        marked = {**msgspec.to_builtins(result), _MADE_BY: _US}
        with advised("--json"):
            write_whole(file, msgspec.json.format(msgspec.json.encode(marked), indent=2) + b"\n")


def _check(ctx: click.Context, param: click.Parameter, file: Path | None) -> Path | None:
    """Check, before any work, that the file may be written."""
    if file is not None:
        check_own_file(file, _is_result)
    return file


def _is_result(content: bytes) -> bool:
    try:
        return msgspec.json.decode(content, type=dict[str, Any]).get(_MADE_BY) == _US
    except (msgspec.DecodeError, RecursionError):
        return False


json_option = option(
    "--json", "json_file", type=Place(try_file), metavar="FILE", callback=_check, help="Write the result as JSON."
)

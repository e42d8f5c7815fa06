"""Whether the code that runs is the code in its file: in a notebook, a module stays as it was when it was imported."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

from rushhour.errors import ModelError


def check_current(module: str, file: Path, content: bytes) -> None:
    """Raise if a module's file has been edited since the module was imported.

    The functions of the module and the methods of its classes are compared with those that the file defines now;
    positions in the file and comments do not count.

    Args:
        module: its name. One that is not imported passes.
        file: its file.
        content: of the file.

    Raises:
        ModelError: if a function differs.
    """
    loaded = sys.modules.get(module)
    spec = getattr(loaded, "__spec__", None)
    if loaded is None or type(getattr(spec, "loader", None)) is not SourceFileLoader:  # others may rewrite the code
        return
    try:
        now = {_content(code) for code in _codes(compile(content, str(file), "exec", dont_inherit=True))}
    except (SyntaxError, ValueError):  # then it cannot have been imported so
        now = set()
    for function in _functions(loaded):
        code = function.__code__
        if Path(code.co_filename) == file and _content(code) not in now:
            raise ModelError(
                f"{file} has changed since it was imported",
                f"Python still runs the old {function.__qualname__}",
                f"start Python (in a notebook: the kernel) again, or importlib.reload({module})",
            )


def _functions(module: ModuleType) -> Iterator[FunctionType]:
    for value in list(vars(module).values()):
        if isinstance(value, FunctionType):
            yield value
        elif isinstance(value, type) and value.__module__ == module.__name__:
            yield from (each for each in map(_unwrapped, vars(value).values()) if isinstance(each, FunctionType))


def _unwrapped(attribute: Any) -> Any:
    """The function of a static or class method."""
    return getattr(attribute, "__func__", attribute)


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _content(code: CodeType) -> tuple[Any, ...]:
    """All that decides what code does, and not where it stands."""
    constants = tuple(map(_constant, code.co_consts))
    return code.co_qualname, code.co_code, code.co_names, code.co_varnames, code.co_flags, constants


def _constant(value: Any) -> Any:
    if isinstance(value, CodeType):
        return _content(value)
    return tuple(sorted(map(repr, value))) if isinstance(value, frozenset) else repr(value)

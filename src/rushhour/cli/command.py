"""A command of `rushhour`: its options in sections, its output files tried before work begins, its end by a signal."""

from __future__ import annotations

import keyword
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from importlib import import_module
from typing import Any, TypeVar

import click

from rushhour.cli.places import advised, try_places
from rushhour.errors import StorageError
from rushhour.system.interruption import INTERRUPTION
from rushhour.system.machine import open_files

C = TypeVar("C", bound=Callable[..., Any])

_FILES, _FEWEST_FILES = 4096, 32
"""Files that a command may open: as many as any needs, and the fewest that any works with."""


class Interrupted(click.ClickException):
    """A signal has ended the command; the message says how to continue."""


class Command(click.Command):
    """A command that tries its output files and folders before work begins, and says how to continue after a signal.

    Args:
        how_to_continue: in words; gets the command's parameters.
    """

    def __init__(
        self, *args: Any, how_to_continue: Callable[[dict[str, Any]], str] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._how_to_continue = how_to_continue

    def invoke(self, ctx: click.Context) -> Any:
        """Run it."""
        try:
            _check_files()
            try_places(ctx)
            if "out" not in ctx.params:
                return super().invoke(ctx)
            with advised("--out"):
                return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            raise self._interrupted(ctx) from stop
        except (EOFError, BrokenPipeError) as error:  # click takes them for the end of the terminal, and prints nothing
            renamed = RuntimeError(str(error) or type(error).__name__)
            for note in getattr(error, "__notes__", ()):
                renamed.add_note(note)
            raise renamed from error
        except Exception as error:
            if INTERRUPTION.number is None:
                raise
            raise self._interrupted(ctx) from error  # a library has turned the signal into another error

    def _interrupted(self, ctx: click.Context) -> Interrupted:
        explain = self._how_to_continue
        return Interrupted("run it again" if explain is None else explain(ctx.params))

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, each section under its heading."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx) if isinstance(param, click.Option) else None
            if record is not None:
                sections.setdefault(getattr(param, "section", "Options"), []).append(record)
        for name, records in sections.items():
            with formatter.section(name):
                formatter.write_dl(records)


class Verbs(MutableMapping[str, click.Command]):
    """Commands by name, each imported when it is first used: `rushhour serve` needs no library of the others.

    Args:
        package: with a module for each, which defines `command`.
        names: of the modules, in the order of the help.
    """

    def __init__(self, package: str, names: Sequence[str]) -> None:
        self._package = package
        self._commands: dict[str, click.Command | None] = dict.fromkeys(names)

    def __getitem__(self, name: str) -> click.Command:
        found = self._commands[name]
        if found is None:
            module = f"{name}_" if keyword.iskeyword(name) else name
            found = self._commands[name] = import_module(f"{self._package}.{module}").command
        return found

    def __setitem__(self, name: str, command: click.Command) -> None:
        self._commands[name] = command

    def __delitem__(self, name: str) -> None:
        del self._commands[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._commands)

    def __len__(self) -> int:
        return len(self._commands)


class Group(click.Group):
    """Commands that are listed in the order in which they were added."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Their names."""
        return list(self.commands)


class Option(click.Option):
    """An option that is listed under a heading in the help.

    Args:
        section: the heading.
    """

    def __init__(self, *args: Any, section: str = "Options", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.section = section


def option(*names: str, **how: Any) -> Callable[[C], C]:
    """`click.option` with a `section`."""
    return click.option(*names, cls=Option, **how)


def options(*given: Callable[[C], C]) -> Callable[[C], C]:
    """Several options as one decorator, in the order in which the help lists them."""

    def decorate(command: C) -> C:
        for each in reversed(given):
            command = each(command)
        return command

    return decorate


def _check_files() -> None:
    """Raise unless this process may open enough files; the limit is raised as far as possible.

    Raises:
        StorageError: if it may not.
    """
    files, used = open_files(_FILES)
    if files - used < _FEWEST_FILES:
        raise StorageError(
            f"this process may open only {files} files",
            f"{used} are open, and any command needs {_FEWEST_FILES} more",
            "raise the limit: ulimit -n 4096",
        )

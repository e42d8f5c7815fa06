"""The command line: one file a verb, which reads the options, calls `rushhour.api` and shows the result.

Every command: `--json FILE` for machines, progress for people, exit code 0 only on success. Exit codes: 0 success; 1 a
negative result (an SLO that does not hold, nothing inside the budget); 2 an error, in one line that says what happened,
why, and what to do; 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import click

from rushhour.cli.command import Group, Interrupted, Verbs
from rushhour.errors import RushhourError
from rushhour.system.extras import explain_missing
from rushhour.system.faults import cause_chain, report_unexpected
from rushhour.system.interruption import INTERRUPTION
from rushhour.system.storage import home

_VERBS = (
    "demo",
    "tune",
    "train",
    "compress",
    "import",
    "serve",
    "load",
    "compare",
    "report",
    "plan",
    "export",
    "deploy",
    "machine",
)


@click.group(
    cls=Group,
    commands=Verbs(__name__, _VERBS),
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="rushhour")
def cli() -> None:
    """Find, prove and run the fastest way to serve a deep-learning model to many users.

    \b
    First steps:
        rushhour demo                                   everything, on real data, in a few minutes
    Your own model:
        rushhour tune article --data photos/ --slo 'p99<50ms' --max-accuracy-drop 1% --out runs/photos
        rushhour serve runs/photos
        rushhour load http://127.0.0.1:8000 --slo 'p99<50ms'
    """


def main() -> None:
    """The entry point: every expected error becomes one line and an exit code."""
    # `module:factory` on the command line is the user's own file, most often in the current folder.
    if "" not in sys.path:
        sys.path.insert(0, "")
    INTERRUPTION.begin()
    try:
        # Libraries ask for a home and a name, and fail where a container gives its user neither.
        os.environ.setdefault("HOME", str(home()))
        os.environ.setdefault("USER", str(os.getuid()))
        cli.main(prog_name="rushhour", standalone_mode=False)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except Interrupted as stop:
        _stop(stop.message)
    except (click.Abort, KeyboardInterrupt):
        _stop("run it again")
    except click.ClickException as error:
        usage = f"; see {error.ctx.command_path} --help" if isinstance(error, click.UsageError) and error.ctx else ""
        _fail(" ".join(error.format_message().split()).rstrip(".") + usage)
    except Exception as error:
        if INTERRUPTION.number is not None:  # a library has turned it into another error
            _stop("run it again")
        doing = " ".join(["running rushhour", *sys.argv[1:2]])
        expected = error if isinstance(error, RushhourError) else explain_missing(cause_chain(error))
        _fail(report_unexpected(error, doing) if expected is None else str(expected))


def _stop(how_to_continue: str) -> NoReturn:
    INTERRUPTION.end()
    click.echo(f"rushhour: stopped by {INTERRUPTION.name}; {how_to_continue}", err=True)
    sys.exit(INTERRUPTION.code)


def _fail(line: str) -> NoReturn:
    click.echo(f"rushhour: {line}", err=True)
    sys.exit(2)


if __name__ == "__main__":
    main()

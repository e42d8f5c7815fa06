"""`python -m rushhour` is `rushhour`. Signal handlers and streams are set up before anything slow is imported."""

import os
import sys


def _report_stopped() -> None:
    os.write(2, b"rushhour: stopped before it served; run it again\n")


def main() -> None:
    """Run the command line and end the process with its exit code."""
    from rushhour.system import exit

    exit.install()
    if sys.argv[1:2] == ["serve"]:
        from rushhour.serve.processes.signals import SIGNALS

        SIGNALS.before_exit = _report_stopped
        SIGNALS.install()
    else:
        from rushhour.system.interruption import INTERRUPTION

        INTERRUPTION.install()
    from rushhour.system import streams

    streams.install()
    from rushhour.cli import main as run

    code: str | int | None = 0
    try:
        run()
    except SystemExit as end:
        code = end.code
    error = streams.failure()
    if error is not None:
        print(f"rushhour: cannot write to standard output: {error.strerror}; all files are complete", file=sys.stderr)
        code = 2
    exit.leave(code)


if __name__ == "__main__":
    main()

"""`python -m rushhour` is `rushhour`. Signals and streams are seen to before anything slow is imported."""

import os
import sys


def _say_stopped() -> None:
    os.write(2, b"rushhour: stopped before it served; run it again\n")


def main() -> None:
    """The command line, as a process: it ends with the command's exit code."""
    if sys.argv[1:2] == ["serve"]:
        from rushhour.serve.processes.signals import SIGNALS

        SIGNALS.before_exit = _say_stopped
        SIGNALS.install()
    else:
        from rushhour.system.interruption import INTERRUPTION

        INTERRUPTION.take_over()
    from rushhour.system import streams

    streams.settle()
    from rushhour.cli import main as run

    code: str | int | None = 0
    try:
        run()
    except SystemExit as end:
        code = end.code
    error = streams.failure()
    if error is not None:
        print(f"rushhour: cannot write to standard output: {error.strerror}; files are whole", file=sys.stderr)
        code = 2
    sys.exit(code)


if __name__ == "__main__":
    main()

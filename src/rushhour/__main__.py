"""`python -m rushhour` is `rushhour`."""

import sys


def main() -> None:
    """The command line; a server hears signals before anything slow is imported."""
    if sys.argv[1:2] == ["serve"]:
        from rushhour.serve.signals import SIGNALS

        SIGNALS.early()
    from rushhour.cli import main as run

    run()


if __name__ == "__main__":
    main()

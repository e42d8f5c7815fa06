"""`python -m rushhour` is `rushhour`."""

from rushhour.cli import main

main()

"""`make picture`: docs/demo.svg, the README's picture, from the run of a demo."""

from __future__ import annotations

import argparse
from pathlib import Path

from rushhour.report import charts
from rushhour.report.findings import Findings

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Draw the capacity after each step of a run."""
    parser = argparse.ArgumentParser(description="docs/demo.svg from a run of `make demo`")
    parser.add_argument("run", type=Path, nargs="?", default=ROOT / "runs" / "demo")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "demo.svg")
    arguments = parser.parse_args()
    chart = charts.capacity_by_step(Findings.read(arguments.run))
    if chart is None:
        parser.error(f"{arguments.run} names no steps")
    arguments.out.write_text(charts.standalone(chart))


if __name__ == "__main__":
    main()

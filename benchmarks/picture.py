"""Pictures for the documentation, as SVG, from runs: `make picture` draws docs/demo.svg, the README's, from runs/demo.

`--examples` draws docs/gallery/NAME.svg anew from each run of `make bench-fields` that is there.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rushhour.report import charts
from rushhour.report.findings import Findings
from rushhour.system.storage import write_whole

ROOT = Path(__file__).resolve().parent.parent
GALLERY = ROOT / "docs" / "gallery"
EXAMPLES = ROOT / ".bench" / "fields"
_MOST_BYTES = 60_000


def draw_steps(run: Path, file: Path) -> bool:
    """Draw the capacity after each step of a run; false where its plan names no steps."""
    chart = charts.capacity_by_step(Findings.read(run))
    if chart is not None:
        file.write_text(charts.standalone(chart))
    return chart is not None


def draw_example(run: Path, file: Path) -> bool:
    """Draw all candidates of a run by accuracy and capacity, or its steps where these are too many for a small file.

    Nothing of an example's data is in it: most of their licences forbid to pass that on.

    Args:
        run: the folder of the run, finished.
        file: an older one is replaced.

    Returns:
        Whether there was anything to draw.
    """
    found = Findings.read(run)
    for chart in (charts.accuracy_against_capacity(found), charts.capacity_by_step(found)):
        content = b"" if chart is None else charts.standalone(chart).encode()
        if 0 < len(content) <= _MOST_BYTES:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(file, content)
            return True
    return False


def main() -> None:
    """Draw one run, or those of all examples."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", default=ROOT / "runs" / "demo")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "demo.svg")
    parser.add_argument("--examples", action="store_true", help=f"draw those in {EXAMPLES.relative_to(ROOT)} instead")
    arguments = parser.parse_args()
    if not arguments.examples:
        if not draw_steps(arguments.run, arguments.out):
            parser.error(f"{arguments.run} names no steps")
        return
    for plan in sorted(EXAMPLES.glob("*/run/plan.json")):
        name = plan.parent.parent.name
        drawn = draw_example(plan.parent, GALLERY / f"{name}.svg")
        print(f"{name}: {f'docs/gallery/{name}.svg' if drawn else 'nothing to draw'}")


if __name__ == "__main__":
    main()

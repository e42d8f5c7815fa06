"""`make docs`: docs/benchmarks.md from the records in `benchmarks/results`. `--check` fails if it would change.

All numbers of the page are formatted here.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import jinja2
from bench.record import Check, Record

ROOT = Path(__file__).resolve().parent.parent
_DIGITS = 3
_SPACES = ("tune_space",)
"""Files beside the records that hold measurements only; a record says what they show."""


def render(records: list[tuple[str, Record]]) -> str:
    """The whole page.

    Args:
        records: name and record, in the order of the page.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters |= {"number": number, "cell": _cell, "measured": measured, "capitalised": _capitalised}
    return environment.get_template("benchmarks.md.j2").render(records=records)


def number(value: Any) -> str:
    """A number with three digits and separated thousands, not 1e+03; text unchanged; a missing value as a dash."""
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    rounded = float(f"{value:.{_DIGITS}g}")
    return f"{rounded:,.0f}" if abs(rounded) >= 100 else f"{rounded:g}"


def measured(check: Check) -> str:
    """A check's value with its interval."""
    if check.value is None:
        return "–"
    interval = f" [{number(check.interval[0])}, {number(check.interval[1])}]" if check.interval else ""
    return f"{number(check.value)}{interval}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


def main() -> int:
    """Write the page, or check that it agrees with the records."""
    parser = argparse.ArgumentParser(description="docs/benchmarks.md from benchmarks/results/*.json")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the page is out of date")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks.md")
    arguments = parser.parse_args()
    files = [file for file in sorted(arguments.results.glob("*.json")) if file.stem not in _SPACES]
    page = render([(file.stem, Record.load(file)) for file in files])
    if arguments.check:
        if arguments.out.exists() and arguments.out.read_text() == page:
            return 0
        print(f"{arguments.out} does not agree with the results: run `make docs`", file=sys.stderr)
        return 1
    arguments.out.write_text(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())

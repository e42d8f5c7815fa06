"""`make docs`: docs/benchmarks.md from the records in `benchmarks/results`, docs/gallery.md from that of the examples.

`--check` fails if one would change. All numbers of the pages are formatted here.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import jinja2
import msgspec
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
    return _environment().get_template("benchmarks.md.j2").render(records=records)


def render_gallery(record: Record | None, pictures: Path | None = None) -> str:
    """The page of the examples.

    Args:
        record: of `make bench-fields`; None before the first.
        pictures: a folder with a picture NAME.svg or NAME.png of some of them.
    """
    parts = {} if record is None else record.data["parts"]
    examples = [_shown(name, part, pictures) for name, part in parts.items() if "title" in part["measured"]]
    return _environment().get_template("gallery.md.j2").render(examples=examples)


def _shown(name: str, part: dict[str, Any], pictures: Path | None) -> dict[str, Any]:
    """An example as the page shows it."""
    checks = msgspec.convert(part["checks"], list[Check])
    (minutes,) = (check.value for check in checks if check.id == f"1.{name}.minutes")
    (accuracy,) = (check for check in checks if check.id == f"1.{name}.accuracy")
    found = [] if pictures is None else sorted(pictures.glob(f"{name}.*"))
    own = {
        "name": name,
        "minutes": minutes,
        "accuracy": accuracy,
        "checks": checks,
        "picture": f"{found[0].parent.name}/{found[0].name}" if found else "",
    }
    kept = {key: part[key] for key in ("commit", "busy_cores")}
    return {**part["measured"], **kept, **own}


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters |= {"number": number, "cell": _cell, "measured": measured, "capitalised": _capitalised}
    return environment


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
    records = {file.stem: Record.load(file) for file in files}
    gallery = arguments.out.with_name("gallery.md")
    pages = {
        arguments.out: render(list(records.items())),
        gallery: render_gallery(records.get("fields"), gallery.with_suffix("")),
    }
    for file, page in pages.items():
        if not arguments.check:
            file.write_text(page)
        elif not file.exists() or file.read_text() != page:
            print(f"{file} does not agree with the results: run `make docs`", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

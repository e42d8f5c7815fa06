"""A client: send the lines of a file to a server, and print the likeliest classes of each.

python examples/classify.py http://127.0.0.1:8000 beats.csv --top 2

A line is one signal, its values separated by commas or white space; with `--text` a line is one text.
"""

from __future__ import annotations

import argparse
import json
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

AT_ONCE = 100


def ask(url: str, content: dict[str, Any] | None = None) -> Any:
    """The JSON at an address; of a POST where there is content."""
    body = None if content is None else json.dumps(content).encode()
    request = urllib.request.Request(url, body, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise SystemExit(f"{url} answered {error.code}: {error.read().decode(errors='replace')}") from error
    except OSError as error:
        raise SystemExit(f"there is no server at {url}: {error}; start one with `rushhour serve RUN`") from error


def rows_of(file: Path, shape: list[int]) -> list[list[float]]:
    """The signals in a file, each with as many values as a sample of the model has."""
    size = 1
    for each in shape:
        size *= each
    rows = []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = [float(value) for value in line.replace(",", " ").split()]
        except ValueError as error:
            raise SystemExit(f"line {number} of {file}: {error}") from error
        if len(row) != size:
            raise SystemExit(f"line {number} of {file} has {len(row)} values, and the model takes {size}")
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="of the server")
    parser.add_argument("file", type=Path)
    parser.add_argument("--text", action="store_true", help="lines are texts")
    parser.add_argument("--top", type=int, default=1, help="classes that are printed of each line")
    arguments = parser.parse_args()
    server = arguments.url.rstrip("/")
    (model,) = (each["name"] for each in ask(f"{server}/v2/repository/index", {}))
    described = ask(f"{server}/v2/models/{model}")
    spec, output = described["inputs"][0], described["outputs"][0]
    if arguments.text:
        samples: list[Any] = [line for line in arguments.file.read_text().splitlines() if line.strip()]
    else:
        samples = rows_of(arguments.file, spec["shape"][1:])
    wanted = {"name": output["name"], "parameters": {"classification": arguments.top}}
    for first in range(0, len(samples), AT_ONCE):
        some = samples[first : first + AT_ONCE]
        entry = {"name": spec["name"], "datatype": spec["datatype"], "shape": [len(some), *spec["shape"][1:]]}
        if arguments.text:
            entry = {"name": "text", "datatype": "BYTES", "shape": [len(some)]}
        request = {"inputs": [entry | {"data": some}], "outputs": [wanted]}
        (answer,) = ask(f"{server}/v2/models/{model}/infer", request)["outputs"]
        names = answer["data"]
        for at, sample in enumerate(some):
            found = (each.split(":", 2) for each in names[at * arguments.top : (at + 1) * arguments.top])
            shown = ", ".join(f"{name} {float(value):.1%}" for value, _, name in found)
            print(f"{first + at + 1}: {shown}" + (f"    {sample}" if arguments.text else ""))


if __name__ == "__main__":
    sys.exit(main())

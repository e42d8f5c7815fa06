"""Run an example from its data to its report: `python examples/run.py heartbeats --out runs/heartbeats`.

An example is a file `examples/FIELD/NAME.toml`: its steps are commands, which are shown before they run, so that each
can be repeated by hand. A step that has ended well is not run again: the same command continues after an interruption.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import packages

HERE = Path(__file__).resolve().parent
FILES = {file.stem: file for file in sorted(HERE.glob("*/*.toml"))}


def example(name: str) -> dict[str, Any]:
    """What the file of an example says."""
    return tomllib.loads(FILES[name].read_text())


def commands(name: str, out: Path) -> list[list[str]]:
    """The steps as commands, with `{out}` and `{here}` filled in."""
    own = {"out": str(out), "here": str(FILES[name].parent.relative_to(HERE.parent))}
    return [[part.format(**own) for part in shlex.split(step)] for step in example(name)["steps"]]


def run(name: str, out: Path) -> dict[str, float]:
    """Run what is missing; returns the seconds of each step that ever ran here, also written to `steps.json`.

    Raises:
        SystemExit: if a step fails.
    """
    out.mkdir(parents=True, exist_ok=True)
    for package in example(name).get("data", []):
        packages.Package(package)  # a download is no part of the time
    record = out / "steps.json"
    took: dict[str, float] = json.loads(record.read_text()) if record.exists() else {}
    paths = [str(HERE), str(FILES[name].parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    own = Path(sys.executable)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "PATH": f"{own.parent}{os.pathsep}{os.environ['PATH']}",
    }
    for command in commands(name, out):
        shown = shlex.join(command)
        if shown in took:
            continue
        print(f"\n$ {shown}", flush=True)
        began = time.monotonic()
        command = [str(own), *command[1:]] if command[0] == "python" else [str(own), "-m", *command]
        done = subprocess.run(command, cwd=HERE.parent, env=environment, check=False)
        if done.returncode and not (done.returncode == 1 and (out / "run" / "plan.json").exists()):
            raise SystemExit(f"{shown} ended with exit code {done.returncode}: correct it, and run this again")
        took[shown] = round(time.monotonic() - began, 1)
        record.write_text(json.dumps(took, indent=1))
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=FILES)
    parser.add_argument("--out", type=Path, help="where all of it is kept; runs/NAME by default")
    arguments = parser.parse_args()
    out = (arguments.out or Path("runs") / arguments.name).resolve()
    took = run(arguments.name, out)
    report = out / "run" / "report.html"
    print(f"\n{sum(took.values()) / 60:.1f} minutes; the report: {report}")


if __name__ == "__main__":
    main()

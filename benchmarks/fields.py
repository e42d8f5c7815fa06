"""`make bench-fields`: every example in a fresh folder, through the command line, from its data to its report.

A part for each file `examples/FIELD/NAME.toml`: its minutes, its accuracy with the interval against its target and a
plain baseline, its capacity against its own network in torch as it is, and what else the example has measured itself
(`figures.json`). `--only NAME` measures one anew. Downloads are no part of the minutes. Part 3 compares compiled
networks for places in a picture with torch (fields_places.py).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from bench.parts import Part, run_parts, say
from bench.record import Check, Table, verdict
from fields_places import Scale, places_part
from picture import GALLERY, draw_example

from rushhour.errors import RushhourError
from rushhour.plan import Plan

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

import run as examples  # noqa: E402
from packages import described  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "fields.json"
BENCH = ROOT / ".bench" / "fields"
MINUTES, GAIN = "<= 10", ">= 5"
PLACES = "3"
"""The part that is no example."""
_COLUMNS = (
    "example", "field", "metric", "network", "Plan", "baseline", "torch, requests/s", "Plan, requests/s", "minutes",
)  # fmt: skip


class ExampleError(RushhourError):
    """An example that did not end in a Plan."""


def example_part(name: str, work: Path, *, resumes: bool, pictures: Path | None = None) -> Part:
    """Run an example, judge what it wrote, and draw it for the gallery.

    Args:
        name: of the example.
        work: where its folder is made.
        resumes: whether a folder that is there is continued; else it is removed first.
        pictures: the folder of the gallery's pictures.

    Raises:
        ExampleError: if a step fails.
    """
    out = work / name
    if not resumes:
        shutil.rmtree(out, ignore_errors=True)
    try:
        took = examples.run(name, out)
    except SystemExit as error:
        raise ExampleError(f"the example {name} ended early", str(error), "") from error
    plan = Plan.load(out / "run" / "plan.json")
    if pictures is not None:
        draw_example(out / "run", pictures / f"{name}.svg")
    part = judged_example(name, examples.example(name), plan, sum(took.values()) / 60, figures(out))
    folder = examples.FILES[name].parent.relative_to(ROOT)
    measured = {
        "steps_s": {step.replace(str(out), "OUT"): seconds for step, seconds in took.items()},
        "data": [described(each) for each in examples.example(name).get("data", [])],
        "readme": str(folder / examples.example(name).get("readme", "README.md")),
    }
    return msgspec.structs.replace(part, measured=part.measured | measured)


def figures(out: Path) -> list[Check]:
    """What the example measured itself, in the form of checks; those of `figures.json`."""
    file = out / "figures.json"
    return msgspec.json.decode(file.read_bytes(), type=list[Check]) if file.exists() else []


def judged_example(name: str, said: dict[str, Any], plan: Plan, minutes: float, own: list[Check]) -> Part:
    """The checks of an example that has ended.

    Args:
        name: of the example.
        said: its file.
        plan: that it ended in.
        minutes: of all steps.
        own: what it measured itself.
    """
    accuracy, title, evidence = said["accuracy"], said["title"], plan.evidence
    assert evidence is not None
    checks = [verdict(f"1.{name}.minutes", f"{title}: minutes from the data to the report", MINUTES, minutes, None, 1,
                      unit="minutes")]  # fmt: skip
    what = f"{title}: {evidence.metric} of the served graph on the test part"
    if "baseline" in accuracy:
        what += f"; a plain baseline has {accuracy['baseline']:g} ({accuracy['baseline_is']})"
    checks.append(
        reached(f"1.{name}.accuracy", what, accuracy["target"], evidence.accuracy, evidence.accuracy_interval, accuracy)
    )
    gain = evidence.capacity_rps / evidence.baseline_capacity_rps if evidence.baseline_capacity_rps else None
    what = f"{title}: capacity of the Plan over that of its own network in torch as it is, on the same machine"
    if gain is None:
        checks.append(
            Check(f"2.{name}", what, "x", GAIN, None, None, 0, False, "torch as it is kept the SLO at no rate")
        )
    else:
        low, high = evidence.capacity_interval_rps or (evidence.capacity_rps, evidence.capacity_rps)
        known = evidence.proven or evidence.capacity_interval_rps is None
        base = evidence.baseline_capacity_rps
        interval = None if known else (low / base, high / base)
        checks.append(verdict(f"2.{name}", what, GAIN, gain, interval, 1, why=said.get("why_capacity", "")))
    if not plan.feasible:
        checks[-1] = msgspec.structs.replace(checks[-1], holds=False, why="no plan meets the goal: this is the nearest")
    row = (
        title, said["field"], evidence.metric, evidence.reference_accuracy, evidence.accuracy, accuracy.get("baseline"),
        evidence.baseline_capacity_rps, evidence.capacity_rps, minutes,
    )  # fmt: skip
    measured = {
        "title": title,
        "field": said["field"],
        "metric": evidence.metric,
        "baseline": accuracy.get("baseline"),
        "baseline_is": accuracy.get("baseline_is", ""),
        "slo": str(plan.goal.slo),
        "torch_rps": evidence.baseline_capacity_rps,
        "plan_rps": evidence.capacity_rps,
        "accuracy_interval": evidence.accuracy_interval,
        "accuracy_drop": evidence.accuracy_drop,
        "accuracy_drop_interval": evidence.accuracy_drop_interval,
        "parameters": evidence.parameters,
        "reference_parameters": evidence.reference_parameters,
        "p99_ms": evidence.p99_ms,
        "proven": evidence.proven,
        "steps": [(step.step, step.capacity_rps) for step in evidence.ladder],
    }
    return Part((*checks, *own), (Table("The examples", _COLUMNS, (row,)),), measured)


def reached(
    id: str, what: str, target: str, value: float, interval: tuple[float, float], said: dict[str, Any]
) -> Check:
    """A check of an accuracy: the value meets the target; where its interval reaches below, `why` says so.

    A test part is as large as it is: more of it cannot be measured, as of a rate. So the value decides.
    """
    check = verdict(id, what, target, value, None, 1, unit=said.get("unit", "share"), why=said.get("why", ""))
    low, high = interval
    check = msgspec.structs.replace(check, interval=(low, high))
    if check.holds and low < float(target.partition(" ")[2]) < high:
        check = msgspec.structs.replace(check, why="the target is within the interval: the test part is small")
    return check


def main(given: list[str] | None = None) -> int:
    """Run what is missing, and write the record after each example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help=f"examples, or {PLACES}, measured anew")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the record")
    parser.add_argument("--work", type=Path, default=BENCH, help="where the examples' folders are made")
    parser.add_argument("--resume", action="store_true", help="continue folders that are there")
    arguments = parser.parse_args(given)
    only = {name for name in arguments.only.split(",") if name}
    if strange := only - {*examples.FILES, PLACES}:
        parser.error(f"there is no example {', '.join(strange)}: they are {', '.join(examples.FILES)}")
    work, pictures = arguments.work.resolve(), GALLERY if arguments.out == RESULTS else None
    own = partial(example_part, work=work, resumes=arguments.resume, pictures=pictures)
    parts = {name: partial(own, name) for name in examples.FILES}
    parts[PLACES] = partial(places_part, work / "places", Scale())
    say(json.dumps({name: examples.example(name)["title"] for name in examples.FILES}))
    return run_parts(parts, arguments.out, kept=True, only=only, timed=set(examples.FILES), seeds={"first": 0})


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)

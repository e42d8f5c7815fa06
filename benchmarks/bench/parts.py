"""A benchmark in parts: each stays in the record with the commit that it was measured at, so that a run resumes where
the last was interrupted, and single parts can be repeated."""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from bench.blocks import machine_cpu_s
from bench.record import Check, Record, Table, commit, record
from bench.servers import DidNotStart
from rushhour.errors import RushhourError
from rushhour.system.machine import Machine, describe

_LOOK_S = 1.0

S = TypeVar("S", bound=msgspec.Struct)


class Part(msgspec.Struct, frozen=True):
    """The results of one part, its commit, and the machine: a record's parts may come from several."""

    checks: tuple[Check, ...]
    tables: tuple[Table, ...]
    measured: Any
    commit: str = ""
    machine: str = ""
    date: str = ""
    busy_cores: float = 0.0
    minutes: float = 0.0
    versions: dict[str, str] = {}


def run_parts(
    parts: Mapping[str, Callable[[], Part]],
    out: Path,
    *,
    kept: bool,
    only: set[str],
    timed: set[str],
    seeds: dict[str, int],
) -> int:
    """Measure what is missing, and write the record after each part; the exit code.

    Args:
        parts: name -> what measures it, in order.
        out: the record.
        kept: parts that are in it already stay, and those of this very commit are not measured again.
        only: measure these, whatever is there; empty for all that are missing.
        timed: parts before which the machine is looked at: is anything else busy?
        seeds: of all that is random.
    """
    now = commit()
    out.parent.mkdir(parents=True, exist_ok=True)
    done: dict[str, Part] = {}
    if out.exists() and kept:
        done = _parts_of(Record.load(out))
    for name, measured in parts.items():
        if only and name not in only:
            continue
        if not only and name in done and done[name].commit == now and not now.endswith("+"):
            say(f"{name}  is there already")
            continue
        began, busy = time.monotonic(), busy_cores() if name in timed else 0.0
        try:
            part = measured()
        except (RushhourError, DidNotStart) as error:
            print(f"{name}: {error}", file=sys.stderr)
            return 1
        done[name] = msgspec.structs.replace(
            part,
            commit=now,
            machine=str(describe()),
            date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
            busy_cores=round(busy, 3),
            minutes=round((time.monotonic() - began) / 60, 1),
        )
        _write(out, {key: done[key] for key in parts if key in done}, seeds)
        for check in done[name].checks:
            say(f"{'ok  ' if check.holds else 'MISS'} {check.id:26} {_value(check)} {check.target} {check.why or ''}")
    say(f"written to {out}")
    return 0


def _parts_of(before: Record) -> dict[str, Part]:
    """The parts of a record. Those of older ones do not name their machine: it is the record's."""
    parts = msgspec.convert(before.data["parts"], dict[str, Part])
    machine = str(msgspec.convert({**before.machine, "versions": before.versions}, Machine))
    return {
        name: part if part.machine else msgspec.structs.replace(part, machine=machine) for name, part in parts.items()
    }


def say(text: str) -> None:
    """Print a line for the user."""
    print(text, file=sys.stderr, flush=True)


def busy_cores(seconds: float = _LOOK_S) -> float:
    """Cores that are busy while this process sleeps."""
    before, _ = machine_cpu_s()
    time.sleep(seconds)
    return (machine_cpu_s()[0] - before) / seconds


def scale_options(parser: argparse.ArgumentParser, whole: msgspec.Struct) -> None:
    """An option for each field of a benchmark's scale; without any it is `whole`."""
    for name in whole.__struct_fields__:
        value: Any = getattr(whole, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)


def scale_of(arguments: argparse.Namespace, kind: type[S]) -> S:
    """The scale set by `scale_options`."""
    return msgspec.convert({name: getattr(arguments, name) for name in kind.__struct_fields__}, kind)


def _value(check: Check) -> str:
    return "not measured" if check.value is None else f"{check.value:.4g} {check.unit}"


def _write(out: Path, parts: dict[str, Part], seeds: dict[str, int]) -> None:
    rows = tuple((name, part.date, part.commit, part.minutes, part.machine) for name, part in parts.items())
    when = Table("When and where each part was measured", ("part", "date", "commit", "minutes", "machine"), rows)
    data = {
        "busy_cores_before": max((part.busy_cores for part in parts.values()), default=0.0),
        "tables": [*_joined(table for part in parts.values() for table in part.tables), when],
        "parts": parts,
    }
    versions = {name: version for part in parts.values() for name, version in part.versions.items()}
    checks = [check for part in parts.values() for check in part.checks]
    record(checks, msgspec.to_builtins(data), seeds, versions).save(out)


def _joined(tables: Iterable[Table]) -> list[Table]:
    """Tables of one kind, from several parts, as one."""
    kinds: dict[tuple[str, tuple[str, ...], str], list[tuple[str | float | None, ...]]] = {}
    for table in tables:
        kinds.setdefault((table.title, table.columns, table.note), []).extend(table.rows)
    return [Table(title, columns, tuple(rows), note) for (title, columns, note), rows in kinds.items()]

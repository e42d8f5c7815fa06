"""`make bench-zoo`: any network. Some 5 minutes for the first part and 20 for the second, on 2 cores.

heap    500 random small networks are trained for three steps each under a heap that is checked, with all instructions
        of this machine and with those of AVX2 only: as Rushhour trains them, and, as data, in memory formats that are
        forced. Is any memory corrupted?
matrix  every network of `rushhour.testing.gallery` is trained, killed and gone on with, trained on two workers,
        exported, pruned, quantised and served: each works, or one line says why before any work.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import multiprocessing
import queue
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import msgspec
from bench.parts import Part, run_parts, say, scale_of, scale_options
from bench.record import Table, verdict

from rushhour.system.machine import cores
from rushhour.testing.gallery import GALLERY, Specimen
from rushhour.testing.matrix import CELLS, WORKS, Cell, cells, is_fault
from rushhour.testing.zoo import WAYS, Instructions, Outcome, checker, outcomes, specimen

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "zoo.json"
BENCH = ROOT / ".bench"
SETS: tuple[Instructions, ...] = ("native", "avx2")
_TOGETHER = 50
"""Networks for one child process; it forks for each, so their number is a matter of speed only."""
_TELL_S = 5.0


class Scale(msgspec.Struct, frozen=True):
    """How much of everything.

    Attributes:
        networks: trained in each way, with each set of instructions.
        seed: of the first.
        named: networks of the gallery that go through the matrix, the first ones.
    """

    networks: int = 500
    seed: int = 0
    named: int = len(GALLERY)


class Found(msgspec.Struct, frozen=True):
    """One training that did not end well."""

    instructions: Instructions
    outcome: Outcome
    network: str


def heap(scale: Scale) -> Part:
    """Random networks under a checked heap."""
    return judge(measure(scale), scale)


def outcomes_of(one: Specimen) -> dict[Cell, str]:
    """One network through every cell, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        return cells(one, Path(folder))


def matrix(scale: Scale) -> Part:
    """Named networks through every cell."""
    some = GALLERY[: scale.named]
    rows: list[tuple[str | float | None, ...]] = []
    lines: list[tuple[str | float | None, ...]] = []
    faults = filled = 0
    with concurrent.futures.ProcessPoolExecutor(cores(), multiprocessing.get_context("spawn")) as pool:
        pending = {pool.submit(outcomes_of, one): one for one in some}
        done: dict[str, dict[Cell, str]] = {}
        for future in concurrent.futures.as_completed(pending):
            one = pending[future]
            done[one.name] = future.result()
            result = done[one.name].values()
            brief = (each if each == WORKS else "fault" if is_fault(each) else "refused" for each in result)
            say(f"{len(done)} of {len(some)}  {one.name}: {', '.join(brief)}")
    for one in some:
        outcomes, short = done[one.name], {WORKS: WORKS}
        for cell in CELLS:
            said = outcomes[cell]
            if said not in short:
                lines.append((f"{one.name}.{len(short)}", cell, said))
                short[said] = f"{'**fault**' if is_fault(said) else 'refused'} .{len(short)}"
        rows.append((one.name, one.data, *(short[outcomes[cell]] for cell in CELLS)))
        faults += sum(is_fault(said) for said in outcomes.values())
        filled += len(outcomes)
    check = verdict(
        "24.2",
        f"cells of {len(some)} networks that neither work nor say why in one line before any work",
        "<= 0",
        faults,
        None,
        filled,
        unit="cells",
    )
    note = (
        "Small networks of all kinds (`rushhour.testing.gallery`): trained for two epochs; killed at its fourth step "
        "and gone on with, to the same bits; on two workers, to the same weights up to rounding, or it is said why "
        "not; the graph compared with torch; 30% of the channels pruned; int8; one request to a real server. What is "
        "refused says so in a line of the table below."
    )
    tables = (
        Table("What each kind of network goes through", ("network", "data", *CELLS), tuple(rows), note),
        Table("Why a cell is refused", ("network", "first in", "line"), tuple(lines)),
    )
    return Part((check,), tables, None)


def measure(scale: Scale) -> list[tuple[Instructions, Outcome]]:
    """Train them all, on all cores, and say how far it is."""
    numbers = range(scale.seed, scale.seed + scale.networks)
    chunks: queue.SimpleQueue[tuple[Instructions, Sequence[int]]] = queue.SimpleQueue()
    for at in range(0, scale.networks, _TOGETHER):
        for instructions in SETS:
            chunks.put((instructions, numbers[at : at + _TOGETHER]))
    found: list[tuple[Instructions, Outcome]] = []
    failed: list[Exception] = []

    def work() -> None:
        try:
            while not failed:
                instructions, some = chunks.get_nowait()
                found.extend((instructions, one) for one in outcomes(some, WAYS, instructions))
        except queue.Empty:
            pass
        except Exception as error:
            failed.append(error)

    began, total = time.monotonic(), scale.networks * len(SETS) * len(WAYS)
    workers = [threading.Thread(target=work, daemon=True) for _ in range(cores())]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        workers[0].join(_TELL_S)
        time.sleep(0 if workers[0].is_alive() else _TELL_S / 10)
        done, seconds = len(found), time.monotonic() - began
        left = f"{seconds * (total / done - 1) / 60:.1f} minutes left" if done else "starting"
        bad = sum(one.corrupted for _, one in found)
        say(f"{done:,} of {total:,} trainings, {bad} corrupted; {left}")
    if failed:
        raise failed[0]
    return found


def judge(found: Sequence[tuple[Instructions, Outcome]], scale: Scale) -> Part:
    """What they come to."""
    ours = [one for _, one in found if one.way == "rushhour"]
    tested = [one for one in ours if one.corrupted or one.ended == "well"]  # not what torch refused
    corrupted = {one.number for one in ours if one.corrupted}
    why = "" if checker() else "glibc's malloc debugging is not installed, so corruption showed by crashes only"
    check = verdict(
        "5",
        f"networks of {scale.networks} whose training corrupts the heap, with all instructions or with AVX2 only",
        "<= 0",
        len(corrupted),
        None,
        len(tested),
        unit="networks",
        why=why,
    )
    counts = collections.Counter((instructions, one.way, _kind(one)) for instructions, one in found)
    kinds = ("well", "signal", "hung", "error")
    rows = tuple(
        (instructions, way, *(float(counts[instructions, way, kind]) for kind in kinds))
        for instructions in SETS
        for way in WAYS
    )
    note = (
        "Trainings of three steps, by how they ended. `rushhour` chooses the memory format; the others force it: "
        "weights and pictures channels-last, both contiguous, or contiguous weights and pictures as they come on the "
        "wire. A signal or a hang is corruption. Errors of torch's are counted apart; those of memory that cannot be "
        "had, or is invalid, are likely to come from it too."
    )
    bad = [Found(how, one, str(specimen(one.number))) for how, one in found if one.ended != "well"]
    bad.sort(key=lambda one: (one.outcome.number, one.instructions, one.outcome.way))
    table = Table("How trainings ended", ("instructions", "memory format", *kinds), rows, note)
    return Part((check,), (table,), msgspec.to_builtins(bad))


def _kind(one: Outcome) -> str:
    if one.ended in ("well", "hung"):
        return one.ended
    return "signal" if one.corrupted else "error"


PARTS: dict[str, Callable[[Scale], Part]] = {"heap": heap, "matrix": matrix}


def main(given: list[str] | None = None) -> int:
    """Measure what is missing, and write the record after each part."""
    arguments = _arguments(given)
    scale = scale_of(arguments, Scale)
    whole = scale == Scale()
    BENCH.mkdir(exist_ok=True)
    try:
        return run_parts(
            {name: partial(measured, scale) for name, measured in PARTS.items()},
            Path(arguments.out or (RESULTS if whole else BENCH / "zoo-smoke.json")),
            kept=whole,
            only={name for name in arguments.only.split(",") if name},
            timed=set(),
            seeds={"first network": scale.seed},
        )
    except (RuntimeError, OSError) as error:
        print(f"{error}", file=sys.stderr)
        return 1


def _arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Random networks under a checked heap, and named ones in a matrix.")
    parser.add_argument("--only", default="", help=f"parts, of {','.join(PARTS)}, measured anew; the rest is kept")
    scale_options(parser, Scale())
    parser.add_argument("--out", help="the record; by default results/zoo.json of a whole run, .bench/ of any other")
    return parser.parse_args(given)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)

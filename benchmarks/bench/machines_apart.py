"""One training on two machines that share a cable and the disk, against the same on one machine with two workers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bench.parts import Part, say
from bench.record import Table, verdict
from bench.servers import DidNotStart
from rushhour.data import load
from rushhour.records.curves import Epoch, read_curves
from rushhour.testing.namespaces import CannotSeparate, torchrun, two_machines
from rushhour.train.parallel.interface import VARIABLE

_TOLERANCE = 1e-5
"""Of tests/train, for losses of several workers."""
_LONGEST_S = 1800.0
_JUDGED = 1000


def machines_apart(epochs: int, pictures: int, work: Path) -> Part:
    """Part 6, torchrun: a part of Fashion-MNIST on the article's network, with fresh files.

    Args:
        epochs: of each training.
        pictures: of the training part.
        work: where data and bundles are written.
    """
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    whole = load("fashion-mnist")
    sizes = {"train": pictures, "validation": _JUDGED, "test": _JUDGED}
    parts = {name: getattr(whole, name).head(size) for name, size in sizes.items()}
    arrays = {f"x_{name}": part.inputs for name, part in parts.items()}
    np.savez(work / "data.npz", **arrays, **{f"y_{name}": part.targets for name, part in parts.items()})
    one, one_s = _trained(work / "one", epochs, [[sys.executable]], ["--workers", "2"])
    say(f"6  one machine, two workers: {one_s:.0f} s")
    try:
        with two_machines() as machines:
            starts = [machines.command(each, sys.executable, *torchrun(each)) for each in range(2)]
            two, two_s = _trained(work / "two", epochs, starts, [])
    except CannotSeparate as error:
        raise DidNotStart(f"no network namespaces: {error}") from error
    say(f"6  two machines, a worker each: {two_s:.0f} s")
    rows, off = [], 0.0
    for here, there in zip(one, two, strict=True):
        for what in ("loss", "validation_loss", "value"):
            expected, got = getattr(here, what), getattr(there, what)
            off = max(off, abs(got - expected) / abs(expected))
            rows.append((str(here.step), what.replace("_", " "), expected, got))
    check = verdict(
        "6.torchrun",
        "torchrun over two network namespaces against one machine with two workers: largest relative difference of "
        "losses and accuracies",
        f"<= {_TOLERANCE:g}",
        off,
        None,
        len(rows),
        unit="",
    )
    columns = ("step", "what", "one machine", "two machines")
    return Part(
        (check,), (Table("Two machines train what one does", columns, tuple(rows)),), {"seconds": [one_s, two_s]}
    )


def _trained(
    out: Path, epochs: int, starts: Sequence[Sequence[str]], options: Sequence[str]
) -> tuple[tuple[Epoch, ...], float]:
    """The curves of a training that these commands begin together, and its seconds."""
    # channels-last is chosen by time, and changes the rounding
    fixed = ["--parallel", "data", "--no-channels-last", "--no-bf16", "--no-tensorboard"]
    words = ["-m", "rushhour", "train", "article", "--data", str(out.with_name("data.npz")), "--epochs", str(epochs)]
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    began = time.monotonic()
    running = [
        subprocess.Popen(
            [*start, *words, *fixed, *options, "--out", str(out)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for start in starts
    ]  # fmt: skip
    try:
        for process in running:
            said, _ = process.communicate(timeout=_LONGEST_S)
            if process.returncode:
                raise DidNotStart((said.strip().splitlines() or ["the training printed no message"])[-1])
    finally:
        for process in running:
            process.kill()
            process.communicate()
    return tuple(read_curves(out.with_name(f"{out.name}-training"))), time.monotonic() - began

"""A tuning run whose networks two nodes of a Ray cluster make, one of which is killed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

import numpy as np

import rushhour
from bench.parts import Part, say
from bench.record import Check, Table, verdict
from bench.servers import DidNotStart
from rushhour.api.compression import CompressResult
from rushhour.bundle import Bundle
from rushhour.data import load
from rushhour.plan import PLAN, Plan
from rushhour.progress import Silent
from rushhour.testing.ray_nodes import Nodes, ray_nodes

_NODES = 2
_LOOK_S = 0.2
_JUDGED = 1000
_RECIPES = ("int8", "prune:0.25,distil:2,int8", "prune:0.5,distil:2,int8")
_KEY = 24
"""Characters of a bundle's name in a store."""


class _Killing(Silent):
    """Kills a node when the first recipe was built, and keeps what is said of nodes."""

    def __init__(self, nodes: Nodes) -> None:
        self._nodes = nodes
        self._doing = ""
        self.lost: list[str] = []
        self.killed = False

    def start(self, what: str, total: float | None = None) -> None:
        """A piece of work begins."""
        self._doing = what

    def advance(self, by: float = 1.0, note: str = "") -> None:
        """A recipe, or anything else, is further."""
        if self._doing.startswith("build ") and not self.killed:
            self._nodes.kill_one_but(note)  # the other one is building
            self.killed = True

    def note(self, text: str) -> None:
        """A line."""
        if "was lost" in text:
            self.lost.append(text)


def trial_cluster(pictures: int, budget: str, work: Path) -> Part:
    """Part 6, trials: first recipes of a compression, which have to give what they give here, then a tuning run.

    Args:
        pictures: of the training part: of Fashion-MNIST, on the article's network.
        budget: of the tuning run.
        work: where data, bundles and the run are written.
    """
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    data = work / "data.npz"
    whole = load("fashion-mnist")
    sizes = {"train": pictures, "validation": _JUDGED, "test": _JUDGED}
    parts = {name: getattr(whole, name).head(size) for name, size in sizes.items()}
    arrays = {f"x_{name}": part.inputs for name, part in parts.items()}
    np.savez(data, **arrays, **{f"y_{name}": part.targets for name, part in parts.items()})
    reference = rushhour.train("article", data, out=work / "reference", epochs=2, tensorboard=False).bundle
    alone = _compressed(reference, data, work / "alone")
    with ray_nodes(_NODES) as nodes:
        killing = _Killing(nodes)
        both = _compressed(reference, data, work / "both", cluster=nodes.address, progress=killing)
    say(f"6  compression: {'; '.join(killing.lost)}")
    rows, off = _compared(alone, both)
    checks = [
        verdict(
            "6.trials.same",
            "recipes built on two nodes, one of which is killed, against those built here: largest difference of the "
            "accuracy on the validation part",
            "<= 0.005",
            off,
            None,
            len(rows),
            unit="",
        )
    ]
    finished, lost, minutes = _tuned(reference, data, budget, work / "run")
    say(f"6  tuning: {'finished' if finished else 'no plan'} after {minutes:.1f} minutes; {'; '.join(lost)}")
    cost = len(set(map(_recipe_of, lost)))
    checks += [
        _count("6.trials.finished", "tuning runs that end with a Plan, one of two nodes killed", ">= 1", int(finished)),
        _count("6.trials.lost", "recipes of the tuning run that its loss cost", "<= 1", cost),
    ]
    columns = ("recipe", "step", "accuracy here", "accuracy on the cluster")
    tables = (Table("Recipes on a cluster that loses a node", columns, tuple(rows)),)
    return Part(tuple(checks), tables, {"minutes": minutes, "lost": [*killing.lost, *lost]})


def _recipe_of(line: str) -> str:
    """The recipe that a line says is built again; a worker may be lost before its node is."""
    return line.partition("was lost: ")[2].partition(" is built again")[0]


def _count(id: str, what: str, target: str, value: int) -> Check:
    return verdict(id, what, target, value, None, 1, unit="")


def _compressed(reference: Bundle, data: Path, out: Path, **how: Any) -> CompressResult:
    return rushhour.compress(reference, data, out=out, recipe=_RECIPES, max_accuracy_drop="10%", **how)


def _compared(alone: CompressResult, both: CompressResult) -> tuple[list[tuple[str, str, float, float]], float]:
    rows = [
        (attempt.recipe, stage.step, stage.accuracy.value, other.accuracy.value)
        for attempt, again in zip(alone.record.attempts, both.record.attempts, strict=True)
        for stage, other in zip(attempt.stages, again.stages, strict=True)
    ]
    return rows, max(abs(there - here) for _, _, here, there in rows)


def _tuned(reference: Bundle, data: Path, budget: str, run: Path) -> tuple[bool, list[str], float]:
    """Whether the run has ended with a Plan, what it says of lost nodes, and its minutes."""
    began, log = time.monotonic(), run.with_name("tune.log")
    with ray_nodes(_NODES) as nodes, log.open("w+") as said:
        words = ["tune", str(reference.path), "--data", str(data), "--max-accuracy-drop", "2%", "--budget", budget]
        process = subprocess.Popen(
            [sys.executable, "-m", "rushhour", *words, "--cluster", nodes.address, "--out", str(run)],
            env=os.environ | {"COLUMNS": "300"}, stdout=said, stderr=said,
        )  # fmt: skip
        try:
            _wait_for_bundle(run / ".recipes", process, said)
            nodes.kill(_NODES - 1)
            process.wait()
        finally:
            process.kill()
            process.wait()
    text = log.read_text()
    if process.returncode not in (0, 1):  # 1: it is a nearest miss
        raise DidNotStart((text.strip().splitlines() or ["the tuning run printed no message"])[-1])
    finished = (run / PLAN).is_file() and Plan.load(run / PLAN).evidence is not None
    return finished, [line for line in text.splitlines() if "was lost" in line], (time.monotonic() - began) / 60


def _wait_for_bundle(store: Path, process: subprocess.Popen[bytes], said: IO[str]) -> None:
    """Until the first network has come from a node."""
    while process.poll() is None:
        for file in store.glob("*/bundle.json"):
            if len(file.parent.name) == _KEY and json.loads(file.read_bytes())["lineage"]:
                return
        time.sleep(_LOOK_S)
    said.seek(0)
    raise DidNotStart((said.read().strip().splitlines() or ["the tuning run printed no message"])[-1])

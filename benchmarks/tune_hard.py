"""Parts 6, 7 and 9 of bench-tune: equal plans, a search that is killed, and bad input."""

from __future__ import annotations

import json
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import msgspec
import numpy as np
from bench.parts import Part, say
from bench.record import Check, Table, verdict
from noise import races

from rushhour.plan import PLAN, Plan
from rushhour.records.journal import JOURNAL
from rushhour.testing.measured import MeasuredSpace
from rushhour.testing.replay import replay

SEED = 0
_HERE = str(Path(__file__).with_name("tune.py").resolve())


def races_part(n: int, network: str, folder: Path) -> Part:
    """Part 6: races of a plan against itself."""
    found = races(n, 1.0, network, str(folder))
    different = sum(each["order"] != "tie" for each in found)
    what = "races of two identical plans in which one is called faster, share"
    check = verdict("6.equal", what, "<= 0.05", different / n, None, n, unit="")
    ratios = [each["ratio"] for each in found]
    row = (
        *(float(n), float(different), min(ratios), max(ratios)),
        *(statistics.median(each["pairs"] for each in found), statistics.median(each["seconds"] for each in found)),
    )
    columns = ("races", "called different", "lowest ratio", "highest", "pairs of windows, median", "seconds, median")
    return Part((check,), (Table("Races of two identical plans", columns, (row,)),), found)


# Part 7.


def replay_here(file: str, run: str, seed: int) -> None:
    """In a child process: a search on the record of a space, until it ends or is killed."""
    space = MeasuredSpace.load(Path(file))
    replay(space, Path(run), seed=seed).save(Path(run) / PLAN)


def kills_part(file: Path, kills: int) -> Part:
    """Part 7: a replayed search is killed with SIGKILL again and again, each time after a random number of lines of its
    journal and a random pause; it ends in the plan of one that was left alone."""
    random = np.random.default_rng(SEED)
    with TemporaryDirectory() as folder:
        alone, killed = Path(folder) / "alone", Path(folder) / "killed"
        _replay_in_child(file, alone).wait()
        expected = _lines(alone)
        moments = sorted(
            random.choice(np.arange(1, len(expected)), min(kills, len(expected) - 1), replace=False).tolist()
        )
        died = sum(_killed(file, killed, moment, float(random.uniform(0, 0.1))) for moment in moments)
        _replay_in_child(file, killed).wait()
        plans = [_timeless(run / PLAN) for run in (alone, killed)]
        lines = _lines(killed)
    times = Counter((line["phase"], line["subject"], line["detail"], line["key"]) for line in lines)
    twice = sum(count - 1 for count in times.values())
    missing = len(set(_keys(expected)) ^ set(times))
    same = float(plans[0] is not None and plans[0] == plans[1])
    checks = (
        verdict("7.plan", f"a search killed {died} times: its plan is that of an undisturbed one", ">= 1", same, None,
                died, unit=""),
        verdict("7.twice", "measurements that were made twice", "<= 0", float(twice), None, len(lines), unit=""),
        verdict("7.same", "measurements that only one of the two made", "<= 0", float(missing), None, len(lines),
                unit=""),
    )  # fmt: skip
    return Part(checks, (), {"killed after lines": moments, "killed": died, "lines": len(lines)})


def _replay_in_child(file: Path, run: Path) -> subprocess.Popen[bytes]:
    given = json.dumps({"file": str(file.resolve()), "run": str(run), "seed": SEED})
    return subprocess.Popen([sys.executable, _HERE, "--child", given])


def _killed(file: Path, run: Path, moment: int, pause_s: float) -> bool:
    """Kill a search after so many lines of its journal; false if it had ended before."""
    child = _replay_in_child(file, run)
    while child.poll() is None and len(_lines(run)) < moment:
        time.sleep(0.005)
    time.sleep(pause_s)
    child.send_signal(signal.SIGKILL)
    return child.wait() == -signal.SIGKILL


def _lines(run: Path) -> list[dict[str, Any]]:
    file = run / JOURNAL
    whole = file.read_bytes().rpartition(b"\n")[0].splitlines() if file.is_file() else []
    return [json.loads(line) for line in whole]


def _keys(lines: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    return [(line["phase"], line["subject"], line["detail"], line["key"]) for line in lines]


def _timeless(file: Path) -> Plan | None:
    """A plan without times: when it was made, and what its decisions cost, as a killed run starts servers again."""
    if not file.is_file():
        return None
    plan = Plan.load(file)
    assert plan.evidence is not None
    decisions = tuple(msgspec.structs.replace(each, cost_s=0.0) for each in plan.evidence.decisions)
    evidence = msgspec.structs.replace(plan.evidence, at="", decisions=decisions)
    return msgspec.structs.replace(plan, evidence=evidence)


# Part 9.


class Bad(NamedTuple):
    """A bad input: the options, and how the command has to end.

    Attributes:
        codes: exit codes that are right.
        said: each of these words has to be in the output, or in the reasons of the plan's trials.
        plan: whether there has to be a plan.
    """

    name: str
    what: str
    arguments: list[str]
    codes: tuple[int, ...]
    said: tuple[str, ...]
    plan: bool


CRASHES = '''import torch
from torch import nn


class Net(nn.Module):
    """Cannot be run with half of its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.out = nn.Linear(16, 10)

    def forward(self, x):
        if self.first.out_channels == 8:
            raise RuntimeError("half the channels crash")
        x = torch.relu(self.second(torch.relu(self.first(x))))
        return self.out(x.mean((2, 3)))


def build() -> nn.Module:
    return Net()
'''


def small_data(file: Path) -> None:
    """Ten classes of 28x28 pictures: a bright place on noise."""
    random = np.random.default_rng(SEED)
    labels = np.arange(1200, dtype=np.int64) % 10
    pictures = random.integers(0, 100, (1200, 28, 28, 1), dtype=np.uint8)
    for picture, label in zip(pictures, labels.tolist(), strict=True):
        row, column = divmod(label, 4)
        picture[7 * row : 7 * row + 7, 7 * column : 7 * column + 7] += 120
    np.savez(file, x=pictures, y=labels)


def bad_inputs(bundle: Path, data: str, budget: str, work: Path) -> list[Bad]:
    """The inputs of part 9.

    Args:
        bundle: a trained network.
        data: that it was trained on.
        budget: of each run that needs load.
        work: for the files of the inputs.
    """
    work = work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(SEED)
    unlabelled = work / "unlabelled.npz"
    np.savez(unlabelled, x=random.integers(0, 256, (400, 28, 28, 1), dtype=np.uint8))
    (work / "bench_crashes.py").write_text(CRASHES)
    small_data(work / "small.npz")
    common = ["--data", data, "--budget", budget]
    crashing = ["bench_crashes:build", "--trust", "bench_crashes:build", "--data", str(work / "small.npz")]
    crashing += ["--epochs", "4", "--max-accuracy-drop", "20%", "--budget", budget]
    return [
        Bad("slo", "an SLO that no plan can meet", [str(bundle), *common, "--slo", "p99<20us", "--recipes", "none"],
            (1,), ("nearest",), True),
        Bad("zero", "a budget of zero", [str(bundle), "--data", data, "--budget", "0s"], (1, 2), ("0s",), False),
        Bad("short", "a budget of 3 s", [str(bundle), "--data", data, "--budget", "3s"], (2,),
            ("cannot tune within",), False),
        Bad("unlabelled", "a network to be trained on data without labels",
            ["mlp", "--data", str(unlabelled), "--budget", budget], (1, 2), ("label",), False),
        Bad("fidelity", "a trained network on data without labels", [str(bundle), "--data", str(unlabelled),
            "--budget", budget, "--recipes", "none"], (0, 1), (), True),
        Bad("crash", "a recipe that crashes, among others", crashing, (0,), ("half the channels crash",), True),
    ]  # fmt: skip


def bad_part(bundle: Path, data: str, budget: str, work: Path, only: str = "") -> Part:
    """Part 9: each bad input ends with the right exit code, in words, and without a traceback."""
    checks: list[Check] = []
    rows: list[tuple[str | float | None, ...]] = []
    for bad in bad_inputs(bundle, data, budget, work):
        if only and bad.name not in only.split(","):
            continue
        with TemporaryDirectory() as folder:
            run = Path(folder) / "run"
            command = [sys.executable, "-m", "rushhour", "tune", *bad.arguments, "--out", str(run)]
            ended = subprocess.run(command, capture_output=True, text=True, cwd=work)
            output = (ended.stdout + ended.stderr).replace(folder, "").replace(str(work), "")
            plan = Plan.load(run / PLAN) if (run / PLAN).is_file() else None
        reasons = (
            [trial.why for trial in plan.evidence.trials] if plan is not None and plan.evidence is not None else []
        )
        wrong = _wrong(bad, ended.returncode, output, plan, reasons)
        lines = [line.strip() for line in output.splitlines() if line.strip()]
        line = next((each for each in (*reasons, *lines[::-1]) if any(word in each for word in bad.said)), lines[-1])
        what = f"{bad.what}: exit code {' or '.join(map(str, bad.codes))}, its reason said, no traceback"
        checks.append(verdict(f"9.{bad.name}", what, ">= 1", float(not wrong), None, 1, unit="", why=wrong))
        rows.append((bad.what, float(ended.returncode), line[:300]))
        say(f"9  {bad.name}: exit code {ended.returncode}: {line[:200]}")
    table = Table("Bad input", ("input", "exit code", "what it says"), tuple(rows))
    return Part(tuple(checks), (table,), [list(row) for row in rows])


def _wrong(bad: Bad, code: int, output: str, plan: Plan | None, reasons: Sequence[str]) -> str:
    """What is not as it has to be; empty where all is."""
    everything = "\n".join((output, *reasons))
    found = [] if code in bad.codes else [f"exit code {code}"]
    found += [f"it does not say {word!r}" for word in bad.said if word not in everything]
    found += ["it prints a traceback"] if "Traceback" in output else []
    if bad.plan != (plan is not None):
        found.append("there is no plan" if bad.plan else "there is a plan")
    return "; ".join(found)

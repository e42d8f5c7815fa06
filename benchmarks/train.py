"""`make bench-train`: training by a parallel plan is exact, sends what it says, keeps what it says, and is fast.

In parts; each stays in the record with the commit that it was measured at, so that a run goes on where the last was
broken off, and `--only 5,7` measures anew just what needs a quiet machine (some five minutes on 2 cores).

1  every plan trains as one process does        4  the article's two case studies
2  bytes on the wire, as predicted              5  the planner's choice against all others (timed)
3  the state of the 103M network, on 8 workers  6  kill -9, and other numbers of workers
8  tables divided over workers (timed)          7  steps a second against DDP and Lightning Fabric (timed)
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import numpy as np
import torch
from bench.clicks import Clicked, clicked
from bench.clicks import table_for as table_of_clicks
from bench.parts import Part, run_parts, say, scale_of, scale_options
from bench.record import Table, judged, mean_ratio, verdict
from bench.training import CLASSES, NETWORKS, OWN_ROWS, Stepped, deep, one_epoch, stepped, timed

from rushhour.bundle import Source
from rushhour.data import Dataset, Split
from rushhour.data.arrays import from_splits
from rushhour.errors import ModelError, PlanError
from rushhour.models import article
from rushhour.progress import Silent
from rushhour.records.curves import read_curves
from rushhour.testing.mortal import KILLS
from rushhour.testing.networks import ANY, SMALL, WIDE, all_of, arranged, distance, short_training, table_for
from rushhour.train import ParallelSettings, Tracking, TrainingJob, TrainSettings, trained_weights
from rushhour.train.parallel import Mode, ParallelPlan, launch
from rushhour.train.parallel.calibration import calibrate
from rushhour.train.parallel.cost import Layer, Layout, Mesh, state_bytes
from rushhour.train.parallel.layer_table import table_of
from rushhour.train.parallel.planner import plan_layers, ranked_plans

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "train.json"
BENCH = ROOT / ".bench"
SEED = 0
_MODES: tuple[Mode, ...] = ("data", "sharded", "tables", "model", "pipeline", "hybrid")
_TIMED = {"5", "7", "8"}
_ROOM = 0.85
"""Share of the free memory that the case study may take."""
_GB = 1e9


class Scale(msgspec.Struct, frozen=True):
    """How much of everything.

    Attributes:
        most: workers of the largest plans that are compared with one worker.
        side: of the pictures that the article's network takes.
        batch: of them, in a step.
        workers: that share it, and the case studies.
        parameters: of each sub-model in the case study.
        rows: of the case study's data.
        features: of each row.
        rounds: of everything that is timed.
        steps: in each round.
        kills: under each of three plans.
        ids: rows of all embedding tables of the recommender.
        clicks: in each of its steps.
    """

    most: int = 8
    side: int = 224
    batch: int = 64
    workers: int = 8
    parameters: int = 100_000_000
    rows: int = 100_000
    features: int = 1000
    rounds: int = 8
    steps: int = 3
    kills: int = 2
    ids: int = 1_000_000
    clicks: int = 1024


# 1


def equality(scale: Scale) -> Part:
    """Five steps of every plan against one worker: four networks, double and single precision."""
    batch = 11  # divides by nothing
    bounds = {True: 1e-10, False: 1e-5}
    alone = {
        (name, double): short_training(
            name, plan_layers(table_for(name), workers=1, batch=batch, constants=ANY), double=double
        )
        for name in SMALL
        for double in bounds
    }
    found: list[tuple[str, int, str, bool, float]] = []
    for workers in (2, 4, 8):
        if workers > scale.most:
            continue
        plans = [(name, kind, plan) for name in SMALL for kind, plan in _plans(name, workers, batch)]
        cases = [(name, kind, plan, double) for name, kind, plan in plans for double in bounds]
        came_to = launch(all_of, workers, ([(name, plan, {"double": double}) for name, _, plan, double in cases],))[0]
        for (name, kind, _, double), one in zip(cases, came_to, strict=True):
            reference = alone[name, double]
            losses = max(abs(mine / theirs - 1) for mine, theirs in zip(one.losses, reference.losses, strict=True))
            found.append((name, workers, kind, double, max(losses, distance(one.state, reference.state))))
        say(f"1  {workers} workers: {len(cases)} trainings compared")
    checks = []
    for double, bound in bounds.items():
        errors = [error for *_, of, error in found if of is double]
        word = "double" if double else "single"
        what = f"the largest relative error of a merged tensor or a loss after 5 steps in {word} precision"
        checks.append(verdict(f"1.{word}", what, f"<= {bound:g}", max(errors), None, len(errors), unit=""))
    kinds = sorted({kind for _, _, kind, _, _ in found})
    rows = []
    for name, kind in itertools.product(SMALL, kinds):
        worst: list[float | None] = []
        for double in bounds:
            errors = [error for of, _, how, precise, error in found if (of, how, precise) == (name, kind, double)]
            worst.append(max(errors) if errors else None)
        if worst[0] is not None:
            counts = sorted({workers for of, workers, how, _, _ in found if (of, how) == (name, kind)})
            rows.append((name, kind, ", ".join(map(str, counts)), *(f"{one:.1e}" for one in worst if one is not None)))
    note = (
        "Relative error, in the 2-norm, of the worst tensor after merging, or of a loss; the worst of all numbers of "
        "workers. Adam in double precision, descent with momentum in single."
    )
    columns = ("network", "plan", "workers", "double", "single")
    return Part(tuple(checks), (Table("Every plan against one worker", columns, tuple(rows), note),), found)


def _plans(name: str, workers: int, batch: int) -> Iterator[tuple[str, ParallelPlan]]:
    table = table_for(name)
    for mode in _MODES:
        with contextlib.suppress(PlanError):
            yield mode, plan_layers(table, workers=workers, batch=batch, mode=mode, constants=ANY)
    meshes: dict[Mesh, tuple[Layout, Layout]] = {
        Mesh(1, workers, 1): ("row", "data"),
        Mesh(workers // 2, 2, 1): ("row", "sharded"),
        Mesh(workers // 2, 1, 2): ("data", "data"),
        Mesh(1, workers // 2, 2): ("column", "sharded"),
        Mesh(max(1, workers // 4), 2, 2): ("row", "data"),
    }
    for mesh, (dense, rest) in meshes.items():
        if mesh.inner * mesh.pipeline == workers and mesh != Mesh(1, 1, 2):
            parts = 2 if mesh.pipeline > 1 and batch // mesh.inner > 1 and name != "residual" else 1
            yield (
                f"{mesh}, {dense}",
                arranged(table, mesh, batch=batch, constants=ANY, dense=dense, rest=rest, microbatches=parts),
            )


# 2 and 3


def wire(scale: Scale) -> Part:
    """What workers send, by the kernel's count for their sockets, and by that of the loopback for all.

    No memory is shared here, as between machines.
    """
    rows: list[tuple[str | float | None, ...]] = []
    ratios = []
    for workers in (2, 4):
        plans = [
            (name, plan)
            for name in WIDE
            for mode in _MODES
            for plan in _possible(table_for(name, True), workers, 16, mode)
        ]
        how = {"double": False, "steps": 3, "wide": True, "shared_memory": False}
        came_to = launch(all_of, workers, ([(name, plan, how) for name, plan in plans],))
        for index, (name, plan) in enumerate(plans):
            sent = max(worker[index].sent_bytes for worker in came_to)
            ratios.append(sent / plan.predicted.sent_bytes)
            rows.append((name, workers, plan.mode, plan.predicted.sent_bytes / 1e6, sent / 1e6, ratios[-1]))
    say(f"2  {len(ratios)} plans of small networks")
    found = {mode: _article(scale, mode, wire=True) for mode in ("auto", "data")}
    carried = {}
    for mode, (plan, steps) in found.items():
        sent = max(float(np.median(one.sent_bytes)) for one in steps)
        carried[mode] = float(np.median(steps[0].loopback_bytes)) / scale.workers
        ratios.append(sent / plan.predicted.sent_bytes)
        name = f"article, {scale.side}x{scale.side}"
        kind = f"{plan.mode} (chosen)" if mode == "auto" else mode
        rows.append((name, scale.workers, kind, plan.predicted.sent_bytes / 1e6, sent / 1e6, ratios[-1]))
        say(f"2  {name}, {kind}: {sent / 1e6:,.1f} MB a step and worker")
    over = [carried[mode] / plan.predicted.sent_bytes for mode, (plan, _) in found.items()]
    which = f"the article's network, {scale.workers} workers, batch {scale.batch}"
    checks = (
        verdict("2.wire", "bytes sent by the busiest worker in a step, by what the plan predicts; the worst plan",
                "<= 1.05", max(ratios), None, len(ratios)),
        verdict("2.loopback", f"bytes on the loopback for each worker, headers included, by the prediction: {which}",
                "<= 1.05", max(over), None, len(over), why="what other programs send is counted too"),
        verdict("2.fewer", f"bytes that replicas send, by those of the chosen plan: {which}", ">= 40",
                carried["data"] / carried["auto"], None, scale.steps, why=found["auto"][0].explain().split("\n")[0]),
    )  # fmt: skip
    note = (
        "MB sent by the busiest worker in a step; the table of layers and nothing measured goes into the prediction. "
        "As between machines: on one, gradients are added up in memory that workers share, and are not sent."
    )
    columns = ("network", "workers", "plan", "predicted", "measured", "measured / predicted")
    return Part(checks, (Table("Bytes on the wire", columns, tuple(rows), note),), rows)


def state(scale: Scale) -> Part:
    """The article's network under the chosen plan, with Adam."""
    plan, steps = _article(scale, "auto", adam=True)
    whole = state_bytes(_article_table(scale.side))
    most = max(one.state_bytes for one in steps)
    check = verdict(
        "3.state",
        f"parameters, gradients and moments on the fullest worker, by 1/{scale.workers} of the whole: the article's "
        f"network, {whole // 16:,} parameters",
        "<= 1.1",
        most / (whole / scale.workers),
        None,
        scale.workers,
        why=plan.explain().split("\n")[0],
    )
    if not all(math.isfinite(loss) for loss in steps[0].losses):
        raise ModelError("the article's network does not train", f"losses {steps[0].losses}", "mend the plan")
    rows = tuple(
        (float(rank), one.parameters / 1e6, one.state_bytes / 1e6, one.peak_bytes / 1e6)
        for rank, one in enumerate(steps)
    )
    columns = ("worker", "million parameters", "MB of state", "MB of the process at its largest")
    said = f"The whole state takes {whole / 1e6:,.0f} MB. {len(steps[0].losses)} steps by Adam."
    note = f"{said}\n\n```\n{plan.explain()}\n```"
    title = f"The article's network on {scale.workers} workers"
    return Part((check,), (Table(title, columns, rows, note),), steps)


def _possible(table: tuple[Layer, ...], workers: int, batch: int, mode: Mode) -> list[ParallelPlan]:
    with contextlib.suppress(PlanError):
        return [plan_layers(table, workers=workers, batch=batch, mode=mode, constants=ANY)]
    return []


def _article_table(side: int) -> tuple[Layer, ...]:
    with torch.device("meta"):
        return table_of(article(side), (3, side, side), 1000)


def _article(scale: Scale, mode: Mode, *, adam: bool = False, wire: bool = False) -> tuple[ParallelPlan, list[Stepped]]:
    """Steps of the article's network; `wire`: as if each worker were on a machine of its own."""
    workers = scale.workers
    constants = calibrate(workers, shared_memory=not wire)
    plan = plan_layers(_article_table(scale.side), workers=workers, batch=scale.batch, mode=mode, constants=constants)
    given = (article, {"input_size": scale.side}, (3, scale.side, scale.side), 1000, plan, scale.steps, adam, not wire)
    return plan, launch(stepped, workers, given)


# 4


def cases(scale: Scale) -> Part:
    """A network of 8 sub-models too large for one worker, and 8 replicas that go once through 100,000 rows."""
    workers, depth = scale.workers, 8
    # parameters, gradient, two moments, and the largest layer's once more; what a process takes anyway comes first
    room = _ROOM * _free_bytes() / workers
    fits = int((room - 0.35 * _GB) / 18)
    wanted = min(scale.parameters, fits)
    width = math.isqrt(wanted // depth)
    width += width * (width + 1) * depth < wanted
    arguments = {"width": width, "layers": depth * workers}
    with torch.device("meta"):
        table = table_of(deep(**arguments), (width,), width)
    planned = partial(
        plan_layers, table, workers=workers, batch=scale.batch, constants=calibrate(workers), memory_bytes=int(room)
    )
    plan = planned()
    plans = {"chosen": plan}
    if plan.mode != "pipeline":
        plans["pipeline"] = planned(mode="pipeline")
    rows: list[tuple[str | float | None, ...]] = []
    runs = {}
    for name, one in plans.items():
        steps = launch(stepped, workers, (deep, arguments, (width,), width, one, scale.steps, True))
        if not all(math.isfinite(loss) for loss in steps[0].losses):
            raise ModelError("the sub-models do not train", f"losses {steps[0].losses}", "mend the plan")
        runs[name] = steps
        label = f"{one.mode} (chosen)" if name == "chosen" else one.mode
        rows.append(
            (
                label,
                sum(each.parameters for each in steps) / 1e6,
                max(each.state_bytes for each in steps) / _GB,
                sum(each.peak_bytes for each in steps) / _GB,
                max(float(np.median(each.sent_bytes)) for each in steps) / 1e6,
                float(np.median(steps[0].step_s)),
            )
        )
        say(f"4  {label}: {rows[-1][1]:,.0f} million parameters")
    short = f"more did not fit in {_free_bytes() / _GB:.1f} GB" if wanted < scale.parameters else ""
    trained = sum(one.parameters for one in runs["chosen"]) / workers
    first = verdict("4.submodels", f"parameters of each of {workers} sub-models, trained at once on this machine",
                    f">= {scale.parameters}", trained, None, workers, unit="", why=short)  # fmt: skip
    columns = (
        "plan",
        "million parameters",
        "GB of state, fullest",
        "GB of all processes",
        "MB sent, busiest",
        "s a step",
    )
    tables = [
        Table(
            f"{workers} sub-models of a deep uniform network",
            columns,
            tuple(rows),
            f"Adam.\n\n```\n{plan.explain()}\n```",
        )
    ]
    batch = scale.rows // 100
    with tempfile.TemporaryDirectory(dir=BENCH) as folder:
        _write_rows(Path(folder), scale)
        with torch.device("meta"):
            table = table_of(_replica(scale), (scale.features,), CLASSES)
        losses = {
            count: launch(
                one_epoch,
                count,
                (folder, plan_layers(table, workers=count, batch=batch, mode="data", constants=ANY), 64, CLASSES),
            )[0]
            for count in (1, workers)
        }
    error = max(abs(a / b - 1) for a, b in zip(losses[1], losses[workers], strict=True))
    second = verdict("4.replicas", f"{scale.rows:,} x {scale.features:,} data in {len(losses[1])} batches on {workers} "
                     "replicas: the largest relative difference of a batch's loss from one process's", "<= 1e-4", error,
                     None, len(losses[1]), unit="")  # fmt: skip
    ends = tuple((float(index + 1), losses[1][index], losses[workers][index]) for index in (0, len(losses[1]) // 2, -1))
    ends = (*ends[:-1], (float(len(losses[1])), *ends[-1][1:]))
    tables.append(Table("Replicas on large data", ("batch", "loss, 1 process", f"loss, {workers} replicas"), ends))
    return Part((first, second), tuple(tables), {"steps": runs, "losses": losses})


def _free_bytes() -> int:
    line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    return int(line.split()[1]) * 1024


def _replica(scale: Scale) -> torch.nn.Module:
    from rushhour.models import mlp

    return mlp(inputs=scale.features, outputs=CLASSES, hidden=64, depth=2)


def _write_rows(folder: Path, scale: Scale) -> None:
    random = np.random.default_rng(SEED)
    inputs = random.standard_normal((scale.rows, scale.features), dtype=np.float32)
    np.save(folder / "inputs.npy", inputs)
    np.save(folder / "targets.npy", np.argmax(inputs[:, :CLASSES], 1))


# 5


def regret(scale: Scale) -> Part:
    """All kinds of plans in turns, round by round; the chosen one against the fastest of them."""
    checks, rows, measured = [], [], {}
    for name, workers in itertools.product(NETWORKS, (2, 4)):
        plans = _candidates(name, workers)
        found = launch(timed, workers, (name, list(plans.values()), scale.rounds, scale.steps))[0]
        chosen, taken = found.chosen, found.step_s
        measured[f"{name} {workers}"] = taken
        middle = {mode: float(np.median(times)) for mode, times in taken.items()}
        best = min(middle, key=lambda mode: middle[mode])
        ratios = [mine / theirs for mine, theirs in zip(taken[chosen], taken[best], strict=True)]
        why = f"{best} was fastest, {chosen} chosen" if chosen != best else ""
        what = f"step of the chosen plan, by the fastest of {len(plans)} measured: {name}, {workers} workers"
        checks.append(judged(f"5.{name}.{workers}", what, "<= 1.10", ratios, why=why))
        for mode, plan in plans.items():
            sign = " (chosen)" if mode == chosen else ""
            rows.append((name, workers, f"{mode}{sign}", 1e3 * plan.predicted.step_s, 1e3 * middle[mode]))
        say(f"5  {name}, {workers} workers: {chosen} chosen, {best} fastest")
    note = "Median ms of a step, Adam's included. With 4 workers on fewer cores, they take turns."
    columns = ("network", "workers", "plan", "predicted, ms", "measured, ms")
    return Part(tuple(checks), (Table("Every plan in turns", columns, tuple(rows), note), _simulated(scale)), measured)


def _candidates(name: str, workers: int) -> dict[str, ParallelPlan]:
    factory, shape, batch = NETWORKS[name]
    with torch.device("meta"):
        table = table_of(factory(), shape, CLASSES)
    found = ranked_plans(table, workers=workers, batch=batch, constants=calibrate(workers))
    return {str(plan.mode): plan for plan in found}


def _simulated(scale: Scale) -> Table:
    constants, table, rows = calibrate(2, shared_memory=False), _article_table(scale.side), []
    one = plan_layers(table, workers=1, batch=8, constants=constants).predicted.step_s
    for workers in (2, 4, 8, 16, 32, 64):
        figures: list[str | float | None] = [float(workers)]
        for mode in ("auto", "data"):
            plan = plan_layers(
                table, workers=workers, batch=8 * workers, mode=mode, constants=constants, memory_bytes=24 * 10**9
            )
            rate = 8 * workers / plan.predicted.step_s
            figures += [f"{plan.mode} ({plan.mesh})", rate, 100 * rate / workers / (8 / one)]
        rows.append((*figures[:4], *figures[5:]))
    note = (
        "Simulated, not measured: the constants of 2 workers of this machine, as if each worker had a core and 24 GB "
        "of its own and all links were like the loopback. 8 pictures for each worker."
    )
    columns = ("workers", "plan", "pictures/s", "efficiency (%)", "replicas, pictures/s", "replicas, efficiency (%)")
    return Table("Simulated scaling of the article's network", columns, tuple(rows), note)


# 6


def deaths(scale: Scale) -> Part:
    """SIGKILL to a worker in a step, under three plans; then 4, 2 and 1 workers one after the other."""
    data, settings = _table_data(), TrainSettings(epochs=2, batch=40, ema=0.9, clip=1.0, bf16=False)
    random = np.random.default_rng(SEED)
    modes: tuple[Mode, ...] = ("data", "model", "pipeline")
    worst, count, rows = 0.0, 0, []
    BENCH.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BENCH) as at:

        def trained(folder: Path, workers: int, mode: Mode) -> np.ndarray[Any, Any]:
            job = TrainingJob(
                Source("bench.training:mortal"), settings, folder / "work",
                trusted=("bench.training:mortal",), checkpoint_every_s=0.0, workers=workers,
                parallel=ParallelSettings(mode, constants=ANY), tracking=Tracking(folder, tensorboard=False),
            )  # fmt: skip
            trained_weights(data, job, progress=Silent())
            return np.array([(one.loss, one.validation_loss, one.value) for one in read_curves(folder)])

        for mode in modes:
            undisturbed = trained(Path(at) / mode, 2, mode)
            for index in range(scale.kills):
                rank, pass_ = int(random.integers(2)), int(random.integers(2, 24))
                killed = Path(at) / f"{mode}-{index}.killed"
                with mock.patch.dict(os.environ, {KILLS: f"{rank} {pass_} {killed}"}):
                    got = trained(Path(at) / f"{mode}-{index}", 2, mode)
                if not killed.exists():
                    raise ModelError("no worker was killed", f"there is no pass {pass_}", "lower it")
                error = float(np.max(np.abs(got - undisturbed)))
                worst, count = max(worst, error), count + 1
                rows.append((mode, float(rank), float(pass_), f"{error:g}"))
                say(f"6  {mode}: worker {rank} killed in pass {pass_}, losses differ by {error:g}")
        reference = trained(Path(at) / "reference", 2, "data")
        folder = Path(at) / "fewer"
        with mock.patch("rushhour.train.parallel.workers._RESTARTS", 0):
            for workers, mode, pass_ in ((4, "hybrid", 8), (2, "pipeline", 10)):
                with (
                    mock.patch.dict(os.environ, {KILLS: f"1 {pass_} {folder}-{workers}.killed"}),
                    contextlib.suppress(ModelError),
                ):
                    trained(folder, workers, mode)
        # on one worker dropout's masks are torch's own, so two end it
        fewer = trained(folder, 2, "data")
    differ = float(np.max(np.abs(fewer / reference - 1)))
    checks = (
        verdict("6.kill", "the largest difference of a loss or metric from an undisturbed run after a kill -9",
                "<= 0", worst, None, count, unit=""),
        verdict("6.resume", "the largest relative difference of a loss or metric: begun with 4 workers, killed, gone "
                "on with 2, killed, ended by another plan", "<= 1e-4", differ, None, fewer.size, unit=""),
    )  # fmt: skip
    columns = ("plan", "killed worker", "in forward pass", "losses differ by")
    return Part(checks, (Table("Workers that are killed", columns, tuple(rows)),), rows)


def _table_data() -> Dataset:
    random = np.random.default_rng(SEED)
    inputs = random.standard_normal((600, 20), dtype=np.float32)
    targets = np.argmax(inputs[:, :4], 1)
    train, validation, test = (
        Split(inputs[rows], targets[rows]) for rows in (slice(400), slice(400, 500), slice(500, 600))
    )
    return from_splits("random", train, validation, test)


# 7


def throughput(scale: Scale) -> Part:
    """Ours, torch's replicas and Lightning Fabric, in the same processes, in turns."""
    workers = 2
    try:
        site, versions = _fabric()
        missing = ""
    except (subprocess.CalledProcessError, OSError) as error:
        site, versions, missing = None, {}, f"Lightning Fabric cannot be installed: {error}"
    checks, rows, measured = [], [], {}
    for name in NETWORKS:
        plans = _candidates(name, workers)
        couples = _couples_rows(name)
        # twice the rounds: differences are small
        given = (name, list(plans.values()), 2 * scale.rounds, scale.steps, ("data",), site, True, couples)
        found = launch(timed, workers, given)[0]
        chosen, taken = found.chosen, found.step_s
        measured[name] = taken
        batch = NETWORKS[name][2]
        for peer in ("DDP", "Fabric"):
            ours = taken[OWN_ROWS if couples else chosen]
            ratios = [theirs / mine for mine, theirs in zip(ours, taken.get(peer, []), strict=False)]
            what = f"samples a second of the chosen plan, by {peer}'s: {name}, {workers} workers"
            why = missing if peer == "Fabric" else ""
            if not why and couples:
                exact = mean_ratio([theirs / mine for mine, theirs in zip(taken[chosen], taken[peer], strict=True)])[0]
                why = (
                    "both normalise each worker's part of a batch by itself (--batch-norm local); as one process does "
                    f"it, over the whole batch, which is our default and {peer} cannot on CPUs: {exact:.2f}x"
                )
            checks.append(judged(f"7.{name}.{peer.lower()}", what, ">= 1", ratios, why=why))
        for one, times in taken.items():
            label = f"ours, {one}" + (" (chosen)" if one == chosen else "") if one in {*plans, OWN_ROWS} else one
            ratio = mean_ratio([ddp / mine for ddp, mine in zip(taken["DDP"], times, strict=True)])[0]
            rows.append((name, label, batch / float(np.median(times)), ratio))
        say(f"7  {name}: {', '.join(f'{one} {1e3 * np.median(times):.1f} ms' for one, times in taken.items())}")
    columns = ("network", "who", "samples/s", "by DDP's")
    note = "Adam, single precision, one thread for each worker; the same network, data and processes, in turns."
    return Part(
        tuple(checks), (Table("Against DDP and Fabric", columns, tuple(rows), note),), measured, versions=versions
    )


def _couples_rows(name: str) -> bool:
    """Whether a network has batch normalisation, whose answer for a row depends on the other rows."""
    factory, shape, _ = NETWORKS[name]
    with torch.device("meta"):
        return any(layer.norms for layer in table_of(factory(), shape, CLASSES))


def _fabric() -> tuple[str, dict[str, str]]:
    """Where it is installed, apart from ours, and its version."""
    wanted = (ROOT / "benchmarks" / "peers" / "fabric" / "requirements.txt").read_text().split("\n")
    site = BENCH / "fabric"
    mark = site / ".made-for"
    if not mark.exists() or mark.read_text() != "\n".join(wanted):
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", str(site)]
        subprocess.run([*command, *filter(None, wanted)], check=True)
        mark.write_text("\n".join(wanted))
    found = sorted(path.name.removesuffix(".dist-info") for path in site.glob("lightning_fabric-*.dist-info"))
    return str(site), {"lightning-fabric": found[-1].rpartition("-")[2]}


# 8


def tables(scale: Scale) -> Part:
    """DeepFM with many ids of a Zipf distribution: tables divided over two workers, replicas, and one worker."""
    workers, steps = 2, 5
    table = table_of_clicks(scale.ids, scale.clicks)
    constants = calibrate(workers, shared_memory=False)
    planned = partial(plan_layers, table, workers=workers, batch=scale.clicks, constants=constants)
    chosen, replicas = planned(), planned(mode="data")
    plans = {"divided": planned(mode="tables"), "replicas": replicas, "replicas, shared memory": replicas}
    one = plan_layers(table, workers=1, batch=scale.clicks, constants=ANY)
    BENCH.mkdir(exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=BENCH, suffix=".pt") as file:
        given = (steps, scale.rounds, file.name, ("replicas, shared memory",))
        alone: Clicked = launch(clicked, 1, (scale.ids, {"one worker": one}, *given))[0]["one worker"]
        found: list[dict[str, Clicked]] = launch(clicked, workers, (scale.ids, plans, *given))
    sent = {name: max(float(np.median(worker[name].sent_bytes[1:])) for worker in found) for name in plans}
    kept = {name: max(worker[name].state_bytes for worker in found) for name in plans}
    divided = found[0]["divided"]
    losses = max(abs(mine / theirs - 1) for mine, theirs in zip(divided.losses, alone.losses, strict=True))
    which = f"DeepFM, {scale.ids:,} ids, {scale.clicks:,} clicks in a step, {workers} workers"
    why = chosen.explain().split("\n")[0]
    checks = (
        verdict("8.chosen", f"embedding tables are divided where the plan is chosen: {which}", ">= 1",
                float(chosen.mode == "tables"), None, 1, unit="", why=why),
        verdict("8.equal", "the largest relative difference of a loss or a merged tensor from one worker's after "
                f"{steps} steps of AdamW in single precision: {which}", "<= 1e-4", max(losses, divided.error), None,
                steps, unit=""),
        verdict("8.wire", f"bytes sent by the busiest worker in a step, by what the plan predicts: {which}", "<= 1.05",
                sent["divided"] / plans["divided"].predicted.sent_bytes, None, steps - 1),
        verdict("8.fewer", f"bytes that replicas send, by those of divided tables: {which}", ">= 40",
                sent["replicas"] / sent["divided"], None, steps - 1),
        verdict("8.state", f"parameters, gradients and moments on the fullest worker, by 1/{workers} of one worker's: "
                f"{which}", "<= 1.1", kept["divided"] / (alone.state_bytes / workers), None, workers),
        judged("8.time", f"step of replicas in shared memory, by that of divided tables: {which}", ">= 1",
               [theirs / mine for mine, theirs in zip(divided.step_s, found[0]["replicas, shared memory"].step_s,
                                                      strict=True)]),
    )  # fmt: skip
    rows: list[tuple[str | float | None, ...]] = [
        ("one worker", alone.state_bytes / 1e6, 0.0, None, 1e3 * float(np.median(alone.step_s)))
    ]
    for name, plan in plans.items():
        predicted = None if name in given[-1] else plan.predicted.sent_bytes / 1e6
        rows.append(
            (name, kept[name] / 1e6, sent[name] / 1e6, predicted, 1e3 * float(np.median(found[0][name].step_s)))
        )
    columns = ("plan", "MB of state, fullest", "MB sent, busiest", "predicted", "ms a step")
    note = f"{which}. AdamW, which moves all rows, in single precision.\n\n```\n{chosen.explain()}\n```"
    return Part(checks, (Table("Embedding tables divided over workers", columns, tuple(rows), note),), found)


PARTS: dict[str, Callable[[Scale], Part]] = {
    "1": equality, "2": wire, "3": state, "4": cases, "5": regret, "6": deaths, "7": throughput, "8": tables,
}  # fmt: skip


def main(given: list[str] | None = None) -> int:
    """Measure what is missing, and write the record after each part."""
    arguments = _arguments(given)
    scale = scale_of(arguments, Scale)
    whole = scale == Scale()
    BENCH.mkdir(exist_ok=True)
    return run_parts(
        {name: partial(measured, scale) for name, measured in PARTS.items()},
        Path(arguments.out or (RESULTS if whole else BENCH / "train-smoke.json")),
        kept=whole,
        only={name for name in arguments.only.split(",") if name},
        timed=_TIMED,
        seeds={"data and kills": SEED, "bootstrap": 0},
    )


def _arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Training by parallel plans: exactness, bytes, memory, speed.")
    parser.add_argument("--only", default="", help=f"parts, of {','.join(PARTS)}, measured anew; the rest is kept")
    scale_options(parser, Scale())
    parser.add_argument("--out", help="the record; by default results/train.json of a whole run, .bench/ of any other")
    return parser.parse_args(given)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)

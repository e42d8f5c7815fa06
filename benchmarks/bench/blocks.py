"""One block: one server, started, checked, warmed up, loaded for a few seconds, and stopped, with its CPU time."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from bench.closed_loop import Load
from bench.closed_loop import run as run_load
from bench.contestants import (
    Batches,
    Setup,
    batches_between,
    batches_so_far,
    model_env,
    request_for,
    start_ours,
    start_peer,
)
from bench.servers import DidNotStart, Server, free_port, running
from bench.wire import answers, check_answers

_RAW = Path(__file__).with_name("raw.py")
_WARM_UP_S = 2.0
_CHECKED = 16
_TICK = os.sysconf("SC_CLK_TCK")


class Block(msgspec.Struct, frozen=True, omit_defaults=True):
    """The measurements of one block.

    Attributes:
        scenario: `noop`, `cnn`, `cnn.both`, `article`.
        server: who.
        round: which, from 0.
        rps: answers per second.
        errors: answers that were none.
        generator_cpu: of the generator, in cores.
        cpu_us: of the server per answer.
        engine_us: of the raw engine per answer, in batches of the same sizes, in the same round.
        batch: mean size.
        foreign_cpu: cores that others used meanwhile. Above a few hundredths the block was disturbed.
        steal: share of the machine that its hypervisor took away.
        failed: why there is nothing of the above.
    """

    scenario: str
    server: str
    round: int
    rps: float = 0.0
    p50_ms: float = 0.0
    p99_ms: float = 0.0
    errors: int = 0
    generator_cpu: float = 0.0
    cpu_us: float = 0.0
    engine_us: float | None = None
    batch: float = 0.0
    foreign_cpu: float = 0.0
    steal: float = 0.0
    failed: str = ""


Costs = dict[int, float]
"""Batch size -> CPU seconds of the raw engine for one batch."""


@contextlib.contextmanager
def served(name: str, python: Path | None, setup: Setup, work: Path) -> Iterator[Server]:
    """A contestant, running and answering.

    Raises:
        DidNotStart: if it does not.
    """
    port = free_port()
    start = start_ours(setup, port, work) if python is None else start_peer(name, python, setup, port, work)
    probe = request_for(name, setup, samples_of(setup)[0])

    try:
        with running(
            start.command, start.env, port, setup.cores, work / f"{name}.log", partial(answers, port, probe)
        ) as server:
            yield server
    finally:
        for left in Path("/dev/shm").glob(f"{work.name}*"):  # Triton's, where it had to be killed
            left.unlink()


def measure(
    scenario: str,
    name: str,
    python: Path | None,
    setup: Setup,
    load: Load,
    expected: NDArray[np.float32],
    *,
    round: int,
    seconds: float,
    costs: Costs | None,
) -> Block:
    """One block, with its failure if it fails.

    Args:
        scenario: its name.
        name: the server's.
        python: of the peer's environment; None for ours.
        setup: what is served.
        load: how it is loaded.
        expected: the right answers to the bundle's samples.
        round: which.
        seconds: how long it is measured.
        costs: of the raw engine, this round.
    """
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        work = Path(folder)
        try:
            with served(name, python, setup, work) as server:
                return _loaded(scenario, name, server, setup, load, expected, round, seconds, costs, work)
        except (DidNotStart, RuntimeError, OSError) as error:
            return Block(scenario, name, round, failed=str(error))


def _loaded(
    scenario: str,
    name: str,
    server: Server,
    setup: Setup,
    load: Load,
    expected: NDArray[np.float32],
    round: int,
    seconds: float,
    costs: Costs | None,
    work: Path,
) -> Block:
    requests = [request_for(name, setup, sample) for sample in samples_of(setup)[:_CHECKED]]
    wrong = check_answers(server.port, requests, expected[:_CHECKED])
    if wrong:
        return Block(scenario, name, round, failed=wrong)
    run_load(server.port, requests[0], load, _WARM_UP_S, work)
    if strays := server.strays(setup.cores):
        return Block(scenario, name, round, failed=f"{len(strays)} threads left their cores")
    before, begin, machine = batches_so_far(name, server.port, work), server.cpu_s(), machine_cpu_s()
    own = time.process_time()
    answered = run_load(server.port, requests[0], load, seconds, work)
    cpu, all_busy, stolen = (
        server.cpu_s() - begin,
        *(now - then for now, then in zip(machine_cpu_s(), machine, strict=True)),
    )
    batches = batches_between(name, before, batches_so_far(name, server.port, work))
    if not answered.requests:
        return Block(scenario, name, round, errors=answered.errors, failed=f"no answers: {server.last_words()}")
    foreign = all_busy - cpu - answered.generator_cpu * answered.seconds - (time.process_time() - own)
    rows = sum(size * count for size, count in batches.items())
    return Block(
        scenario,
        name,
        round,
        rps=round_to(answered.rps, 5),
        p50_ms=answered.p50_ms,
        p99_ms=answered.p99_ms,
        errors=answered.errors,
        generator_cpu=answered.generator_cpu,
        cpu_us=round_to(1e6 * cpu / answered.requests, 5),
        engine_us=None if costs is None or not rows else round_to(engine_us(batches, costs), 5),
        batch=round_to(rows / batches.total(), 4) if batches else 0.0,
        foreign_cpu=max(0.0, round_to(foreign / answered.seconds, 3)),
        steal=round_to(stolen / answered.seconds, 3),
    )


def raw_costs(setup: Setup, sizes: tuple[int, ...], seconds: float) -> dict[int, tuple[float, float]]:
    """The raw engine on the server's cores: size -> CPU seconds of a batch, and batches per second."""
    said = _raw(setup, "cost", str(seconds), *map(str, sizes))
    return {int(size): (cost["cpu_s"], cost["batches_per_s"]) for size, cost in json.loads(said).items()}


def right_answers(setup: Setup) -> NDArray[np.float32]:
    """The raw engine's answers to the bundle's samples, one by one; zeros for the no-op."""
    samples = samples_of(setup)
    outputs = setup.bundle.manifest.signature.outputs[0].shape[0]
    if setup.model == "noop":
        return np.zeros((len(samples), outputs), np.float32)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        np.save(Path(folder) / "samples.npy", samples)
        _raw(setup, "answers", f"{folder}/samples.npy", f"{folder}/answers.npy")
        answers: NDArray[np.float32] = np.load(Path(folder) / "answers.npy")
    return answers


def samples_of(setup: Setup) -> NDArray[Any]:
    """The bundle's own."""
    key = setup.bundle.path
    if key not in _samples:
        (_samples[key],) = setup.bundle.samples().values()
    return _samples[key]


_samples: dict[Path, NDArray[Any]] = {}


def round_to(value: float, digits: int) -> float:
    """Rounded to significant digits."""
    return float(f"{value:.{digits}g}")


def _raw(setup: Setup, *arguments: str) -> str:
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        done = subprocess.run(
            [sys.executable, "-P", str(_RAW), *arguments],
            env=model_env(setup, Path(folder)),
            capture_output=True,
            text=True,
            preexec_fn=lambda: os.sched_setaffinity(0, setup.cores),
        )
    if done.returncode:
        raise RuntimeError(f"the raw engine failed: {done.stderr.strip()[-300:]}")
    return done.stdout


def engine_us(batches: Batches, costs: Costs) -> float:
    """CPU microseconds of the raw engine for one sample, in these batches."""
    return 1e6 * _engine_s(batches, costs) / sum(size * count for size, count in batches.items())


def _engine_s(batches: Batches, costs: Costs) -> float:
    """CPU seconds of the raw engine for these batches; sizes between those measured are interpolated."""
    sizes = sorted(costs)
    seconds = np.interp(list(batches), sizes, [costs[size] for size in sizes])
    return float(np.dot(seconds, list(batches.values())))


def machine_cpu_s() -> tuple[float, float]:
    """CPU seconds that the whole machine was busy, and was stolen, since it started."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq) / _TICK, steal / _TICK

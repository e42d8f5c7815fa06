"""What `rushhour plan` says of one, two and four processes on this machine, against what they carry."""

from __future__ import annotations

import contextlib
import statistics
from functools import partial
from pathlib import Path

import msgspec

import rushhour
from bench.models import bundle_of
from bench.parts import Part, say
from bench.record import Check, Table, judged, verdict
from rushhour.bundle import Bundle
from rushhour.cluster import Node, size
from rushhour.engines import EngineConfig, open_engine, time_service
from rushhour.goal import SLO, Goal
from rushhour.load import Generator, closed_loop, discover, estimate, measure, payloads
from rushhour.measurement import Measurement
from rushhour.plan import PLAN, Evidence, Plan, Policy, Variant
from rushhour.system.machine import cores, describe

PROCESSES = 1, 2, 4
_BATCH = 8
_SLO = "p99<50ms"
_BEGIN, _USERS = 0.9, 64
"""The first rate, as a share of what so many users get who wait for their answers."""
_STEPS, _STEP, _WINDOW_S = 16, 1.05, 3.0


def sizing(rounds: int, work: Path, models: Path) -> Part:
    """Part 3: in each round the capacity of the same Plan as one, two and four processes, which take turns.

    The Plan's own capacity is that of one process in the same round, so that the host's speed does not count.

    Args:
        rounds: of the comparison.
        work: where the run is written.
        models: where the network is kept.
    """
    plan = _plan(work, models)
    plan.save(work / PLAN)
    measured: list[dict[int, float]] = []
    for number in range(rounds):
        found = _capacities(work, seed=number)
        say(f"3  round {number + 1}: " + ", ".join(f"{rate:.0f}/s with {each}" for each, rate in found.items()))
        measured.append(found)
    ratios: dict[int, list[float]] = {processes: [] for processes in PROCESSES}
    rows = []
    for number, found in enumerate(measured):
        # One process is predicted from that of the round before, or after the first.
        for processes in PROCESSES:
            base = found[1] if processes > 1 else measured[number - 1][1] if number else measured[-1][1]
            assert plan.evidence is not None
            evidence = msgspec.structs.replace(plan.evidence, capacity_rps=base)
            node = Node(cores(), processes=processes)
            predicted = size(msgspec.structs.replace(plan, evidence=evidence), base, node).machine_rps
            ratios[processes].append(found[processes] / predicted)
            rows.append((str(number + 1), str(processes), predicted, found[processes]))
    checks: list[Check] = []
    for processes, each in ratios.items():
        off = abs(statistics.median(each) - 1)
        what = f"capacity of {processes} processes on {cores()} cores: error of `rushhour plan`, median"
        checks.append(verdict(f"3.{processes}", what, "<= 0.1", off, None, len(each), unit=""))
        checks.append(
            judged(f"3.{processes}.low", f"capacity of {processes} processes, measured over planned", ">= 0.8", each)
        )
    tables = (Table("Capacity by processes", ("round", "processes", "planned, 1/s", "measured, 1/s"), tuple(rows)),)
    return Part(tuple(checks), tables, {"measured": [{str(k): v for k, v in each.items()} for each in measured]})


def _plan(work: Path, models: Path) -> Plan:
    """A Plan of one process with a stream for each core, as tuning leaves it, but for its capacity."""
    bundle_of("cnn", models).copy_to(work / "bundles" / "served")
    bundle = Bundle.open(work / "bundles" / "served")
    policy = Policy(streams=cores(), max_batch=_BATCH)
    engine = open_engine(bundle, EngineConfig("openvino", streams=policy.streams, max_batch=_BATCH))
    try:
        times = time_service(engine, bundle, 1.0, 0.5)
    finally:
        engine.close()
    none = (0.0, 0.0)
    evidence = Evidence(
        capacity_rps=1.0, lowest_failing_rps=None, p99_ms=None, p99_interval_ms=None, metric="accuracy", accuracy=0.0,
        accuracy_interval=none, accuracy_drop=0.0, accuracy_drop_interval=none, reference_accuracy=0.0,
        reference_accuracy_interval=none, baseline_capacity_rps=0.0, baseline_p99_ms=None, parameters=0, model_bytes=0,
        reference_parameters=0, reference_model_bytes=0, machine=describe(), at="", service_times=times,
    )  # fmt: skip
    variant = Variant("served", "bundles/served", bundle.manifest.hash, "openvino", "f32")
    return Plan(Goal(SLO.parse(_SLO)), (variant,), policy, evidence=evidence, model="cnn")


def _capacities(run: Path, seed: int) -> dict[int, float]:
    """Requests per second that servers of so many processes carry within the SLO, by an estimate from their windows.

    The host's speed comes in waves, and a search takes two minutes: so they take turns, a short window each. A server's
    rate is raised after a window in which it kept the SLO, and lowered after another.
    """
    slo = SLO.parse(_SLO)
    with contextlib.ExitStack() as stack:
        generator = stack.enter_context(Generator())
        targets = {}
        for processes in PROCESSES:
            server = stack.enter_context(rushhour.serve(run, http_port=0, grpc_port=None, cells=processes))
            targets[processes] = discover(server.url)
        requests = payloads(targets[1], seed=seed)
        users = partial(closed_loop, generator, requests=requests, concurrency=_USERS, duration_s=2.0)
        rates = {each: _BEGIN * users(target=target).throughput_rps for each, target in targets.items()}
        windows: dict[int, list[Measurement]] = {processes: [] for processes in PROCESSES}
        for step in range(_STEPS):
            for processes in PROCESSES if step % 2 else reversed(PROCESSES):
                rate = rates[processes]
                window = measure(
                    generator, targets[processes], requests, slo,
                    rate_rps=rate, seed=1000 * seed + step, n=round(rate * _WINDOW_S), warmup_s=1.0,
                )  # fmt: skip
                windows[processes].append(window)
                rates[processes] = rate * _STEP if window.keeps_slo else rate / _STEP
    found = {processes: estimate(each, slo) for processes, each in windows.items()}
    return {processes: 0.0 if each is None else each.rate_rps for processes, each in found.items()}

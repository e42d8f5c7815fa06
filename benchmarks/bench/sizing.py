"""What `rushhour plan` says of one, two and four processes on this machine, against what they carry."""

from __future__ import annotations

import statistics
from pathlib import Path

import msgspec

import rushhour
from bench.models import bundle_of
from bench.parts import Part, say
from bench.record import Check, Table, judged, verdict
from rushhour.api.loading import LoadResult
from rushhour.bundle import Bundle
from rushhour.cluster import Node, size
from rushhour.engines import EngineConfig, open_engine, time_service
from rushhour.goal import SLO, Goal
from rushhour.plan import PLAN, Evidence, Plan, Policy, Variant
from rushhour.system.machine import cores, describe

PROCESSES = 1, 2, 4
_BATCH = 8
_SLO = "p99<50ms"


def sizing(rounds: int, work: Path, models: Path) -> Part:
    """Part 3: in each round the capacity of the same Plan as one, two and four processes, one after another.

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
        found = {processes: _capacity(work, processes, seed=number) for processes in PROCESSES}
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


def _capacity(run: Path, processes: int, seed: int) -> float:
    """Requests per second that a server of so many processes carries within the SLO."""
    with rushhour.serve(run, http_port=0, grpc_port=None, cells=processes) as server:
        found = rushhour.load(server, slo=_SLO, seed=seed)
    assert isinstance(found, LoadResult)
    search = found.search
    return 0.0 if search is None else search.capacity_rps

"""The server of a candidate: a process of its own, which serves a plan as a user's server would."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from rushhour.bundle import Bundle
from rushhour.errors import EngineError, ServeError
from rushhour.goal import Goal
from rushhour.plan import Plan, Variant
from rushhour.serve import ServeSettings
from rushhour.serve.child import ChildServer
from rushhour.tune.space import Candidate, CascadeCandidate


def plan_of(candidate: Candidate, bundle: Bundle, goal: Goal, model: str = "") -> Plan:
    """The plan, without evidence, that serves `candidate` from a run's folder, under the name `model`."""
    policy = msgspec.structs.replace(candidate.policy, deadline_ms=goal.slo.limit_ms)
    variant = _variant(candidate, bundle.manifest.hash)
    if not isinstance(candidate, CascadeCandidate):
        return Plan(goal=goal, variants=(variant,), policy=policy, model=model)
    # The large one first: a machine that cannot run the cascade serves it alone.
    both = (variant, _variant(candidate.small, candidate.small_hash))
    return Plan(goal=goal, variants=both, policy=policy, model=model, cascade=candidate.rule)


def variant_name(candidate: Candidate) -> str:
    """The name of a candidate's variant in a plan."""
    return f"{candidate.bundle}-{candidate.engine}-{candidate.precision}"


def _variant(candidate: Candidate, bundle_hash: str) -> Variant:
    return Variant(
        name=variant_name(candidate),
        bundle=f"bundles/{candidate.bundle}",
        bundle_hash=bundle_hash,
        engine=candidate.engine,
        precision=candidate.precision,
    )


@contextlib.contextmanager
def served(
    candidate: Candidate, bundle: Bundle, goal: Goal, run: Path, trusted: tuple[str, ...]
) -> Iterator[tuple[str, int]]:
    """A server for `candidate` on a free loopback port, as a context; gives its URL and its process ID.

    The process is gone at the end in every case.

    Raises:
        EngineError: if the server does not start; the message is the server's own.
    """
    name = hashlib.sha256(str(candidate).encode()).hexdigest()[:12]
    file, log = run / f".candidate-{name}.json", run / f".candidate-{name}.log"
    plan = plan_of(candidate, bundle, goal, bundle.manifest.name)
    if plan.cascade is not None:  # a load test does not see accuracy: what is measured keeps that of the rule
        plan = msgspec.structs.replace(plan, cascade=msgspec.structs.replace(plan.cascade, stands=False))
    plan.save(file)
    try:
        try:
            server = ChildServer(file, ServeSettings(http_port=0, trusted=trusted), log)
        except ServeError as error:
            raise EngineError(f"the server of {candidate} does not start", error.why) from error
        try:
            yield server.url, server.pid
        finally:
            server.close()
    finally:
        file.unlink(missing_ok=True)
        log.unlink(missing_ok=True)


def cpu_seconds(pid: int) -> float | None:
    """CPU time of a process and all its descendants, including those that have ended and were waited for.

    None where there is no /proc, or no such process.
    """
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            fields = entry.read_text().rpartition(")")[2].split()
            parents[int(entry.parent.name)] = int(fields[1])
            ticks[int(entry.parent.name)] = sum(map(int, fields[11:15]))
    if pid not in ticks:
        return None
    tree = {pid}
    while grown := {child for child, parent in parents.items() if parent in tree} - tree:
        tree |= grown
    return sum(ticks[each] for each in tree) / os.sysconf("SC_CLK_TCK")

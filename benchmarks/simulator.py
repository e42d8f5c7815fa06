"""`make bench-simulator`: the capacity simulator alone, without load: seconds.

1  how many policies a minute on one core
2  the same as a simulation of one after another, and the same again

How well it predicts measured capacities is part 5 of bench-noise.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from pathlib import Path

import msgspec
import numpy as np
from bench.parts import Part, run_parts, scale_of, scale_options
from bench.record import Table, verdict

from rushhour.capacity import Overhead, Scenario, ServiceProfile, Traffic, capacities, late_shares, simulate
from rushhour.goal import SLO
from rushhour.measurement import ServiceTimes

RESULTS = Path(__file__).parent / "results" / "simulator.json"
SEED = 0
SLO_ = SLO.parse("p99<50ms")
_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
_PROFILES = {
    "f32": (0.57, 0.86, 1.20, 1.54, 2.26, 3.00, 4.58, 6.47, 9.25, 12.16, 18.07, 25.15),
    "int8": (0.35, 0.44, 0.47, 0.56, 0.75, 0.96, 1.40, 1.84, 2.69, 3.63, 5.48, 7.19),
}
"""Milliseconds of a batch of the article's network on OpenVINO, one of two streams."""
_KINDS = ("Poisson", "in bursts", "varied, with deadlines")


class Scale(msgspec.Struct, frozen=True):
    """The size of each part.

    Attributes:
        policies: of each kind.
        rounds: of each kind.
        compared: policies that are simulated one after another as well.
    """

    policies: int = 2000
    rounds: int = 3
    compared: int = 100


def profile_of(name: str, varied: bool) -> ServiceProfile:
    """A network's service times, and on a host whose batches vary by some per cent."""
    seconds = tuple(value / 1e3 for value in _PROFILES[name])
    factors = tuple(np.sort(np.random.default_rng(SEED).lognormal(0, 0.1, 16)).tolist())
    throughput = tuple(2 * size / value for size, value in zip(_SIZES, seconds, strict=True))
    return ServiceProfile(ServiceTimes(_SIZES, seconds, throughput, (factors,) * len(_SIZES) if varied else ()))


def scenarios(n: int, *, varied: bool) -> list[Scenario]:
    """Policies: streams, batch bounds, delays, overheads and deadlines."""
    profiles = [profile_of(name, varied) for name in _PROFILES]
    deadlines = (0.045, 0.030) if varied else (np.inf,)
    bounds = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
    every = itertools.product(profiles, (1, 2, 4), bounds, (0.0, 0.002, 0.008), (0, 50, 90, 150), (1.0, 1.3), deadlines)
    found = [
        Scenario(
            of, streams, bound, Overhead(request_us / 1e6, 0, slowdown), wait_s, max(1, bound // 2), float(deadline)
        )
        for of, streams, bound, wait_s, request_us, slowdown, deadline in every
    ]
    order = np.random.default_rng(SEED).permutation(len(found))
    return [found[order[at % len(found)]] for at in range(n)]


def speed(scale: Scale) -> Part:
    """Part 1. CPU time of this process, which has one thread: others on the machine do not count."""
    bursts = Traffic.bursty(3000, SEED, intensity=5.0, share=0.1, burst_s=0.5)
    checks, rows = [], []
    for kind in _KINDS:
        policies = scenarios(scale.policies, varied=kind == _KINDS[2])
        traffic = bursts if kind == _KINDS[1] else None
        spent = []
        for _ in range(scale.rounds):
            began = time.process_time()
            capacities(policies, SLO_, traffic, seed=SEED)
            spent.append(time.process_time() - began)
        rate = 60 * len(policies) / statistics.median(spent)
        checks.append(
            verdict(
                f"1.{kind}", f"policies a minute on one core, {kind}", ">= 10000", rate, None, scale.rounds, unit="/min"
            )
        )
        rows.append((kind, len(policies), statistics.median(spent), rate))
    columns = ("arrivals and batches", "policies", "CPU seconds", "policies a minute")
    return Part(tuple(checks), (Table("Capacities by simulation", columns, tuple(rows)),), [list(row) for row in rows])


def agreement(scale: Scale) -> Part:
    """Part 2."""
    policies = [without_waiting(each) for each in scenarios(scale.compared, varied=False)]
    found = capacities(policies, SLO_, seed=SEED)
    again = capacities(policies[::-1], SLO_, seed=SEED)[::-1]
    n = 3000
    off = []
    for policy, rate in zip(policies, (1.1 * found).tolist(), strict=True):  # there, some are late
        if not rate:
            continue
        together = late_shares([policy], np.array([rate]), SLO_.limit_s, Traffic.poisson(n, SEED))[0]
        alone = simulate(
            policy.profile,
            streams=policy.streams,
            max_batch=policy.max_batch,
            rate_rps=rate,
            n=n,
            seed=SEED,
            overhead=policy.overhead,
        )
        off.append(abs(float(together) - float(np.mean(alone > SLO_.limit_s))))
    checks = (
        verdict(
            "2.same",
            "share of late requests, lock-step against one by one, most",
            "<= 0.001",
            max(off),
            None,
            len(off),
            unit="",
        ),
        verdict(
            "2.again",
            "capacities that differ in another order",
            "<= 0",
            float((found != again).sum()),
            None,
            len(found),
            unit="",
        ),
    )
    return Part(checks, (), off)


def without_waiting(scenario: Scenario) -> Scenario:
    """The same without what `simulate` does not know: waiting, and a deadline."""
    return Scenario(scenario.profile, scenario.streams, scenario.max_batch, scenario.overhead)


def main() -> int:
    """Measure what is missing, and write the record after each part."""
    parser = argparse.ArgumentParser(description="The capacity simulator.")
    parser.add_argument("--only", default="", help="of 1,2, measured anew")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the record")
    scale_options(parser, Scale())
    arguments = parser.parse_args()
    scale = scale_of(arguments, Scale)
    return run_parts(
        {"1": lambda: speed(scale), "2": lambda: agreement(scale)},
        arguments.out,
        kept=True,
        only={name for name in arguments.only.split(",") if name},
        timed={"1"},
        seeds={"simulation": SEED},
    )


if __name__ == "__main__":
    sys.exit(main())

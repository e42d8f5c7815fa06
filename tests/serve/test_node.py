"""A Plan on another machine: what differs, what is left of its capacity, the layout, and where all that is said."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from plans import run_of

from rushhour.capacity import Overhead, ServiceProfile, predicted_capacity
from rushhour.errors import ServeError
from rushhour.goal import SLO
from rushhour.measurement import ServiceTimes
from rushhour.plan import Plan, Policy
from rushhour.serve import ServeSettings, open_target, serve
from rushhour.serve.node import Fit, differences, fit_of, seconds_per_size
from rushhour.system.machine import Machine, cores, describe

SLO_50 = SLO.parse("p99<50ms")
THERE = Machine("a processor", 2, ("avx2", "avx512f", "avx512_vnni"), 24.0, "Linux", "3.11", {})
SIZES = (1, 2, 4, 8)


def times_of(base_s: float, sample_s: float, streams: int = 2) -> ServiceTimes:
    seconds = tuple(base_s + size * sample_s for size in SIZES)
    return ServiceTimes(SIZES, seconds, tuple(streams * size / each for size, each in zip(SIZES, seconds, strict=True)))


def edited(run: Path, times: ServiceTimes | None = None, **machine: Any) -> Path:
    """The run's plan as one of another machine."""
    plan = Plan.load(run / "plan.json")
    assert plan.evidence is not None
    there = msgspec.structs.replace(describe(), **machine)
    evidence = msgspec.structs.replace(plan.evidence, machine=there, service_times=times, alone_rps=None)
    msgspec.structs.replace(plan, evidence=evidence).save(run / "plan.json")
    return run


@pytest.mark.parametrize(
    ("here", "granted", "words"),
    [
        ({}, (2, None), ()),
        ({"cores": 1}, (2, 1.0), ("1 of 2 cores (CFS quota)",)),
        ({"cores": 1}, (2, 1.5), ("1 of 2 cores (CFS quota of 1.5)",)),
        ({"cores": 8}, (8, None), ("8 cores instead of 2",)),
        ({"features": ("avx2", "avx512f")}, (2, None), ("class avx2 instead of vnni", "no avx512_vnni")),
        ({"features": (*THERE.features, "amx_int8")}, (2, None), ("class amx instead of vnni",)),
        ({"cpu": "another"}, (2, None), ("another instead of a processor",)),
        ({"memory_gb": 12.0}, (2, None), ("12 of 24 GiB of memory",)),
        ({"memory_gb": 23.5}, (2, None), ()),
        ({"system": "Linux 7", "versions": {"numpy": "3"}}, (2, None), ()),
    ],
)
def test_what_differs_is_said_in_words(
    here: dict[str, Any], granted: tuple[int, float | None], words: tuple[str, ...]
) -> None:
    assert differences(THERE, msgspec.structs.replace(THERE, **here), granted) == words


def test_fewer_cores_by_affinity_are_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    here = msgspec.structs.replace(THERE, cores=1)
    assert differences(THERE, here, (1, None)) == ("1 of 2 cores (CPU affinity)",)


def test_the_same_machine_needs_no_fit(tmp_path: Path) -> None:
    run = edited(run_of(tmp_path / "run", cores=cores()))
    assert fit_of(Plan.load(run / "plan.json")) is None
    bundle = open_target(run / "bundles" / "best")
    assert fit_of(bundle.plan) is None  # no plan, no evidence


def known(run: Path, times: ServiceTimes, overhead: Overhead) -> Fit:
    """The fit of a plan whose capacity is that of a simulated server with this overhead."""
    edited(run, times, cpu="another")
    plan = Plan.load(run / "plan.json")
    capacity = predicted_capacity(ServiceProfile(times), streams=2, max_batch=8, slo=SLO_50, overhead=overhead)
    assert plan.evidence is not None
    evidence = msgspec.structs.replace(plan.evidence, alone_rps=capacity)
    fit = fit_of(msgspec.structs.replace(plan, evidence=evidence))
    assert fit is not None
    assert fit.plan_rps == pytest.approx(capacity, rel=0.05)
    return fit


def test_the_share_is_the_ratio_of_simulated_capacities(tmp_path: Path) -> None:
    times, overhead = times_of(1e-3, 5e-4), Overhead(request_s=2e-4)
    run = run_of(tmp_path / "run", cores=2, policy=Policy(streams=2, max_batch=8))
    fit = known(run, times, overhead)
    policy = Policy(streams=2, max_batch=8)
    assert fit.share(times, policy, 2) == pytest.approx(1.0)
    slower = fit.share(times_of(2e-3, 1e-3), policy, 2)
    assert slower is not None
    # The engine takes twice as long; requests themselves do not.
    alone = predicted_capacity(
        ServiceProfile(times_of(2e-3, 1e-3)), streams=2, max_batch=8, slo=SLO_50, overhead=overhead
    )
    assert slower == pytest.approx(alone / fit.plan_rps, rel=0.05)
    halved = fit.share(times, Policy(streams=1, max_batch=8), 1)
    assert halved is not None
    assert 0.35 < halved < 0.55
    assert fit.line(0.714) == "this node gives 71% of the Plan's capacity: " + "; ".join(fit.differences)


def test_without_known_times_the_plans_capacity_is_compared(tmp_path: Path) -> None:
    run = edited(run_of(tmp_path / "run", cores=2), cpu="another")
    fit = fit_of(Plan.load(run / "plan.json"))
    assert fit is not None
    assert (fit.plan_rps, fit.request_s) == (9120.0, 0.0)
    nothing = msgspec.structs.replace(fit, plan_rps=0.0)
    assert nothing.share(times_of(1e-3, 1e-3), Policy(), 1) is None
    assert nothing.line(None).startswith("this is not the Plan's machine: ")


def test_two_seconds_are_spent_on_all_sizes() -> None:
    for largest, sizes in ((1, 1), (8, 7), (32, 11), (100, 14)):
        assert 0.9 <= sizes * seconds_per_size(largest) <= 2.01


@pytest.mark.parametrize(
    ("measured", "policy", "room", "layout"),
    [
        (2, Policy(streams=2), 2, (2, 1)),
        (2, Policy(streams=2), 1, (1, 1)),
        (2, Policy(streams=2), 4, (4, 1)),
        (2, Policy(streams=1), 4, (2, 1)),  # half of the cores, as before
        (2, Policy(threads=2), 4, (2, 2)),
        (4, Policy(streams=2, threads=2), 3, (3, 1)),
        (4, Policy(streams=1, threads=4), 2, (1, 2)),
        (8, Policy(cells=2, streams=4), 2, (2, 1)),
        (8, Policy(streams=1), 1, (1, 1)),
    ],
)
def test_the_layout_is_scaled_to_the_cores(
    tmp_path: Path, measured: int, policy: Policy, room: int, layout: tuple[int, int]
) -> None:
    target = open_target(run_of(tmp_path / "run", cores=measured, policy=policy)).scaled_to(room)
    assert (target.plan.policy.streams, target.plan.policy.threads) == layout


# -- a server


@contextlib.contextmanager
def served(run: Path, *options: str, allowed: set[int] | None = None) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server on some of the cores, and its URL once it is ready."""
    every = os.sched_getaffinity(0)
    os.sched_setaffinity(0, allowed or every)  # a child inherits it
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "rushhour", "serve", str(run), "--http-port=0", "--no-grpc", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        os.sched_setaffinity(0, every)
    try:
        assert process.stdout is not None
        ready = re.search(r"http://[\d.:]*\d", process.stdout.readline())
        yield process, ready[0] if ready else ""
    finally:
        process.kill()
        process.communicate()


def ended(process: subprocess.Popen[str]) -> list[dict[str, Any]]:
    """The log of a server that is stopped."""
    process.send_signal(signal.SIGTERM)
    _, log = process.communicate(timeout=60)
    return [json.loads(line) for line in log.splitlines()]


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        text: str = answer.read().decode()
        return text


def ratio(metrics: str) -> float | None:
    found = re.search(r"^rushhour_plan_capacity_ratio\{[^}]*\} (\S+)$", metrics, re.MULTILINE)
    return None if found is None else float(found[1])


def said(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [entry for entry in log if "the Plan's" in entry["event"]]


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="a core has to be taken away")
def test_fewer_cores_are_said_and_fewer_streams_served(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", cores=2, policy=Policy(streams=2, max_batch=8))
    edited(run, times_of(2e-5, 1e-6), cores=2)
    with served(run, allowed={min(os.sched_getaffinity(0))}) as (process, url):
        assert url
        policy = json.loads(get(f"{url}/config"))["policy"]
        shown = ratio(get(f"{url}/metrics"))
        (entry,) = said(ended(process))
    assert (policy["streams"], policy["threads"]) == (1, 1)
    assert shown is not None
    assert shown > 0
    assert entry["share"] == pytest.approx(shown)
    line = f"this node gives {shown:.0%} of the Plan's capacity: 1 of 2 cores (CPU affinity)"
    assert (entry["event"], entry["level"]) == (line, "warning")


def test_an_instruction_set_that_is_missing_is_said(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", cores=cores())
    edited(run, times_of(2e-5, 1e-6), features=(*describe().features, "avx1024"))
    with served(run) as (process, url):
        assert url
        (entry,) = said(ended(process))
    assert entry["event"].endswith("of the Plan's capacity: no avx1024")


def test_on_the_plans_machine_nothing_is_said(tmp_path: Path) -> None:
    run = edited(run_of(tmp_path / "run", cores=cores()), times_of(2e-5, 1e-6))
    with served(run, "--strict") as (process, url):
        assert ratio(get(f"{url}/metrics")) is None
        assert not said(ended(process))


@pytest.mark.slow
@pytest.mark.skipif(cores() < 2, reason="each cell needs a core")
def test_several_cells_are_one_line_and_one_number(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", cores=cores(), policy=Policy(cells=2, max_batch=8))
    edited(run, times_of(2e-5, 1e-6), memory_gb=2 * describe().memory_gb)
    with served(run) as (process, url):
        assert url
        shown = ratio(get(f"{url}/metrics"))
        (entry,) = said(ended(process))
    assert shown is not None
    assert entry["share"] == pytest.approx(shown)
    assert entry["event"].endswith("GiB of memory")


def test_strict_refuses_another_machine_in_one_line(tmp_path: Path) -> None:
    run = edited(run_of(tmp_path / "run", cores=cores() + 1), cores=cores() + 1)
    command = [sys.executable, "-m", "rushhour", "serve", str(run), "--http-port=0", "--no-grpc", "--strict"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert f"{cores()} of {cores() + 1} cores" in line
    assert line.endswith("; tune on this machine, or omit --strict")
    with pytest.raises(ServeError, match="--strict"):
        serve(open_target(run), ServeSettings(http_port=0, strict=True), lambda *_: None)

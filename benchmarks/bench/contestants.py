"""The servers compared: how each is started for a model, queried, and what it reports of its batches."""

from __future__ import annotations

import dataclasses
import http.client
import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from bench.models import ModelName
from bench.wire import Request, bare_request, protocol_request
from rushhour.bundle import Bundle
from rushhour.goal import SLO, Goal
from rushhour.plan import Plan, Policy, Precision, Variant
from rushhour.serve import ServeSettings

HERE = Path(__file__).resolve().parent.parent
PEERS = HERE / "peers"
OURS = "rushhour"
_PEER_BATCH = 32

Batches = Counter[float]
"""Size -> how many batches of it."""


@dataclasses.dataclass(frozen=True)
class Setup:
    """The model, its options and its cores.

    Attributes:
        cores: of the server.
        instances: streams, workers or replicas: one core each.
        max_batch: samples in one of our batches; the peers' bound is 32, as large as any of theirs gets.
        cells: processes of ours.
        deadline_ms: of our admission.
    """

    model: ModelName
    bundle: Bundle
    precision: Precision
    cores: frozenset[int]
    instances: int
    max_batch: int
    cells: int = 1
    deadline_ms: float | None = None


@dataclasses.dataclass(frozen=True)
class Start:
    """The command that starts a server."""

    command: list[str]
    env: dict[str, str]


def start_ours(setup: Setup, port: int, work: Path) -> Start:
    """Rushhour, by a plan."""
    plan = plan_of(setup)
    # A plan's bundles lie below it; the name is the setup's own, for several servers may be read from one folder.
    file = setup.bundle.path.parent / f"{setup.model}-{setup.instances}-{setup.max_batch}.json"
    plan.save(file)
    settings = msgspec.json.encode(ServeSettings(http_port=port)).decode()
    what = [str(HERE / "bench" / "noop.py")] if setup.model == "noop" else ["-m", "rushhour.serve"]
    return Start([sys.executable, "-P", *what, str(file), settings], _env(work))


def plan_of(setup: Setup) -> Plan:
    """The plan."""
    manifest = setup.bundle.manifest
    variant = Variant(
        name=f"{setup.model}-{setup.precision}",
        bundle=setup.bundle.path.name,
        bundle_hash=manifest.hash,
        engine="openvino",
        precision=setup.precision,
    )
    policy = Policy(
        cells=setup.cells,
        streams=setup.instances // setup.cells,
        threads=1,
        max_batch=setup.max_batch,
        queue_bound=4096,
        deadline_ms=setup.deadline_ms,
    )
    return Plan(goal=Goal(slo=SLO(percentile=99, limit_s=0.1)), variants=(variant,), policy=policy)


def peer_of(name: str) -> tuple[str, str]:
    """The folder of a peer, and which of its ways to answer it takes part with: of `triton.examples` the second."""
    folder, _, way = name.partition(".")
    return folder, way


def start_peer(name: str, python: Path, setup: Setup, port: int, work: Path) -> Start:
    """A peer, by its `server.py`, which reads what to do from the environment."""
    folder, way = peer_of(name)
    env = model_env(setup, work) | {"BENCH_PORT": str(port), "BENCH_WAY": way}
    return Start([str(python), str(PEERS / folder / "server.py")], env)


def model_env(setup: Setup, work: Path) -> dict[str, str]:
    """What `bench_model` reads: the same graph, engine and options for all."""
    counts = work / "counts"
    counts.mkdir(exist_ok=True)
    return _env(work) | {
        "BENCH_MODEL": "noop" if setup.model == "noop" else str(setup.bundle.model),
        "BENCH_PRECISION": setup.precision,
        "BENCH_MAX_BATCH": str(_PEER_BATCH),
        "BENCH_INSTANCES": str(setup.instances),
        "BENCH_COUNTS": str(counts),
        "BENCH_WORK": str(work),
        "PYTHONPATH": str(HERE / "model"),
    }


def request_for(name: str, setup: Setup, sample: NDArray[Any]) -> Request:
    """One sample, as this server takes it: all but Triton and we get the bare pixels at their natural endpoint."""
    if name == OURS:
        return protocol_request(
            f"/v2/models/{setup.bundle.manifest.name}/infer", setup.bundle.manifest.signature, sample
        )
    if peer_of(name)[0] == "triton":
        model = "noop" if setup.model == "noop" else "cnn"
        return protocol_request(f"/v2/models/{model}/infer", setup.bundle.manifest.signature, sample)
    return bare_request("/predict" if name == "litserve" else "/infer", sample)


def batches_so_far(name: str, port: int, work: Path) -> Batches:
    """What the server has run: exact for the peers; of ours the mean size, in one cell of several."""
    if name == OURS:
        stats = _get(port, "/stats")
        return Counter({stats["rows"] / stats["batches"]: stats["batches"]}) if stats["batches"] else Counter()
    found: Batches = Counter()
    for file in (work / "counts").iterdir():
        for size, count in enumerate(np.fromfile(file, np.uint64).tolist()):
            found[float(size)] += count
    return found


def batches_between(name: str, before: Batches, after: Batches) -> Batches:
    """The batches of a window, from what was run before and after it; of ours, all since the start."""
    return after if name == OURS else after - before


def _get(port: int, path: str) -> dict[str, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path)
        found: dict[str, Any] = json.loads(connection.getresponse().read())
        return found
    finally:
        connection.close()


def _env(work: Path) -> dict[str, str]:
    """Nothing of the caller's environment but the path: what is measured must not depend on whose shell it is."""
    home = work / "home"
    home.mkdir(exist_ok=True)
    return {"PATH": os.environ["PATH"], "HOME": str(home), "LANG": "C.UTF-8", "PYTHONUNBUFFERED": "1"}

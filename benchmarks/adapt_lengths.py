"""Part 4 of bench-adapt: sentences of mixed lengths in buckets, against padding all of them to the largest length.

The model is MiniLM on real sentences (bench/sentences.py). One server takes them as they are, in the buckets that the
tuner would choose; the other is the same model with one length, to which its clients pad. Both have the same engine,
streams and batch bound. Their capacities at the same limit are measured in turn. Then every answer of the first server
under a crowd is compared with that of its sentence alone.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import http.client
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from bench.contest import Aim, capacities_in_turn
from bench.parts import Part
from bench.record import Check, Table, judged
from bench.sentences import rated_sentences
from numpy.typing import NDArray

from rushhour.bundle import Bundle, OpenDimension, Signature, TensorSpec, cut, own_sizes
from rushhour.capacity import best_bounds, padding_share
from rushhour.data.text import tokens
from rushhour.engines import EngineConfig, Runner, open_engine
from rushhour.goal import SLO, Goal
from rushhour.load import discover, payloads
from rushhour.models.minilm import INPUTS, minilm_bundle
from rushhour.plan import PLAN, Plan, Policy, Variant
from rushhour.serve import ServeSettings
from rushhour.serve.child import ChildServer
from rushhour.system.machine import cores
from rushhour.wire import decode_answer, encode_request

_LONGEST = 128
_BUCKETS = 8
_DRAWN = 8
"""Sets of requests of different sentences."""
_CALLERS = 16
_TARGET, _CLOSE = ">= 1.8", "<= 0.0001"


def lengths_part(count: int, limit_ms: float, rounds: int, window_s: float, work: Path, seed: int) -> Part:
    """Both servers, and how far answers in a crowd are from those alone.

    Args:
        count: sentences, drawn from all.
        limit_ms: of the 99th percentile.
        rounds: in which both capacities are measured.
        window_s: seconds of a window of load.
        work: where the models are kept.
        seed: of all that is random.
    """
    every = rated_sentences(work / "sentences")
    order = np.random.default_rng(seed).permutation(len(every))[:count]
    samples = tokens([every[at].text for at in order], length=_LONGEST)
    columns = {name: np.ascontiguousarray(samples[name]) for name in INPUTS}
    folder = work / "lengths"
    shutil.rmtree(folder, ignore_errors=True)
    some = samples[:64]
    longest = max(size for (size,) in own_sizes(_signature(), {name: some[name] for name in INPUTS}))
    shortened = np.zeros(len(some), [(name, np.int64, (longest,)) for name in INPUTS])
    for name in INPUTS:
        shortened[name] = some[name][:, :longest]
    opened = minilm_bundle(folder / "open" / "bundles" / "text", shortened, longest=_LONGEST)
    fixed = minilm_bundle(folder / "fixed" / "bundles" / "text", some)
    lengths = [size for (size,) in own_sizes(opened.manifest.signature, columns)]
    bounds = best_bounds(lengths, _LONGEST, _BUCKETS)
    slo = SLO.parse(f"p99<{limit_ms:g}ms")
    for bundle, policy in (
        (opened, Policy(streams=cores(), max_batch=16, buckets=bounds)),
        (fixed, Policy(streams=cores(), max_batch=16)),
    ):
        variant = Variant("text", "bundles/text", bundle.manifest.hash, "openvino", "f32")
        Plan(Goal(slo), (variant,), policy, model="minilm").save(bundle.path.parent.parent / PLAN)
    contestants = {
        "buckets": lambda: _served(opened, columns, seed),
        "padded to the largest": lambda: _served(fixed, columns, seed),
    }
    found = capacities_in_turn(contestants, slo, rounds, seconds=window_s, seed=seed)
    ratios = [ours / theirs for ours, theirs in zip(*found.values(), strict=True)]
    off, counted = _farthest(opened, columns)
    checks = (
        judged("4", f"capacity in buckets over that padded to {_LONGEST}, {slo}", _TARGET, ratios, seed=seed),
        Check("4.equal", "largest difference of an answer in a crowd from that alone", "", _CLOSE, off, None,
              len(order), off <= 1e-4),
    )  # fmt: skip
    expected = padding_share(lengths, bounds)
    rows = (
        ("sentences", float(len(order))),
        ("tokens of a sentence, mean", float(np.mean(lengths))),
        ("tokens of a sentence, 99th percentile", float(np.percentile(lengths, 99))),
        ("padding with the bounds, share", expected),
        ("padding in the crowd, share", counted),
        ("padding to the largest, share", 1 - float(np.mean(lengths)) / _LONGEST),
        *((f"capacity, {name}, 1/s", float(np.mean(rates))) for name, rates in found.items()),
    )
    note = f"Bounds {', '.join(map(str, bounds))}; MiniLM-L6 in f32 on OpenVINO, {cores()} streams."
    table = Table("Sentences of mixed lengths", ("what", "value"), rows, note)
    return Part(checks, (table,), {"capacities": found, "bounds": bounds, "difference": off})


def _signature() -> Signature:
    """By which the lengths of sentences are found before there is a bundle."""
    axes = dict.fromkeys(INPUTS, 0)
    length = OpenDimension("length", _LONGEST, axes, padding=dict.fromkeys(INPUTS, 0))
    inputs = tuple(TensorSpec(name, "int64", (_LONGEST,)) for name in INPUTS)
    return Signature(inputs, (TensorSpec("embedding", "float32", (384,)),), open=(length,))


@contextlib.contextmanager
def _served(bundle: Bundle, columns: dict[str, NDArray[Any]], seed: int) -> Iterator[Aim]:
    server = ChildServer(bundle.path.parent.parent / PLAN, ServeSettings(http_port=0))
    try:
        target, signature = discover(server.url), bundle.manifest.signature
        drawn = [payloads(target, columns, seed=seed + each, signature=signature) for each in range(_DRAWN)]
        yield Aim(target, [payload for requests in drawn for payload in requests])
    finally:
        server.close()


def _farthest(bundle: Bundle, columns: dict[str, NDArray[Any]]) -> tuple[float, float]:
    """The largest difference between an answer in a crowd and that of its sentence alone; and the share of padding."""
    signature = bundle.manifest.signature
    sizes = own_sizes(signature, columns)
    rows = [
        cut(signature, {name: array[row : row + 1] for name, array in columns.items()}, own)
        for row, own in enumerate(sizes)
    ]
    engine = open_engine(bundle, EngineConfig("openvino", streams=1, max_batch=1))
    runner = Runner(engine)
    alone = [runner.infer(row)["embedding"] for row in rows]
    engine.close()
    server = ChildServer(bundle.path.parent.parent / PLAN, ServeSettings(http_port=0))
    host, port = server.url.partition("://")[2].split(":")

    def call(first: int) -> float:
        connection, worst = http.client.HTTPConnection(host, int(port), timeout=60), 0.0
        for row in range(first, len(rows), _CALLERS):
            length, body = encode_request(signature, rows[row])
            connection.request(
                "POST", "/v2/models/minilm/infer", body, {"Inference-Header-Content-Length": str(length)}
            )
            answer = connection.getresponse()
            content, header = answer.read(), answer.getheader("Inference-Header-Content-Length")
            found = decode_answer(content, None if header is None else int(header))["embedding"]
            worst = max(worst, float(np.abs(found - alone[row]).max()))
        connection.close()
        return worst

    try:
        with concurrent.futures.ThreadPoolExecutor(_CALLERS) as pool:
            worst = max(pool.map(call, range(_CALLERS)))
        connection = http.client.HTTPConnection(host, int(port), timeout=60)
        connection.request("GET", "/stats")
        counted = json.loads(connection.getresponse().read())
        connection.close()
    finally:
        server.close()
    return worst, counted["padding"] / (counted["positions"] + counted["padding"])

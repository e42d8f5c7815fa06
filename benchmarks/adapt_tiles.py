"""Parts 3 and 7b of bench-adapt: photographs that are cut into tiles, and what an answer's times cost.

Part 3 serves the article's network at 224x224, narrow and untrained (what is measured does not depend on its weights),
and sends it photographs of 12 megapixels: alone, and many at once beside single samples. Part 7b times the code that
`Server-Timing` adds to a request, in turn with nothing.
"""

from __future__ import annotations

import http.client
import io
import itertools
import math
import os
import statistics
import threading
import time
import timeit
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from bench.models import pictures
from bench.parts import Part, say
from bench.record import Check, Table, judged, verdict
from numpy.typing import NDArray
from PIL import Image

from rushhour.bundle import Bundle, Preprocessing, TensorSpec, Tiling
from rushhour.engines import Engine, EngineConfig, keep_busy, open_engine, time_service
from rushhour.errors import BundleError
from rushhour.serve import ServeSettings
from rushhour.serve.child import ChildServer
from rushhour.serve.observability.explanation import Explanation
from rushhour.serve.scheduling.decoding import Decoder
from rushhour.serve.scheduling.merging import Grid
from rushhour.task import Task
from rushhour.wire import decode_answer

SIDE, CLASSES, SEED = 224, 10, 0
_TILING = Tiling("mean", overlap=32)
_BATCH = 16
_LIMIT, _P99, _GROWTH_MIB = "<= 1.15", "<= 2", 450
_SHARE = 0.2
"""Of the capacity: the rate of the small requests."""
_SAMPLED_S = 0.02
_PHOTOS = 3
"""Alone, in each round."""
_ENGINE_S = 0.5
_PIXELS = 50_000_000


class Tiled(NamedTuple):
    """What is served, and what is sent.

    Attributes:
        bundle: with tiles.
        photo: a JPEG.
        pixels: of it, as the server decodes it.
    """

    bundle: Bundle
    photo: bytes
    pixels: NDArray[np.uint8]


def tiles_part(sides: tuple[int, int], rounds: int, photos: int, small: int, work: Path) -> Part:
    """Part 3.

    Args:
        sides: width and height of the photograph, in pixels.
        rounds: of each comparison.
        photos: that are sent together.
        small: single samples that are sent meanwhile.
        work: where the bundle is kept.
    """
    tiled = _tiled(*sides, work)
    cores = len(os.sched_getaffinity(0))
    config = EngineConfig("openvino", streams=cores, max_batch=_BATCH)
    engine = open_engine(tiled.bundle, config)
    try:
        expected = _one_by_one(engine, tiled)
        server = ChildServer(tiled.bundle.path, ServeSettings(http_port=0))
        try:
            return _measured(server, engine, tiled, expected, rounds, photos, small)
        finally:
            server.close()
    finally:
        engine.close()


def _measured(
    server: ChildServer,
    engine: Engine,
    tiled: Tiled,
    expected: NDArray[np.float32],
    rounds: int,
    photos: int,
    small: int,
) -> Part:
    grid = Grid(_TILING, tiled.bundle.manifest.signature, tiled.pixels.shape[:2])
    checks: list[Check] = []
    answer = _send_photo(server, tiled.photo)[1]
    off = float(np.abs(answer - expected).max()) / float(np.abs(expected).max())
    what = f"{grid.count} tiles of a photograph: deviation of the answer from the tiles computed one by one"
    checks.append(verdict("3.equal", what, "<= 1e-4", off, None, 1, unit="of the largest"))

    ratios, rows = [], []
    batch = _best_batch(engine, tiled)
    before_s = _ideal_s(engine, tiled, grid.count, batch)
    for number in range(_PHOTOS * rounds):
        took_s = _send_photo(server, tiled.photo)[0]
        after_s = _ideal_s(engine, tiled, grid.count, batch)
        ideal_s, before_s = (before_s + after_s) / 2, after_s
        ratios.append(took_s / ideal_s)
        rows.append((f"photograph {number + 1}", ideal_s, took_s))
        say(f"3  photograph {number + 1}: ideal {ideal_s:.2f} s, took {took_s:.2f} s")
    what = f"latency of a photograph of {grid.count} tiles over the ideal: engine alone on all streams, plus decoding"
    checks.append(judged("3.latency", what, _LIMIT, ratios))

    rate_rps = float(_SHARE * grid.count / statistics.median(ideal_s for _, ideal_s, _ in rows))
    alone, together, growths = [], [], []
    lasts_s = small / rate_rps
    for number in range(max(1, rounds // 2)):
        alone.append(_p99_ms(_small_ones(server, tiled, rate_rps, small, SEED + number)))
        before = _resident_mib(server.pid)
        with _watching(server.pid) as peak, ThreadPoolExecutor(photos + 1) as pool:
            sent = [pool.submit(_send_photo, server, tiled.photo, at) for at in _spread(photos)]
            together.append(_p99_ms(_small_ones(server, tiled, rate_rps, small, SEED + number)))
            answers = [each.result() for each in sent]
        growths.append(peak[0] - before)
        wrong = sum(float(np.abs(other - expected).max()) > 1e-4 * np.abs(expected).max() for _, other in answers)
        say(f"3  p99 of {small} small: {alone[-1]:.1f} ms alone, {together[-1]:.1f} ms beside {photos} photographs, "
            f"{wrong} wrong, {growths[-1]:.0f} MiB more")  # fmt: skip
        checks_wrong = wrong
    per = [one / other for one, other in zip(together, alone, strict=True)]
    what = f"p99 of {small} single samples beside {photos} photographs sent together, over that without them"
    note = f"at {rate_rps:.0f} requests a second for {lasts_s:.0f} s"
    checks.append(judged("3.small", what, _P99, per, why=note))
    what = f"answers to {photos} photographs sent together that differ from those to one"
    checks.append(verdict("3.together", what, "<= 0", float(checks_wrong), None, photos, unit="answers"))
    pixels = tiled.pixels.nbytes / 2**20
    what = f"memory that {photos} photographs of {pixels:.0f} MiB of pixels add to the server's, at its peak"
    checks.append(verdict("3.memory", what, f"<= {_GROWTH_MIB}", max(growths), None, len(growths), unit="MiB"))
    tables = (
        Table("Photographs cut into tiles", ("what", "ideal, s", "measured, s"), tuple(rows)),
        Table(
            "Single samples beside photographs",
            ("round", "p99 alone, ms", "p99 beside them, ms", "MiB more"),
            tuple(zip(map(str, itertools.count(1)), alone, together, growths, strict=False)),
        ),
    )
    data = {"ratios": ratios, "alone_ms": alone, "together_ms": together, "growth_mib": growths, "rate_rps": rate_rps}
    return Part(tuple(checks), tables, data)


def _spread(photos: int) -> Iterator[float]:
    """When each photograph is sent, in seconds from now: together, after the small ones have begun."""
    return itertools.repeat(0.2, photos)


def _tiled(width: int, height: int, work: Path) -> Tiled:
    path = work / "adapt" / "tiles-224"
    try:
        bundle = Bundle.open(path)
    except BundleError:
        bundle = _exported(path)
    if bundle.manifest.tiles != _TILING:
        bundle = bundle.with_tiles(_TILING)
    coarse = np.random.default_rng(SEED).integers(0, 256, (height // 40, width // 40, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    with closing(_decoder(bundle)) as decoder:
        return Tiled(bundle, file.getvalue(), decoder.whole(file.getvalue()))


def _exported(path: Path) -> Bundle:
    import torch

    from rushhour.models import article, export

    torch.manual_seed(SEED)
    network = article(input_size=SIDE, classes=CLASSES, width=0.25, dense=64)
    last = network[-1]
    assert isinstance(last, torch.nn.Linear)
    with torch.no_grad():
        last.weight.mul_(100)  # fresh weights say nearly the same of all pictures
    return export(
        network,
        name="tiles",
        task=Task.classification(tuple(f"class {index}" for index in range(CLASSES))),
        sample_spec=TensorSpec("image", "uint8", (SIDE, SIDE, 3)),
        preprocessing=Preprocessing(scale=1 / 255, layout="NHWC->NCHW"),
        source=None,
        lineage=(),
        samples=pictures(SIDE, 16),
        path=path,
    )


def _decoder(bundle: Bundle) -> Decoder:
    return Decoder(bundle.manifest.signature.inputs[0], max_pixels=_PIXELS, threads=1)


def _one_by_one(engine: Engine, tiled: Tiled) -> NDArray[np.float32]:
    """The reference: each tile in a batch of its own, then the average."""
    grid = Grid(_TILING, tiled.bundle.manifest.signature, tiled.pixels.shape[:2])
    slot, answers = engine.slots[0], []
    ended = threading.Event()
    for number in range(grid.count):
        top, left = grid.place(number)
        slot.inputs["image"][0] = tiled.pixels[top : top + SIDE, left : left + SIDE]
        ended.clear()
        slot.start(1, lambda error: ended.set())
        ended.wait()
        answers.append(slot.outputs["probabilities"][0].copy())
    average: NDArray[np.float32] = np.stack(answers).mean(axis=0, dtype=np.float64).astype(np.float32)
    return average


def _best_batch(engine: Engine, tiled: Tiled) -> int:
    """The size of batches with which the engine computes most samples a second."""
    times = time_service(engine, tiled.bundle, 5.0, 0.3)
    return times.batch_sizes[int(np.argmax(times.throughput))]


def _ideal_s(engine: Engine, tiled: Tiled, tiles: int, batch: int) -> float:
    """Seconds that the tiles take on all streams, and the decoding of the picture: measured before and after each
    photograph for as long as one takes, because the host's speed comes in waves."""
    times = keep_busy(engine.slots, batch, _ENGINE_S)[0]
    with closing(_decoder(tiled.bundle)) as decoder:
        began = time.perf_counter()
        decoder.whole(tiled.photo)
        decoding_s = time.perf_counter() - began
    return tiles * statistics.mean(times) / (batch * len(engine.slots)) + decoding_s


def _connection(server: ChildServer) -> http.client.HTTPConnection:
    host, _, port = server.url.removeprefix("http://").partition(":")
    return http.client.HTTPConnection(host, int(port), timeout=300)


def _send_photo(server: ChildServer, photo: bytes, after_s: float = 0.0) -> tuple[float, NDArray[np.float32]]:
    """Seconds to the answer, and the answer."""
    time.sleep(after_s)
    with closing(_connection(server)) as connection:
        connection.connect()
        began = time.perf_counter()
        connection.request("POST", "/v2/models/tiles/infer", photo, {"Content-Type": "image/jpeg"})
        response = connection.getresponse()
        body = response.read()
        took_s = time.perf_counter() - began
    if response.status != 200:
        raise BundleError("a photograph was not answered", body.decode(errors="replace"), "")
    return took_s, decode_answer(body, None)["probabilities"][0].astype(np.float32)


def _small_ones(server: ChildServer, tiled: Tiled, rate_rps: float, count: int, seed: int) -> list[float]:
    """Latencies of single samples from their scheduled arrival, in seconds: Poisson arrivals, open loop."""
    arrivals = np.random.default_rng(seed).exponential(1 / rate_rps, count).cumsum()
    body, headers = tiled.pixels[:SIDE, :SIDE].tobytes(), {"Inference-Header-Content-Length": "0"}
    local = threading.local()
    began = time.perf_counter() + 0.1

    def one(at: float) -> float:
        time.sleep(max(0.0, began + at - time.perf_counter()))
        if not hasattr(local, "connection"):
            local.connection = _connection(server)
        local.connection.request("POST", "/v2/models/tiles/infer", body, headers)
        response = local.connection.getresponse()
        response.read()
        return time.perf_counter() - began - at if response.status == 200 else math.inf

    with ThreadPoolExecutor(32) as pool:
        return list(pool.map(one, arrivals.tolist()))


def _p99_ms(latencies_s: Sequence[float]) -> float:
    return 1e3 * sorted(latencies_s)[math.ceil(0.99 * len(latencies_s)) - 1]


def _resident_mib(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@contextmanager
def _watching(pid: int) -> Iterator[list[float]]:
    """The largest resident memory of a process meanwhile, in MiB."""
    peak, over = [0.0], threading.Event()

    def watch() -> None:
        while not over.wait(_SAMPLED_S):
            peak[0] = max(peak[0], _resident_mib(pid))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()


class _Ended(NamedTuple):
    variant: str
    rows: int
    taken: float
    started: float
    ended: float


def timing_part(rounds: int, answers: int) -> Part:
    """Part 7b: CPU time that `Server-Timing` adds to an answer, in batches of eight.

    Args:
        rounds: of the comparison.
        answers: timed in each.
    """
    parts = (b"HTTP/1.1 200 OK\r\n", b"date: Sun, 06 Nov 1994 08:49:37 GMT\r\n", bytes(180), bytes(40))
    batch, explanation, size = _Ended("small-int8", 8, 1.001, 1.0011, 1.0042), Explanation(), 8
    heads = {"small-int8": parts[2]}

    def with_times() -> None:
        explanation.begin(batch, "3", 1.005)
        for _ in range(size):
            explanation.arrived, explanation.decoding_s = 1.0001, 0.0
            b"".join((parts[0], parts[1], explanation.field(), heads[explanation.variant], parts[3]))

    def without() -> None:
        for _ in range(size):
            b"".join((parts[0], parts[1], parts[2], parts[3]))

    added = []
    for _ in range(rounds):
        timers = (timeit.Timer(each, timer=time.process_time) for each in (with_times, without))
        both = [timer.timeit(answers // size) / answers for timer in timers]
        added.append(1e6 * (both[0] - both[1]))
    what = "CPU time that Server-Timing adds to an answer over HTTP, in batches of eight"
    check = judged("7b.timing", what, "<= 1", added, unit="µs")
    return Part((check,), (), {"added_us": added})

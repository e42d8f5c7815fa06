"""Load, from the user's side: arrivals, payloads, protocols, checks, comparisons, and what a careless hand gets."""

from __future__ import annotations

import io
import json
import math
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from in_process import answer_to
from PIL import Image
from rich.console import Console

from conftest import Server, serving
from rushhour.bundle import Bundle
from rushhour.cli.terminal import LoadView
from rushhour.errors import LoadError
from rushhour.goal import SLO
from rushhour.load import (
    Arrivals,
    Bursty,
    Endpoint,
    Generator,
    Interface,
    OpenJob,
    Status,
    Target,
    Tick,
    Trace,
    body_payloads,
    closed_loop,
    compare,
    constant,
    discover,
    endpoint,
    folder_payloads,
    judge,
    measure,
    null_throughput,
    payloads,
    poisson,
    read_arrivals,
    read_trace,
    t_quantile,
)
from rushhour.load.generator.timestamps import Timestamps
from rushhour.measurement import Measurement, Outcome
from rushhour.report import write_load_plot
from rushhour.serve import ServeSettings
from rushhour.wire import Codec
from servers import behaving

P99 = SLO.parse("p99<50ms")
GENEROUS = SLO.parse("p99<2s")


@pytest.fixture(scope="module")
def generator() -> Iterator[Generator]:
    with Generator() as running:
        yield running


@pytest.fixture(scope="module")
def both(tiny: Bundle) -> Iterator[Server]:
    """A server of HTTP and gRPC."""
    with serving(tiny.path, ServeSettings(http_port=0, grpc_port=0)) as running:
        yield running


def job(target: Endpoint, requests: list[bytes], *, rate: float = 400.0, n: int = 300, **changes: Any) -> OpenJob:
    settings: dict[str, Any] = {
        "host": target.host,
        "port": target.port,
        "protocol": target.protocol,
        "requests": tuple(requests),
        "limit_s": 0.05,
        "timeout_s": 5.0,
        "outputs": target.outputs,
        "schedule": poisson(rate, n=n, seed=3).tobytes(),
    }
    return OpenJob(**(settings | changes))


# -- arrivals

BURSTY = Bursty(intensity=10, share=0.1, burst_s=0.5)
TRACE = Trace("a trace", np.random.default_rng(5).exponential(2.0, 700))


@pytest.mark.parametrize("arrivals", [poisson, constant, BURSTY, TRACE], ids=["poisson", "constant", "bursty", "trace"])
def test_every_process_keeps_its_rate_and_its_seed(arrivals: Arrivals) -> None:
    schedule = arrivals(100, n=40_000, seed=7)
    assert len(schedule) == 40_000
    assert schedule[0] >= 0
    assert (np.diff(schedule) >= 0).all()
    assert len(schedule) / schedule[-1] == pytest.approx(100, rel=0.15)
    assert np.array_equal(schedule, arrivals(100, n=40_000, seed=7))
    assert np.allclose(schedule[:30_000], arrivals(100, n=30_000, seed=7))
    assert np.allclose(arrivals(200, n=40_000, seed=7)[-1], schedule[-1] / 2, rtol=0.15)
    within = arrivals(100, duration_s=30, seed=7)
    assert within[-1] <= 30
    assert len(within) == pytest.approx(3000, rel=0.5)


def test_a_burst_is_one() -> None:
    """Counts of 100 ms: as spread as their mean for Poisson, far more for bursts, not at all for clockwork."""

    def dispersion(schedule: np.ndarray[Any, Any]) -> float:
        counts = np.bincount((schedule / 0.1).astype(int))[:-1]
        return float(counts.var() / counts.mean())

    assert dispersion(constant(205, n=40_000, seed=1)) < 0.1
    assert dispersion(poisson(205, n=40_000, seed=1)) == pytest.approx(1, rel=0.2)
    assert dispersion(BURSTY(205, n=40_000, seed=1)) > 5
    assert not np.array_equal(BURSTY(205, n=50, seed=1), BURSTY(205, n=50, seed=2))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "# recorded\n10\n10.5\n\n13\n11\n"),
        ("a.csv", "id,timestamp,size\n1,10,3\n2,10.5,3\n3,13,3\n4,11,4\n"),
        ("b.csv", "when\n10\n10.5\n13\n11\n"),
        ("a.jsonl", '{"t": 10}\n{"t": 10.5}\n{"t": 13, "path": "/"}\n11\n'),
        ("c.csv", "2026-01-01T00:00:10\n2026-01-01T00:00:10.500\n2026-01-01T00:00:13\n2026-01-01T00:00:11\n"),
    ],
)
def test_a_trace_is_read_and_scaled(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    trace = read_arrivals(str(tmp_path / name))
    assert isinstance(trace, Trace)
    assert trace.gaps.tolist() == [1.0, 0.5, 0.5, 2.0]
    assert trace.rate_rps == 1.0
    assert trace(1.0, n=4, seed=9).tolist() == [1.0, 1.5, 2.0, 4.0]
    assert trace(2.0, n=6, seed=9).tolist() == [0.5, 0.75, 1.0, 2.0, 2.5, 2.75]  # from the beginning again
    assert len({tuple(trace(1.0, n=2, seed=seed)) for seed in range(20)}) > 1


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("none.csv", None, "No such file"),
        ("empty.txt", "", "0 arrivals"),
        ("one.txt", "5\n", "1 arrivals"),
        ("same.txt", "5\n5\n", "different times"),
        ("words.txt", "5\nsoon\n", "line 2 holds no time: 'soon'"),
        ("nan.txt", "5\nnan\n", "line 2 holds no time"),
        ("nan first.txt", "nan\n5\n6\n", "line 1 holds no time"),
        ("inf first.csv", "inf,a\n5,b\n6,c\n", "line 1 holds no time"),
        ("long.csv", "x" * 200_000, "field larger"),
        ("deep.jsonl", '{"t":' * 50_000, "line 1 is not JSON"),
        ("short.csv", "id,timestamp\n1,5\n2\n", "line 3 holds no time"),
        ("not.jsonl", '{"t": 1}\n{t}\n', "line 2 is not JSON"),
        ("other.jsonl", '{"t": 1}\n{"x": 1}\n', "line 2 holds no time"),
        ("binary.csv", b"\xff\xfe\x00\x81", "not text"),
    ],
)
def test_a_bad_trace_is_one_line(name: str, content: str | bytes | None, says: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(LoadError, match=says) as caught:
        read_trace(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["sometimes", "bursty:intensity", "bursty:share=2", "bursty:speed=3", "bursty:burst_s=nan"]
)
def test_arrivals_that_do_not_exist_are_refused(text: str) -> None:
    with pytest.raises(LoadError, match=r"poisson|bursty"):
        read_arrivals(text)


def test_arrivals_are_named_as_they_are_written() -> None:
    assert read_arrivals("bursty:intensity=10,share=0.1,burst_s=0.5") == BURSTY
    assert read_arrivals(str(BURSTY)) == BURSTY
    assert read_arrivals("constant") is constant


@pytest.mark.parametrize("rate", [math.nan, math.inf, -1.0, 0.0])
def test_a_rate_that_is_none_is_refused(generator: Generator, rate: float) -> None:
    with pytest.raises(LoadError, match="a rate is above zero"):
        measure(generator, endpoint("http://127.0.0.1:1"), [b"x"], P99, rate_rps=rate, seed=0)


def test_a_schedule_beyond_memory_is_refused() -> None:
    with pytest.raises(LoadError, match="cannot schedule"):
        poisson(1e9, duration_s=3600, seed=0)


# -- payloads


def _split(request: bytes) -> tuple[str, dict[str, str], bytes]:
    head, body = request.split(b"\r\n\r\n", 1)
    first, *rest = head.decode().split("\r\n")
    return first, dict(line.split(": ", 1) for line in rest), body


def test_files_of_a_folder_become_requests(tiny: Bundle, tmp_path: Path) -> None:
    signature = tiny.manifest.signature
    target = Target("http://h:1", "h", 1, "", "m", Interface.of(signature))
    name, sample = signature.inputs[0].name, tiny.samples()[signature.inputs[0].name][0]
    np.save(tmp_path / "a.npy", sample)
    np.savez(tmp_path / "b.npz", **{name: np.stack([sample, sample])})
    Image.fromarray(sample[..., 0]).save(tmp_path / "c.png")
    (tmp_path / "d.bin").write_bytes(sample.tobytes())
    (tmp_path / "e.json").write_text('{"inputs": []}')
    (tmp_path / "notes.md").write_text("not a payload")
    requests = [_split(request) for request in folder_payloads(target, tmp_path)]
    codec = Codec("m", signature)
    decoded = [codec.decode(body, int(fields["Inference-Header-Content-Length"])) for _, fields, body in requests[:4]]
    assert [request.rows for request in decoded] == [1, 2, 1, 1]
    assert all(bytes(request.tensors[0])[: sample.nbytes] == sample.tobytes() for request in decoded)
    assert requests[4][1]["Content-Type"] == "application/json"
    assert requests[4][2] == b'{"inputs": []}'
    assert len(requests) == 5


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        (None, b"", "holds no payload"),
        ("a.npy", b"nothing", "cannot send .*a.npy"),
        ("a.png", b"nothing", "cannot send .*a.png"),
        ("a.npy", np.zeros((9, 9), np.uint8), "takes uint8 of shape"),
        ("a.npy", np.zeros((4, 4, 1), np.float32), "takes uint8 of shape"),
    ],
)
def test_a_folder_that_cannot_be_sent_is_one_line(
    name: str | None, content: Any, says: str, tiny: Bundle, tmp_path: Path
) -> None:
    if isinstance(content, np.ndarray):
        np.save(tmp_path / str(name), content)
    elif name is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(LoadError, match=says) as caught:
        folder_payloads(Target("http://h:1", "h", 1, "", "m", Interface.of(tiny.manifest.signature)), tmp_path)
    assert "\n" not in str(caught.value)


def test_any_endpoint_gets_the_body_as_it_is() -> None:
    at = endpoint("http://[::1]:80/api")
    (request,) = body_payloads(at, [("image/png", b"body")], method="PUT", path="/x?y=1", headers=["Accept: */*"])
    assert request == (
        b"PUT /api/x?y=1 HTTP/1.1\r\nHost: [::1]:80\r\nContent-Type: image/png\r\nAccept: */*\r\n"
        b"Content-Length: 4\r\n\r\nbody"
    )
    (request,) = body_payloads(endpoint("http://h:1"), [], method="GET")
    assert request == b"GET / HTTP/1.1\r\nHost: h:1\r\n\r\n"
    (request,) = body_payloads(at, [("image/png", b"")], headers=["content-type: a/b", "HOST: other"])
    assert b"image/png" not in request
    assert request.count(b"other") == 1
    assert b"[::1]" not in request


@pytest.mark.parametrize(
    "wrong",
    [
        {"headers": ["no colon"]},
        {"headers": ["a: b\r\nInjected: c"]},
        {"headers": ["Content-Length: 7"]},
        {"method": "GET / HTTP/1.1\r\n"},
        {"method": "HEAD"},
        {"path": "/a b"},
        {"path": "no-slash"},
    ],
)
def test_what_is_not_http_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(LoadError, match="cannot use the"):
        body_payloads(endpoint("http://h:1"), [], **wrong)


# -- protocols


@pytest.mark.parametrize("way", ["binary", "json", "grpc"])
def test_every_protocol_is_answered_and_checked(way: Any, generator: Generator, both: Server, tiny: Bundle) -> None:
    target = discover(f"grpc://{both.grpc}" if way == "grpc" else both.url)
    assert target.interface == Interface.of(tiny.manifest.signature)
    requests = payloads(target, tiny.samples(), encoding="json" if way == "json" else "binary")
    run = generator.run(job(target, requests, check=True))
    assert run.count(Status.OK) == 300, run.first_error
    assert (run.sent >= run.taken).all()
    assert (run.done >= run.sent).all()
    assert run.error_kinds == {}
    closed = closed_loop(generator, target, requests, concurrency=3, duration_s=0.4, check=True)
    assert (closed.errors, closed.shed) == (0, 0)
    assert closed.throughput_rps > 10


def test_grpc_errors_are_told_apart(generator: Generator, tiny: Bundle) -> None:
    with serving(tiny.path, ServeSettings(http_port=0, grpc_port=0)) as server:
        target = discover(f"grpc://{server.grpc}")
        with pytest.raises(LoadError, match=r"no model 'other'.*the server has"):
            discover(target.url, "other")
        wrong = payloads(Target(target.url, target.host, target.port, "", "other", target.interface))
        with pytest.raises(LoadError, match="rejects the request with status 404"):
            generator.run(job(target, wrong))
        right = payloads(target, tiny.samples())
        threading.Timer(0.5, server.process.kill).start()
        run = generator.run(job(target, right, rate=300, n=400, timeout_s=1.0))
        assert 0 < run.count(Status.OK) < 400
        assert run.count(Status.OK) + run.count(Status.LOST) == 400
        assert sum(run.error_kinds.values()) == run.count(Status.LOST)
    with pytest.raises(LoadError, match="cannot reach grpc://"):
        discover(target.url)
    with pytest.raises(LoadError, match="cannot connect to"):
        generator.run(job(target, right, timeout_s=1.0))


def test_the_null_server_speaks_grpc_too(generator: Generator, both: Server, tiny: Bundle) -> None:
    """It spoke HTTP alone: of a gRPC server every window was `generator_limited`, with 0 requests/s out of nothing."""
    target = discover(f"grpc://{both.grpc}")
    requests = payloads(target, tiny.samples())
    assert null_throughput(generator, requests, "grpc") > 50
    assert null_throughput(generator, [bytes(3_000_000)], "grpc") > 1, "of many frames, and through many windows"
    window = measure(generator, target, requests, GENEROUS, rate_rps=200, seed=1, n=320, warmup_s=0.2)
    assert window.outcome in (Outcome.PASS, Outcome.VOID), window.reason


def test_any_endpoint_can_be_loaded(generator: Generator) -> None:
    with behaving() as url:
        at = endpoint(url)
        requests = body_payloads(at, [], method="GET", path="/v2/models/tiny")
        run = generator.run(job(at, requests, check=True))
    assert run.count(Status.OK) == 300, run.first_error


def test_answers_and_requests_of_any_size_go_through(generator: Generator) -> None:
    with behaving(large=3_000_000) as url:
        at = endpoint(url)
        (down,) = body_payloads(at, [], method="GET", path="/large")
        run = generator.run(job(at, [down], rate=100, n=40, check=True))
        assert run.count(Status.OK) == 40, run.first_error
        (up,) = body_payloads(at, [("application/octet-stream", bytes(5_000_000))], path="/large")
        run = generator.run(job(at, [up], rate=50, n=20))
        assert run.count(Status.OK) == 20, run.first_error


def test_an_answer_that_nobody_waited_for_is_timed_by_its_arrival(generator: Generator) -> None:
    """At 20 requests a second answers lie unread until the next is due: that is no latency."""
    with behaving(service_s=0.001) as url:
        target = discover(url)
        schedule = constant(20, n=30, seed=1).tobytes()
        run = generator.run(job(target, payloads(target), schedule=schedule))
    assert run.count(Status.OK) == 30, run.first_error
    assert np.median(run.latencies()) < 0.025


def test_a_server_that_hangs_up_without_a_word_gets_no_request_into_the_closed_door(generator: Generator) -> None:
    with behaving(hang_up=True) as url:
        target = discover(url)
        run = generator.run(job(target, payloads(target), rate=100, n=100))
    assert run.count(Status.OK) >= 90, run.first_error
    assert run.count(Status.OK) + run.error_kinds.get("closed", 0) == 100


class Clocks:
    """The time of day and the monotonic clock, as somebody sets them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.day, self.monotonic = 1_000_000.0, 500.0
        monkeypatch.setattr("rushhour.load.generator.timestamps.time", lambda: self.day)
        monkeypatch.setattr("rushhour.load.generator.timestamps.monotonic", lambda: self.monotonic)

    def advance(self, seconds: float) -> None:
        self.day += seconds
        self.monotonic += seconds

    def note(self) -> list[tuple[int, int, bytes]]:
        nanoseconds = round(self.day * 1e9)
        return [(socket.SOL_SOCKET, 35, struct.pack("@ll", *divmod(nanoseconds, 10**9)))]


def test_the_kernel_s_note_is_read_on_the_monotonic_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = Clocks(monkeypatch)
    stamps = Timestamps()
    assert not stamps.available
    clocks.advance(1.25)
    note = clocks.note()
    clocks.advance(0.04)
    stamps.refresh()
    assert stamps.arrival(note) == pytest.approx(501.25, abs=1e-6)
    assert stamps.available
    assert stamps.arrival([]) == clocks.monotonic  # nobody noted anything: it is read as soon as it comes from here on
    assert not stamps.available


@pytest.mark.parametrize("step", [-3600.0, -0.01, 0.01, 3600.0])
def test_no_answer_is_early_because_the_clock_was_set(step: float, monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = Clocks(monkeypatch)
    stamps = Timestamps()
    note = clocks.note()
    clocks.day += step
    clocks.advance(0.002)
    stamps.refresh()
    assert stamps.arrival(note) == clocks.monotonic
    assert stamps.available
    later = clocks.note()
    clocks.advance(0.005)
    stamps.refresh()
    assert stamps.arrival(later) == pytest.approx(clocks.monotonic - 0.005, abs=1e-6)


# -- checked answers


def test_an_answer_that_changes_is_a_mismatch(generator: Generator) -> None:
    with behaving(change_from=101, change_by=0.2) as url:
        target = discover(url)
        run = generator.run(job(target, payloads(target), check=True))
    assert run.count(Status.OK) == 100
    assert run.error_kinds == {"mismatch": 200}
    assert run.first_error == "an answer is not the one expected"


def test_another_order_of_sums_is_no_mismatch(generator: Generator) -> None:
    with behaving(change_from=101, change_by=0.004) as url:
        target = discover(url)
        assert generator.run(job(target, payloads(target), check=True)).count(Status.OK) == 300
    with behaving(change_from=101, change_by=0.004) as url:
        target = discover(url)
        strict = generator.run(job(target, payloads(target), check=True, tolerance=0.001))
        assert strict.error_kinds == {"mismatch": 200}


# -- ended early


def test_a_stop_keeps_what_was_measured() -> None:
    with behaving(service_s=0.001) as url, Generator() as generator:
        target = discover(url)
        long = job(target, payloads(target), rate=100, n=60_000, warmup=10)
        generator.run(job(target, payloads(target), n=5))  # it is there now
        threading.Timer(1.0, generator.stop).start()
        run = generator.run(long)
        assert 20 < len(run) < 2000
        assert (run.status == Status.OK).all()
        later = generator.run(job(target, payloads(target), rate=1000, n=30_000))
    assert len(later) < 20_000, "whatever is asked after it ends at once"


def test_a_stop_before_anything_was_measured_is_said() -> None:
    with behaving() as url, Generator() as generator:
        target = discover(url)
        threading.Timer(0.5, generator.stop).start()
        with pytest.raises(LoadError, match="stopped before anything was measured"):
            generator.run(job(target, payloads(target), rate=50, n=60_000, warmup=59_000))


def test_who_never_answers_does_not_hold_up_a_stop() -> None:
    with behaving(hang_from=20) as url, Generator() as generator:
        target = discover(url)
        generator.run(job(target, payloads(target), n=5))  # it is there now
        threading.Timer(0.5, generator.stop).start()
        began = time.monotonic()
        run = generator.run(job(target, payloads(target), rate=200, n=60_000, timeout_s=60.0))
        assert time.monotonic() - began < 30
    assert run.count(Status.LOST) > 10
    assert run.error_kinds == {"stopped": run.count(Status.LOST)}


# -- servers compared


class Servers:
    """Two servers in a weather that changes from block to block; b takes 1.2 times as long as a."""

    def __init__(self, void_at: tuple[int, ...] = (), seed: int = 1) -> None:
        self.asked: list[tuple[str, int]] = []
        self.void_at = void_at
        self.random = np.random.default_rng(seed)

    def __call__(self, server: str, rate: float, seed: int) -> Measurement:
        self.asked.append((server, seed))
        weather = 1 + seed % 7
        ms = 10 * weather * {"a": 1.0, "b": 1.2, "c": 1.0}[server] * float(np.exp(self.random.normal(0, 0.02)))
        void = len(self.asked) in self.void_at
        return Measurement(
            P99, rate, seed, 1.0, 1000, 0, 0, 0, ms / 2, ms, (ms, ms), 1.0, 0.1, 0.1,
            Outcome.VOID if void else Outcome.PASS, "", "",
        )  # fmt: skip


def test_a_difference_shows_through_the_weather() -> None:
    servers = Servers()
    found = compare(servers, ["a", "b", "c"], P99, rates=[100.0], blocks=8)
    p99 = {ratio.server: ratio for ratio in found.ratios if ratio.metric == "p99_ms"}
    assert p99["b"].differs
    assert p99["b"].ratio == pytest.approx(1.2, rel=0.05)
    assert p99["c"].pairs == 8
    order = [server for server, _ in servers.asked[:6]]
    assert order == ["a", "b", "c", "c", "b", "a"]
    seeds = [seed for _, seed in servers.asked]
    assert seeds == [seeds[3 * block] for block in range(8) for _ in range(3)]
    assert len(set(seeds)) == 8


def test_the_interval_holds_what_it_promises() -> None:
    covered = []
    for seed in range(300):
        found = compare(Servers(seed=seed), ["a", "b"], P99, rates=[100.0], blocks=4)
        (interval,) = [ratio.interval for ratio in found.ratios if ratio.metric == "p99_ms"]
        assert interval is not None
        covered.append(interval[0] < 1.2 < interval[1])
    assert 0.92 <= np.mean(covered) <= 0.98


def test_a_disturbed_block_is_asked_again_and_not_counted() -> None:
    found = compare(Servers(void_at=(2,)), ["a", "b"], P99, rates=[100.0], blocks=4)
    assert found.retries == 1
    assert [window.counted for window in found.windows] == [False, False, *[True] * 8]
    assert {ratio.pairs for ratio in found.ratios} == {4}
    always = compare(Servers(void_at=tuple(range(100))), ["a", "b"], P99, rates=[100.0], blocks=4)
    assert always.retries == 3
    assert {(ratio.ratio, ratio.interval, ratio.pairs) for ratio in always.ratios} == {(None, None, 0)}


@pytest.mark.parametrize("servers", [[], ["a"], ["a", "a"]])
def test_nothing_to_compare_is_refused(servers: list[str]) -> None:
    with pytest.raises(LoadError, match="two or more different servers"):
        compare(Servers(), servers, P99, rates=[1.0])


@pytest.mark.parametrize(("freedom", "value"), [(1, 12.7062), (2, 4.3027), (5, 2.5706), (30, 2.0423)])
def test_the_t_distribution_is_student_s(freedom: int, value: float) -> None:
    assert t_quantile(0.975, freedom) == pytest.approx(value, abs=1e-4)


# -- what a person sees


TICKS = [
    Tick(at_s=1.0, sent=100, ended=90, late=1, shed=0, errors=0, p50_ms=3.0, p99_ms=20.0),
    Tick(at_s=2.0, sent=600, ended=550, late=9, shed=20, errors=7, p50_ms=4.0, p99_ms=61.0),
]


def test_the_live_view_shows_the_figures() -> None:
    drawn = io.StringIO()
    view = LoadView(P99, Console(file=drawn, force_terminal=True, width=120))
    view.start("500 requests/s", 10.0)
    view.add(Servers()("a", 250.0, 1))
    for tick in TICKS:
        view.tick(tick)
    view.fail()
    text = drawn.getvalue()
    for figure in ("500 requests/s", "433", "61.0 of 50", "p50 ms", "in flight", "50", "20", "7", "250/s", "pass"):
        assert figure in text


def test_without_a_terminal_there_are_plain_lines() -> None:
    written = io.StringIO()
    view = LoadView(P99, Console(file=written, width=60))
    view.start("500 requests/s", 10.0)
    for tick in (*TICKS, Tick(7.0, 3100, 3000, 9, 20, 7, 4.0, 9.0)):
        view.tick(tick)
    view.done("pass: all is well")
    view.fail()
    lines = written.getvalue().splitlines()
    assert lines[0] == "500 requests/s ..."
    assert lines[1].startswith("  7 s: offered/s 500, answered/s 490, p50 ms 4.0, p99 ms 9.0 of 50, in flight 100")
    assert lines[2:] == ["  pass: all is well"]
    assert "\x1b" not in written.getvalue()


def test_a_plot_is_one_file(tmp_path: Path) -> None:
    ask = Servers()
    windows = [ask("a", 100.0 * (1 + step), step) for step in range(4)]
    write_load_plot(tmp_path / "load.png", "a <server>", windows, P99, "100 requests/s")
    with Image.open(tmp_path / "load.png") as image:
        assert image.format == "PNG"
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 24) or ()}
    assert {(255, 255, 255), (0, 0x67, 0xA6)} <= colours
    write_load_plot(tmp_path / "load.html", "a <server>", windows, P99, "100 requests/s")
    page = (tmp_path / "load.html").read_text()
    assert page.count("<svg") == 2, "drawn for a desk and for a phone; the style sheet shows one"
    assert "var(--plan)" in page
    assert "a &lt;server&gt;" in page
    assert "<script" not in page
    assert page.count("<tr>") == 5
    with pytest.raises(LoadError, match=r"plots are \.html or \.png"):
        write_load_plot(tmp_path / "load.jpg", "a", windows, P99, "")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["load.html", "load.png"]


# -- the command line


def rushhour(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "rushhour", *map(str, arguments)], capture_output=True, text=True, timeout=120
    )


def test_bad_options_are_one_line_each(server: Server, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.csv").write_text("1\nsoon\n")
    np.save(tmp_path / "wrong.npy", np.zeros((3, 3), np.uint8))
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    (tmp_path / "wrong.npy").rename(wrong / "wrong.npy")
    cases: list[tuple[list[str | Path], str]] = [
        (["--rate", "nan"], "a rate is a number above zero"),
        (["--rate", "10", "--duration", "-5s"], "duration"),
        (["--rate", "10", "--arrivals", tmp_path / "bad.csv"], "line 2 holds no time"),
        (["--rate", "10", "--payloads", tmp_path / "empty"], "holds no payload"),
        (["--rate", "10", "--payloads", wrong], "takes uint8 of shape"),
        (["--rate", "recorded"], "not a trace"),
        (["--rate", "10", "--body", tmp_path / "none.bin"], "none.bin"),
        (["--rate", "10", "--plot", "load.gif"], ".png"),
        (["--rate", "10", "--closed-loop", "2"], "closed loop"),
    ]
    for arguments, says in cases:
        done = answer_to("load", server.url, *arguments)
        assert done.returncode == 2, (arguments, done.stderr)
        line = done.stderr.strip().splitlines()[-1]
        assert line.startswith("rushhour: ")
        assert says in line
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("behaviour", "says"), [({"garbage_from": 1}, "not an answer"), ({"reject": True}, "status 400: shape")]
)
def test_a_server_that_makes_no_sense_is_one_line(behaviour: dict[str, Any], says: str) -> None:
    with behaving(**behaviour) as url:
        done = rushhour("load", url, "--rate", "100", "--duration", "1s")
    assert done.returncode == 2
    assert says in done.stderr.strip().splitlines()[-1]


@pytest.mark.slow
def test_a_server_that_goes_away_leaves_the_windows_before(tmp_path: Path) -> None:
    file, plot = tmp_path / "load.json", tmp_path / "load.html"
    with behaving(close_from=2600) as url:  # enough for a first window that is disturbed and asked again
        rates = [argument for _ in range(5) for argument in ("--rate", "300")]
        done = rushhour("load", url, "--slo", "p50<50ms", *rates, "--duration", "1s", "--json", file, "--plot", plot)
    assert done.returncode == 2
    assert "cannot connect to" in done.stderr.strip().splitlines()[-1]
    result = json.loads(file.read_text())
    assert result["partial"] is True
    assert "cannot connect" in result["stopped"]
    *before, last = result["runs"]
    assert before
    assert not any(run["errors"] for run in before)
    assert set(last["error_kinds"]) & {"closed", "refused"}
    assert plot.exists()


def test_ctrl_c_keeps_what_was_measured(tmp_path: Path) -> None:
    file = tmp_path / "load.json"
    with behaving() as url:
        command = [sys.executable, "-m", "rushhour", "load", url, "--rate", "200", "--duration", "10m", "--json", file]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stderr is not None
        for line in process.stderr:
            if "offered/s" in line:
                break
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "Traceback" not in error
    result = json.loads(file.read_text())
    assert (result["partial"], result["stopped"]) == (True, "stopped by Ctrl-C")
    assert 200 < result["n"] < 60_000
    assert result["runs"][0]["reason"].startswith("stopped early")
    assert "partial" in out


def test_a_window_that_is_stopped_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the machine was disturbed: else Ctrl-C would only begin another one."""

    def disturbed(*given: Any, **named: Any) -> Measurement:
        return msgspec.structs.replace(judge(*given, **named), outcome=Outcome.VOID)

    monkeypatch.setattr("rushhour.load.window.judge", disturbed)
    with behaving() as url:
        target = discover(url)
        asked = {"rate_rps": 200, "seed": 1, "window_s": 600.0, "retries": 3}
        with Generator() as generator:

            def tell(tick: Tick) -> None:
                if tick.at_s > 3:
                    generator.stop()

            window = measure(generator, target, payloads(target), SLO.parse("p99<50ms"), **asked, on_tick=tell)
            assert window.retries == 0
            assert window.n < 2_000
            with pytest.raises(LoadError, match="stopped before anything was measured"):
                measure(generator, target, payloads(target), SLO.parse("p99<50ms"), **asked)


@pytest.mark.slow
def test_a_comparison_for_people_and_machines(tmp_path: Path) -> None:
    file = tmp_path / "compare.json"
    options = ["--slo", "p50<50ms", "--rate", "400", "--window", "1s", "--blocks", "2", "--json", str(file)]
    with behaving() as quick, behaving(service_s=0.0001) as slow:
        done = rushhour("compare", quick, slow, *options)
    assert done.returncode in (0, 1), done.stderr
    result = json.loads(file.read_text())
    assert result["servers"] == [quick, slow]
    assert {ratio["metric"] for ratio in result["ratios"]} == {"p50_ms", "p99_ms", "answered_rps"}
    first, second = result["windows"][:2]
    assert first["measurement"]["seed"] == second["measurement"]["seed"]
    assert [window["server"] for window in result["windows"][:2]] == [quick, slow]
    assert "Against" in done.stdout


def test_a_closed_loop_gives_no_verdict(server: Server, tmp_path: Path) -> None:
    file = tmp_path / "closed.json"
    done = rushhour("load", server.url, "--closed-loop", "2", "--duration", "1s", "--json", file)
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text())
    assert result["loop"] == "closed"
    assert "outcome" not in result
    assert result["result"]["concurrency"] == 2

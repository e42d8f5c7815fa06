"""Parts 1 and 2: replicas of `rushhour deploy`: what two carry, what each way to them costs, what a failure loses."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
import numpy as np

from bench.closed_loop import Answered, Load, run
from bench.contestants import Setup, request_for, start_peer
from bench.models import ModelName, bundle_of, pictures
from bench.parts import Part, say
from bench.rays import Ray, ray_on
from bench.record import Check, Table, verdict
from bench.servers import free_port, running
from bench.wire import Request, protocol_request
from rushhour.bundle import Bundle
from rushhour.goal import SLO, Goal
from rushhour.plan import PLAN, Plan, Policy, Variant
from rushhour.system.machine import cores

_LIMIT = SLO.parse("p99<50ms")
_NAME = "crowd"
_USERS, _FEW = 16, 1
_WARMUP_S = 2.0
_PEERS = {"rayserve": "proxy", "rayserve.direct": "direct", "rayserve.haproxy": "haproxy"}
_CALM_S, _BACK_S, _LOOK_S = 3.0, 120.0, 0.2
_THREADS, _PAUSE_S = 4, 0.03
_MOST = 4
"""Replicas that a flood makes of one."""


class Way(msgspec.Struct, frozen=True):
    """Requests by one way to one replica, which shares a core with all of Ray; the generator has the other core.

    Attributes:
        server: ours, or Ray Serve's own `@serve.batch`.
        way: `direct`, Ray's `proxy`, or its `haproxy`.
        rps: answers per second to 16 users.
        p50_ms: of one user.
        cpu_ms: CPU time per request of all processes but the generator; None of a peer.
        generator_cpu: cores, with 16 users.
        errors: answers that were none.
    """

    server: str
    way: str
    rps: float
    p50_ms: float
    cpu_ms: float | None
    generator_cpu: float
    errors: int


class Event(msgspec.Struct, frozen=True):
    """What happened to requests while something happened to replicas.

    Attributes:
        what: happened.
        sent: requests, each to a replica directly.
        lost: that got no answer at the first try.
        lost_elsewhere: tries without an answer at replicas that were not killed.
        lost_twice: requests that got none at a second try either, at another address.
        back_s: until the replicas were as many as there is room for, all ready, and clients are told of no others.
    """

    what: str
    sent: int
    lost: int
    lost_elsewhere: int
    lost_twice: int
    back_s: float


def replicas(rounds: int, seconds: float, work: Path, models: Path) -> Part:
    """Part 1.

    Args:
        rounds: of one replica and two, one after the other.
        seconds: of each load.
        work: where runs are written.
        models: where networks are kept.
    """
    ones, twos, generator = _scaled(rounds, seconds, work, models)
    ratios = [two / one for one, two in zip(ones, twos, strict=True)]
    ways = _ways(seconds, work, models)
    ours = next(way for way in ways if (way.server, way.way) == ("rushhour", "direct"))
    theirs = next((way for way in ways if (way.server, way.way) == ("@serve.batch", "proxy")), None)
    checks: list[Check] = [
        verdict(
            "1.scale",
            "answers per second of two replicas on a core each over those of one, users waiting for answers within "
            f"{_LIMIT}; the generator shares their cores",
            ">= 1.85",
            float(np.median(ratios)),
            None,
            rounds,
            unit="x",
            why=f"the generator used {generator:.2f} cores with two replicas",
        ),
        verdict(
            "1.batch",
            "a replica reached directly over Ray Serve's @serve.batch behind its proxy: answers per second of one core",
            ">= 5",
            None if theirs is None else ours.rps / theirs.rps,
            None,
            1,
            unit="x",
        ),
    ]
    columns = ("server", "way", "1/s, 16 users", "p50 of one user, ms", "beyond direct, ms", "CPU per request, ms")
    rows = tuple((w.server, w.way, w.rps, w.p50_ms, w.p50_ms - _direct(ways, w), w.cpu_ms) for w in ways)
    measured = {"one_rps": ones, "two_rps": twos, "generator_cpu": generator, "ways": ways}
    return Part(tuple(checks), (Table("Ways to a replica on Ray", columns, rows),), measured)


def failures(work: Path, models: Path) -> Part:
    """Part 2: each thing that may happen to replicas, once, under load.

    Args:
        work: where runs are written.
        models: where networks are kept.
    """
    first = _run_of(work / "first", "cnn", models, max_batch=8)
    second = _run_of(work / "second", "cnn", models, max_batch=4)
    events = [*_on_one_node(first, second), _node_lost(first), *_scaling(work, models)]
    for event in events:
        lost = f"{event.lost} of {event.sent} lost, {event.lost_elsewhere} elsewhere, {event.lost_twice} twice"
        say(f"2  {event.what}: {lost}, {event.back_s:.1f} s")
    checks = []
    for event in events:
        killed = event.what.startswith("kill")
        checks.append(
            verdict(
                f"2.{event.what.replace(' ', '.')}",
                f"requests without an answer{' at replicas that were not killed' if killed else ''}: {event.what}",
                "<= 0",
                float(event.lost_elsewhere if killed else event.lost),
                None,
                event.sent,
                unit="requests",
                why=f"{event.lost} without an answer at the first try, {event.lost_twice} at two",
            )
        )
        checks.append(
            verdict(
                f"2.{event.what.replace(' ', '.')}.back",
                f"seconds until the replicas are as many as they should be: {event.what}",
                f"< {_BACK_S:g}",
                event.back_s,
                None,
                1,
                unit="s",
            )
        )
    rows = tuple(
        (e.what, float(e.sent), float(e.lost), float(e.lost_elsewhere), float(e.lost_twice), e.back_s) for e in events
    )
    columns = ("what", "requests", "lost", "lost elsewhere", "lost twice", "s until as before")
    return Part(tuple(checks), (Table("Failures and updates of replicas", columns, rows),), {"events": events})


# -- part 1


def _scaled(rounds: int, seconds: float, work: Path, models: Path) -> tuple[list[float], list[float], float]:
    """Answers per second of one replica and of two, and the generator's cores beside two."""
    path = _run_of(work / "scaled", "cnn64", models, max_batch=8)
    bundle = Bundle.open(path / "bundles" / "served")
    ones: list[float] = []
    twos: list[float] = []
    used = 0.0
    everywhere = frozenset(os.sched_getaffinity(0))
    with ray_on(everywhere, max(2, cores())) as ray:
        found = ray.deploy(str(path), "--name", _NAME, "--replicas", "2", "--no-grpc", "--proxy-port", str(free_port()))
        urls = [each["http"] for each in found["replicas"]]
        for number in range(rounds):
            for count in (1, 2) if number % 2 == 0 else (2, 1):
                answered = _together(urls[:count], bundle, seconds, work, everywhere)
                rps = sum(each.rps for each in answered)
                (ones if count == 1 else twos).append(rps)
                cpu = sum(each.generator_cpu for each in answered)
                used = max(used, cpu) if count == 2 else used
                late = max(each.p99_ms for each in answered)
                say(f"1  {count} replicas: {rps:.0f}/s, p99 {late:.1f} ms, generator {cpu:.2f} cores")
    return ones, twos, used


def _together(urls: list[str], bundle: Bundle, seconds: float, work: Path, on: frozenset[int]) -> list[Answered]:
    """A load for each address, at the same time."""
    request = _request(bundle)
    folders = [work / f"load-{number}" for number in range(len(urls))]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)

    def load(url: str, folder: Path) -> Answered:
        port = urlsplit(url).port
        assert port is not None
        run(port, request, Load(_USERS // 4, on), _WARMUP_S, folder)
        return run(port, request, Load(_USERS // 4, on), seconds, folder)

    with ThreadPoolExecutor(len(urls)) as pool:
        return list(pool.map(load, urls, folders))


def _ways(seconds: float, work: Path, models: Path) -> list[Way]:
    """Each way to one replica, of ours and of Ray Serve's own; all of Ray and the replica have one core."""
    available = sorted(os.sched_getaffinity(0))
    server, sender = frozenset(available[:1]), frozenset(available[-1:])
    bundle = bundle_of("cnn", models)
    path = _run_of(work / "ways", "cnn", models, max_batch=32)
    found = []
    for through in ("proxy", "haproxy"):
        with ray_on(server, 1, haproxy=through == "haproxy") as ray:
            state = ray.deploy(str(path), "--name", _NAME, "--no-grpc", "--proxy-port", str(free_port()))
            addresses = {"direct": state["replicas"][0]["http"], through: state["proxy"]}
            for way, url in addresses.items():
                if way != "direct" or through == "proxy":
                    found.append(_way(ray, "rushhour", way, url, _request(bundle), seconds, sender, work))
    setup = Setup("cnn", bundle, "f32", server, 1, 32)
    for peer, way in _PEERS.items():
        with tempfile.TemporaryDirectory(prefix="b", dir="/tmp", ignore_cleanup_errors=True) as name:  # for its sockets
            found.append(_peer(peer, way, setup, Path(name), seconds, sender))
    return found


def _peer(peer: str, way: str, setup: Setup, files: Path, seconds: float, sender: frozenset[int]) -> Way:
    port, request = free_port(), request_for(peer, setup, pictures(32, 1)[0])
    start = start_peer(peer, Path(sys.executable), setup, port, files)
    with running(start.command, start.env, port, setup.cores, files / "log", lambda: _answers(port, request)):
        return _way(None, "@serve.batch", way, f"http://127.0.0.1:{port}", request, seconds, sender, files)


def _way(
    ray: Ray | None, server: str, way: str, url: str, request: Request, seconds: float, on: frozenset[int], work: Path
) -> Way:
    port = urlsplit(url).port
    assert port is not None
    run(port, request, Load(_USERS, on), _WARMUP_S, work)
    before = 0.0 if ray is None else ray.cpu_s()
    many = run(port, request, Load(_USERS, on), seconds, work)
    cpu_ms = None if ray is None or not many.requests else 1e3 * (ray.cpu_s() - before) / many.requests
    one = run(port, request, Load(_FEW, on), seconds, work)
    say(f"1  {server} {way}: {many.rps:.0f}/s, p50 of one user {one.p50_ms:.2f} ms, {many.errors} errors")
    return Way(server, way, many.rps, one.p50_ms, cpu_ms, many.generator_cpu, many.errors + one.errors)


def _direct(ways: list[Way], way: Way) -> float:
    return next(each.p50_ms for each in ways if each.server == way.server and each.way == "direct")


def _answers(port: int, request: Request) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("POST", request.path, request.body, dict(request.headers))
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


# -- part 2


class Crowd:
    """Clients that send one request after another to replicas in turn, whose addresses they ask the proxy for."""

    def __init__(self, proxy: str, request: Request) -> None:
        self._proxy, self._request = proxy, request
        self._urls = self.addresses()
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self.sent = self.lost = self.lost_twice = self.lost_elsewhere = 0
        self.victims: frozenset[str] = frozenset()
        self._threads = [threading.Thread(target=self._send, args=(number,)) for number in range(_THREADS)]
        self._threads.append(threading.Thread(target=self._ask))
        for thread in self._threads:
            thread.start()

    def addresses(self) -> list[str]:
        """Of replicas that take requests."""
        with urllib.request.urlopen(f"{self._proxy}/replicas", timeout=5) as answer:
            return [each["http"] for each in json.load(answer)["replicas"] if each["state"] == "ready"]

    def close(self) -> None:
        """Stop sending."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask(self) -> None:
        while not self._stop.wait(_LOOK_S):
            with contextlib.suppress(OSError, ValueError):
                self._urls = self.addresses() or self._urls

    def _send(self, number: int) -> None:
        while not self._stop.wait(_PAUSE_S):
            urls = self._urls
            first, second = urls[number % len(urls)], urls[(number + 1) % len(urls)]
            number += 1
            failed = not self._one(first)
            again = failed and not self._one(second)
            with self._lock:
                self.sent += 1
                self.lost += failed
                self.lost_twice += again
                self.lost_elsewhere += (failed and first not in self.victims) + (again and second not in self.victims)

    def _one(self, url: str) -> bool:
        """Whether an answer comes; one that turns the request away is one."""
        parts = urlsplit(url)
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=10)
        try:
            connection.request("POST", self._request.path, self._request.body, dict(self._request.headers))
            answer = connection.getresponse()
            answer.read()
            return answer.status in (200, 429)
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()


@contextlib.contextmanager
def _crowd(proxy: str, request: Request) -> Iterator[Crowd]:
    crowd = Crowd(proxy, request)
    try:
        time.sleep(_CALM_S)
        yield crowd
        time.sleep(_CALM_S)
    finally:
        crowd.close()


def _event(proxy: str, request: Request, what: str, happen: Callable[[Crowd], float]) -> Event:
    with _crowd(proxy, request) as crowd:
        back_s = happen(crowd)
    return Event(what, crowd.sent, crowd.lost, crowd.lost_elsewhere, crowd.lost_twice, back_s)


def _until(holds: Callable[[], bool]) -> float:
    """Seconds until it is true; the longest that is waited where it does not become so."""
    began = time.monotonic()
    while time.monotonic() < began + _BACK_S:
        with contextlib.suppress(OSError, ValueError):
            if holds():
                return time.monotonic() - began
        time.sleep(_LOOK_S)
    return _BACK_S


def _on_one_node(first: Path, second: Path) -> Iterator[Event]:
    request = _request(Bundle.open(first / "bundles" / "served"))
    how = ("--name", _NAME, "--replicas", "2", "--no-grpc", "--proxy-port", str(free_port()))
    with ray_on(frozenset(os.sched_getaffinity(0)), 3) as ray:
        state = ray.deploy(str(first), *how)
        proxy = state["proxy"]
        for what, victim in (("kill server", "server_pid"), ("kill replica", "pid")):
            state = ray.deploy("--status", _NAME)
            killed = state["replicas"][0]

            def kill(crowd: Crowd, pid: int = killed[victim], url: str = killed["http"]) -> float:
                crowd.victims = frozenset([url])
                os.kill(pid, signal.SIGKILL)
                return _until(lambda: len(now := crowd.addresses()) == 2 and url not in now)

            yield _event(proxy, request, what, kill)

        def update(crowd: Crowd) -> float:
            old = set(crowd.addresses())
            changing = ray.begin(str(second), *how)
            took = _until(lambda: len(now := crowd.addresses()) == 2 and not old & set(now))
            changing.wait(_BACK_S)
            return took

        yield _event(proxy, request, "update", update)


def _node_lost(first: Path) -> Event:
    request = _request(Bundle.open(first / "bundles" / "served"))
    with ray_on(frozenset(os.sched_getaffinity(0)), 2, nodes=2) as ray:
        words = ("--name", _NAME, "--replicas", "3", "--no-grpc", "--proxy-port", str(free_port()))
        state = ray.deploy(str(first), *words)  # two nodes of two CPUs: at least one on the second
        nodes = [each["node"] for each in state["replicas"]]
        say(f"2  {len(nodes)} replicas on {len(set(nodes))} nodes")
        victim = ray.agent_of(1)
        there = Path(f"/proc/{victim}/cmdline").read_bytes()
        killed = {each["http"] for each in state["replicas"] if each["node"].encode() in there}

        def kill(crowd: Crowd) -> float:
            crowd.victims = frozenset(killed)
            os.kill(victim, signal.SIGKILL)
            # the other node has room for two
            return _until(lambda: not killed & set(now := crowd.addresses()) and len(now) == 2)

        return _event(state["proxy"], request, "kill node", kill)


def _scaling(work: Path, models: Path) -> Iterator[Event]:
    """One replica is flooded until there are `_MOST`, then nobody floods it until there is one again."""
    path = _run_of(work / "scaled", "cnn64", models, max_batch=8)
    bundle = Bundle.open(path / "bundles" / "served")
    request = _request(bundle)
    with ray_on(frozenset(os.sched_getaffinity(0)), _MOST) as ray:
        words = ("--name", _NAME, "--replicas", f"1..{_MOST}", "--no-grpc", "--scale-down-after", "5s")
        state = ray.deploy(str(path), *words, "--proxy-port", str(free_port()))
        port = urlsplit(state["replicas"][0]["http"]).port
        assert port is not None
        enough = threading.Event()

        def flood() -> None:
            while not enough.is_set():
                run(port, request, Load(4 * _USERS, frozenset(os.sched_getaffinity(0))), 5.0, work)

        def rush(crowd: Crowd) -> float:
            with ThreadPoolExecutor(1) as pool:
                flooded = pool.submit(flood)
                took = _until(lambda: len(crowd.addresses()) == _MOST)
                enough.set()
                flooded.result()
            return took

        yield _event(state["proxy"], request, "scale up", rush)
        yield _event(state["proxy"], request, "scale down", lambda crowd: _until(lambda: len(crowd.addresses()) == 1))


# -- both


def _request(bundle: Bundle) -> Request:
    shape = bundle.manifest.signature.inputs[0].shape
    sample = pictures(shape[0], 1)[0]
    return protocol_request(f"/v2/models/{_NAME}/infer", bundle.manifest.signature, sample)


def _run_of(path: Path, model: ModelName, models: Path, *, max_batch: int) -> Path:
    """A run of one stream of one thread: a replica needs one CPU."""
    if not (path / "bundles" / "served").exists():
        bundle_of(model, models).copy_to(path / "bundles" / "served")
    bundle = Bundle.open(path / "bundles" / "served")
    policy = Policy(streams=1, threads=1, max_batch=max_batch, queue_bound=256, deadline_ms=1e3 * _LIMIT.limit_s)
    variant = Variant("served", "bundles/served", bundle.manifest.hash, "openvino", "f32")
    Plan(Goal(_LIMIT), (variant,), policy, model=_NAME).save(path / PLAN)
    return path

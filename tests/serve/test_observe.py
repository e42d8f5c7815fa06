"""What operators see: metrics, statistics of all cells, logs, spans, and the port for administration."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import http.client
import json
import logging
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from tritonclient.utils import InferenceServerException
from tritonclient.utils import shared_memory as shm

from conftest import Server
from rushhour.bundle import Bundle
from rushhour.capacity import ServiceProfile
from rushhour.clock import VirtualClock, WallClock
from rushhour.engines import EngineConfig
from rushhour.errors import ServeError
from rushhour.measurement import ServiceTimes
from rushhour.plan import Policy
from rushhour.serve import Limits, ServeSettings
from rushhour.serve.access.keys import Keys
from rushhour.serve.observability import log
from rushhour.serve.observability.metrics import render
from rushhour.serve.observability.requests import Observer
from rushhour.serve.observability.statistics import BOUNDS, Counted, Report, Statistics, Totals, sum_by_version
from rushhour.serve.observability.tracing import Spans, provider
from rushhour.serve.processes.messages import Result
from rushhour.serve.protocols.http.observed import ObservedConnection
from rushhour.serve.scheduling.admission import Profile
from rushhour.serve.scheduling.cell import Cell
from rushhour.serve.scheduling.job import Shed
from rushhour.serve.scheduling.speed import HostSpeed, Speeds
from rushhour.serve.scheduling.speed import sum_speeds as summed_speeds
from rushhour.serve.scheduling.variant import Variant
from rushhour.testing.bundles import tiny_answers, tiny_bundle
from rushhour.testing.fakes import FakeEngine
from rushhour.wire import Codec, InferRequest, Wanted, encode_request

IMAGES = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 1), dtype=np.uint8)
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Logging(Server):
    """A server, and what it and its cells have logged."""

    def __init__(self, process: subprocess.Popen[bytes], url: str, grpc: str, file: Path) -> None:
        super().__init__(process, url, grpc)
        self._file = file

    def logged(self, event: str) -> list[dict[str, Any]]:
        lines = self._file.read_text().splitlines()
        return [record for line in lines if (record := json.loads(line))["event"] == event]


@contextlib.contextmanager
def serving(target: Path, tmp_path: Path, settings: ServeSettings, **environment: str) -> Iterator[Logging]:
    file = tmp_path / "log"
    with (
        file.open("wb") as stderr,
        subprocess.Popen(
            [sys.executable, "-m", "rushhour.serve", str(target), msgspec.json.encode(settings).decode()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env=os.environ | environment,
        ) as process,
    ):
        try:
            assert process.stdout is not None
            said = json.loads(process.stdout.readline())
            assert said["url"], said["error"]
            yield Logging(process, said["url"], said["grpc"], file)
        finally:
            process.kill()


def http_request(
    address: tuple[str, int], method: str, path: str, body: bytes = b"", **headers: str
) -> tuple[int, str, bytes]:
    """Status, content type and body, over a connection of its own: it lands on any cell."""
    connection = http.client.HTTPConnection(*address, timeout=20)
    try:
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        return response.status, response.getheader("content-type", ""), response.read()
    finally:
        connection.close()


def get(server: Server, path: str) -> Any:
    status, _, body = http_request(server.address, "GET", path)
    assert status == 200, body
    return json.loads(body)


def infer(server: Server, bundle: Bundle, *, id: str = "", **headers: str) -> int:
    signature = bundle.manifest.signature
    length, body = encode_request(signature, {"image": IMAGES})
    if id:
        header = json.dumps(json.loads(body[:length]) | {"id": id}).encode()
        length, body = len(header), header + body[length:]
    named = {"Inference_Header_Content_Length": str(length), **headers}
    return http_request(server.address, "POST", "/v2/models/tiny/infer", body, **named)[0]


Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def samples_of(text: str, parse: Callable[[str], Any] = parse_text) -> Samples:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in parse(text)
        for sample in family.samples
    }


def scraped(server: Server) -> Samples:
    status, _, body = http_request(server.address, "GET", "/metrics")
    assert status == 200, body
    return samples_of(body.decode())


def summed(samples: Samples, name: str, **labels: str) -> float:
    return sum(
        value for (found, with_), value in samples.items() if found == name and labels.items() <= dict(with_).items()
    )


def cells_of(server: Server) -> list[int]:
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    return [int(child) for child in children]


def wait_until(true: Callable[[], object], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


# Counting.


class ABatch:
    positions = padding = 0
    variant = ""

    def __init__(self, rows: int, taken: float, ended: float) -> None:
        self.rows, self.taken, self.started, self.ended = rows, taken, taken, ended


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.lists(st.floats(0, 20), max_size=40), st.floats(20, 30), st.integers(1, 64), st.floats(0, 12)),
        max_size=80,
    )
)
def test_histograms_are_those_of_every_single_value(batches: list[tuple[list[float], float, int, float]]) -> None:
    clock = VirtualClock(50.0)
    statistics = Statistics(clock)
    for begun, taken, rows, took in batches:
        statistics.count(ABatch(rows, taken, taken + took), len(begun), begun, begun)
    totals = statistics.totals()
    for histogram, values in (
        (totals.queue_s, [taken - arrived for begun, taken, _, _ in batches for arrived in begun]),
        (totals.request_s, [50.0 - arrived for begun, _, _, _ in batches for arrived in begun]),
        (totals.inference_s, [(taken + took) - taken for _, taken, _, took in batches]),
    ):
        below = [sum(value <= bound for value in values) for bound in (*BOUNDS, float("inf"))]
        assert np.cumsum(histogram.counts).tolist() == below
        assert histogram.sum == pytest.approx(sum(values), abs=1e-6)
    assert sum(stages.computing.count for stages in totals.of_size.values()) == len(batches) == totals.batches


def test_sums_of_versions_share_nothing_and_forget_no_request() -> None:
    first, second = Totals(answered=1), Totals(answered=2)
    first.queue_s.count(np.array([0.5]))
    sums = sum_by_version([{"1": first}, {"1": second, "2": Totals(answered=4)}])
    assert {version: totals.answered for version, totals in sums.items()} == {"1": 3, "2": 4}
    assert sum(sums["1"].queue_s.counts) == 1
    sums["1"].queue_s.counts[0] += 1
    assert (first.answered, sum(first.queue_s.counts)) == (1, 1)
    many = sum_by_version([{str(version): Totals(answered=1) for version in range(1, 101)}])
    assert len(many) < 50
    assert "100" in many
    again = sum_by_version([many, {"101": Totals(answered=1)}])
    assert sum(totals.answered for totals in again.values()) == 101


def test_the_speed_is_what_batches_were_to_take_over_what_they_took() -> None:
    speedometer, times = (
        HostSpeed(),
        ServiceProfile(ServiceTimes((1, 2, 4), (0.010, 0.012, 0.016), (100.0, 166.0, 250.0))),
    )
    assert speedometer.recent() is None
    assert speedometer.speeds(1.0).parts == {}
    for rows, ended, took in ((1, 5.01, 0.010), (3, 5.02, 0.028), (2, 5.11, 0.024), (1, 5.09, 0.020), (4, 7.0, 0.016)):
        speedometer.record(times.seconds(rows), ended, took)
    told = speedometer.speeds(7.01)
    assert told.parts == {
        50: pytest.approx((0.024, 0.038)),
        51: pytest.approx((0.022, 0.044)),  # two streams: the older batch is told of last
        70: pytest.approx((0.016, 0.016)),
    }
    speedometer.record(0.016, 7.05, 0.032)
    assert speedometer.speeds(8.0).parts[70] == pytest.approx((0.032, 0.048)), "what is asked for is not ended by it"
    assert speedometer.recent() == pytest.approx(0.078 / 0.130)
    shown = told.shown()
    assert shown["age_s"] == pytest.approx([1.96, 1.86, 0.0], abs=1e-9)
    assert (len(shown["expected_s"]), shown["interval_s"]) == (3, 0.1)
    for second in range(10_000):
        speedometer.record(0.010, 10.05 + second, 0.010)
    assert len(speedometer.speeds(20_000.0).parts) == 3000
    assert speedometer.recent() == pytest.approx(1.0)


def test_the_speeds_of_cells_add_up() -> None:
    told = [Speeds(9.0, {3: (1.0, 2.0), 5: (1.0, 1.0)}), Speeds(8.0, {4: (1.0, 1.0), 5: (2.0, 5.0)})]
    assert summed_speeds(told) == Speeds(9.0, {3: (1.0, 2.0), 4: (1.0, 1.0), 5: (3.0, 6.0)})


def test_a_report_survives_the_way_between_processes() -> None:
    done = Result(speeds=Speeds(9.0, {3: (1.0, 2.0)}))
    assert msgspec.json.decode(msgspec.json.encode(done), type=Result) == done
    totals = Totals(answered=3)
    totals.of_size[2] = msgspec.convert({}, type(totals.stages))
    report = Report({"tiny": Counted({"1": totals})})
    assert msgspec.json.decode(msgspec.json.encode(report), type=Report) == report


# Metrics.


@pytest.fixture(scope="module")
def observed(tiny: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Logging]:
    settings = ServeSettings(
        http_port=0, grpc_port=0, admin_port=0, log_requests=True, api_keys=("k" * 20,), shared_memory=False
    )
    with serving(tiny.path, tmp_path_factory.mktemp("observed"), settings) as server:
        yield server


@pytest.fixture(scope="module")
def plain(tiny: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Logging]:
    with serving(tiny.path, tmp_path_factory.mktemp("plain"), ServeSettings(http_port=0, grpc_port=0)) as server:
        yield server


def test_metrics_count_what_happened(plain: Logging, tiny: Bundle) -> None:
    before = scraped(plain)
    for _ in range(5):
        assert infer(plain, tiny) == 200
    assert http_request(plain.address, "POST", "/v2/models/tiny/infer", b"{")[0] == 400
    with (
        triton_grpc.InferenceServerClient(plain.grpc) as client,
        pytest.raises(InferenceServerException, match="nonsense"),
    ):
        client.infer("tiny", [triton_grpc.InferInput("nonsense", [1, 4, 4, 1], "UINT8")])
    after = scraped(plain)

    def more(name: str, **labels: str) -> float:
        return summed(after, name, **labels) - summed(before, name, **labels)

    assert more("rushhour_requests_total", model="tiny", version="1", outcome="success") == 5
    assert more("rushhour_requests_total", outcome="invalid") == 2
    assert more("rushhour_requests_total") == 7
    for name in ("rushhour_request_seconds", "rushhour_queue_seconds"):
        assert more(f"{name}_count", model="tiny") == more(f"{name}_bucket", le="+Inf") == 5
    assert 0 < more("rushhour_queue_seconds_sum") < more("rushhour_request_seconds_sum")
    assert more("rushhour_inference_seconds_sum") > 0
    assert more("rushhour_batch_size_sum") == 10
    assert more("rushhour_batch_size_count") == more("rushhour_inference_seconds_count")
    assert summed(after, "rushhour_ready") == summed(after, "rushhour_cells", state="up") == 1
    assert summed(after, "rushhour_connections", protocol="http") == 1
    assert summed(after, "rushhour_service_time_seconds", coefficient="per_sample") > 0
    assert summed(after, "rushhour_host_speed") > 0
    assert summed(after, "process_resident_memory_bytes") > 1e6
    assert summed(after, "process_cpu_seconds_total") > 0
    assert summed(after, "rushhour_build_info") == 1
    assert {name for name, _ in after} >= {
        *("rushhour_queue_samples", "rushhour_in_flight_batches", "rushhour_in_flight_samples"),
        *("rushhour_shed_total", "rushhour_cancelled_total", "rushhour_cell_restarts_total"),
    }


def test_metrics_speak_openmetrics_to_who_reads_it(plain: Logging) -> None:
    _, kind, text = http_request(plain.address, "GET", "/metrics")
    assert kind.startswith("text/plain")
    _, kind, new = http_request(plain.address, "GET", "/metrics", Accept="application/openmetrics-text;version=1.0.0")
    assert kind.startswith("application/openmetrics-text")
    assert new.endswith(b"# EOF\n")
    assert samples_of(text.decode()).keys() == samples_of(new.decode(), parse_openmetrics).keys()
    assert http_request(plain.address, "POST", "/metrics")[0] == 405


def test_shed_and_cancelled_requests_are_told_apart(tiny: Bundle) -> None:
    async def scenario() -> None:
        engine = FakeEngine(EngineConfig("openvino", max_batch=1), schedule=lambda seconds, finish: None)
        profile = Profile(ServiceTimes((1, 2), (0.011, 0.012), (90.0, 166.0)))
        cell = Cell(
            [Variant(engine, profile)], Codec("tiny", engine.signature), Policy(max_batch=1, queue_bound=1), WallClock()
        )

        def submit(timeout_s: float | None = None) -> Any:
            wanted = Wanted("", (0,), (True,), timeout_s=timeout_s)
            return cell.submit(InferRequest(1, (memoryview(bytes(16)),), wanted), lambda result: None)

        submit()
        await asyncio.sleep(0)
        waiting = submit()
        late, full = submit(1e-3), submit()
        assert isinstance(late, Shed)
        assert isinstance(full, Shed)
        assert cell.running == (1, 1)
        cell.cancel(waiting)
        samples = samples_of(render(Report({"tiny": Counted({"1": cell.totals()})}), "")[1].decode())
        assert summed(samples, "rushhour_shed_total", reason="queue") == 1
        assert summed(samples, "rushhour_shed_total", reason="deadline") == 1
        assert summed(samples, "rushhour_requests_total", outcome="shed") == 2
        assert summed(samples, "rushhour_cancelled_total") == 1
        engine.close()
        await asyncio.sleep(0.01)

    asyncio.run(scenario())


def test_a_reload_keeps_what_was_counted(tiny: Bundle, tmp_path: Path) -> None:
    tiny.copy_to(tmp_path / "served")
    with serving(tmp_path / "served", tmp_path, ServeSettings(http_port=0)) as server:
        assert infer(server, tiny) == 200
        tiny_bundle(tmp_path / "served", seed=1)
        assert http_request(server.address, "POST", "/v2/repository/models/tiny/load")[0] == 200
        assert infer(server, tiny) == 200
        samples = scraped(server)
        assert summed(samples, "rushhour_requests_total", version="1", outcome="success") == 1
        assert summed(samples, "rushhour_requests_total", version="2", outcome="success") == 1
        assert summed(samples, "rushhour_request_seconds_count") == get(server, "/stats")["answered"] == 2
        (shown,) = get(server, "/v2/models/stats")["model_stats"]
        assert (shown["version"], shown["inference_stats"]["success"]["count"]) == ("2", 1)
        assert [record["version"] for record in server.logged("loaded")] == ["1", "2"]


# Several cells.


def test_every_cell_answers_for_all_and_no_counter_falls_when_one_dies(tiny: Bundle, tmp_path: Path) -> None:
    with serving(tiny.path, tmp_path, ServeSettings(http_port=0, grpc_port=0, cells=2)) as server:
        for _ in range(40):
            assert infer(server, tiny) == 200
        # Connections land on either cell; each has counted only its share, and says the sum.
        for _ in range(12):
            samples = scraped(server)
            assert summed(samples, "rushhour_requests_total", outcome="success") == 40
            assert summed(samples, "rushhour_cells", state="up") == 2
            assert get(server, "/stats")["answered"] == 40
            assert get(server, "/v2/models/tiny/stats")["model_stats"][0]["inference_count"] == 80
            told = get(server, "/v2/models/tiny/versions/1/speed")
            took = summed(samples, "rushhour_inference_seconds_sum")
            assert sum(told["took_s"]) == pytest.approx(took, abs=1e-4), "of both"
            assert told["age_s"] == sorted(told["age_s"], reverse=True)
            with triton_grpc.InferenceServerClient(
                server.grpc, channel_args=[("grpc.use_local_subchannel_pool", 1)]
            ) as client:
                assert client.get_inference_statistics().model_stats[0].inference_stats.success.count == 40
        assert len({key for key in samples if key[0] == "process_resident_memory_bytes"}) == 2
        first = cells_of(server)
        os.kill(first[0], signal.SIGKILL)
        before, states = samples, set()

        def back() -> bool:
            nonlocal before
            with contextlib.suppress(OSError, http.client.HTTPException):
                now = scraped(server)
                for key, value in now.items():
                    if key[0].startswith("rushhour_") and key[0].endswith(("_total", "_bucket", "_count", "_sum")):
                        assert value >= before.get(key, 0), key
                assert before.keys() - now.keys() <= {key for key in before if ("cell", "0") in key[1]}
                before = now
                states.add(summed(now, "rushhour_cells", state="down"))
            return len(cells_of(server)) == 2 and summed(before, "rushhour_cells", state="up") == 2

        wait_until(lambda: first[0] not in cells_of(server))
        wait_until(back)
        assert states == {0.0, 1.0}
        assert summed(before, "rushhour_requests_total", outcome="success") == 40
        assert summed(before, "rushhour_cell_restarts_total") == 1
        assert infer(server, tiny) == 200
        assert get(server, "/stats")["answered"] == 41
        (died,) = server.logged("cell died")
        assert died["code"] == -signal.SIGKILL
        wait_until(lambda: server.logged("cell restarted"))


def test_a_cell_that_hangs_is_left_out_but_not_what_it_did(tiny: Bundle, tmp_path: Path) -> None:
    with serving(tiny.path, tmp_path, ServeSettings(http_port=0, cells=2)) as server:
        for _ in range(20):
            assert infer(server, tiny) == 200
        connections = [http.client.HTTPConnection(*server.address, timeout=20) for _ in range(16)]
        for connection in connections:
            connection.request("GET", "/stats")
            assert json.loads(connection.getresponse().read())["answered"] == 20
        hung = cells_of(server)[0]
        os.kill(hung, signal.SIGSTOP)
        try:
            answers = []

            def scrape(connection: http.client.HTTPConnection) -> None:
                with contextlib.suppress(OSError):
                    connection.request("GET", "/metrics")
                    answers.append(connection.getresponse().read().decode())

            threads = [threading.Thread(target=scrape, args=(connection,)) for connection in connections]
            for thread in threads:
                thread.start()
            wait_until(lambda: answers)
            samples = samples_of(answers[0])
            assert summed(samples, "rushhour_cells", state="down") == 1
            assert summed(samples, "rushhour_requests_total", outcome="success") == 20
        finally:
            os.kill(hung, signal.SIGCONT)
        for thread in threads:
            thread.join()
        for connection in connections:
            connection.close()
        wait_until(lambda: summed(scraped(server), "rushhour_cells", state="up") == 2)


def test_shared_memory_reaches_every_cell_and_a_restarted_one(tiny: Bundle, tmp_path: Path) -> None:
    key = f"/rushhour-test-{os.getpid()}"
    handle = shm.create_shared_memory_region("images", key, IMAGES.nbytes)
    try:
        shm.set_shared_memory_region(handle, [IMAGES])
        with serving(tiny.path, tmp_path, ServeSettings(http_port=0, cells=2)) as server:

            def shared() -> None:
                with triton.InferenceServerClient(server.url.removeprefix("http://")) as client:
                    assert [region["name"] for region in client.get_system_shared_memory_status()] == ["images"]
                    tensor = triton.InferInput("image", list(IMAGES.shape), "UINT8")
                    tensor.set_shared_memory("images", IMAGES.nbytes)
                    answer = client.infer("tiny", [tensor]).as_numpy("probabilities")
                    np.testing.assert_allclose(answer, tiny_answers(IMAGES), atol=1e-5)

            with triton.InferenceServerClient(server.url.removeprefix("http://")) as client:
                client.register_system_shared_memory("images", key, IMAGES.nbytes)
                with pytest.raises(InferenceServerException, match="is registered already"):
                    client.register_system_shared_memory("images", key, IMAGES.nbytes)
                with pytest.raises(InferenceServerException, match="No such file"):
                    client.register_system_shared_memory("other", "/rushhour-nowhere", 1)
            for _ in range(10):
                shared()
            first = cells_of(server)
            os.kill(first[0], signal.SIGKILL)
            wait_until(lambda: server.logged("cell restarted"))
            for _ in range(10):
                shared()
            with triton.InferenceServerClient(server.url.removeprefix("http://")) as client:
                client.unregister_system_shared_memory()
            for _ in range(10):
                assert get(server, "/v2/systemsharedmemory/status") == []
    finally:
        shm.destroy_shared_memory_region(handle)


def test_two_reloads_asked_of_one_cell_at_once_are_both_answered(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "served")
    with serving(bundle.path, tmp_path, ServeSettings(http_port=0, cells=2)) as server:
        answers: list[int] = []

        def load() -> None:
            answers.append(http_request(server.address, "POST", "/v2/repository/models/tiny/load")[0])

        threads = [threading.Thread(target=load) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert answers == [200] * 4
        assert get(server, "/v2/models/tiny")["versions"] == ["1"]


def test_a_restarted_cell_stays_unloaded_and_logs_as_the_others(tiny: Bundle, tmp_path: Path) -> None:
    with serving(tiny.path, tmp_path, ServeSettings(http_port=0, cells=2)) as server:
        assert http_request(server.address, "POST", "/v2/repository/models/tiny/unload")[0] == 200
        quiet = json.dumps({"log_warning": False}).encode()
        assert http_request(server.address, "POST", "/v2/logging", quiet)[0] == 200
        first = cells_of(server)
        os.kill(first[0], signal.SIGKILL)
        wait_until(lambda: first[0] not in cells_of(server) and len(cells_of(server)) == 2)
        wait_until(lambda: summed(scraped(server), "rushhour_cells", state="up") == 2)
        for _ in range(10):
            assert get(server, "/v2/logging")["log_warning"] is False
            assert http_request(server.address, "GET", "/v2/health/ready")[0] == 503
            assert get(server, "/stats")["cells"] == 2


# Logs.


def test_each_request_is_logged_where_that_is_asked_for(observed: Logging, tiny: Bundle) -> None:
    key = {"Authorization": f"Bearer {'k' * 20}"}
    assert infer(observed, tiny, id="from the header", **key) == 200
    assert infer(observed, tiny, X_Request_Id="from a proxy", **key) == 200
    assert infer(observed, tiny, **key) == 200
    assert infer(observed, tiny, id="nobody") == 401
    assert http_request(observed.address, "POST", "/v2/models/tiny/infer", b"{", **key)[0] == 400
    with triton_grpc.InferenceServerClient(observed.grpc) as client:
        tensor = triton_grpc.InferInput("image", list(IMAGES.shape), "UINT8")
        tensor.set_data_from_numpy(IMAGES)
        client.infer("tiny", [tensor], request_id="over gRPC", headers={"authorization": f"Bearer {'k' * 20}"})
        with pytest.raises(InferenceServerException):
            client.infer("tiny", [tensor])
    wait_until(lambda: len(observed.logged("request")) >= 7)
    named = [record for record in observed.logged("request") if "infer" in record["path"] or record["method"]]
    statuses = [record["status"] for record in named]
    assert sorted(statuses) == [200, 200, 200, 200, 400, 401, 401]
    first, second, third = (record for record in named if record["status"] == 200 and record["protocol"] == "http")
    assert (first["id"], second["id"]) == ("from the header", "from a proxy")
    assert third["id"] not in ("", first["id"], second["id"])
    assert (first["method"], first["path"], first["version"]) == ("POST", "/v2/models/tiny/infer", "1")
    assert (first["samples"], first["batch"]) == (2, 2)
    assert 0 <= first["queue_ms"] < first["latency_ms"]
    assert 0 < first["inference_ms"] < first["latency_ms"]
    over_grpc = next(record for record in named if record["id"] == "over gRPC")
    assert (over_grpc["protocol"], over_grpc["method"], over_grpc["batch"]) == ("grpc", "ModelInfer", 2)


def test_what_is_no_request_is_logged_once(observed: Logging) -> None:
    with socket.create_connection(observed.address, timeout=10) as connection:
        connection.sendall(b"nonsense\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 400")
    wait_until(lambda: [record for record in observed.logged("request") if not record["method"]])
    (record,) = [record for record in observed.logged("request") if not record["method"]]
    assert (record["status"], record["path"]) == (400, "")


def test_a_request_refused_before_its_body_came_is_logged(observed: Logging) -> None:
    head = "POST /v2/models/tiny/infer HTTP/1.1\r\nhost: x\r\nx-request-id: early\r\ncontent-length: 100000\r\n\r\n"
    with socket.create_connection(observed.address, timeout=10) as connection:
        connection.sendall(head.encode() + bytes(10))
        assert connection.recv(65536).startswith(b"HTTP/1.1 401")
    wait_until(lambda: [record for record in observed.logged("request") if record["id"] == "early"])
    (record,) = [record for record in observed.logged("request") if record["id"] == "early"]
    assert (record["status"], record["path"]) == (401, "/v2/models/tiny/infer")


def test_no_request_is_logged_where_nobody_asked(plain: Logging, tiny: Bundle) -> None:
    assert infer(plain, tiny) == 200
    assert [record["url"] for record in plain.logged("ready")] == [plain.url]
    assert plain.logged("request") == []


def test_the_end_is_logged(tiny: Bundle, tmp_path: Path) -> None:
    with serving(tiny.path, tmp_path, ServeSettings(http_port=0)) as server:
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0
        assert [len(server.logged(event)) for event in ("start", "loaded", "ready", "drain", "stopped")] == [1] * 5


def test_a_client_cannot_forge_lines_of_the_log(capsys: pytest.CaptureFixture[str]) -> None:
    for form in ("json", "text"):
        with log.to_stderr(form, "info"):  # type: ignore[arg-type]
            log.event(logging.INFO, "request", id='x"\n{"event":"ready"}')
            log.event(logging.DEBUG, "not said")
        assert len(capsys.readouterr().err.splitlines()) == 1
    log.event(logging.INFO, "after the server")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("asked", "level"),
    [
        ({"log_verbose_level": 2}, (True, True, True, 1)),
        ({"log_warning": False}, (False, False, True, 0)),
        ({"log_error": False}, (False, False, False, 0)),
        ({"log_info": None, "log_warning": None}, (True, True, True, 0)),
    ],
)
def test_the_level_follows_the_switches(plain: Logging, asked: dict[str, Any], level: tuple[Any, ...]) -> None:
    try:
        status, _, body = http_request(plain.address, "POST", "/v2/logging", json.dumps(asked).encode())
        shown = json.loads(body)
        names = ("log_info", "log_warning", "log_error", "log_verbose_level")
        assert (status, tuple(shown[name] for name in names)) == (200, level)
    finally:
        back = json.dumps({"log_verbose_level": 0, "log_info": True}).encode()
        assert http_request(plain.address, "POST", "/v2/logging", back)[0] == 200


@pytest.mark.parametrize("asked", [{"log_info": True, "log_error": False}, {"log_info": 3}, {"log_verbose_level": "x"}])
def test_switches_that_make_no_level_are_refused(plain: Logging, asked: dict[str, Any]) -> None:
    assert http_request(plain.address, "POST", "/v2/logging", json.dumps(asked).encode())[0] == 400


# Spans.


class DeskOf:
    """A desk with one cell and no control."""

    def __init__(self, cell: Cell) -> None:
        self.connections: set[Any] = set()
        self.explanation = None
        self.draining = False
        self.limits = Limits()
        self.keys = Keys(())
        self.date = b""
        self.stages = {b"/v2/models/tiny/infer": cell}

    def control(self, method: bytes, path: bytes, body: bytes, accept: bytes, asker: Any) -> Any:
        raise AssertionError

    def refused(self, path: bytes, status: int, seconds: float = 0.0) -> None:
        raise AssertionError


def test_a_request_is_a_span_below_its_callers_with_its_queue_and_batch() -> None:
    exporter = InMemorySpanExporter()
    spans = provider(0.0)  # nothing of its own accord: what the caller samples is sampled
    spans.add_span_processor(SimpleSpanProcessor(exporter))

    async def scenario() -> None:
        engine = FakeEngine(EngineConfig("openvino", max_batch=4))
        profile = Profile(ServiceTimes((1, 2), (0.011, 0.012), (90.0, 166.0)))
        cell = Cell([Variant(engine, profile)], Codec("tiny", engine.signature), Policy(max_batch=4), WallClock())
        observer = Observer(WallClock(), records=False, spans=Spans(spans, WallClock()))
        server = await asyncio.get_running_loop().create_server(
            lambda: ObservedConnection(DeskOf(cell), observer), "127.0.0.1", 0
        )
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname()[:2])
        length, body = encode_request(engine.signature, {"image": IMAGES})
        for field in ("x-request-id: traced\r\ntraceparent: " + PARENT, "x-request-id: not"):
            head = f"POST /v2/models/tiny/infer HTTP/1.1\r\nhost: x\r\n{field}\r\ncontent-length: {len(body)}\r\n"
            writer.write(f"{head}inference-header-content-length: {length}\r\n\r\n".encode() + body)
            answer = await reader.readuntil(b"\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 200")
            size = int(answer.lower().partition(b"\r\ncontent-length: ")[2].partition(b"\r\n")[0])
            await reader.readexactly(size)
        writer.close()
        await writer.wait_closed()
        server.close()

    asyncio.run(asyncio.wait_for(scenario(), 20))
    found = {span.name: span for span in exporter.get_finished_spans()}
    assert sorted(found) == ["infer", "infer tiny", "queue"]
    request = found["infer tiny"]
    assert request.parent is not None
    assert f"{request.context.trace_id:032x}-{request.parent.span_id:016x}" == PARENT[3:-3]
    assert request.attributes is not None
    assert request.attributes["rushhour.request_id"] == "traced"
    assert (request.attributes["rushhour.batch_size"], request.attributes["http.response.status_code"]) == (2, 200)
    queue, batch = found["queue"], found["infer"]
    for child in (queue, batch):
        assert child.parent is not None
        assert child.parent.span_id == request.context.span_id
    moments = [request.start_time, queue.start_time, queue.end_time, batch.start_time, batch.end_time]
    assert all(moment is not None for moment in moments)
    assert sorted(moments) == moments  # type: ignore[type-var]


def test_spans_of_both_faces_reach_a_collector(tiny: Bundle, tmp_path: Path) -> None:
    received: list[Any] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            sent = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                import gzip

                sent = gzip.decompress(sent)
            received.append(ExportTraceServiceRequest.FromString(sent))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Collector) as collector:
        thread = threading.Thread(target=collector.serve_forever)
        thread.start()
        try:
            settings = ServeSettings(http_port=0, grpc_port=0, otel=True)
            endpoint = f"http://127.0.0.1:{collector.server_port}"
            with serving(tiny.path, tmp_path, settings, OTEL_EXPORTER_OTLP_ENDPOINT=endpoint) as server:
                assert infer(server, tiny, traceparent=PARENT) == 200
                assert get(server, "/v2/trace/setting")["trace_level"] == ["TIMESTAMPS"]
                with triton_grpc.InferenceServerClient(server.grpc) as client:
                    tensor = triton_grpc.InferInput("image", list(IMAGES.shape), "UINT8")
                    tensor.set_data_from_numpy(IMAGES)
                    client.infer("tiny", [tensor], headers={"traceparent": PARENT})
                server.process.send_signal(signal.SIGTERM)
                assert server.process.wait(30) == 0  # what waits is sent before the end
        finally:
            collector.shutdown()
            thread.join()
    resources = [resource for each in received for resource in each.resource_spans]
    found = [span for resource in resources for scope in resource.scope_spans for span in scope.spans]
    assert sorted(span.name for span in found) == ["infer", "infer", "infer tiny", "infer tiny", "queue", "queue"]
    assert {span.trace_id.hex() for span in found} == {PARENT[3:35]}
    named = {pair.key: pair.value.string_value for pair in resources[0].resource.attributes}
    assert named["service.name"] == "rushhour"


def test_tracing_without_its_extra_says_what_to_install(tiny: Bundle) -> None:
    code = (
        "import sys; sys.modules['opentelemetry'] = None; from rushhour.cli import main; "
        f"sys.argv = ['rushhour', 'serve', {str(tiny.path)!r}, '--http-port=0', '--grpc-port=0', '--otel']; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "rushhour[otel]" in done.stderr.splitlines()[-1]


# Administration, and settings that mean something.


def test_administration_moves_to_its_own_port(observed: Logging, tiny: Bundle) -> None:
    key = {"Authorization": f"Bearer {'k' * 20}"}

    def answered(address: tuple[str, int], method: str, path: str, body: bytes = b"") -> tuple[int, Any]:
        status, _, answer = http_request(address, method, path, body, **key)
        return status, answer if path == "/metrics" else json.loads(answer)

    shown = answered(observed.address, "GET", "/config")[1]["server"]
    assert shown["http_port"] == observed.address[1]
    host, _, port = shown["admin_address"].rpartition(":")
    admin = (host, int(port))
    assert host == "127.0.0.1"
    assert admin != observed.address
    assert observed.logged("ready")[0]["admin"] == f"http://{shown['admin_address']}"
    for path in ("/v2/repository/models/tiny/load", "/v2/repository/models/tiny/unload"):
        assert answered(observed.address, "POST", path)[0] == 403
    for path, body in (("/v2/logging", b'{"log_info":true}'), ("/v2/trace/setting", b'{"trace_level":["OFF"]}')):
        assert answered(observed.address, "POST", path, body)[0] == 403
        assert answered(observed.address, "GET", path)[0] == 200
        assert answered(admin, "POST", path, body)[0] == 200
    with (
        triton_grpc.InferenceServerClient(observed.grpc) as client,
        pytest.raises(InferenceServerException, match="use the administration port"),
    ):
        client.load_model("tiny", headers={"authorization": key["Authorization"]})
    assert answered(admin, "POST", "/v2/repository/models/tiny/load") == (200, {})
    for address in (admin, observed.address):
        assert answered(address, "GET", "/metrics")[0] == 200
        assert http_request(address, "GET", "/metrics")[0] == 401, "keys hold for metrics too"
        assert http_request(address, "GET", "/v2/health/live")[0] == 200
    status, error = answered(admin, "POST", "/v2/models/tiny/infer")
    assert (status, "administration" in error["error"]) == (404, True)


def test_the_port_for_administration_works_with_several_cells(tiny: Bundle, tmp_path: Path) -> None:
    tiny.copy_to(tmp_path / "served")
    with serving(tmp_path / "served", tmp_path, ServeSettings(http_port=0, admin_port=0, cells=2)) as server:
        host, _, port = get(server, "/config")["server"]["admin_address"].rpartition(":")
        tiny_bundle(tmp_path / "served", seed=1)
        assert http_request((host, int(port)), "POST", "/v2/repository/models/tiny/load")[0] == 200
        for _ in range(6):
            assert get(server, "/v2/models/tiny")["versions"] == ["2"]
            assert http_request(server.address, "POST", "/v2/repository/models/tiny/load")[0] == 403


def test_metrics_need_no_admin(tiny: Bundle, tmp_path: Path) -> None:
    with serving(tiny.path, tmp_path, ServeSettings(http_port=0, admin=False)) as server:
        assert summed(scraped(server), "rushhour_ready") == 1
        assert http_request(server.address, "POST", "/v2/logging", b'{"log_info":false}')[0] == 403


def test_shared_memory_is_for_loopback_unless_asked_for() -> None:
    assert ServeSettings().shares_memory
    assert not ServeSettings(exposed=True).shares_memory
    assert not ServeSettings(host="0.0.0.0").shares_memory
    assert ServeSettings(host="0.0.0.0", shared_memory=True).shares_memory
    assert not ServeSettings(shared_memory=False).shares_memory


def test_shared_memory_of_an_exposed_server_is_shown_to_be_off(tiny: Bundle, tmp_path: Path) -> None:
    with serving(tiny.path, tmp_path, ServeSettings(http_port=0, exposed=True)) as server:
        assert get(server, "/config")["server"]["shared_memory"] is False
        asked = b'{"key":"/x","byte_size":1}'
        assert http_request(server.address, "POST", "/v2/systemsharedmemory/region/x/register", asked)[0] == 501


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (ServeSettings(admin=False, admin_port=1), "--admin-port has no effect"),
        (ServeSettings(admin_host="127.0.0.1"), "--admin-host has no effect"),
        (ServeSettings(otel_sample=0.5), "--otel-sample has no effect"),
        (ServeSettings(log_requests=True, log_level="error"), "--log-requests has no effect"),
        (ServeSettings(http_port=8000, admin_port=8000), "--http-port and --admin-port are both 8000"),
        (ServeSettings(http_port=8000, grpc_port=8000), "--http-port and --grpc-port are both 8000"),
        (ServeSettings(host="0.0.0.0", grpc_port=1, admin_port=1), "--grpc-port and --admin-port are both 1"),
        (ServeSettings(host="localhost", admin_port=8000), "both 8000"),
    ],
)
def test_an_option_that_cannot_take_effect_is_an_error(settings: ServeSettings, says: str) -> None:
    with pytest.raises(ServeError, match=says):
        settings.check()


def test_ports_may_be_equal_where_nobody_shares_them() -> None:
    ServeSettings(http_port=0, grpc_port=0, admin_port=0).check()
    ServeSettings(host="192.0.2.1", http_port=8000, admin_port=8000).check()


# Errors: each is counted once, by its reason, and as no success.

POST = "POST /v2/models/tiny/infer HTTP/1.1\r\nhost: x\r\n"


def said_to(server: Server, sent: bytes) -> int:
    """The status of the answer to some bytes."""
    with socket.create_connection(server.address, timeout=10) as connection:
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        said = b""
        while chunk := connection.recv(65536):
            said += chunk
    return int(said[len("HTTP/1.1 ") :][:3])


def posted(body: bytes, fields: str = "", path: str = "/v2/models/tiny/infer") -> bytes:
    return f"POST {path} HTTP/1.1\r\nhost: localhost\r\n{fields}content-length: {len(body)}\r\n\r\n".encode() + body


RIGHT = json.dumps(
    {"inputs": [{"name": "image", "datatype": "UINT8", "shape": [1, 4, 4, 1], "data": [0] * 16}]}
).encode()
GZIP = "content-encoding: gzip\r\n"
INFERENCES: dict[str, tuple[bytes, int, str]] = {
    "no JSON": (posted(b"{"), 400, "invalid"),
    "another input": (posted(RIGHT.replace(b"image", b"other")), 400, "invalid"),
    "an unknown output": (posted(RIGHT[:-1] + b',"outputs":[{"name":"z"}]}'), 400, "invalid"),
    "a length that is none": (posted(RIGHT, "inference-header-content-length: x\r\n"), 400, "invalid"),
    "damaged gzip": (posted(b"nonsense", GZIP), 400, "invalid"),
    "gzip cut short": (posted(gzip.compress(RIGHT)[:-9], GZIP), 400, "invalid"),
    "an unknown coding": (posted(RIGHT, "content-encoding: br\r\n"), 415, "unsupported_media_type"),
    "no picture": (posted(RIGHT, "content-type: image/png\r\n"), 400, "invalid"),
    "a body too large": (f"{POST}content-length: 99999999\r\n\r\n".encode(), 413, "too_large"),
    "chunks too large": (
        f"{POST}transfer-encoding: chunked\r\n\r\n100000\r\n".encode() + bytes(2**20) + b"\r\n1\r\nx\r\n0\r\n\r\n",
        413,
        "too_large",
    ),
    "too large unpacked": (posted(gzip.compress(bytes(2**20 + 1)), GZIP), 413, "too_large"),
    "an unknown model": (posted(RIGHT, path="/v2/models/other/infer"), 404, "not_found"),
    "an unknown version": (posted(RIGHT, path="/v2/models/tiny/versions/9/infer"), 404, "not_found"),
    "an empty version": (posted(RIGHT, path="/v2/models/tiny/versions//infer"), 404, "not_found"),
    "another method": (posted(RIGHT).replace(b"POST", b"PUT"), 405, "method_not_allowed"),
    "a damaged chunk": (f"{POST}transfer-encoding: chunked\r\n\r\nzz\r\n".encode(), 400, "invalid"),
    "another transfer coding": (f"{POST}transfer-encoding: gzip, chunked\r\n\r\n".encode(), 501, "not_implemented"),
    "a field too long": (f"{POST}x: {'y' * 40_000}\r\n\r\n".encode(), 431, "header_too_large"),
    "shared memory": (
        posted(
            json.dumps(
                {
                    "inputs": [
                        {
                            "name": "image",
                            "datatype": "UINT8",
                            "shape": [1, 4, 4, 1],
                            "parameters": {"shared_memory_region": "r", "shared_memory_byte_size": 16},
                        }
                    ]
                }
            ).encode()
        ),
        501,
        "not_implemented",
    ),
}
OTHERS: dict[str, tuple[bytes, int, str]] = {
    "nothing there": (b"GET /nothing HTTP/1.1\r\nhost: x\r\n\r\n", 404, "not_found"),
    "another model": (b"GET /v2/models/other HTTP/1.1\r\nhost: x\r\n\r\n", 404, "not_found"),
    "another version": (b"GET /v2/models/tiny/versions/9/stats HTTP/1.1\r\nhost: x\r\n\r\n", 404, "not_found"),
    "a method": (b"PUT /v2 HTTP/1.1\r\nhost: x\r\n\r\n", 405, "method_not_allowed"),
    "no HTTP": (b"garbage\r\n\r\n", 400, "invalid"),
    "no host": (b"GET /v2 HTTP/1.1\r\n\r\n", 400, "invalid"),
    "a target too long": (b"GET /" + b"x" * 40_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n", 414, "target_too_long"),
    "another HTTP": (b"GET /v2 HTTP/2.0\r\nhost: x\r\n\r\n", 505, "version_not_supported"),
    "no JSON": (posted(b"{", path="/v2/repository/index"), 400, "invalid"),
    "CUDA": (posted(b"{}", path="/v2/cudasharedmemory/region/r/register"), 501, "not_implemented"),
}  # fmt: skip


@pytest.fixture(scope="module")
def counted(tiny: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Logging]:
    settings = ServeSettings(http_port=0, grpc_port=0, shared_memory=False, limits=Limits(body_bytes=2**20))
    with serving(tiny.path, tmp_path_factory.mktemp("counted"), settings) as server:
        yield server


class Counts:
    """What a server has counted, and what came to that since."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._before = self._now()

    def _now(self) -> tuple[Samples, dict[str, Any]]:
        (entry,) = get(self._server, "/v2/models/stats")["model_stats"]
        return scraped(self._server), entry["inference_stats"]

    def assert_one(self, reason: str, *, infer: bool) -> None:
        """One error has come, and nothing else."""
        (before, stats_before), (after, stats) = self._before, self._now()

        def more(name: str, **labels: str) -> float:
            return summed(after, name, **labels) - summed(before, name, **labels)

        model = "tiny" if infer else ""
        assert more("rushhour_errors_total", model=model, reason=reason) == more("rushhour_errors_total") == 1
        assert more("rushhour_requests_total") == more("rushhour_requests_total", outcome="success") + infer == infer
        assert more("rushhour_request_seconds_count") == 0
        assert stats["fail"]["count"] - stats_before["fail"]["count"] == infer
        assert stats["success"] == stats_before["success"]


@pytest.mark.parametrize("case", INFERENCES)
def test_an_inference_that_fails_is_counted_once_and_as_no_success(counted: Logging, case: str) -> None:
    sent, status, reason = INFERENCES[case]
    counts = Counts(counted)
    assert said_to(counted, sent) == status
    counts.assert_one(reason, infer=True)


@pytest.mark.parametrize("case", OTHERS)
def test_any_other_error_is_counted_once_and_with_no_model(counted: Logging, case: str) -> None:
    sent, status, reason = OTHERS[case]
    counts = Counts(counted)
    assert said_to(counted, sent) == status
    counts.assert_one(reason, infer=False)


@pytest.mark.parametrize(
    ("model", "version", "input", "reason"),
    [
        ("tiny", "", "nonsense", "invalid"),
        ("other", "", "image", "not_found"),
        ("tiny", "9", "image", "not_found"),
    ],
)
@pytest.mark.parametrize("streamed", [False, True])
def test_errors_over_grpc_are_counted_alike(
    counted: Logging, model: str, version: str, input: str, reason: str, streamed: bool
) -> None:
    counts = Counts(counted)
    tensor = triton_grpc.InferInput(input, [1, 4, 4, 1], "UINT8")
    tensor.set_data_from_numpy(np.zeros((1, 4, 4, 1), np.uint8))
    with triton_grpc.InferenceServerClient(counted.grpc) as client:
        if streamed:
            said: queue.Queue[Any] = queue.Queue()
            client.start_stream(lambda result, error: said.put(error))
            client.async_stream_infer(model, [tensor], model_version=version)
            assert said.get(timeout=10) is not None
            client.stop_stream()
        else:
            with pytest.raises(InferenceServerException):
                client.infer(model, [tensor], model_version=version)
    counts.assert_one(reason, infer=True)


def test_other_errors_over_grpc_are_counted_alike(counted: Logging) -> None:
    with triton_grpc.InferenceServerClient(counted.grpc) as client:
        for call in (
            lambda: client.get_model_metadata("other"),
            lambda: client.get_model_metadata(""),
            lambda: client.get_inference_statistics("tiny", "9"),
            lambda: client.get_inference_statistics("", "9"),
            lambda: client.load_model(""),
        ):
            counts = Counts(counted)
            with pytest.raises(InferenceServerException, match="NOT_FOUND"):
                call()
            counts.assert_one("not_found", infer=False)


def test_who_has_no_key_is_counted(observed: Logging) -> None:
    def counted() -> Samples:
        _, _, body = http_request(observed.address, "GET", "/metrics", Authorization=f"Bearer {'k' * 20}")
        return samples_of(body.decode())

    before = counted()
    assert said_to(observed, posted(RIGHT)) == 401
    assert said_to(observed, b"GET /v2 HTTP/1.1\r\nhost: x\r\n\r\n") == 401
    with triton_grpc.InferenceServerClient(observed.grpc) as client:
        with pytest.raises(InferenceServerException):
            client.infer("tiny", [triton_grpc.InferInput("image", [1, 4, 4, 1], "UINT8")])
        with pytest.raises(InferenceServerException):
            client.get_server_metadata()
    after = counted()
    for model in ("tiny", ""):
        labels = {"model": model, "reason": "unauthorized"}
        assert summed(after, "rushhour_errors_total", **labels) - summed(before, "rushhour_errors_total", **labels) == 2


def test_an_answer_that_cannot_be_written_is_no_success() -> None:
    async def scenario() -> None:
        engine = FakeEngine(EngineConfig("openvino", max_batch=2))
        profile = Profile(ServiceTimes((1, 2), (0.001, 0.002), (900.0, 900.0)))
        cell = Cell([Variant(engine, profile)], Codec("tiny", engine.signature), Policy(max_batch=2), WallClock())

        def submit(rows: int, reply: Callable[[Any], int | None]) -> None:
            wanted = Wanted("", (0,), (True,))
            cell.submit(InferRequest(rows, (memoryview(bytes(16 * rows)),), wanted), reply)

        submit(1, lambda result: 404)
        submit(5, lambda result: 500)  # in several batches
        submit(1, lambda result: None)
        while cell.counters.answered + cell.counters.invalid + cell.counters.failed < 3:
            await asyncio.sleep(0.001)
        totals = cell.totals()
        assert (totals.answered, totals.invalid, totals.failed) == (1, 1, 1)
        assert (totals.success.count, totals.fail.count) == (1, 2)
        assert totals.errors == {"not_found": 1, "internal": 1}
        assert sum(totals.request_s.counts) == 1
        engine.close()

    asyncio.run(scenario())


def test_errors_of_cells_are_added_up_and_outlive_a_cell(tiny: Bundle, tmp_path: Path) -> None:
    with serving(tiny.path, tmp_path, ServeSettings(http_port=0, cells=2)) as server:
        for _ in range(12):
            assert said_to(server, b"GET /nothing HTTP/1.1\r\nhost: x\r\n\r\n") == 404
            assert said_to(server, posted(b"{")) == 400
        assert summed(scraped(server), "rushhour_errors_total", model="", reason="not_found") == 12
        assert summed(scraped(server), "rushhour_errors_total", model="tiny", reason="invalid") == 12
        os.kill(cells_of(server)[0], signal.SIGKILL)

        def is_back() -> bool:
            with contextlib.suppress(OSError):  # asked of the cell that was killed
                text = scraped(server)
                return (
                    summed(text, "rushhour_cell_restarts_total") == 1
                    and summed(text, "rushhour_cells", state="up") == 2
                )
            return False

        wait_until(is_back)
        assert summed(scraped(server), "rushhour_errors_total", model="", reason="not_found") == 12
        assert summed(scraped(server), "rushhour_errors_total", model="tiny", reason="invalid") == 12

"""A server of a model whose samples differ in length: everybody gets the answers of whole samples, over every face."""

from __future__ import annotations

import asyncio
import http.client
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton
import tritonclient.utils.shared_memory as shared_memory
from tritonclient.utils import InferenceServerException

from conftest import Server, serving
from rushhour.bundle import Bundle, OpenDimension, Signature, TensorSpec
from rushhour.clock import WallClock
from rushhour.engines import EngineConfig
from rushhour.goal import SLO, Goal
from rushhour.measurement import PositionCost, ServiceTimes
from rushhour.plan import EngineName, Plan, Policy, Variant
from rushhour.serve import ServeSettings
from rushhour.serve.scheduling.admission import Profile
from rushhour.serve.scheduling.cell import Cell
from rushhour.serve.scheduling.job import Shed
from rushhour.serve.scheduling.variant import Variant as CellVariant
from rushhour.testing.bundles import tiny_text_answers, tiny_text_bundle
from rushhour.testing.fakes import FakeEngine, fake_answers, on_a_timer
from rushhour.wire import Codec, InferRequest, Wanted

SIGNATURE = Signature(
    inputs=(TensorSpec("x", "float32", (32, 2)),),
    outputs=(TensorSpec("sums", "float32", (3,)), TensorSpec("each", "float32", (32,))),
    open=(OpenDimension("length", 32, {"x": 0, "each": 0}, padding={"x": 0}),),
)


def planned(bundle: Bundle, folder: Path, engine: EngineName = "openvino", **policy: Any) -> Path:
    bundle.copy_to(folder / "bundles" / "text")
    variant = Variant("v", "bundles/text", bundle.manifest.hash, engine, "f32")
    Plan(Goal(SLO.parse("p99<50ms")), (variant,), Policy(**{"max_batch": 8, **policy})).save(folder / "plan.json")
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return tiny_text_bundle(tmp_path_factory.mktemp("text") / "text")


@pytest.fixture(scope="module", params=["openvino", "onnxruntime"])
def server(request: pytest.FixtureRequest, text: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    target = planned(text, tmp_path_factory.mktemp("run"), request.param, buckets=(4, 8, 16))
    with serving(target, ServeSettings(http_port=0, grpc_port=0, shared_memory=True)) as running:
        yield running


def words(rows: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, rows, length]).integers(1, 50, (rows, length))


def inputs(kit: Any, tokens: np.ndarray, *, mask: np.ndarray | None = None) -> list[Any]:
    found = []
    for name, array in (("tokens", tokens), ("mask", np.ones_like(tokens) if mask is None else mask)):
        tensor = kit.InferInput(name, list(array.shape), "INT64")
        tensor.set_data_from_numpy(array)
        found.append(tensor)
    return found


def check(answer: Any, tokens: np.ndarray) -> None:
    for name, wanted in tiny_text_answers(tokens).items():
        found = answer.as_numpy(name)
        assert found.shape == wanted.shape
        np.testing.assert_allclose(found, wanted, atol=1e-4)


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_crowd_of_mixed_lengths_gets_the_answers_of_whole_samples(server: Server, protocol: str) -> None:
    def call(seed: int) -> None:
        chance = np.random.default_rng(seed)
        kit: Any = triton if protocol == "http" else triton_grpc
        url = server.url.partition("://")[2] if protocol == "http" else server.grpc
        with kit.InferenceServerClient(url) as client:
            for turn in range(25):
                rows = int(chance.integers(1, 4)) if turn % 5 else 11  # larger than a batch: it is split
                tokens = words(rows, int(chance.integers(1, 33)), seed)
                check(client.infer("tiny-text", inputs(kit, tokens)), tokens)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(call, range(8)))
    counted = json.loads(get(server, "/stats"))
    assert counted["padding"] > 0
    assert counted["positions"] > counted["padding"]
    assert b'rushhour_positions_total{kind="padding"' in get(server, "/metrics")


def test_padding_that_a_client_sends_is_its_own(server: Server) -> None:
    tokens = words(2, 5)
    padded, mask = np.zeros((2, 20), np.int64), np.zeros((2, 20), np.int64)
    padded[:, :5], mask[:, :5] = tokens, 1
    with triton.InferenceServerClient(server.url.partition("://")[2]) as client:
        answer = client.infer("tiny-text", inputs(triton, padded, mask=mask))
    assert answer.as_numpy("tags").shape == (2, 20)
    np.testing.assert_allclose(answer.as_numpy("scores"), tiny_text_answers(tokens)["scores"], atol=1e-4)


def test_json_requests_and_answers_have_their_own_shapes(server: Server) -> None:
    tokens = words(2, 3)
    entries = [
        {"name": "tokens", "datatype": "INT64", "shape": [2, 3], "data": tokens.tolist()},
        {"name": "mask", "datatype": "INT64", "shape": [2, 3], "data": [1] * 6},
    ]
    status, answer = post(server, json.dumps({"inputs": entries}).encode())
    assert status == 200
    tags = next(output for output in answer["outputs"] if output["name"] == "tags")
    assert tags["shape"] == [2, 3]
    np.testing.assert_allclose(np.reshape(tags["data"], (2, 3)), tiny_text_answers(tokens)["tags"], atol=1e-4)


def test_shared_memory_takes_any_length(server: Server) -> None:
    with triton.InferenceServerClient(server.url.partition("://")[2]) as client:
        for length in (3, 30):
            tokens = words(2, length)
            size = tokens.nbytes
            handle = shared_memory.create_shared_memory_region("texts", "/rushhour-texts", 2 * size + 1024)
            try:
                shared_memory.set_shared_memory_region(handle, [tokens, np.ones_like(tokens)])
                client.register_system_shared_memory("texts", "/rushhour-texts", 2 * size + 1024)
                sent = [triton.InferInput(name, [2, length], "INT64") for name in ("tokens", "mask")]
                for number, tensor in enumerate(sent):
                    tensor.set_shared_memory("texts", size, offset=number * size)
                tags = triton.InferRequestedOutput("tags")
                tags.set_shared_memory("texts", 2 * length * 4, offset=2 * size)
                client.infer("tiny-text", sent, outputs=[tags])
                found = shared_memory.get_contents_as_numpy(handle, np.float32, [2, length], 2 * size)
                np.testing.assert_allclose(found, tiny_text_answers(tokens)["tags"], atol=1e-4)
                client.unregister_system_shared_memory("texts")
            finally:
                shared_memory.destroy_shared_memory_region(handle)


@pytest.mark.parametrize("length", [0, 33, 10**9, -1])
def test_hostile_lengths_are_refused_in_one_line_and_nobody_else_notices(server: Server, length: int) -> None:
    entries = [
        {"name": name, "datatype": "INT64", "shape": [1, length], "parameters": {"binary_data_size": 8}}
        for name in ("tokens", "mask")
    ]
    status, answer = post(server, json.dumps({"inputs": entries}).encode())
    assert status == 400
    assert "[-1, 1 to 32]" in answer["error"]
    tokens = words(1, 4)
    with triton_grpc.InferenceServerClient(server.grpc) as client:
        if -(2**63) <= length < 2**31:
            wrong = [triton_grpc.InferInput(name, [1, length], "INT64") for name in ("tokens", "mask")]
            for tensor in wrong:
                tensor._raw_content = bytes(8)
            with pytest.raises(InferenceServerException, match="1 to 32"):
                client.infer("tiny-text", wrong)
        check(client.infer("tiny-text", inputs(triton_grpc, tokens)), tokens)


@pytest.mark.parametrize("word", [50, -1, 2**62])
def test_words_that_the_model_does_not_have_are_refused_and_do_not_fail_the_batch(server: Server, word: int) -> None:
    wrong = words(1, 4)
    wrong[0, 2] = word

    def hostile(_: int) -> None:
        for kit, url in ((triton, server.url.partition("://")[2]), (triton_grpc, server.grpc)):
            with kit.InferenceServerClient(url) as client:
                for _ in range(5):  # the second time the header is known
                    with pytest.raises(InferenceServerException, match=f"holds the value {word}.*takes 0 to 49"):
                        client.infer("tiny-text", inputs(kit, wrong))

    def honest(seed: int) -> None:
        with triton.InferenceServerClient(server.url.partition("://")[2]) as client:
            for _ in range(20):
                tokens = words(1, 4, seed)
                check(client.infer("tiny-text", inputs(triton, tokens)), tokens)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: (hostile if number % 2 else honest)(number), range(4)))


def test_inputs_of_two_lengths_are_refused(server: Server) -> None:
    entries = [
        {"name": "tokens", "datatype": "INT64", "shape": [1, 2], "data": [1, 2]},
        {"name": "mask", "datatype": "INT64", "shape": [1, 3], "data": [1, 1, 1]},
    ]
    status, answer = post(server, json.dumps({"inputs": entries}).encode())
    assert (status, "the inputs differ in length" in answer["error"]) == (400, True)


def test_clients_are_told_which_dimensions_are_open(server: Server) -> None:
    shown = json.loads(get(server, "/v2/models/tiny-text"))
    assert [each["shape"] for each in shown["inputs"]] == [[-1, -1], [-1, -1]]
    assert json.loads(get(server, "/v2/models/tiny-text/config"))["output"][1]["dims"] == [-1]
    assert json.loads(get(server, "/config"))["open_dimensions"][0]["largest"] == 32
    schema = json.loads(get(server, "/openapi.json"))["components"]["schemas"]["InferRequest"]
    sizes = schema["properties"]["inputs"]["items"]["anyOf"][0]["properties"]["shape"]["prefixItems"]
    assert sizes[1] == {"type": "integer", "minimum": 1, "maximum": 32}
    with triton_grpc.InferenceServerClient(server.grpc) as client:
        assert list(client.get_model_metadata("tiny-text").inputs[0].shape) == [-1, -1]


def get(server: Server, path: str) -> bytes:
    connection = http.client.HTTPConnection(*server.address, timeout=30)
    connection.request("GET", path)
    found = connection.getresponse().read()
    connection.close()
    return found


def post(server: Server, body: bytes) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(*server.address, timeout=30)
    connection.request("POST", "/v2/models/tiny-text/infer", body)
    answer = connection.getresponse()
    found = answer.status, json.loads(answer.read())
    connection.close()
    return found


# The cell, with an engine whose batches are seen.


def cell_of(engine: FakeEngine, deadline_ms: float | None = None) -> Cell:
    times = ServiceTimes((1, 2, 4), (0.011, 0.012, 0.014), (1.0, 1.0, 1.0), positions=PositionCost(usual=8, share=1.0))
    policy = Policy(max_batch=engine.config.max_batch, queue_bound=100, deadline_ms=deadline_ms)
    return Cell([CellVariant(engine, Profile(times))], Codec("fake", SIGNATURE), policy, WallClock())


def put(cell: Cell, samples: np.ndarray, done: Callable[[list[bytes] | Exception], None]) -> None:
    def answered(result: Any) -> None:
        done(result if isinstance(result, Exception) else [bytes(each) for each in result])

    wanted = Wanted("", (0, 1), (True, True), sizes=(samples.shape[1],))
    submitted = cell.submit(InferRequest(len(samples), (memoryview(samples.tobytes()),), wanted), answered)
    assert not isinstance(submitted, Shed)


def test_each_request_of_a_padded_batch_gets_its_own_rows() -> None:
    async def run() -> None:
        engine = FakeEngine(EngineConfig("openvino", max_batch=4), signature=SIGNATURE, schedule=on_a_timer)
        cell = cell_of(engine)
        answers: dict[int, list[bytes] | Exception] = {}
        sent = [np.full((rows, length, 2), length, np.float32) for rows, length in ((1, 5), (2, 8), (6, 7), (1, 1))]
        for number, samples in enumerate(sent):
            put(cell, samples, lambda result, number=number: answers.__setitem__(number, result))  # type: ignore[misc]
        while len(answers) < len(sent):
            await asyncio.sleep(0.001)
        for number, samples in enumerate(sent):
            found = answers[number]
            assert not isinstance(found, Exception)
            rows, length = samples.shape[:2]
            scores, each = (np.frombuffer(part, np.float32).reshape(rows, -1) for part in found)
            np.testing.assert_array_equal(scores, fake_answers(samples))
            np.testing.assert_array_equal(each, fake_answers(samples, length))
        totals = cell.totals()
        assert totals.positions == sum(len(samples) * samples.shape[1] for samples in sent)
        assert totals.padding == 10 * 8 - totals.positions
        assert cell.idle
        engine.close()

    asyncio.run(run())


def test_long_samples_are_shed_where_short_ones_would_be_in_time() -> None:
    async def run() -> None:
        engine = FakeEngine(EngineConfig("openvino", max_batch=4), signature=SIGNATURE, schedule=on_a_timer)
        cell = cell_of(engine, deadline_ms=20)
        layout = Wanted("", (0, 1), (True, True), sizes=(8,))
        kept: list[Any] = []
        put(cell, np.zeros((1, 8, 2), np.float32), kept.append)  # something is in flight: no probe
        for rows, length, admitted in ((1, 8, True), (2, 32, False)):
            request = InferRequest(rows, (memoryview(bytes(rows * length * 8)),), layout)
            request.wanted = Wanted("", (0, 1), (True, True), sizes=(length,))
            assert isinstance(cell.submit(request, lambda result: None), Shed) is not admitted
        while not cell.idle:
            await asyncio.sleep(0.001)
        engine.close()

    asyncio.run(run())

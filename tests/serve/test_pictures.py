"""Encoded pictures: a server makes of them what training made of them, over every face, and is not fooled by them."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import http.client
import io
import json
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton
import tritonclient.utils.shared_memory as shared_memory
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException, serialize_byte_tensor

from conftest import Server, serving
from rushhour.bundle import Bundle, Decoding, Preprocessing, Signature, TensorSpec
from rushhour.clock import VirtualClock, WallClock
from rushhour.data import load
from rushhour.engines import EngineConfig
from rushhour.errors import BundleError, DataError, WireError
from rushhour.measurement import ServiceTimes
from rushhour.picture import decode, decode_whole, inspect_picture
from rushhour.plan import Policy
from rushhour.serve import Limits, ServeSettings
from rushhour.serve.scheduling.admission import Profile
from rushhour.serve.scheduling.cell import Cell
from rushhour.serve.scheduling.decoding import Decoder
from rushhour.serve.scheduling.job import Shed
from rushhour.serve.scheduling.variant import Variant
from rushhour.testing.bundles import tiny_answers, tiny_bundle
from rushhour.testing.fakes import FakeEngine, fake_answers, on_a_timer
from rushhour.wire import Codec, PictureRequest, content_of, decode_answer

SIDE = 32
LIMITS = Limits(picture_pixels=4_000_000, body_bytes=8 * 2**20)


def scene(height: int, width: int, seed: int = 0) -> Image.Image:
    """Soft colours: JPEG keeps them, and no part is like another."""
    small = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def encoded(picture: Image.Image, form: str = "JPEG", **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


def turned(picture: Image.Image, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(picture, exif=exif)


def noise(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


def bomb(width: int, height: int) -> bytes:
    """A PNG of one colour: some kilobytes, and as many pixels as it likes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = zlib.compress(bytes((width // 8 + 1) * height), 9)
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


PHOTOS: dict[str, bytes] = {
    "0-exact.png": encoded(scene(SIDE, SIDE), "PNG"),
    "1-large.jpg": encoded(scene(600, 800), quality=90),
    "2-on-its-side.jpg": turned(scene(300, 90), 6),
    "3-mirrored.jpg": turned(scene(90, 300), 5),
    "4-progressive.jpg": encoded(scene(200, 200), progressive=True),
    "5-cmyk.jpg": encoded(scene(64, 64).convert("CMYK")),
    "6-grey.jpg": encoded(scene(64, 64).convert("L")),
    "7-alpha.png": encoded(scene(40, 50).convert("RGBA"), "PNG"),
    "8-palette.png": encoded(scene(40, 50).quantize(16), "PNG"),
    "9-deep.png": encoded(Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64) * 16), "PNG"),
    "a-web.webp": encoded(scene(100, 70), "WEBP"),
}
DAMAGED = {
    "empty": b"",
    "text": b"no picture at all",
    "cut JPEG": PHOTOS["1-large.jpg"][:2000],
    "cut PNG": PHOTOS["7-alpha.png"][:300],
    "GIF": encoded(scene(40, 50).quantize(16), "GIF"),
    "bomb": bomb(4000, 4000),
    "larger bomb": bomb(12_000, 12_000),
    "largest bomb": bomb(100_000, 20_000),
    "scans": (jpeg := PHOTOS["4-progressive.jpg"])[:-2] + jpeg[jpeg.rindex(b"\xff\xda") : -2] * 100 + jpeg[-2:],
}


@pytest.fixture(scope="module")
def trained_on(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """What training made of `PHOTOS`: shape `(n, SIDE, SIDE, 3)`."""
    folder = tmp_path_factory.mktemp("photos")
    for part in ("train", "validation", "test"):
        for name in ("x", "y"):
            (folder / part / name).mkdir(parents=True)
            (folder / part / name / "0.png").write_bytes(PHOTOS["0-exact.png"])
    for name, content in PHOTOS.items():
        (folder / "test" / "x" / name).write_bytes(content)
    (folder / "test" / "x" / "0.png").unlink()
    data = load(str(folder), size=(SIDE, SIDE))
    assert data.preprocessing.decoding == Decoding()
    samples = data.test.inputs[: len(PHOTOS)]
    assert len({sample.tobytes() for sample in samples}) == len(PHOTOS)
    return samples


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny", shape=(SIDE, SIDE, 3))


@pytest.fixture(scope="module")
def server(bundle: Bundle) -> Iterator[Server]:
    with serving(bundle.path, ServeSettings(http_port=0, grpc_port=0, limits=LIMITS)) as running:
        yield running


def post(
    server: Server, body: bytes, headers: dict[str, str] | None = None, model: str = "tiny"
) -> tuple[int, bytes, str | None]:
    connection = http.client.HTTPConnection(*server.address, timeout=20)
    try:
        connection.request("POST", f"/v2/models/{model}/infer", body, headers or {})
        response = connection.getresponse()
        return response.status, response.read(), response.getheader("Inference-Header-Content-Length")
    finally:
        connection.close()


def counters(server: Server) -> dict[str, int]:
    connection = http.client.HTTPConnection(*server.address, timeout=20)
    try:
        connection.request("GET", "/stats")
        found: dict[str, int] = json.loads(connection.getresponse().read())
        return found
    finally:
        connection.close()


def bytes_tensor(pictures: Sequence[bytes]) -> bytes:
    return b"".join(len(picture).to_bytes(4, "little") + picture for picture in pictures)


def binary(pictures: Sequence[bytes], **changes: object) -> tuple[bytes, dict[str, str]]:
    blob = bytes_tensor(pictures)
    parameters = {"binary_data_size": len(blob)}
    entry = {"name": "image", "shape": [len(pictures)], "datatype": "BYTES", "parameters": parameters} | changes
    header = json.dumps({"inputs": [entry]}).encode()
    return header + blob, {"Inference-Header-Content-Length": str(len(header))}


def as_json(pictures: Sequence[object], shape: list[int]) -> bytes:
    entry = {"name": "image", "shape": shape, "datatype": "BYTES", "data": pictures}
    return json.dumps({"inputs": [entry]}).encode()


def in_base64(picture: bytes) -> str:
    return base64.b64encode(picture).decode()


def probabilities(status: int, body: bytes, length: str | None) -> np.ndarray:
    assert status == 200, body
    return decode_answer(body, None if length is None else int(length))["probabilities"]


# The same as in training, over every face.


@pytest.mark.parametrize("column", [False, True])
def test_binary(server: Server, trained_on: np.ndarray, column: bool) -> None:
    pictures = list(PHOTOS.values())
    answer = probabilities(*post(server, *binary(pictures, shape=[len(pictures), 1][: 1 + column])))
    np.testing.assert_allclose(answer, tiny_answers(trained_on), atol=1e-5)


@pytest.mark.parametrize("column", [False, True])
def test_json_carries_base64(server: Server, trained_on: np.ndarray, column: bool) -> None:
    texts: list[object] = [in_base64(picture) for picture in PHOTOS.values()]
    nested = [[text] for text in texts]
    body = as_json(nested if column else texts, [len(texts), 1][: 1 + column])
    np.testing.assert_allclose(probabilities(*post(server, body)), tiny_answers(trained_on), atol=1e-5)


def test_a_picture_as_the_body(server: Server, trained_on: np.ndarray) -> None:
    for (name, picture), sample in zip(PHOTOS.items(), trained_on, strict=True):
        kind = {"jpg": "image/jpeg", "png": "image/png"}.get(name.rpartition(".")[2], "Image/WebP")
        status, body, length = post(server, picture, {"Content-Type": kind})
        assert length is None
        np.testing.assert_allclose(probabilities(status, body, length), tiny_answers(sample[None]), atol=1e-5)


def test_a_picture_and_a_tensor_take_turns_on_one_connection(server: Server, trained_on: np.ndarray) -> None:
    connection = http.client.HTTPConnection(*server.address, timeout=20)
    with contextlib.closing(connection):
        for _ in range(3):
            for kind, body in (("image/png", PHOTOS["0-exact.png"]), ("application/octet-stream", None)):
                headers = {"Content-Type": kind}
                if body is None:
                    body = trained_on[0].tobytes()
                    headers["Inference-Header-Content-Length"] = "0"
                connection.request("POST", "/v2/models/tiny/infer", body, headers)
                response = connection.getresponse()
                answer = probabilities(
                    response.status, response.read(), response.getheader("Inference-Header-Content-Length")
                )
                np.testing.assert_allclose(answer, tiny_answers(trained_on[:1]), atol=1e-5)


@pytest.mark.parametrize("face", ["http", "http-json", "grpc"])
def test_an_unmodified_triton_client(server: Server, trained_on: np.ndarray, face: str) -> None:
    pictures = list(PHOTOS.values())
    module = triton_grpc if face == "grpc" else triton
    with module.InferenceServerClient(server.grpc or "" if face == "grpc" else server.url[7:]) as client:
        tensor = module.InferInput("image", [len(pictures)], "BYTES")
        if face == "http-json":
            texts = np.array([in_base64(picture) for picture in pictures], np.object_)
            tensor.set_data_from_numpy(texts, binary_data=False)
        else:
            tensor.set_data_from_numpy(np.array(pictures, np.object_))
        answer = client.infer("tiny", [tensor]).as_numpy("probabilities")
        metadata = client.get_model_metadata("tiny", as_json=True) if face == "grpc" else None
    np.testing.assert_allclose(answer, tiny_answers(trained_on), atol=1e-5)
    assert metadata is None or metadata["inputs"][0]["datatype"] == "UINT8"


def test_grpc_contents_and_the_clients_own_deadline(server: Server, trained_on: np.ndarray) -> None:
    request = service_pb2.ModelInferRequest(model_name="tiny", id="7")
    tensor = request.inputs.add(name="image", datatype="BYTES", shape=[len(PHOTOS), 1])
    tensor.contents.bytes_contents.extend(PHOTOS.values())
    with triton_grpc.InferenceServerClient(server.grpc) as client:
        response = client._client_stub.ModelInfer(request, timeout=20)
    assert response.id == "7"
    answer = np.frombuffer(response.raw_output_contents[0], np.float32).reshape(-1, 3)
    np.testing.assert_allclose(answer, tiny_answers(trained_on), atol=1e-5)


def test_shared_memory(server: Server, trained_on: np.ndarray) -> None:
    tensor = np.array(list(PHOTOS.values()), np.object_)
    size = len(serialize_byte_tensor(tensor).item())
    region = shared_memory.create_shared_memory_region("pictures", "/rushhour_test_pictures", size)
    try:
        shared_memory.set_shared_memory_region(region, [serialize_byte_tensor(tensor)])
        with triton.InferenceServerClient(server.url[7:]) as client:
            client.register_system_shared_memory("pictures", "/rushhour_test_pictures", size)
            asked = triton.InferInput("image", [len(PHOTOS)], "BYTES")
            asked.set_shared_memory("pictures", size)
            answer = client.infer("tiny", [asked]).as_numpy("probabilities")
            client.unregister_system_shared_memory("pictures")
    finally:
        shared_memory.destroy_shared_memory_region(region)
    np.testing.assert_allclose(answer, tiny_answers(trained_on), atol=1e-5)


def test_every_one_of_many_callers_gets_its_own_answer(server: Server) -> None:
    def caller(number: int) -> None:
        with triton.InferenceServerClient(server.url[7:]) as client:
            for turn in range(3):
                samples = np.stack([noise(100 * number + 10 * turn + index) for index in range(1 + number % 3)])
                pictures = [encoded(Image.fromarray(sample), "PNG") for sample in samples]
                tensor = triton.InferInput("image", [len(pictures)], "BYTES")
                tensor.set_data_from_numpy(np.array(pictures, np.object_))
                answer = client.infer("tiny", [tensor]).as_numpy("probabilities")
                np.testing.assert_allclose(answer, tiny_answers(samples), atol=1e-5)

    with ThreadPoolExecutor(64) as pool:
        list(pool.map(caller, range(64)))


def test_what_is_in_force_is_shown(server: Server) -> None:
    connection = http.client.HTTPConnection(*server.address, timeout=20)
    with contextlib.closing(connection):
        connection.request("GET", "/config")
        shown = json.loads(connection.getresponse().read())["pictures"]
    assert shown["max_pixels"] == LIMITS.picture_pixels
    assert shown["formats"] == ["JPEG", "PNG", "WEBP"]
    assert shown["threads"] >= 1


# What is wrong with pictures and requests.


@pytest.mark.parametrize("harm", DAMAGED)
def test_a_picture_that_cannot_be_read_is_named_and_harms_nobody(
    server: Server, trained_on: np.ndarray, harm: str
) -> None:
    good = PHOTOS["0-exact.png"]
    body, headers = binary([good, good, DAMAGED[harm], good])
    status, answer, _ = post(server, body, headers)
    assert status == 400
    said = json.loads(answer)["error"]
    assert "picture 3 of 4" in said
    assert " at 0x" not in said
    assert post(server, DAMAGED[harm], {"Content-Type": "image/jpeg"})[0] == 400
    with triton_grpc.InferenceServerClient(server.grpc) as client:
        tensor = triton_grpc.InferInput("image", [1], "BYTES")
        tensor.set_data_from_numpy(np.array([DAMAGED[harm]], np.object_))
        with pytest.raises(InferenceServerException, match="cannot be read") as caught:
            client.infer("tiny", [tensor])
        assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
    np.testing.assert_allclose(probabilities(*post(server, *binary([good]))), tiny_answers(trained_on[:1]), atol=1e-5)
    assert counters(server)["waiting"] == 0


GOOD = PHOTOS["0-exact.png"]


@pytest.mark.parametrize(
    ("body", "headers", "status", "says"),
    [
        (*binary([GOOD], shape=[2]), 400, "1 complete elements"),
        (*binary([GOOD, GOOD], shape=[1]), 400, "its shape says 1"),
        (*binary([GOOD], shape=[0]), 400, "0 samples"),
        (*binary([], shape=[-1]), 400, "-1 samples"),
        (*binary([GOOD], shape=[]), 400, "shape"),
        (*binary([GOOD], shape=[1, 2]), 400, "shape"),
        (*binary([GOOD], shape=[1, SIDE, SIDE, 3]), 400, "shape"),
        (*binary([GOOD], shape=[10**6]), 413, "split"),
        (*binary([GOOD], parameters={"binary_data_size": -1}), 400, "binary_data_size"),
        (*binary([GOOD], parameters={"binary_data_size": 5}), 400, "follow the JSON header"),
        (*binary([GOOD], parameters={}), 400, "no data"),
        (*binary([GOOD], name="other"), 400, "unknown"),
        (*binary([GOOD], datatype="FP32"), 400, "UINT8"),
        (as_json(["not Base64"], [1]), {}, 400, "Base64"),
        (as_json(["é"], [1]), {}, 400, "Base64"),
        (as_json([17], [1]), {}, 400, "not a list of text"),
        (as_json([], [1]), {}, 400, "0 elements"),
        (as_json([in_base64(GOOD)], [2]), {}, 400, "1 elements"),
        (b"", {"Content-Type": "image/png"}, 400, "cannot be read"),
    ],
)
def test_a_request_that_is_not_valid_is_refused(
    server: Server, body: bytes, headers: dict[str, str], status: int, says: str
) -> None:
    found, answer, _ = post(server, body, headers)
    assert found == status, answer
    assert says in json.loads(answer)["error"]


def test_a_model_of_something_else_takes_no_pictures(tmp_path: Path) -> None:
    other = tiny_bundle(tmp_path / "b", shape=(16,))
    with serving(other.path) as running:
        assert post(running, GOOD, {"Content-Type": "image/png"})[0] == 415
        status, answer, _ = post(running, *binary([GOOD]))
        assert status == 400
        assert "UINT8" in json.loads(answer)["error"]


@given(st.binary(max_size=60), st.integers(1, 5))
def test_any_bytes_are_elements_or_refused(content: bytes, number: int) -> None:
    signature = Signature((TensorSpec("image", "uint8", (2, 2, 3)),), (TensorSpec("y", "float32", (3,)),))
    codec = Codec("m", signature, pictures=100)
    entry = {"name": "image", "shape": [number], "datatype": "BYTES", "parameters": {"binary_data_size": len(content)}}
    header = json.dumps({"inputs": [entry]}).encode()
    try:
        request = codec.decode(header + content, len(header))
    except WireError:
        return
    assert isinstance(request, PictureRequest)
    assert bytes_tensor([content_of(picture) for picture in request.pictures]) == content


# Turned away before, cancelled during, in time after.


class Counted(Decoder):
    """Counts what it decodes, and holds it back until it is let go."""

    begun = 0
    gate: threading.Event | None = None

    def decode(self, content: bytes, into: np.ndarray) -> None:
        self.begun += 1
        if self.gate is not None:
            assert self.gate.wait(20)
        super().decode(content, into)


PICTURE = Signature((TensorSpec("image", "uint8", (SIDE, SIDE, 3)),), (TensorSpec("probabilities", "float32", (3,)),))


@contextlib.contextmanager
def decoding(*, held: bool = True, threads: int = 1) -> Iterator[Counted]:
    decoder = Counted(PICTURE.inputs[0], max_pixels=4_000_000, threads=threads)
    decoder.begun = 0
    decoder.gate = threading.Event() if held else None
    try:
        yield decoder
    finally:
        if decoder.gate is not None:
            decoder.gate.set()
        decoder.close()


def cell_of(
    decoder: Decoder,
    *,
    queue_bound: int = 100,
    deadline_ms: float | None = None,
    clock: object = None,
    service_s: float = 0.0,
) -> Cell:
    engine = FakeEngine(
        EngineConfig("openvino", max_batch=4), signature=PICTURE, schedule=on_a_timer, service_s=lambda rows: service_s
    )
    profile = Profile(ServiceTimes((1, 2, 4), (0.011, 0.012, 0.014), (90.0, 166.0, 285.0)))
    policy = Policy(max_batch=4, queue_bound=queue_bound, deadline_ms=deadline_ms)
    codec = Codec("fake", PICTURE, pictures=100)
    return Cell([Variant(engine, profile)], codec, policy, clock or WallClock(), decoder)  # type: ignore[arg-type]


def submit(cell: Cell, *pictures: bytes, **parameters: object) -> tuple[asyncio.Future[np.ndarray], Callable[[], None]]:
    answer: asyncio.Future[np.ndarray] = asyncio.get_running_loop().create_future()
    body, headers = binary(pictures)
    length = int(headers["Inference-Header-Content-Length"])
    header = json.dumps(json.loads(body[:length]) | {"parameters": parameters}).encode()

    def reply(result: Sequence[memoryview] | Exception) -> None:
        if isinstance(result, Exception):
            answer.set_exception(result)
        else:
            answer.set_result(np.frombuffer(bytes(result[0]), np.float32).reshape(-1, 3))

    submitted = cell.submit(cell.codec.decode(header + body[length:], len(header)), reply)
    if isinstance(submitted, Shed):
        raise LookupError(submitted.reason)
    return answer, lambda: cell.cancel(submitted)


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.002)


def png(seed: int) -> bytes:
    return encoded(Image.fromarray(noise(seed)), "PNG")


def test_pictures_that_wait_count_as_waiting_and_what_is_too_much_is_never_decoded() -> None:
    async def scenario() -> None:
        with decoding() as decoder:
            cell = cell_of(decoder, queue_bound=4)
            answers = [submit(cell, png(seed))[0] for seed in range(3)]
            assert (cell.waiting, cell.idle) == (3, False)
            with pytest.raises(LookupError, match="queue"):
                submit(cell, png(3), png(4))
            answers.append(submit(cell, png(3))[0])
            with pytest.raises(LookupError, match="queue"):
                submit(cell, png(4))
            assert decoder.gate is not None
            decoder.gate.set()
            for seed, answer in enumerate(answers):
                np.testing.assert_array_equal(await answer, fake_answers(noise(seed)[None]))
            assert decoder.begun == 4
            assert (cell.waiting, cell.idle) == (0, True)
            assert cell.counters.shed_queue == 2

    asyncio.run(scenario())


def test_what_cannot_be_in_time_is_never_decoded() -> None:
    async def scenario() -> None:
        with decoding() as decoder:
            cell = cell_of(decoder, deadline_ms=10)  # the engine alone takes 11
            submit(cell, png(0))  # a probe: nothing else shows whether the profile is right
            with pytest.raises(LookupError, match="deadline"):
                submit(cell, png(0))
            other = cell_of(decoder, deadline_ms=60_000)
            submit(other, png(0), timeout=5_000)
            with pytest.raises(LookupError, match="deadline"):
                submit(other, png(0), timeout=5_000)
            assert (cell.waiting, other.waiting) == (1, 1)
            assert decoder.gate is not None
            decoder.gate.set()
            await eventually(lambda: decoder.begun == 2 and cell.idle and other.idle)

    asyncio.run(scenario())


def test_the_time_that_decoding_takes_counts() -> None:
    async def scenario() -> None:
        with decoding() as decoder:
            cell = cell_of(decoder, deadline_ms=1_000)
            decoder._bytes, decoder._seconds = 1_000.0, 0.2  # 200 µs a byte: a PNG of noise has over 3,000 bytes
            assert len(png(0)) > 3_000
            submit(cell, png(0))
            with pytest.raises(LookupError, match="deadline"):
                submit(cell, png(1))
            assert cell.waiting == 1

    asyncio.run(scenario())


def test_a_picture_that_took_too_long_does_not_cost_the_engine_too() -> None:
    async def scenario() -> None:
        with decoding() as decoder:
            clock = VirtualClock()
            cell = cell_of(decoder, deadline_ms=100, clock=clock)
            answer, _ = submit(cell, png(0))
            clock.advance(0.099)
            assert decoder.gate is not None
            decoder.gate.set()
            with pytest.raises(WireError) as caught:
                await answer
            assert caught.value.status == 429
            assert cell.counters.shed_deadline == 1
            assert (cell.counters.batches, cell.waiting) == (0, 0)

    asyncio.run(scenario())


def test_a_caller_that_has_gone_costs_no_decoding() -> None:
    async def scenario() -> None:
        with decoding() as decoder:
            cell = cell_of(decoder)
            first, leave = submit(cell, png(0), png(1), png(2))
            second, _ = submit(cell, png(3))
            await eventually(lambda: decoder.begun == 1)
            leave()
            assert (cell.waiting, cell.counters.cancelled) == (1, 1)
            assert decoder.gate is not None
            decoder.gate.set()
            np.testing.assert_array_equal(await second, fake_answers(noise(3)[None]))
            assert not first.done()
            assert decoder.begun == 2, "one that had begun, and one that is waited for"
            assert cell.idle

    asyncio.run(scenario())


def test_a_caller_that_goes_while_the_engine_computes_frees_no_room_twice() -> None:
    async def scenario() -> None:
        with decoding(held=False) as decoder:
            cell = cell_of(decoder, service_s=0.2)
            answer, leave = submit(cell, png(0))
            await eventually(lambda: cell.counters.batches == 1)
            leave()
            assert cell.waiting == 0
            await eventually(lambda: cell.idle)
            assert not answer.done()

    asyncio.run(scenario())


def test_after_a_damaged_picture_the_others_of_its_request_are_left_out() -> None:
    async def scenario() -> None:
        with decoding(held=False) as decoder:
            cell = cell_of(decoder)
            answer, _ = submit(cell, b"damaged", *map(png, range(50)))
            with pytest.raises(WireError, match="picture 1 of 51"):
                await answer
            assert decoder.begun == 1
            assert cell.idle

    asyncio.run(scenario())


def test_a_client_that_hangs_up_stops_the_decoding(server: Server) -> None:
    before = counters(server)
    body, headers = binary([encoded(Image.new("RGB", (2000, 1900), "red"), "PNG")] * 200)
    assert len(body) < LIMITS.body_bytes
    head = f"POST /v2/models/tiny/infer HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    with socket.create_connection(server.address, timeout=20) as connection:
        connection.sendall(head.encode() + b"\r\n" + body)
        deadline = time.monotonic() + 20
        while counters(server)["waiting"] == 0 and time.monotonic() < deadline:
            pass
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    while counters(server)["cancelled"] == before["cancelled"] and time.monotonic() < deadline:
        time.sleep(0.01)
    after = counters(server)
    assert after["cancelled"] == before["cancelled"] + 1
    assert (after["waiting"], after["rows"]) == (0, before["rows"])


# The one place.


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("refused", [False, True])
def test_the_pixels_of_a_large_picture_are_those_of_pillow(
    channels: int, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def memfd_create(name: str) -> int:
        raise PermissionError(1, "not permitted", name)

    if refused:
        monkeypatch.setattr("os.memfd_create", memfd_create)
    picture = scene(1100, 1301).convert("L" if channels == 1 else "RGB")
    pixels, seen = decode_whole(io.BytesIO(encoded(picture, "PNG")), channels, max_pixels=2_000_000)
    assert pixels.shape == (1100, 1301, channels)
    assert (seen.height, seen.width, seen.colour) == (1100, 1301, channels == 3)
    np.testing.assert_array_equal(pixels, np.asarray(picture).reshape(pixels.shape))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_stands_upright(orientation: int) -> None:
    """As the camera meant it: what EXIF says has been done to the picture is undone."""
    source = turned(scene(40, 60), orientation)
    seen = inspect_picture(io.BytesIO(source), max_pixels=10_000)
    assert (seen.colour, seen[:2]) == (True, (60, 40) if orientation >= 5 else (40, 60))
    sample = np.empty((*seen[:2], 3), np.uint8)
    decode(io.BytesIO(source), sample, max_pixels=10_000)
    with Image.open(io.BytesIO(source)) as opened:
        wanted = ImageOps.exif_transpose(opened)
    np.testing.assert_array_equal(sample, np.asarray(wanted))


def test_a_large_jpeg_decoded_smaller_is_the_same_picture() -> None:
    picture = scene(1600, 1200)
    sample = np.empty((64, 64, 3), np.uint8)
    decode(io.BytesIO(encoded(picture, quality=95)), sample, max_pixels=10_000_000)
    plain = np.asarray(picture.resize((64, 64), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(sample - plain).max() <= 4


@pytest.mark.filterwarnings("ignore")
@given(st.sampled_from(sorted(PHOTOS)), st.data())
def test_no_damage_gives_anything_but_a_sample_or_a_clear_error(name: str, data: st.DataObject) -> None:
    content = bytearray(PHOTOS[name])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(DataError):
        decode(io.BytesIO(bytes(content)), np.empty((8, 8, 3), np.uint8), max_pixels=1_000_000)


def test_a_bundle_says_how_its_pictures_were_decoded_and_older_ones_keep_their_hash(tmp_path: Path) -> None:
    old = tiny_bundle(tmp_path / "old")
    assert "decoding" not in (old.path / "bundle.json").read_text()
    said = Preprocessing(decoding=Decoding())
    assert msgspec.json.decode(msgspec.json.encode(said), type=Preprocessing) == said
    text = (old.path / "bundle.json").read_text()
    (old.path / "bundle.json").write_text(text.replace('"layout"', '"decoding": {"fit": "crop"}, "layout"'))
    with pytest.raises(BundleError):
        Bundle.open(old.path)


def test_grey_of_12_bits_is_decoded_as_in_training() -> None:
    deep = encoded(Image.fromarray(np.array([[0, 1000], [2000, 4095]], np.uint16)), "PNG")
    into = np.empty((2, 2, 1), np.uint8)
    spec = TensorSpec("image", "uint8", (2, 2, 1))
    for white, wanted in ((4095, [0, 62, 125, 255]), (65_535, [0, 4, 8, 16])):
        decoder = Decoder(spec, max_pixels=100, threads=1, decoding=Decoding(deep=white))
        decoder.decode(deep, into)
        assert into.reshape(-1).tolist() == wanted
        decoder.close()
    narrow = Decoder(spec, max_pixels=100, threads=1, decoding=Decoding(deep=1023))
    with pytest.raises(DataError, match="go up to 4095, and the model expects up to 1023"):
        narrow.decode(deep, into)
    narrow.close()

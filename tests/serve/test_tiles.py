"""Pictures and recordings larger than the model's input: cut, computed among other requests, and merged exactly."""

from __future__ import annotations

import asyncio
import http.client
import io
import json
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnxruntime
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from test_pictures import bomb, counters, encoded, eventually, post, scene, turned
from tritonclient.utils import InferenceServerException

from conftest import Server, serving
from rushhour.bundle import Bundle, Manifest, Signature, TensorSpec, Tiling
from rushhour.bundle.tiling import map_axes, read_tiling
from rushhour.clock import WallClock
from rushhour.engines import EngineConfig
from rushhour.errors import BundleError, WireError
from rushhour.measurement import ServiceTimes
from rushhour.plan import Policy
from rushhour.serve import Limits, ServeSettings
from rushhour.serve.memory.budget import Budget
from rushhour.serve.scheduling.admission import Profile
from rushhour.serve.scheduling.cell import Cell
from rushhour.serve.scheduling.decoding import Decoder
from rushhour.serve.scheduling.job import Shed
from rushhour.serve.scheduling.merging import Grid
from rushhour.serve.scheduling.tiles import Tiles
from rushhour.serve.scheduling.variant import Variant
from rushhour.task import Task
from rushhour.testing.bundles import tiny_answers, tiny_bundle
from rushhour.testing.fakes import FakeEngine, fake_answers, on_a_timer
from rushhour.wire import Codec, PictureRequest, Wanted, decode_answer

TILE, CLASSES = 32, 3
LIMITS = Limits(picture_pixels=4_000_000, body_bytes=8 * 2**20)
SETTINGS = ServeSettings(http_port=0, grpc_port=None, limits=LIMITS)
Arrays = list[np.ndarray]


def graph_of(nodes: list[Any], constants: dict[str, np.ndarray], output: list[Any], side: Any = TILE) -> Any:
    shape = ["batch", *([side, side] if isinstance(side, int) else ["height", "width"]), 3]
    graph = helper.make_graph(
        nodes,
        "tiles",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, shape)],
        [helper.make_tensor_value_info("answer", TensorProto.FLOAT, ["batch", *output])],
        [numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def convolutional(kernel: int, *, stride: int = 1, side: Any = TILE) -> Any:
    """Two convolutions of `kernel`x`kernel`: a value for each class and place, from the pixels around it."""
    random = np.random.default_rng(3)
    constants = {
        "scale": np.array(1 / 255, np.float32),
        "first": random.normal(0, 0.3, (4, 3, kernel, kernel)).astype(np.float32),
        "second": random.normal(0, 0.3, (CLASSES, 4, kernel, kernel)).astype(np.float32),
    }
    pads = [kernel // 2] * 4
    nodes = [
        helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["float", "scale"], ["scaled"]),
        helper.make_node("Transpose", ["scaled"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["planes", "first"], ["hidden"], pads=pads, strides=[stride, stride]),
        helper.make_node("Relu", ["hidden"], ["active"]),
        helper.make_node("Conv", ["active", "second"], ["answer"], pads=pads),
    ]
    places = [side // stride] * 2 if isinstance(side, int) else ["high", "wide"]
    return graph_of(nodes, constants, [CLASSES, *places], side)


def one_box() -> Any:
    """One box for each tile, at the same place, whose score is the tile's brightness."""
    weights = np.zeros((TILE * TILE * 3, 6), np.float32)
    weights[:, 4] = 1 / (255 * len(weights))
    constants = {"weights": weights, "box": np.array([4, 6, 12, 16, 0, 1], np.float32), "to": np.array([-1, 1, 6])}
    nodes = [
        helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["float"], ["flat"], axis=1),
        helper.make_node("MatMul", ["flat", "weights"], ["bright"]),
        helper.make_node("Add", ["bright", "box"], ["row"]),
        helper.make_node("Reshape", ["row", "to"], ["answer"]),
    ]
    return graph_of(nodes, constants, [1, 6])


def bundle_of(path: Path, graph: Any, shape: tuple[int, ...], name: str = "tiny") -> Bundle:
    manifest = Manifest(
        name=name,
        signature=Signature(
            (TensorSpec("image", "uint8", (TILE, TILE, 3)),), (TensorSpec("answer", "float32", shape),)
        ),
        task=Task.classification(tuple("abc")),
    )
    samples = np.random.default_rng(0).integers(0, 256, (4, TILE, TILE, 3), dtype=np.uint8)
    return Bundle.create(path, manifest, lambda file: onnx.save(graph, file), samples={"image": samples})


def photo(height: int, width: int) -> tuple[bytes, np.ndarray]:
    """A picture without loss, and its pixels."""
    picture = scene(height, width, seed=height)
    return encoded(picture, "PNG"), np.asarray(picture)


def tiles_of(pixels: np.ndarray, tiling: Tiling, stride: int = 1) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Cut by hand: `(n, TILE, TILE, 3)`, and where each begins."""
    places = [
        (y, x)
        for y in tiling.offsets(pixels.shape[0], TILE, stride)
        for x in tiling.offsets(pixels.shape[1], TILE, stride)
    ]
    cut = np.full((len(places), TILE, TILE, 3), tiling.fill, np.uint8)
    for tile, (y, x) in zip(cut, places, strict=True):
        part = pixels[y : y + TILE, x : x + TILE]
        tile[: part.shape[0], : part.shape[1]] = part
    return cut, places


def one_by_one(bundle: Bundle, tiles: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(bundle.model), providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, {"image": tile[None]})[0] for tile in tiles])


# Where tiles begin.


@given(
    length=st.integers(1, 2000),
    tile=st.integers(1, 64),
    data=st.data(),
    border=st.sampled_from(["shift", "pad"]),
)
def test_tiles_cover_every_pixel_and_overlap_as_asked(length: int, tile: int, data: st.DataObject, border: Any) -> None:
    tiling = Tiling("mean", overlap=data.draw(st.integers(0, tile - 1)), border=border)
    starts = tiling.offsets(length, tile)
    assert len(starts) == tiling.count(length, tile)
    assert starts[0] == 0
    assert starts[-1] + tile >= length
    assert all(0 < after - before <= tile - tiling.overlap for before, after in pairwise(starts))
    if border == "shift" and length >= tile:
        assert starts[-1] + tile == length
    assert len(starts) == 1 or starts[-2] + tile < length, "no tile shows nothing new"


def test_what_is_no_tiling_is_refused() -> None:
    for text, why in {
        "median": "Invalid enum value",
        "crop,overlap=-1": ">= 0",
        "crop,overlap=a": "Expected `int`",
        "crop,overlp=3": "'overlp' is no setting",
        "crop,overlap=3,overlap=4": "given twice",
        "mean,border=left": "Invalid enum value",
        "mean,fill=256": "<= 255",
        "boxes,same=0": "> 0",
    }.items():
        with pytest.raises(BundleError, match="cannot cut tiles") as refused:
            read_tiling(text)
        assert why in str(refused.value)
    assert read_tiling("crop, overlap=8, border=pad,fill=9") == Tiling("crop", overlap=8, border="pad", fill=9)


@pytest.fixture(scope="module")
def maps(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return bundle_of(tmp_path_factory.mktemp("maps") / "b", convolutional(3), (CLASSES, TILE, TILE))


def test_tiles_that_do_not_fit_the_model_are_refused_in_one_line(tmp_path: Path, maps: Bundle) -> None:
    scores = tiny_bundle(tmp_path / "scores", shape=(TILE, TILE, 3))
    coarse = bundle_of(tmp_path / "coarse", convolutional(3, stride=4), (CLASSES, 8, 8))
    other = tiny_bundle(tmp_path / "other", shape=(8, 8))
    for bundle, tiling, what in (
        (scores, Tiling("mean", overlap=TILE), "the overlap of tiles is 32 pixels"),
        (scores, Tiling("crop", overlap=8), "cannot be merged by 'crop'"),
        (scores, Tiling("boxes", overlap=8), "cannot be merged by 'boxes'"),
        (coarse, Tiling("crop", overlap=6), "give an overlap of 4 or 8"),
        (maps, Tiling("crop"), "tiles without overlap cannot be merged"),
        (maps, Tiling("blend"), "tiles without overlap cannot be merged"),
        (other, Tiling("mean"), "tiles are cut from pictures and recordings"),
    ):
        with pytest.raises(BundleError) as refused:
            bundle.with_tiles(tiling)
        assert what in str(refused.value)
        assert "\n" not in str(refused.value)
        assert Bundle.open(bundle.path).manifest.tiles is None


def test_a_network_that_looks_at_one_pixel_needs_no_overlap(tmp_path: Path) -> None:
    bundle = bundle_of(tmp_path / "b", convolutional(1), (CLASSES, TILE, TILE)).with_tiles(Tiling("crop"))
    assert Bundle.open(bundle.path).manifest.tiles == Tiling("crop")


def test_a_bundle_keeps_its_tiles_and_refuses_impossible_ones(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "b", shape=(TILE, TILE, 3))
    before = bundle.manifest.hash
    tiled = bundle.with_tiles(Tiling("mean", overlap=8))
    assert tiled.manifest.hash != before
    assert Bundle.open(bundle.path).manifest == tiled.manifest
    assert tiled.copy_to(tmp_path / "copy").manifest.tiles == Tiling("mean", overlap=8)
    assert tiled.with_tiles(None).manifest.hash == before
    preprocessing = msgspec.structs.replace(bundle.manifest.preprocessing, tiles=Tiling("mean", overlap=TILE))
    bundle._with(preprocessing=preprocessing)
    with pytest.raises(BundleError, match="overlap"):
        Bundle.open(bundle.path)


# Recordings: one side, along time.


def recording_bundle(path: Path, *, steps: int, channels: int, first: bool) -> Bundle:
    """Two convolutions of 3 along time: a value for each class and step."""
    random = np.random.default_rng(4)
    constants = {
        "a": random.normal(0, 0.5, (4, channels, 3)).astype(np.float32),
        "b": random.normal(0, 0.5, (CLASSES, 4, 3)).astype(np.float32),
    }
    turn = [] if first else [helper.make_node("Transpose", ["signal"], ["rows"], perm=[0, 2, 1])]
    nodes = [
        *turn,
        helper.make_node("Conv", ["signal" if first else "rows", "a"], ["hidden"], pads=[1, 1]),
        helper.make_node("Relu", ["hidden"], ["active"]),
        helper.make_node("Conv", ["active", "b"], ["answer"], pads=[1, 1]),
    ]
    shape = (channels, steps) if first else (steps, channels)
    graph = helper.make_graph(
        nodes,
        "recording",
        [helper.make_tensor_value_info("signal", TensorProto.FLOAT, ["batch", *shape])],
        [helper.make_tensor_value_info("answer", TensorProto.FLOAT, ["batch", CLASSES, steps])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    manifest = Manifest(
        name="tiny",
        signature=Signature(
            (TensorSpec("signal", "float32", shape),), (TensorSpec("answer", "float32", (CLASSES, steps)),)
        ),
        task=Task.classification(tuple("abc")),
    )
    samples = random.normal(size=(4, *shape)).astype(np.float32)
    return Bundle.create(path, manifest, lambda file: onnx.save(model, file), samples={"signal": samples})


def of_whole(bundle: Bundle, recording: np.ndarray, first: bool) -> np.ndarray:
    """The map of a recording of any length: the same graph, with its length left open."""
    model = onnx.load(bundle.model)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[1 + (value.name == "answer" or first)].dim_param = "long"
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found: np.ndarray = session.run(None, {"signal": recording})[0]
    return found


@pytest.mark.parametrize("first", [False, True], ids=["steps first", "channels first"])
def test_a_recording_is_cut_along_its_time(tmp_path: Path, first: bool) -> None:
    bundle = recording_bundle(tmp_path / "tiny", steps=40, channels=2, first=first)
    with pytest.raises(BundleError, match="without overlap"):
        bundle.with_tiles(Tiling("crop"))
    bundle.with_tiles(Tiling("crop", overlap=4))
    random = np.random.default_rng(1)
    with serving(bundle.path, SETTINGS) as server, triton.InferenceServerClient(server.url[7:]) as client:
        assert client.get_model_metadata("tiny")["inputs"][0]["shape"] == [-1, 2, -1] if first else [-1, -1, 2]
        for steps in (40, 41, 399, 5000):
            recording = random.normal(size=(1, *((2, steps) if first else (steps, 2)))).astype(np.float32)
            tensor = triton.InferInput("signal", list(recording.shape), "FP32")
            tensor.set_data_from_numpy(recording)
            for _ in range(2):
                got = client.infer("tiny", [tensor]).as_numpy("answer")
                np.testing.assert_allclose(got, of_whole(bundle, recording, first), atol=1e-5)


def test_scores_of_a_long_recording_are_the_average_of_its_parts(tmp_path: Path) -> None:
    tiling = Tiling("mean", overlap=8)
    bundle = tiny_bundle(tmp_path / "tiny", shape=(32,)).with_tiles(tiling)
    recordings = np.random.default_rng(2).integers(0, 256, (3, 500), dtype=np.uint8)
    cut = [np.stack([recording[at : at + 32] for at in tiling.offsets(500, 32)]) for recording in recordings]
    expected = [tiny_answers(tiles).mean(axis=0) for tiles in cut]
    with serving(bundle.path, SETTINGS) as server, triton.InferenceServerClient(server.url[7:]) as client:
        tensor = triton.InferInput("image", [3, 500], "UINT8")
        tensor.set_data_from_numpy(recordings)
        np.testing.assert_allclose(client.infer("tiny", [tensor]).as_numpy("probabilities"), expected, atol=1e-5)
        tensor = triton.InferInput("image", [1, 3_000_000], "UINT8")
        tensor.set_data_from_numpy(np.zeros((1, 3_000_000), np.uint8))
        with pytest.raises(InferenceServerException, match="recording of 3000000 steps is too large"):
            client.infer("tiny", [tensor])


# Merging, against the plainest way to say it.


@given(
    size=st.tuples(st.integers(1, 150), st.integers(1, 150)),
    overlap=st.integers(4, 24),
    border=st.sampled_from(["shift", "pad"]),
    merge=st.sampled_from(["crop", "blend"]),
    stride=st.sampled_from([1, 4]),
    last=st.booleans(),
)
def test_a_map_of_which_each_tile_shows_its_part_is_put_together(
    size: tuple[int, int], overlap: int, border: Any, merge: Any, stride: int, last: bool
) -> None:
    """Tiles that were cut out of a known map give it back, in any order of axes and with any borders."""
    tiling = Tiling(merge, overlap=overlap // stride * stride, border=border)
    places, side = tuple(-(-length // stride) for length in size), TILE // stride
    whole = np.random.default_rng(1).normal(size=(*places, 2)).astype(np.float32)
    shape = (side, side, 2) if last else (2, side, side)
    signature = Signature((TensorSpec("i", "uint8", (TILE, TILE, 3)),), (TensorSpec("o", "float32", shape),))
    tiling.check(signature)
    grid = Grid(tiling, signature, size)
    padded = np.pad(whole, ((0, TILE), (0, TILE), (0, 0)), constant_values=7.0)
    tiles = []
    for number in range(grid.count):
        y, x = (at // stride for at in grid.place(number))
        tiles.append(padded[y : y + side, x : x + side])
    stacked = np.stack(tiles) if last else np.moveaxis(np.stack(tiles), 3, 1)
    (merged,) = grid.merge([stacked])
    np.testing.assert_allclose(merged if last else np.moveaxis(merged, 0, 2), whole, atol=1e-6)


def test_axes_of_maps() -> None:
    assert map_axes((3, 32, 32), (32, 32)) == (1, 1)
    assert map_axes((8, 8, 5), (32, 32)) == (0, 4)
    assert map_axes((16, 8), (64, 32)) == (0, 4)
    assert map_axes((10,), (32, 32)) is None
    assert map_axes((16, 8, 3), (32, 32)) is None


def boxes_one_by_one(rows: np.ndarray, tile: np.ndarray, same: float) -> list[int]:
    """The best box, then the best that is no second view of a better one, and so on."""
    kept: list[int] = []
    for number in sorted(range(len(rows)), key=lambda each: -rows[each, 4]):
        a = rows[number]
        for other in kept:
            b = rows[other]
            wide = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
            high = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
            smaller = min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))
            if a[5] == b[5] and tile[number] != tile[other] and wide * high > same * smaller:
                break
        else:
            kept.append(number)
    return kept


@given(seed=st.integers(0, 10_000), each=st.integers(0, 8), same=st.floats(0.1, 0.9))
def test_boxes_of_several_tiles_become_one_for_each_object(seed: int, each: int, same: float) -> None:
    random = np.random.default_rng(seed)
    signature = Signature((TensorSpec("i", "uint8", (TILE, TILE, 3)),), (TensorSpec("o", "float32", (each or 1, 6)),))
    tiling = Tiling("boxes", overlap=16, same=same)
    grid = Grid(tiling, signature, (48, 64))
    corner = random.integers(0, 20, (grid.count, each, 2))
    found = np.concatenate(
        [corner, corner + random.integers(1, 12, corner.shape), random.random((*corner.shape[:2], 1)),
         random.integers(0, 2, (*corner.shape[:2], 1))], axis=2
    ).astype(np.float32)  # fmt: skip
    (merged,) = grid.merge([found])
    moved = found.copy()
    for number in range(grid.count):
        y, x = grid.place(number)
        moved[number, :, :4] += [x, y, x, y]
    rows = moved.reshape(-1, 6)
    kept = boxes_one_by_one(rows, np.repeat(np.arange(grid.count), each), same)
    np.testing.assert_array_equal(merged, rows[kept].reshape(-1, 6))


def test_boxes_in_three_outputs() -> None:
    specs = (TensorSpec("b", "float32", (2, 4)), TensorSpec("s", "float32", (2,)), TensorSpec("c", "float32", (2,)))
    signature = Signature((TensorSpec("i", "uint8", (TILE, TILE, 3)),), specs)
    tiling = Tiling("boxes", overlap=16)
    tiling.check(signature)
    grid = Grid(tiling, signature, (TILE, 48))
    boxes = np.array([[[20, 4, 30, 10], [0, 0, 0, 0]], [[4, 4, 14, 10], [0, 0, 5, 5]]], np.float32)
    scores, classes = np.array([[0.9, 0.0], [0.8, 0.3]], np.float32), np.array([[1, 0], [1, 2]], np.float32)
    placed, kept, named = grid.merge([boxes, scores, classes])
    np.testing.assert_array_equal(placed, [[20, 4, 30, 10], [16, 0, 21, 5]])
    np.testing.assert_array_equal(kept, np.array([0.9, 0.3], np.float32))
    np.testing.assert_array_equal(named, [1, 2])
    assert tiling.declared(signature) == {"b": (-1, 4), "s": (-1,), "c": (-1,)}


# Served, over every face.

SCORES, MAPS, BOXES = Tiling("mean", overlap=8), Tiling("crop", overlap=8), Tiling("boxes", overlap=8)


@pytest.fixture(scope="module")
def scores_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    bundle = tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny", shape=(TILE, TILE, 3)).with_tiles(SCORES)
    with serving(bundle.path, ServeSettings(http_port=0, grpc_port=0, limits=LIMITS)) as running:
        yield running


@pytest.fixture(scope="module")
def maps_server(tmp_path_factory: pytest.TempPathFactory, maps: Bundle) -> Iterator[Server]:
    bundle = maps.copy_to(tmp_path_factory.mktemp("bundles") / "tiny").with_tiles(MAPS)
    with serving(bundle.path, ServeSettings(http_port=0, grpc_port=0, limits=LIMITS)) as running:
        yield running


def answer_to(server: Server, picture: bytes, output: str, kind: str = "image/png") -> np.ndarray:
    status, body, length = post(server, picture, {"Content-Type": kind})
    assert status == 200, body
    return decode_answer(body, None if length is None else int(length))[output]


@pytest.mark.parametrize("size", [(32, 32), (20, 20), (33, 32), (100, 250), (401, 307)])
def test_scores_are_averaged(scores_server: Server, size: tuple[int, int]) -> None:
    picture, pixels = photo(*size)
    tiles, _ = tiles_of(pixels, SCORES)
    expected = tiny_answers(tiles).mean(axis=0)[None]
    np.testing.assert_allclose(answer_to(scores_server, picture, "probabilities"), expected, atol=1e-5)


def test_a_jpeg_is_decoded_at_its_own_size_and_upright(scores_server: Server) -> None:
    for picture in (encoded(scene(300, 200), quality=90), turned(scene(300, 90), 6)):
        pixels = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"))
        if picture[:40].find(b"Exif") > 0:
            pixels = np.rot90(pixels, -1)
        tiles, _ = tiles_of(pixels, SCORES)
        got = answer_to(scores_server, picture, "probabilities", "image/jpeg")
        np.testing.assert_allclose(got, tiny_answers(tiles).mean(axis=0)[None], atol=1e-5)


@pytest.mark.parametrize("face", ["http", "grpc"])
def test_several_pictures_of_several_sizes_in_one_request(scores_server: Server, face: str) -> None:
    photos = [photo(40, 90), photo(32, 32), photo(200, 50)]
    module = triton_grpc if face == "grpc" else triton
    address = scores_server.grpc if face == "grpc" else scores_server.url[7:]
    with module.InferenceServerClient(address) as client:
        tensor = module.InferInput("image", [3], "BYTES")
        tensor.set_data_from_numpy(np.array([picture for picture, _ in photos], np.object_))
        answer = client.infer("tiny", [tensor]).as_numpy("probabilities")
    expected = [tiny_answers(tiles_of(pixels, SCORES)[0]).mean(axis=0) for _, pixels in photos]
    np.testing.assert_allclose(answer, np.stack(expected), atol=1e-5)


def test_a_tensor_is_one_tile(scores_server: Server) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, TILE, TILE, 3), dtype=np.uint8)
    status, body, length = post(scores_server, images.tobytes(), {"Inference-Header-Content-Length": "0"})
    assert status == 200
    answer = decode_answer(body, int(length or 0))["probabilities"]
    np.testing.assert_allclose(answer, tiny_answers(images), atol=1e-5)


@pytest.mark.parametrize("face", ["http", "grpc"])
@pytest.mark.parametrize("size", [(100, 250), (20, 200), (32, 32)])
def test_a_tensor_of_another_size_is_cut_too(scores_server: Server, face: str, size: tuple[int, int]) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, *size, 3), dtype=np.uint8)
    expected = [tiny_answers(tiles_of(image, SCORES)[0]).mean(axis=0) for image in images]
    module = triton_grpc if face == "grpc" else triton
    with module.InferenceServerClient(scores_server.grpc if face == "grpc" else scores_server.url[7:]) as client:
        tensor = module.InferInput("image", [2, *size, 3], "UINT8")
        tensor.set_data_from_numpy(images)
        for _ in range(3):  # its head is known then
            answer = client.infer("tiny", [tensor]).as_numpy("probabilities")
            np.testing.assert_allclose(answer, np.stack(expected), atol=1e-5)


@pytest.mark.parametrize("face", ["http", "grpc"])
def test_the_map_of_a_tensor_has_the_shape_of_its_picture_each_time(
    maps_server: Server, maps: Bundle, face: str
) -> None:
    module = triton_grpc if face == "grpc" else triton
    with module.InferenceServerClient(maps_server.grpc if face == "grpc" else maps_server.url[7:]) as client:
        for size in ((97, 150), (97, 150), (97, 150), (60, 40), (32, 32)):
            image = np.random.default_rng(size[0]).integers(0, 256, (1, *size, 3), dtype=np.uint8)
            answers = one_by_one(maps, tiles_of(image[0], MAPS)[0])
            expected = Grid(MAPS, maps.manifest.signature, size).merge([answers])[0]
            tensor = module.InferInput("image", [1, *size, 3], "UINT8")
            tensor.set_data_from_numpy(image)
            for identity in ("", "7", "8", "9"):
                got = client.infer("tiny", [tensor], request_id=identity)
                np.testing.assert_allclose(got.as_numpy("answer"), expected[None], atol=1e-5)
        tensor = module.InferInput("image", [2, 40, 40, 3], "UINT8")
        tensor.set_data_from_numpy(np.zeros((2, 40, 40, 3), np.uint8))
        with pytest.raises(InferenceServerException, match="send one in each request"):
            client.infer("tiny", [tensor])


@pytest.mark.parametrize("size", [(32, 32), (20, 50), (97, 150), (200, 133)])
def test_a_map_equals_that_of_the_whole_picture(maps_server: Server, size: tuple[int, int]) -> None:
    """Two convolutions of 3x3 look two pixels aside, and each tile has four to either side of what it gives."""
    picture, pixels = photo(*size)
    network = onnxruntime.InferenceSession(convolutional(3, side=None).SerializeToString())
    height, width = max(size[0], TILE), max(size[1], TILE)
    padded = np.zeros((height, width, 3), np.uint8)
    padded[: size[0], : size[1]] = pixels  # a smaller picture is filled up
    expected = network.run(None, {"image": padded[None]})[0][:, :, : size[0], : size[1]]
    got = answer_to(maps_server, picture, "answer")
    assert got.shape == (1, CLASSES, *size)
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("face", ["http", "grpc"])
def test_a_map_over_triton_clients(maps_server: Server, maps: Bundle, face: str) -> None:
    picture, pixels = photo(97, 150)
    tiles, _ = tiles_of(pixels, MAPS)
    answers = one_by_one(maps, tiles)
    expected = Grid(MAPS, maps.manifest.signature, pixels.shape[:2]).merge([answers])[0]
    module = triton_grpc if face == "grpc" else triton
    address = maps_server.grpc if face == "grpc" else maps_server.url[7:]
    with module.InferenceServerClient(address) as client:
        tensor = module.InferInput("image", [1], "BYTES")
        tensor.set_data_from_numpy(np.array([picture], np.object_))
        got = client.infer("tiny", [tensor], request_id="7").as_numpy("answer")
        metadata = client.get_model_metadata("tiny", **({"as_json": True} if face == "grpc" else {}))
    np.testing.assert_allclose(got, expected[None], atol=1e-5)
    assert [int(size) for size in metadata["outputs"][0]["shape"]] == [-1, CLASSES, -1, -1]
    assert [int(size) for size in metadata["inputs"][0]["shape"]] == [-1, -1, -1, 3]


def test_boxes_are_moved_to_their_place_in_the_picture(tmp_path: Path) -> None:
    bundle = bundle_of(tmp_path / "tiny", one_box(), (1, 6)).with_tiles(BOXES)
    picture, pixels = photo(80, 104)
    tiles, places = tiles_of(pixels, BOXES)
    rows = one_by_one(bundle, tiles)[:, 0]
    rows[:, :4] += [[x, y, x, y] for y, x in places]
    expected = rows[boxes_one_by_one(rows, np.arange(len(rows)), BOXES.same)]
    with serving(bundle.path, ServeSettings(http_port=0)) as server:
        got = answer_to(server, picture, "answer")
    assert got.shape[1] == len(expected) > 5
    np.testing.assert_allclose(got[0], expected, atol=1e-4)


def test_times_include_the_decoding_and_tiles_are_counted(scores_server: Server) -> None:
    before = counters_of(scores_server)
    connection = http.client.HTTPConnection(*scores_server.address, timeout=20)
    connection.request("POST", "/v2/models/tiny/infer", photo(100, 250)[0], {"Content-Type": "image/png"})
    response = connection.getresponse()
    response.read()
    connection.close()
    said = dict(metric.partition(";")[::2] for metric in response.getheader("Server-Timing", "").split(", "))
    times = {name: float(said[name][4:]) for name in ("queue", "decode", "batch", "compute", "total")}
    assert times["decode"] > 0
    assert times["total"] == pytest.approx(sum(times.values()) - times["total"], abs=0.003)
    after = counters_of(scores_server)
    tiles = len(tiles_of(np.zeros((100, 250, 3), np.uint8), SCORES)[0])
    assert after["rushhour_cut_pictures_total"] - before["rushhour_cut_pictures_total"] == 1
    assert after["rushhour_tiles_total"] - before["rushhour_tiles_total"] == tiles


def counters_of(server: Server) -> dict[str, float]:
    connection = http.client.HTTPConnection(*server.address, timeout=20)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    connection.close()
    return {line.partition("{")[0]: float(line.rpartition(" ")[2]) for line in lines if line.startswith("rushhour_")}


def test_config_shows_the_tiles(scores_server: Server) -> None:
    connection = http.client.HTTPConnection(*scores_server.address, timeout=20)
    connection.request("GET", "/config")
    shown = json.loads(connection.getresponse().read())
    connection.close()
    assert shown["tiles"] == msgspec.to_builtins(SCORES)


# Hostile and careless clients.


HOSTILE = {
    "cut": (encoded(scene(600, 800), quality=90)[:3000], 400, "cannot be read"),
    "bomb": (bomb(4000, 4000), 400, "4,000,000 are allowed"),
    "larger bomb": (bomb(100_000, 20_000), 400, "decompression bomb"),
    "wide": (bomb(130_000, 1), 413, "tiles, and a request has up to 4096"),
    "text": (b"no picture", 400, "cannot be read"),
    "cut in its header": (encoded(scene(600, 800), "PNG")[:20], 400, "cannot be read"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_picture_is_refused_and_costs_the_others_nothing(scores_server: Server, name: str) -> None:
    content, status, why = HOSTILE[name]
    before = counters(scores_server)
    found, body, _ = post(scores_server, content, {"Content-Type": "image/png"})
    assert (found, why in json.loads(body)["error"]) == (status, True), body
    after = counters(scores_server)
    assert after["invalid"] == before["invalid"] + 1
    test_scores_are_averaged(scores_server, (100, 250))


def test_a_long_thin_picture_is_many_tiles(scores_server: Server) -> None:
    content = bomb(50_000, 1)
    pixels = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    expected = tiny_answers(tiles_of(pixels, SCORES)[0]).mean(axis=0)[None]
    np.testing.assert_allclose(answer_to(scores_server, content, "probabilities"), expected, atol=1e-5)


def test_a_map_takes_one_picture_in_a_request(maps_server: Server) -> None:
    picture = photo(40, 40)[0]
    with triton.InferenceServerClient(maps_server.url[7:]) as client:
        tensor = triton.InferInput("image", [2], "BYTES")
        tensor.set_data_from_numpy(np.array([picture, picture], np.object_))
        with pytest.raises(InferenceServerException, match="1 of them"):
            client.infer("tiny", [tensor])


def test_clients_that_hang_up_leave_nothing(scores_server: Server) -> None:
    content = photo(1500, 1500)[0]
    head = (
        f"POST /v2/models/tiny/infer HTTP/1.1\r\nhost: x\r\ncontent-type: image/png\r\ncontent-length: {len(content)}"
    )
    for _ in range(6):
        with socket.create_connection(scores_server.address) as sock:
            sock.sendall(head.encode() + b"\r\n\r\n" + content)
    test_scores_are_averaged(scores_server, (401, 307))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda size: test_scores_are_averaged(scores_server, size), [(100, 250), (401, 307)] * 6))


# The stage by itself.

PICTURE = Signature((TensorSpec("image", "uint8", (8, 8, 3)),), (TensorSpec("probabilities", "float32", (3,)),))


class Held(Decoder):
    """Counts the pixels that are decoded, and holds decoding back until it is let go."""

    gate: threading.Event
    begun = 0

    def whole(self, content: bytes) -> np.ndarray:
        self.begun += 1
        assert self.gate.wait(20)
        return super().whole(content)


def stage_of(
    decoder: Decoder, *, held_bytes: int = 2**20, deadline_ms: float | None = None, queue_bound: int = 1000
) -> Tiles:
    engine = FakeEngine(EngineConfig("openvino", max_batch=4), signature=PICTURE, schedule=on_a_timer)
    profile = Profile(ServiceTimes((1, 2, 4), (0.001, 0.0011, 0.0012), (90.0, 166.0, 285.0)))
    policy = Policy(max_batch=4, queue_bound=queue_bound, deadline_ms=deadline_ms)
    variant = Variant(engine, profile)
    cell = Cell([variant], Codec("fake", PICTURE, pictures=100), policy, WallClock(), decoder)
    return Tiles(cell, Tiling("mean", overlap=2), WallClock(), Budget(held_bytes))


def submit(stage: Tiles, content: bytes) -> tuple[asyncio.Future[np.ndarray], Callable[[], None]]:
    answer: asyncio.Future[np.ndarray] = asyncio.get_running_loop().create_future()

    def reply(result: Sequence[memoryview] | Exception) -> None:
        if isinstance(result, Exception):
            answer.set_exception(result)
        else:
            answer.set_result(np.frombuffer(bytes(result[0]), np.float32))

    wanted = Wanted(id="", outputs=(0,), binary=(True,))
    submitted = stage.submit(PictureRequest((memoryview(content),), wanted), reply)
    assert not isinstance(submitted, Shed)
    return answer, lambda: stage.cancel(submitted)


def expected_of(pixels: np.ndarray) -> np.ndarray:
    tiling = Tiling("mean", overlap=2)
    cut = np.stack(
        [
            pixels[y : y + 8, x : x + 8]
            for y in tiling.offsets(len(pixels), 8)
            for x in tiling.offsets(pixels.shape[1], 8)
        ]
    )
    return fake_answers(cut).mean(axis=0, dtype=np.float64).astype(np.float32)


def held(threads: int = 8) -> Held:
    decoder = Held(PICTURE.inputs[0], max_pixels=4_000_000, threads=threads)
    decoder.gate = threading.Event()
    return decoder


def test_no_more_pictures_are_decoded_at_once_than_there_is_room_for() -> None:
    async def scenario() -> None:
        decoder = held()
        stage = stage_of(decoder, held_bytes=4 * 2 * 128 * 128 * 3)  # two pictures, and not quite a third
        photos = [photo(100 + number, 120) for number in range(6)]
        answers = [submit(stage, content)[0] for content, _ in photos]
        await eventually(lambda: decoder.begun == 2 and len(stage._waiting) == 4)
        assert not stage.idle
        decoder.gate.set()
        for answer, (_, pixels) in zip(answers, photos, strict=True):
            np.testing.assert_allclose(await answer, expected_of(pixels), rtol=1e-6)
        await eventually(lambda: stage._held == 0 and stage.idle)
        assert stage.totals().cut == 6
        decoder.close()

    asyncio.run(scenario())


def test_pictures_that_are_too_large_together_are_refused_before_one_is_decoded() -> None:
    async def scenario() -> None:
        decoder = held()
        stage = stage_of(decoder, held_bytes=4 * 2 * 128 * 128 * 3)
        answer: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        wanted = Wanted(id="", outputs=(0,), binary=(True,))
        request = PictureRequest([memoryview(photo(100, 120)[0])] * 4, wanted)
        stage.submit(request, lambda result: answer.set_result(result))
        wrong = await answer
        assert isinstance(wrong, WireError)
        assert (wrong.status, wrong.what) == (413, "the request has 4 pictures")
        assert decoder.begun == 0
        assert stage.idle
        assert stage.totals().invalid == 1
        decoder.close()

    asyncio.run(scenario())


def test_callers_that_go_give_their_room_back() -> None:
    async def scenario() -> None:
        decoder = held()
        stage = stage_of(decoder, held_bytes=4 * 2 * 128 * 128 * 3)
        begun = [submit(stage, photo(100 + number, 120)[0]) for number in range(4)]
        await eventually(lambda: decoder.begun == 2 and len(stage._waiting) == 2)
        for _, cancel in begun:
            cancel()
        decoder.gate.set()
        content, pixels = photo(64, 64)
        np.testing.assert_allclose(await submit(stage, content)[0], expected_of(pixels), rtol=1e-6)
        await eventually(lambda: stage._held == 0 and stage.idle)
        assert decoder.begun == 3
        assert stage.totals().cancelled == 4
        decoder.close()

    asyncio.run(scenario())


def test_a_stage_that_is_abandoned_answers_everybody() -> None:
    async def scenario() -> None:
        decoder = held()
        stage = stage_of(decoder)
        answers = [submit(stage, photo(100 + number, 120)[0])[0] for number in range(3)]
        await eventually(lambda: decoder.begun > 0)
        stage.abandon(WireError("the end", status=500))
        for answer in answers:
            with pytest.raises(WireError, match="the end"):
                await answer
        decoder.gate.set()
        await eventually(lambda: stage.idle)
        decoder.close()

    asyncio.run(scenario())


def test_a_picture_whose_time_is_over_costs_no_tiles() -> None:
    async def scenario() -> None:
        decoder = held()
        stage = stage_of(decoder, deadline_ms=60)
        answer, _ = submit(stage, photo(100, 120)[0])
        await eventually(lambda: decoder.begun == 1)
        await asyncio.sleep(0.07)
        decoder.gate.set()
        with pytest.raises(WireError, match="time limit"):
            await answer
        assert stage.totals().batches == 0
        decoder.close()

    asyncio.run(scenario())


def test_pictures_wait_for_room_in_the_queue_and_are_not_shed_for_it() -> None:
    """Each of them has more tiles than the queue takes: one after another is decoded and computed."""

    async def scenario() -> None:
        decoder = held()
        stage = stage_of(decoder, queue_bound=50)
        photos = [photo(100 + number, 120) for number in range(3)]
        answers = [submit(stage, content)[0] for content, _ in photos]
        await eventually(lambda: decoder.begun == 1 and len(stage._waiting) == 2)
        decoder.gate.set()
        for answer, (_, pixels) in zip(answers, photos, strict=True):
            np.testing.assert_allclose(await answer, expected_of(pixels), rtol=1e-6)
        await eventually(lambda: stage.idle)
        assert stage.cell.batcher.waiting == 0
        decoder.close()

    asyncio.run(scenario())


def test_more_pictures_than_the_queue_has_room_for_samples_are_shed_on_arrival() -> None:
    async def scenario() -> None:
        decoder = held()
        stage = stage_of(decoder, queue_bound=3)
        content = photo(100, 120)[0]
        begun = [submit(stage, content) for _ in range(3)]
        wanted = Wanted(id="", outputs=(0,), binary=(True,))
        assert isinstance(stage.submit(PictureRequest((memoryview(content),), wanted), lambda result: None), Shed)
        for answer, cancel in begun:
            cancel()
            answer.cancel()
        decoder.gate.set()
        await eventually(lambda: stage.idle)
        decoder.close()

    asyncio.run(scenario())

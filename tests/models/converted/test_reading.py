"""ONNX files that want something else: refused in one line, with nothing read from elsewhere and nothing computed."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import graph_of
from onnx import TensorProto, helper

from rushhour.errors import ModelError
from rushhour.models.converted import MOST_NODES, read_onnx
from rushhour.models.converted import reading as module

node = helper.make_node


def typed(model: onnx.ModelProto, width: int) -> onnx.ModelProto:
    model.graph.output[0].type.CopyFrom(helper.make_tensor_type_proto(TensorProto.FLOAT, ["n", width]))
    return model


def plain() -> onnx.ModelProto:
    return typed(graph_of([node("MatMul", ["x", "w"], ["y"])], {"w": np.ones((4, 3), np.float32)}), 3)


def external(location: str, length: int = 48, offset: int = 0) -> onnx.ModelProto:
    model = plain()
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("length", str(length)), ("offset", str(offset))):
        tensor.external_data.add(key=key, value=value)
    return model


def dims(*sizes: int) -> onnx.ModelProto:
    model = plain()
    model.graph.initializer[0].dims[:] = sizes
    return model


def cyclic() -> onnx.ModelProto:
    model = plain()
    model.graph.node.extend([node("Add", ["b", "x"], ["a"]), node("Add", ["a", "x"], ["b"])])
    return model


def long() -> onnx.ModelProto:
    names = ["x", *(f"t{index}" for index in range(MOST_NODES)), "y"]
    model = graph_of([node("Identity", ["x"], ["y"])])
    del model.graph.node[:]
    model.graph.node.extend(node("Neg", [one], [other]) for one, other in itertools.pairwise(names))
    return model


def calling(nodes: dict[str, list[onnx.NodeProto]]) -> onnx.ModelProto:
    model = typed(graph_of([node("Identity", ["x"], ["y"])]), 4)
    del model.graph.node[:]
    model.graph.node.extend([node("f0", ["x"], ["y"], domain="own")])
    model.opset_import.append(helper.make_opsetid("own", 1))
    own = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
    model.functions.extend(helper.make_function("own", name, ["x"], ["y"], body, own) for name, body in nodes.items())
    return model


def bomb() -> onnx.ModelProto:
    """Functions that call each other twice: 2^40 operators once they are inlined."""
    body = {
        f"f{level}": [
            node(f"f{level + 1}", ["x"], ["a"], domain="own"),
            node(f"f{level + 1}", ["a"], ["y"], domain="own"),
        ]
        for level in range(40)
    }
    return calling(body | {"f40": [node("Neg", ["x"], ["y"])]})


def in_attribute() -> onnx.ModelProto:
    model = graph_of(
        [node("Constant", [], ["c"], value=external("../secret").graph.initializer[0]), node("Add", ["x", "x"], ["y"])]
    )
    return model


HOSTILE: dict[str, tuple[Callable[[], onnx.ModelProto], str]] = {
    "weights above the folder": (lambda: external("../secret"), "outside of its folder"),
    "weights at the root": (lambda: external("/etc/hostname"), "outside of its folder"),
    "weights behind a link": (lambda: external("link"), "outside of its folder"),
    "weights of a constant": (in_attribute, "outside of its folder"),
    "missing weights": (lambda: external("none.bin"), "missing"),
    "weights beyond the end": (lambda: external("short.bin"), "is not whole"),
    "weights of another length": (lambda: external("weights.bin", 12), "is not whole"),
    "weights before the start": (lambda: external("weights.bin", offset=-4), "is not whole"),
    "huge shape": (lambda: dims(2**40, 2**20), "takes"),
    "negative shape": (lambda: dims(-4, -3), "has the shape"),
    "shape without its data": (lambda: dims(4, 4), "has not the data"),
    "cycle": (cyclic, "topologically sorted"),
    "too many operators": (long, "more than 8,000 operators"),
    "function that calls itself": (lambda: calling({"f0": [node("f0", ["x"], ["y"], domain="own")]}), "calls itself"),
    "functions that multiply": (bomb, "more than 8,000 operators"),
}


@pytest.mark.parametrize(("model", "words"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_file_is_refused(tmp_path: Path, model: Callable[[], onnx.ModelProto], words: str) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(b"s" * 48)
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "short.bin").write_bytes(b"s" * 40)
    (folder / "weights.bin").write_bytes(b"s" * 48)
    before = {file: file.read_bytes() for file in folder.iterdir()}
    file = folder / "net.onnx"
    file.write_bytes(model().SerializeToString())
    with pytest.raises(ModelError, match=words) as raised:
        read_onnx(file)
    assert "\n" not in str(raised.value)
    assert {each: each.read_bytes() for each in folder.iterdir() if each != file} == before


def test_other_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = plain().SerializeToString()
    (tmp_path / "empty.onnx").write_bytes(b"")
    (tmp_path / "cut.onnx").write_bytes(content[:-9])
    (tmp_path / "text.onnx").write_text("hello")
    (tmp_path / "folder.onnx").mkdir()
    for name in ("empty", "cut", "text", "folder", "none"):
        with pytest.raises(ModelError, match="cannot read the model"):
            read_onnx(tmp_path / f"{name}.onnx")
    (tmp_path / "large.onnx").write_bytes(content)
    monkeypatch.setattr(module, "_LARGEST_BYTES", 100)
    with pytest.raises(ModelError, match="larger than"):
        read_onnx(tmp_path / "large.onnx")


def test_weights_beside_the_file_and_functions_come_into_the_model(tmp_path: Path) -> None:
    onnx.save(plain(), tmp_path / "out.onnx", save_as_external_data=True, size_threshold=0, location="w.bin")
    assert read_onnx(tmp_path / "out.onnx").graph.initializer[0].raw_data == plain().graph.initializer[0].raw_data
    model = calling({"f0": [node("f1", ["x"], ["y"], domain="own")], "f1": [node("Neg", ["x"], ["y"])]})
    onnx.save(model, tmp_path / "functions.onnx")
    assert [each.op_type for each in read_onnx(tmp_path / "functions.onnx").graph.node] == ["Neg"]

"""What spans several operators: shapes that follow from the batch, layers from parts, constants, shared weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from graphs import answers, graph_of
from onnx import TensorProto, helper
from torch import nn

from rushhour.errors import ModelError
from rushhour.models.converted import Converted, NotTrainable, convert, network_of, verify
from rushhour.models.converted.functions import FUNCTIONS
from rushhour.models.converted.program import Call, Program, Ref

node = helper.make_node


def ints(*values: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.array(values, np.int64)


def random(*shape: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def layers(found: Converted) -> list[str]:
    return [type(module).__name__ for module in found.network().children()]


def same(model: onnx.ModelProto, found: Converted, shape: Sequence[int] = (4,)) -> None:
    for batch in (1, 9):
        x = np.random.default_rng(batch).normal(size=(batch, *shape)).astype(np.float32)
        (expected,) = answers(model, {"x": x})
        answer = found.network()(torch.from_numpy(x)).detach().numpy()
        assert answer.shape == expected.shape
        np.testing.assert_allclose(answer, expected, rtol=2e-4, atol=2e-5)


GROWING = {
    "batch of a reshape": [
        node("Shape", ["x"], ["s"]), node("Gather", ["s", "zero"], ["n"]), node("Unsqueeze", ["n", "first"], ["n1"]),
        node("Concat", ["n1", "two", "minus"], ["to"], axis=0), node("Reshape", ["x", "to"], ["y"]),
    ],
    "heads in the batch": [
        node("Shape", ["x"], ["s"], start=0, end=1), node("Mul", ["s", "two"], ["n2"]),
        node("Concat", ["n2", "two"], ["to"], axis=0), node("Reshape", ["x", "to"], ["y"]),
    ],
    "expand by where": [
        node("Shape", ["x"], ["s"], end=1), node("Concat", ["s", "minus"], ["wanted"], axis=0),
        node("Equal", ["wanted", "minus"], ["open"]), node("Where", ["open", "four", "wanted"], ["to"]),
        node("Expand", ["row", "to"], ["wide"]), node("Add", ["x", "wide"], ["y"]),
    ],
    "filled": [
        node("Shape", ["x"], ["s"]), node("ConstantOfShape", ["s"], ["zeros"]), node("Sub", ["x", "zeros"], ["y"]),
    ],
    "counted": [
        node("Shape", ["x"], ["s"], start=1), node("Squeeze", ["s"], ["k"]),
        node("Range", ["zero", "k", "one"], ["r"]),
        node("Cast", ["r"], ["f"], to=TensorProto.FLOAT), node("Mul", ["x", "f"], ["y"]),
    ],
    "size": [
        node("Size", ["x"], ["k"]), node("Unsqueeze", ["k", "first"], ["to"]), node("Reshape", ["x", "to"], ["y"]),
    ],
    "eye": [node("EyeLike", ["square"], ["e"]), node("MatMul", ["x", "e"], ["y"])],
    "constants": [
        node("Constant", [], ["c"], value_floats=[1.0, 2.0, 3.0, 4.0]), node("Constant", [], ["k"], value_int=2),
        node("Cast", ["k"], ["f"], to=TensorProto.FLOAT), node("Mul", ["c", "f"], ["d"]),
        node("Add", ["x", "d"], ["y"]),
    ],
}  # fmt: skip
CONSTANTS = {
    "zero": np.int64(0), "one": np.int64(1), "first": ints(0), "two": ints(2), "four": ints(4), "minus": ints(-1),
    "row": random(1, 4), "square": random(4, 4),
}  # fmt: skip


@pytest.mark.parametrize("nodes", GROWING.values(), ids=GROWING)
def test_no_batch_size_is_baked_in(nodes: list[onnx.NodeProto]) -> None:
    used = {name for each in nodes for name in each.input}
    model = graph_of(nodes, {name: value for name, value in CONSTANTS.items() if name in used})
    same(model, convert(model, "net"))


def test_a_product_with_a_matrix_and_a_sum_are_one_dense_layer() -> None:
    nodes = [node("MatMul", ["x", "w"], ["a"]), node("Add", ["b", "a"], ["c"]), node("Div", ["c", "s"], ["y"])]
    model = graph_of(nodes, {"w": random(4, 3), "b": random(3), "s": np.float32(4)})
    found = convert(model, "net")
    same(model, found)
    (layer,) = found.network().children()
    assert isinstance(layer, nn.Linear)
    assert len(found.program.calls) == 1


def test_what_follows_a_convolution_is_put_into_it() -> None:
    nodes = [
        node("Conv", ["x", "w"], ["a"]), node("Mul", ["a", "m"], ["b"]), node("Add", ["b", "t"], ["c"]),
        node("ConvTranspose", ["c", "v"], ["d"], group=2), node("Sub", ["t4", "d"], ["y"]),
    ]  # fmt: skip
    constants = {"w": random(6, 2, 3, 3), "m": random(1, 6, 1, 1), "t": random(6, 1, 1), "v": random(6, 2, 2, 2)}
    model = graph_of(nodes, constants | {"t4": random(1, 4, 1, 1)}, shape=("n", 2, 5, 5))
    found = convert(model, "net")
    same(model, found, (2, 5, 5))
    assert [call.what for call in found.program.calls] == list(found.program.layers)


def test_a_value_of_two_names_keeps_its_layer() -> None:
    nodes = [
        node("MatMul", ["x", "w"], ["a"]), node("Identity", ["a"], ["i"]), node("Mul", ["i", "m"], ["b"]),
        node("Add", ["a", "b"], ["y"]),
    ]  # fmt: skip
    model = graph_of(nodes, {"w": random(4, 4), "m": random(4)})
    same(model, convert(model, "net"))
    turned = [
        node("Conv", ["x", "k"], ["a"]), last("a"), first("a_last"), node("Mul", ["a_last_first", "m"], ["b"]),
        node("ReduceMean", ["a_last"], ["c"], axes=[1, 2, 3]), node("Add", ["b", "c"], ["y"]),
    ]  # fmt: skip
    model = graph_of(turned, {"k": random(4, 2, 3, 3), "m": random(1, 4, 1, 1)}, shape=("n", 2, 5, 5), opset=13)
    same(model, convert(model, "net"), (2, 5, 5))


def last(name: str) -> onnx.NodeProto:
    return node("Transpose", [name], [f"{name}_last"], perm=[0, 2, 3, 1])


def first(name: str) -> onnx.NodeProto:
    return node("Transpose", [name], [f"{name}_first"], perm=[0, 3, 1, 2])


def test_layers_with_channels_last_are_computed_with_channels_first() -> None:
    """Only the input is turned: sums, constants, padding, joining, pooling and dense layers need no Transpose."""
    nodes = [
        first("x"), node("Conv", ["x_first", "k"], ["a"]), last("a"),
        node("Mul", ["a_last", "gamma"], ["b"]), node("Add", ["beta", "b"], ["c"]),
        node("Clip", ["c", "zero", "six"], ["d"]),
        node("Pad", ["d", "around"], ["p"]), first("p"), node("Conv", ["p_first", "k2"], ["e"]), last("e"),
        node("Add", ["d", "e_last"], ["f"]), node("Concat", ["f", "d"], ["g"], axis=3),
        node("PRelu", ["g", "slope"], ["h"]),
        node("ReduceMean", ["h"], ["m"], axes=[1, 2]), node("Sigmoid", ["m"], ["s"]), node("Mul", ["h", "s"], ["i"]),
        node("ReduceMax", ["i"], ["j"], axes=[1, 2], keepdims=0), node("MatMul", ["j", "w1"], ["n"]),
        node("Reshape", ["i", "rows"], ["q"]), node("Relu", ["q"], ["r"]), node("MatMul", ["r", "w2"], ["t"]),
        node("Add", ["n", "t"], ["y"]),
    ]  # fmt: skip
    constants = {
        "k": random(4, 2, 3, 3), "gamma": random(4), "beta": random(1, 1, 1, 4), "zero": np.float32(0),
        "six": np.float32(6), "around": ints(0, 1, 1, 0, 0, 1, 1, 0), "k2": random(4, 4, 3, 3),
        "slope": random(1, 1, 8), "w1": random(8, 3), "rows": ints(-1, 200), "w2": random(200, 3),
    }  # fmt: skip
    model = graph_of(nodes, constants, shape=("n", 7, 7, 2), opset=13)
    found = convert(model, "net")
    same(model, found, (7, 7, 2))
    assert [call.what for call in found.program.calls].count("permute") == 1
    assert not [constant for constant in found.program.constants.values() if len(constant.shape) > 1]
    other = [*nodes[:3], node("Mul", ["a_last", "a_last"], ["b"]), node("Add", ["b", "x5"], ["y"])]
    model = graph_of(other, {"k": random(4, 2, 3, 3), "x5": random(1, 5, 5, 1)}, shape=("n", 7, 7, 2), opset=13)
    same(model, convert(model, "net"), (7, 7, 2))


def test_a_value_that_is_used_twice_keeps_its_layer() -> None:
    nodes = [node("MatMul", ["x", "w"], ["a"]), node("Mul", ["a", "m"], ["b"]), node("Add", ["a", "b"], ["y"])]
    model = graph_of(nodes, {"w": random(4, 4), "m": random(4)})
    same(model, convert(model, "net"))


def test_layers_with_the_same_weights_are_one() -> None:
    nodes = [node("MatMul", ["x", "w"], ["a"]), node("Tanh", ["a"], ["b"]), node("MatMul", ["b", "w"], ["y"])]
    model = graph_of(nodes, {"w": random(4, 4)})
    found = convert(model, "net")
    same(model, found)
    assert len(found.program.layers) == 1


def test_weights_that_two_layers_share_stay_tied() -> None:
    nodes = [
        node("Conv", ["x", "w", "b"], ["a"]), node("Relu", ["a"], ["r"]), node("Conv", ["r", "w"], ["y"], pads=[1, 1]),
    ]  # fmt: skip
    model = graph_of(nodes, {"w": random(3, 3, 3), "b": random(3)}, shape=("n", 3, 9))
    found = convert(model, "net")
    same(model, found, (3, 9))
    first, second = found.network().children()
    assert first.weight is second.weight


TORCH_NORM = [
    node("ReduceMean", ["x"], ["m"], axes=[-1]), node("Sub", ["x", "m"], ["d"]), node("Pow", ["d", "two"], ["p"]),
    node("ReduceMean", ["p"], ["v"], axes=[-1]), node("Add", ["v", "e"], ["ve"]), node("Sqrt", ["ve"], ["s"]),
    node("Div", ["d", "s"], ["q"]), node("Mul", ["q", "g"], ["qg"]), node("Add", ["qg", "t"], ["y"]),
]  # fmt: skip
RECIPROCAL_NORM = [
    *TORCH_NORM[:2], node("Mul", ["d", "d"], ["p"]), *TORCH_NORM[3:6], node("Reciprocal", ["s"], ["r"]),
    node("Mul", ["r", "d"], ["q"]), *TORCH_NORM[7:],
]  # fmt: skip
TENSORFLOW_NORM = [
    *TORCH_NORM[:6], node("Reciprocal", ["s"], ["r"]), node("Mul", ["r", "g"], ["i"]), node("Mul", ["x", "i"], ["xi"]),
    node("Mul", ["m", "i"], ["mi"]), node("Sub", ["t", "mi"], ["ti"]), node("Add", ["xi", "ti"], ["y"]),
]  # fmt: skip


@pytest.mark.parametrize(
    "nodes", [TORCH_NORM, RECIPROCAL_NORM, TENSORFLOW_NORM], ids=["torch", "reciprocal", "tensorflow"]
)
def test_a_layer_norm_in_parts_is_a_layer(nodes: list[onnx.NodeProto]) -> None:
    constants = {"two": np.float32(2), "e": np.float32(1e-3), "g": random(4), "t": random(4)}
    model = graph_of(nodes, constants, shape=("n", 5, 4), opset=13)
    found = convert(model, "net")
    same(model, found, (5, 4))
    assert layers(found) == ["LayerNorm"]
    assert found.notes


def test_a_softmax_at_the_end_is_left_out_where_logits_are_wanted() -> None:
    model = graph_of([node("MatMul", ["x", "w"], ["a"]), node("Softmax", ["a"], ["y"])], {"w": random(4, 3)})
    whole, cut = convert(model, "net"), convert(model, "net", logits=True)
    assert (whole.gives_logits, cut.gives_logits, cut.output) == (False, True, "a")
    same(model, whole)
    assert verify(model, cut, "net") < 1e-5
    inner = graph_of([node("Softmax", ["x"], ["a"]), node("MatMul", ["a", "w"], ["y"])], {"w": random(4, 3)})
    assert not convert(inner, "net", logits=True).gives_logits


def test_weights_are_parameters_and_constants_are_buffers() -> None:
    nodes = [
        node("Add", ["x", "place"], ["a"]),
        node("Concat", ["a", "a"], ["b"], axis=1),
        node("Mul", ["b", "k"], ["y"]),
    ]
    model = graph_of(nodes, {"place": random(1, 4), "k": np.float32(3)})
    network = convert(model, "net").network()
    assert [tuple(each.shape) for each in network.parameters()] == [(1, 4)]
    model = graph_of([node("Gather", ["x", "order"], ["y"], axis=1)], {"order": ints(3, 0, 1)})
    network = convert(model, "net").network()
    assert not list(network.parameters())
    assert len(list(network.buffers())) == 1


def test_a_part_of_a_weight_is_a_weight_and_a_mask_is_none() -> None:
    nodes = [
        node("Gather", ["table", "first"], ["row"]), node("Add", ["x", "row"], ["a"]),
        node("Add", ["a", "mask"], ["b"]), node("Softmax", ["b"], ["y"]),
    ]  # fmt: skip
    mask = np.array([0, 0, -np.inf, 0], np.float32)
    model = graph_of(nodes, {"table": random(9, 4), "first": ints(2), "mask": mask})
    found = convert(model, "net")
    same(model, found)
    assert [tuple(each.shape) for each in found.network().parameters()] == [(1, 4)]


def test_whole_numbers_arrive_as_float() -> None:
    nodes = [node("Cast", ["x"], ["f"], to=TensorProto.FLOAT), node("MatMul", ["f", "w"], ["y"])]
    model = graph_of(nodes, {"w": random(4, 3)}, inputs={"x": (TensorProto.UINT8, ("n", 4))})
    found = convert(model, "net")
    assert [call.what for call in found.program.calls] == list(found.program.layers)
    assert verify(model, found, "net") < 1e-5
    nodes = [node("Gather", ["table", "x"], ["e"]), node("ReduceMean", ["e"], ["y"], axes=[1], keepdims=0)]
    model = graph_of(nodes, {"table": random(50, 8)}, inputs={"x": (TensorProto.INT64, ("n", 6))}, opset=13)
    found = convert(model, "net")
    assert found.limits == {"x": 50}
    assert verify(model, found, "net") < 1e-5


def test_half_precision_is_trained_in_float32() -> None:
    nodes = [
        node("Cast", ["x"], ["h"], to=TensorProto.FLOAT16), node("MatMul", ["h", "w"], ["a"]),
        node("Cast", ["a"], ["y"], to=TensorProto.FLOAT),
    ]  # fmt: skip
    model = graph_of(nodes, {"w": random(4, 3).astype(np.float16)})
    found = convert(model, "net")
    assert verify(model, found, "net") < 1e-2
    assert {each.dtype for each in found.network().parameters()} == {torch.float32}


def test_nearest_neighbours_are_torchs_own_function_where_that_is_the_same() -> None:
    model = graph_of(
        [node("Resize", ["x", "roi", "s"], ["y"], coordinate_transformation_mode="asymmetric", nearest_mode="floor")],
        {"s": np.array([1, 1, 2, 3], np.float32), "roi": np.zeros(0, np.float32)}, shape=("n", 2, 3, 4), opset=11,
    )  # fmt: skip
    found = convert(model, "net")
    same(model, found, (2, 3, 4))
    assert [call.what for call in found.program.calls] == ["interpolate"]


def test_a_difference_names_the_operator_where_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [
        node("MatMul", ["x", "w"], ["a"]),
        node("Tanh", ["a"], ["b"], name="middle"),
        node("MatMul", ["b", "w"], ["y"]),
    ]
    model = graph_of(nodes, {"w": random(4, 4)})
    found = convert(model, "net")
    monkeypatch.setitem(FUNCTIONS, "tanh", torch.sigmoid)
    with pytest.raises(NotTrainable, match="first at Tanh middle"):
        verify(model, found, "net")


def quantised() -> onnx.ModelProto:
    nodes = [node("QuantizeLinear", ["x", "s"], ["q"]), node("DequantizeLinear", ["q", "s"], ["y"])]
    return graph_of(nodes, {"s": np.float32(0.1)})


REFUSED: dict[str, tuple[Callable[[], onnx.ModelProto], str]] = {
    "quantised": (quantised, "it is quantised"),
    "custom": (lambda: graph_of([node("Magic", ["x"], ["y"], domain="acme")]), r"acme.Magic \(1 node\)"),
    "loop": (lambda: graph_of([node("NonZero", ["x"], ["a"]), node("Det", ["x"], ["y"])]), r"Det \(1 node\)"),
    "constant": (lambda: graph_of([node("Shape", ["x"], ["y"])]), "does not depend on"),
    "square": (
        lambda: graph_of(
            [node("Shape", ["x"], ["s"], end=1), node("Mul", ["s", "s"], ["k"]), node("Expand", ["one", "k"], ["c"]),
             node("ReduceSum", ["c"], ["t"]), node("Add", ["x", "t"], ["y"])],
            {"one": np.ones(1, np.float32)},
        ),
        "not in proportion",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("model", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_trained_is_one_line(model: Callable[[], onnx.ModelProto], words: str) -> None:
    with pytest.raises(NotTrainable, match=words) as raised:
        convert(model(), "net")
    assert "\n" not in str(raised.value)


def test_a_graph_that_would_fill_the_memory_is_not_run() -> None:
    side = {"k": ints(100_000, 100_000)}
    sums = [node("ReduceSum", ["c"], ["s"]), node("Mul", ["x", "s"], ["y"])]
    constant = graph_of([node("ConstantOfShape", ["k"], ["c"]), *sums], side)
    tiled = graph_of([node("Tile", ["x", "k"], ["y"])], side)
    for model, words in ((constant, "constant of 10,000,000,000 elements"), (tiled, "for 5 samples it computes")):
        with pytest.raises(ModelError, match=words) as raised:
            convert(model, "net")
        assert not isinstance(raised.value, NotTrainable)


def test_a_damaged_program_is_refused() -> None:
    found = convert(
        graph_of([node("MatMul", ["x", "w"], ["a"]), node("Tanh", ["a"], ["y"])], {"w": random(4, 3)}), "net"
    )
    text = found.program.to_text()
    for damaged in ("", "?", text[:-8], text[: len(text) // 2]):
        with pytest.raises(ModelError, match="damaged"):
            Program.from_text(damaged)
    program = Program.from_text(text)
    evil = (Call("y", "system", [Ref("x")]), Call("y", "tanh", [Ref("nowhere")]))
    for call in evil:
        broken = Program(program.inputs, program.layers, {}, {}, (call,), Ref("y"))
        with pytest.raises(ModelError, match="damaged"):
            network_of(broken)

"""Each operator of the table against ONNX Runtime, at batch sizes that the conversion never saw."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from graphs import Shape, answers, graph_of
from numpy.typing import NDArray
from onnx import TensorProto, helper

from rushhour.models.converted import NotTrainable, Program, convert, network_of
from rushhour.models.converted.operators import OPERATORS

PICTURE: Shape = ("n", 6, 7, 8)
ROWS: Shape = ("n", 5, 4)


@dataclasses.dataclass(frozen=True)
class Case:
    """One operator on `x` and on constants.

    Attributes:
        op: the operator.
        about: what is special.
        shape: of `x`.
        constants: further inputs, in order; a name without a value is left out, `x` is the input again.
        attributes: of the operator.
        opset: of the model.
        low: smallest value of `x`.
        high: largest value of `x`.
        dtype: of `x`.
        first: constants that come before `x`.
        of: which output is compared.
    """

    op: str
    about: str = ""
    shape: Shape = ROWS
    constants: Sequence[Any] = ()
    attributes: dict[str, Any] = dataclasses.field(default_factory=dict)
    opset: int = 18
    low: float = -3.0
    high: float = 3.0
    dtype: int = TensorProto.FLOAT
    first: Sequence[Any] = ()
    of: int = 0
    outputs: int = 1

    def __str__(self) -> str:
        return f"{self.op}-{self.about}" if self.about else self.op


def random(*shape: int, low: float = -1.0, high: float = 1.0, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).uniform(low, high, shape).astype(np.float32)


def ints(*values: int) -> NDArray[np.int64]:
    return np.array(values, np.int64)


def one(value: float) -> NDArray[np.float32]:
    return np.array(value, np.float32)


UNARY = [
    Case(op)
    for op in (
        "Abs", "Asinh", "Atan", "Ceil", "Celu", "Cos", "Cosh", "Elu", "Erf", "Exp", "Floor", "HardSigmoid", "HardSwish",
        "Identity", "IsInf", "IsNaN", "LeakyRelu", "Mish", "Neg", "Reciprocal", "Relu", "Round", "Selu", "Shrink",
        "Sigmoid", "Sign", "Sin", "Sinh", "Softplus", "Softsign", "Tan", "Tanh", "ThresholdedRelu",
    )
] + [
    Case("Acos", low=-0.9, high=0.9), Case("Asin", low=-0.9, high=0.9), Case("Atanh", low=-0.9, high=0.9),
    Case("Acosh", low=1.1), Case("Log", low=0.1), Case("Sqrt", low=0.0),
    Case("Gelu", opset=20), Case("Gelu", "tanh", opset=20, attributes={"approximate": "tanh"}),
    Case("HardSigmoid", "keras", attributes={"alpha": 1 / 6, "beta": 0.5}),
    Case("Not", dtype=TensorProto.BOOL), Case("BitwiseNot", dtype=TensorProto.INT32, high=9),
    Case("Cast", attributes={"to": TensorProto.INT32}), Case("Cast", "bool", attributes={"to": TensorProto.BOOL}),
    Case("CastLike", constants=[ints(1)], opset=19), Case("Dropout", opset=13),
    Case("Clip", constants=[one(-1), one(2)]), Case("Clip", "above", constants=[None, one(2)]),
    Case("PRelu", constants=[random(4)]), Case("PRelu", "channels", PICTURE, constants=[random(6, 1, 1)]),
    Case("PRelu", "one", PICTURE, constants=[random(1)]),
]  # fmt: skip
BINARY = [
    *(Case(op, constants=[random(4, low=0.5, high=2)])
         for op in ("Add", "Sub", "Mul", "Div", "Max", "Min", "Mean", "Sum")),
    *(Case(op, "left", first=[random(5, 1, low=0.5, high=2)], low=0.5) for op in ("Add", "Sub", "Mul", "Div")),
    *(Case(op, "scalar", constants=[one(2)]) for op in ("Add", "Sub", "Mul", "Div")),
    Case("Div", "integers", dtype=TensorProto.INT64, low=-20, high=20, constants=[ints(3)]),
    Case("Mod", "fmod", constants=[one(1.5)], attributes={"fmod": 1}),
    Case("Mod", "integers", dtype=TensorProto.INT64, low=-20, high=20, constants=[ints(3)]),
    Case("Pow", constants=[one(3)]), Case("Pow", "each", constants=[random(4, low=0, high=2)], low=0.1),
    Case("Max", "three", constants=["x", random(4), one(0.5)]),
    *(Case(op, constants=[random(4)]) for op in ("Less", "LessOrEqual", "Greater", "GreaterOrEqual")),
    Case("Equal", dtype=TensorProto.INT64, high=2, low=0, constants=[ints(1)]),
    *(Case(op, dtype=TensorProto.BOOL, constants=[np.array([True, False, True, False])])
         for op in ("And", "Or", "Xor")),
    *(Case(op, dtype=TensorProto.INT32, high=9, low=0, constants=[np.array([1, 2, 3, 4], np.int32)])
      for op in ("BitwiseAnd", "BitwiseOr", "BitwiseXor")),
    Case("Where", first=[np.array([True, False, True, False])], constants=[random(4)]),
]  # fmt: skip
REDUCTIONS = [
    *(Case(op, constants=[ints(-1)], low=0.1) for op in (
        "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceLogSum",
        "ReduceLogSumExp", "ReduceSum")),
    Case("ReduceMean", "attribute", opset=13, attributes={"axes": [1, 2], "keepdims": 0}),
    Case("ReduceProd", "two", constants=[ints(1, 2)], attributes={"keepdims": 0}),
    Case("ReduceSum", "nothing", constants=[ints()], attributes={"noop_with_empty_axes": 1}),
    Case("ArgMax", attributes={"axis": 2, "keepdims": 0}), Case("ArgMin", attributes={"axis": 1}),
    Case("ArgMax", "last", dtype=TensorProto.INT32, low=0, high=2, attributes={"axis": 2, "select_last_index": 1}),
    Case("Softmax"), Case("Softmax", "opset 11", opset=11, attributes={"axis": 1}),
    Case("Softmax", "axis", attributes={"axis": 1}), Case("LogSoftmax"),
    Case("LogSoftmax", "opset 12", opset=12, attributes={"axis": 1}), Case("Hardmax"),
    Case("CumSum", constants=[ints(1)]),
    Case("CumSum", "back", constants=[ints(-1)], attributes={"exclusive": 1, "reverse": 1}),
    Case("TopK", constants=[ints(2)], outputs=2), Case("TopK", "places", constants=[ints(2)], outputs=2, of=1),
    Case("TopK", "smallest", constants=[ints(3)], outputs=2, attributes={"axis": 1, "largest": 0}),
]  # fmt: skip
SHAPES = [
    Case("Reshape", "flat", PICTURE, constants=[ints(-1, 336)]), Case("Reshape", "zero", PICTURE,
         constants=[ints(0, -1)]),
    Case("Reshape", "heads", ROWS, constants=[ints(-1, 5, 2, 2)]), Case("Reshape", "into the batch", ROWS,
         constants=[ints(-1, 4)]),
    Case("Reshape", "merge", PICTURE, constants=[ints(0, 0, -1)]),
    Case("Flatten", "", PICTURE), Case("Flatten", "two", PICTURE, attributes={"axis": 2}),
    Case("Flatten", "back", PICTURE, attributes={"axis": -2}),
    Case("Squeeze", "", ("n", 1, 4, 1), constants=[ints(1, -1)]), Case("Squeeze", "all", ("n", 1, 4, 1)),
    Case("Squeeze", "attribute", ("n", 1, 4), opset=11, attributes={"axes": [1]}),
    Case("Unsqueeze", constants=[ints(1, -1)]), Case("Unsqueeze", "attribute", opset=11, attributes={"axes": [0, 4]}),
    Case("Transpose", "", PICTURE, attributes={"perm": [0, 2, 3, 1]}), Case("Transpose", "reversed"),
    Case("Concat", constants=[random(1, 5, 4)], attributes={"axis": 0}), Case("Concat", "x",
         constants=["x"], attributes={"axis": -1}),
    Case("Split", outputs=2, attributes={"axis": 2}, opset=13), Case("Split", "sizes",
         constants=[ints(1, 3)], outputs=2, of=1, attributes={"axis": -1}),
    Case("Split", "attribute", opset=11, outputs=2, attributes={"axis": 1, "split": [2, 3]}),
    Case("Split", "uneven", outputs=2, of=1, attributes={"axis": 1, "num_outputs": 2}),
    Case("Slice", constants=[ints(1, 0), ints(-1, 3), ints(1, 2)]),
    Case("Slice", "steps", PICTURE, constants=[ints(-1, 0), ints(-100, 2**62), ints(2, 3), ints(-2, 2)]),
    Case("Slice", "batch", constants=[ints(1), ints(2**63 - 1), ints(0)]),
    Case("Expand", "", ("n", 1, 4), constants=[ints(1, 5, 1)]), Case("Expand", "axes", ("n", 4),
         constants=[ints(3, 1, 4)]),
    Case("Tile", constants=[ints(1, 2, 3)]),
    Case("Pad", constants=[ints(0, 1, 2, 0, 0, -1)]), Case("Pad", "value", constants=[ints(0, 1, 0, 0, 0, 1), one(7)]),
    Case("Pad", "reflect", constants=[ints(0, 2, 1, 0, 1, 2)], attributes={"mode": "reflect"}),
    Case("Pad", "edge", constants=[ints(0, 2, 1, 0, 1, 2)], attributes={"mode": "edge"}),
    Case("Pad", "wrap", opset=19, constants=[ints(0, 2, 1, 0, 1, 2)], attributes={"mode": "wrap"}),
    Case("Pad", "axes", constants=[ints(1, 2), None, ints(2)]),
    Case("DepthToSpace", "", ("n", 8, 3, 2), attributes={"blocksize": 2}),
    Case("DepthToSpace", "CRD", ("n", 8, 3, 2), attributes={"blocksize": 2, "mode": "CRD"}),
    Case("SpaceToDepth", "", ("n", 3, 4, 6), attributes={"blocksize": 2}),
    Case("Trilu", "", ("n", 5, 5)), Case("Trilu", "lower", ("n", 5, 5), constants=[ints(1).reshape(())],
         attributes={"upper": 0}),
    Case("OneHot", "", ("n", 3), dtype=TensorProto.INT64, low=-4, high=4, constants=[ints(4), random(2)]),
    Case("Gather", "pick", constants=[ints(-1).reshape(())], attributes={"axis": 1}),
    Case("Gather", "list", constants=[ints(0, -1, 2).reshape(1, 3)], attributes={"axis": 2}),
    Case("Gather", "embedding", ("n", 3), dtype=TensorProto.INT64, low=0, high=9, first=[random(9, 6)]),
    Case("Gather", "columns", ("n", 3), dtype=TensorProto.INT64, low=-6, high=6, first=[random(2, 6)],
         attributes={"axis": 1}),
    Case("GatherElements", constants=[ints(*range(-4, 4)).reshape(1, 4, 2)], attributes={"axis": 2}),
    Case("GatherND", "", ("n", 3, 2), dtype=TensorProto.INT64, low=0, high=4, first=[random(4, 4, 5)]),
    Case("ScatterND", constants=[ints(1, 0).reshape(2, 1), random(2, 5, 4)]),
    Case("ScatterND", "add", constants=[ints(1, 1).reshape(2, 1), random(2, 5, 4)], attributes={"reduction": "add"}),
    Case("ScatterElements", constants=[ints(0, -1, 2).reshape(1, 3, 1), random(1, 3, 1)], attributes={"axis": 2}),
    Case("ScatterElements", "mul", constants=[ints(0, -1, 2).reshape(1, 3, 1), random(1, 3, 1)],
         attributes={"axis": 2, "reduction": "mul"}),
]  # fmt: skip
DENSE = [
    Case("MatMul", constants=[random(4, 3)]), Case("MatMul", "three axes", constants=[random(1, 4, 3)]),
    Case("MatMul", "left", first=[random(3, 5)]), Case("MatMul", "vector", constants=[random(4)]),
    Case("Gemm", "", ("n", 4), constants=[random(4, 3), random(3)]),
    Case("Gemm", "turned", ("n", 4), constants=[random(3, 4), random(1, 3)],
         attributes={"transB": 1, "alpha": 0.5, "beta": 2.0}),
    Case("Gemm", "without", ("n", 4), constants=[random(4, 3)]),
    Case("Gemm", "column", ("n", 4), first=[random(4, 3)], attributes={"transA": 1, "transB": 1}),
    Case("Einsum", constants=[random(4, 3)], attributes={"equation": "bij,jk->bki"}),
    Case("BatchNormalization", "", PICTURE, constants=[random(6, low=0.5), random(6), random(6), random(6, low=0.5)]),
    Case("BatchNormalization", "rows", ("n", 4),
         constants=[random(4, low=0.5), random(4), random(4), random(4, low=0.5)]),
    Case("InstanceNormalization", "", PICTURE, constants=[random(6), random(6)]),
    Case("GroupNormalization", "", PICTURE, opset=21, constants=[random(6), random(6)], attributes={"num_groups": 3}),
    Case("LayerNormalization", constants=[random(4), random(4)]),
    Case("LayerNormalization", "two axes", constants=[random(5, 4)], attributes={"axis": 1}),
    Case("LpNormalization", attributes={"axis": 1, "p": 1}), Case("LpNormalization", "2"),
    Case("LRN", "", PICTURE, attributes={"size": 3, "alpha": 0.1}),
    Case("LSTM", "", ("n", 3, 4), constants=[random(1, 20, 4), random(1, 20, 5), random(1, 40)],
         attributes={"hidden_size": 5}),
    Case("LSTM", "both", ("n", 3, 4), constants=[random(2, 20, 4), random(2, 20, 5)],
         attributes={"hidden_size": 5, "direction": "bidirectional"}),
    Case("LSTM", "back", ("n", 3, 4), constants=[random(1, 20, 4), random(1, 20, 5)],
         attributes={"hidden_size": 5, "direction": "reverse"}),
    Case("GRU", "", ("n", 3, 4), constants=[random(1, 15, 4), random(1, 15, 5), random(1, 30)],
         attributes={"hidden_size": 5, "linear_before_reset": 1}),
    Case("RNN", "", ("n", 3, 4), constants=[random(1, 5, 4), random(1, 5, 5)],
         attributes={"hidden_size": 5, "activations": ["Relu"]}),
]  # fmt: skip
WINDOWS = [
    Case("Conv", "", PICTURE, constants=[random(4, 6, 3, 3), random(4)]),
    Case("Conv", "same", PICTURE, constants=[random(4, 6, 2, 3)], attributes={"auto_pad": "SAME_UPPER",
         "strides": [2, 2]}),
    Case("Conv", "same lower", PICTURE, constants=[random(4, 6, 2, 3)], attributes={"auto_pad": "SAME_LOWER"}),
    Case("Conv", "uneven", PICTURE, constants=[random(4, 6, 3, 3)], attributes={"pads": [0, 1, 2, 0]}),
    Case("Conv", "depthwise", PICTURE, constants=[random(12, 1, 3, 3), random(12)],
         attributes={"group": 6, "dilations": [2, 1]}),
    Case("Conv", "1d", ("n", 3, 9), constants=[random(4, 3, 3)], attributes={"pads": [1, 1]}),
    Case("Conv", "3d", ("n", 2, 4, 5, 3), constants=[random(4, 2, 2, 2, 2)]),
    Case("Conv", "computed", ("n", 3, 9), first=[random(2, 3, 12)], opset=18),
    Case("ConvTranspose", "", PICTURE, constants=[random(6, 4, 3, 3), random(4)],
         attributes={"strides": [2, 2], "pads": [1, 1, 1, 1], "output_padding": [1, 1]}),
    Case("ConvTranspose", "groups", PICTURE, constants=[random(6, 2, 2, 2)], attributes={"group": 3,
         "strides": [2, 1]}),
    Case("ConvTranspose", "same", PICTURE, constants=[random(6, 4, 3, 3), random(4)],
         attributes={"strides": [2, 2], "auto_pad": "SAME_UPPER"}),
    Case("ConvTranspose", "shape", PICTURE, constants=[random(6, 4, 3, 3), random(4)],
         attributes={"strides": [2, 2], "output_shape": [14, 16]}),
    Case("ConvTranspose", "uneven", PICTURE, constants=[random(6, 4, 3, 3), random(4)],
         attributes={"strides": [2, 2], "pads": [0, 1, 1, 0]}),
    Case("MaxPool", "", PICTURE, attributes={"kernel_shape": [2, 2], "strides": [2, 2]}),
    Case("MaxPool", "ceil", PICTURE, attributes={"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1}),
    Case("MaxPool", "uneven", PICTURE, attributes={"kernel_shape": [3, 2], "pads": [0, 1, 1, 0], "dilations": [1, 2]}),
    Case("MaxPool", "same", PICTURE, attributes={"kernel_shape": [3, 3], "strides": [2, 2], "auto_pad": "SAME_UPPER"}),
    Case("MaxPool", "1d", ("n", 3, 9), attributes={"kernel_shape": [3]}),
    Case("AveragePool", "", PICTURE, attributes={"kernel_shape": [2, 2], "strides": [2, 2]}),
    Case("AveragePool", "padded", PICTURE, attributes={"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}),
    Case("AveragePool", "counted", PICTURE, attributes={"kernel_shape": [3, 3],
         "pads": [1, 0, 1, 1], "count_include_pad": 1}),
    Case("AveragePool", "uneven", PICTURE, attributes={"kernel_shape": [3, 3], "strides": [2, 2],
         "auto_pad": "SAME_UPPER"}),
    Case("GlobalAveragePool", "", PICTURE), Case("GlobalMaxPool", "", PICTURE), Case("GlobalAveragePool", "1d", ROWS),
    *(Case("Resize", f"{mode}-{where}-{scale:g}", PICTURE,
         attributes={"mode": mode, "coordinate_transformation_mode": where},
           constants=[None, np.array([1, 1, scale, scale], np.float32)])
      for mode in ("nearest", "linear", "cubic")
           for where in ("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel")
      for scale in (2.0, 0.6)),
    *(Case("Resize", f"{rounding}-{where}", PICTURE, constants=[None, None, ints(10, 4)],
           attributes={"nearest_mode": rounding, "coordinate_transformation_mode": where, "axes": [2, 3]})
      for rounding in ("floor", "ceil", "round_prefer_floor", "round_prefer_ceil")
           for where in ("asymmetric", "half_pixel")),
    Case("Resize", "nothing", PICTURE, constants=[None, np.ones(4, np.float32)]),
]  # fmt: skip

CASES = [*UNARY, *BINARY, *REDUCTIONS, *SHAPES, *DENSE, *WINDOWS]
ELSEWHERE = {"Constant", "ConstantOfShape", "Range", "Shape", "Size", "EyeLike"}
"""Operators that compute from shapes; see `test_graphs`."""


def samples(case: Case, batch: int) -> NDArray[Any]:
    drawn = np.random.default_rng(batch).uniform(case.low, case.high, (batch, *case.shape[1:]))
    return drawn.astype(helper.tensor_dtype_to_np_dtype(case.dtype)) if case.dtype != TensorProto.BOOL else drawn > 0


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_operator_answers_as_onnx_runtime_does(case: Case) -> None:
    constants, names = {}, []
    for place, value in enumerate((*case.first, "x", *case.constants)):
        name = value if isinstance(value, str) else "" if value is None else f"c{place}"
        names.append(name)
        if name.startswith("c"):
            constants[name] = value
    outputs = [f"y{index}" for index in range(case.outputs)]
    node = helper.make_node(case.op, names, outputs, **case.attributes)
    model = graph_of(
        [node], constants, inputs={"x": (case.dtype, case.shape)}, outputs=[outputs[case.of]], opset=case.opset
    )
    found = convert(model, case.op)
    network = network_of(Program.from_text(found.program.to_text()))
    network.load_state_dict(found.state)
    for batch in (2, 9):
        x = samples(case, batch)
        (expected,) = answers(model, {"x": x})
        answer = network.eval()(torch.from_numpy(x.astype(np.float32))).detach().numpy()
        assert answer.shape == expected.shape
        np.testing.assert_allclose(answer, expected, rtol=2e-4, atol=2e-5)


def test_every_operator_of_the_table_has_a_case() -> None:
    assert {case.op for case in CASES} | ELSEWHERE == set(OPERATORS)


REFUSED = [
    (Case("GRU", "", ("n", 3, 4), constants=[random(1, 15, 4), random(1, 15, 5)],
         attributes={"hidden_size": 5}), "linear_before_reset"),
    (Case("LRN", "", PICTURE, attributes={"size": 2}), "even size"),
    (Case("AveragePool", "", PICTURE, opset=19, attributes={"kernel_shape": [2, 2], "dilations": [2, 2]}), "dilated"),
    (Case("MaxPool", "", PICTURE, outputs=2, of=1, attributes={"kernel_shape": [2, 2]}), "places"),
    (Case("NonZero"), r"operators NonZero \(1 node\)"),
    (Case("Softmax", opset=10), "its opset is 10"),
]  # fmt: skip


@pytest.mark.parametrize(("case", "words"), REFUSED, ids=lambda value: str(value) if isinstance(value, Case) else "")
def test_what_cannot_be_converted_is_said(case: Case, words: str) -> None:
    constants = {f"c{index}": value for index, value in enumerate(case.constants)}
    outputs = [f"y{index}" for index in range(case.outputs)]
    node = helper.make_node(case.op, ["x", *constants], outputs, **case.attributes)
    model = graph_of([node], constants, shape=case.shape, outputs=[outputs[case.of]], opset=case.opset)
    with pytest.raises(NotTrainable, match=words) as raised:
        convert(model, "net")
    assert "\n" not in str(raised.value)

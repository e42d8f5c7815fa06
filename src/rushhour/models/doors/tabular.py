"""Fitted estimators of scikit-learn, LightGBM and XGBoost: objects, and pickles that the user trusts."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray

from rushhour.errors import ModelError, TaskError
from rushhour.models.converted import checked_onnx
from rushhour.models.doors.door import Arrival, Opening
from rushhour.models.doors.outputs import keep_outputs
from rushhour.models.failure import why_failed
from rushhour.system.extras import require
from rushhour.task import Task

_SUFFIXES: Final = (".joblib", ".pkl", ".pickle")
_PROTOCOLS: Final = frozenset(range(2, 6))
"""Of pickles: the second byte, after 0x80."""
_BASE: Final = ("sklearn.base", "BaseEstimator")
_INPUT: Final = "input"
_OPSETS: Final = {"": 18, "ai.onnx.ml": 3}
_TREES: Final = {"lightgbm": "LightGBM", "xgboost": "XGBoost"}
_ONLY_ONNX_RUNTIME: Final = "its operators (ai.onnx.ml) run on ONNX Runtime only, not on OpenVINO"


class TabularDoor:
    """Objects that follow scikit-learn's interface, and files that `joblib` or `pickle` wrote of them."""

    takes = "a fitted estimator of scikit-learn, LightGBM or XGBoost, or its .joblib file"
    needs_example = False

    def recognises(self, model: Any) -> bool:
        """By its type; a file by its ending, or its first bytes."""
        if not isinstance(model, Path):
            return not isinstance(model, type) and any(
                (each.__module__, each.__name__) == _BASE for each in type(model).__mro__
            )
        return model.is_file() and (model.suffix.lower() in _SUFFIXES or _begins_as_pickle(model))

    def open(self, model: Any, opening: Opening) -> Arrival:
        """Its graph, of values or of the probabilities of its classes."""
        if isinstance(model, Path):
            opening.require_trust("it is a pickle, and reading one runs any code in it")
        require("tabular")
        estimator = _loaded(model, opening.shown) if isinstance(model, Path) else model
        width = _width(estimator, opening.shown)
        classes = _classes(estimator, opening.shown)
        graph = _graph(estimator, width, opening.shown, is_classifier=classes is not None)
        predict = _predict(estimator, is_classifier=classes is not None)
        task, task_from = None, ""
        if classes is not None:
            task, task_from = Task.classification(classes), "the estimator's classes"
        else:
            (dims,) = (output.type.tensor_type.shape.dim for output in graph.graph.output)
            task = Task("regression", outputs=dims[1].dim_value or 1)
            task_from = "the estimator is a regressor"
        custom = any(node.domain == "ai.onnx.ml" for node in graph.graph.node)
        return Arrival(
            "sklearn",
            graph,
            _origin(estimator),
            lambda columns: (predict(columns[_INPUT]),),
            task=task,
            task_from=task_from,
            notes=(_ONLY_ONNX_RUNTIME,) if custom else (),
        )


def _begins_as_pickle(file: Path) -> bool:
    try:
        with file.open("rb") as opened:
            first = opened.read(3)
    except OSError:
        return False
    return len(first) == 3 and first[0] == 0x80 and first[1] in _PROTOCOLS


def _loaded(file: Path, shown: str) -> Any:
    """What is in a file that the user trusts."""
    import joblib

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = joblib.load(file)
    except Exception as error:  # a pickle may fail in any way
        raise ModelError(
            f"cannot read the model {shown}",
            why_failed(error),
            "check that it is whole, and that the packages it was written with are installed in the same versions",
        ) from error
    if not TabularDoor().recognises(found):
        raise ModelError(
            f"cannot import {shown}",
            f"it holds a {type(found).__name__}, not a fitted estimator",
            "write the estimator itself with joblib.dump",
        )
    return found


def _width(estimator: Any, shown: str) -> int:
    """How many features it takes."""
    width = getattr(estimator, "n_features_in_", None)
    if not isinstance(width, int | np.integer) or width < 1:
        raise ModelError(
            f"cannot import {shown}", "it is not fitted: it does not know its features", "call .fit(x, y) first"
        )
    return int(width)


def _classes(estimator: Any, shown: str) -> tuple[str, ...] | None:
    """The names of its classes; None for a regressor."""
    found = getattr(estimator, "classes_", None)
    if found is None:
        if not hasattr(estimator, "predict"):
            raise ModelError(f"cannot import {shown}", "it has no predict: it transforms", "add a final estimator")
        return None
    if isinstance(found, list):
        raise ModelError(
            f"cannot import {shown}",
            "it answers several questions, each with classes of its own",
            "give each by itself",
        )
    if not hasattr(estimator, "predict_proba"):
        raise ModelError(
            f"cannot import {shown}",
            "it gives no probabilities",
            "fit it with probability=True, or inside sklearn.calibration.CalibratedClassifierCV",
        )
    try:
        return Task.classification(tuple(map(str, np.asarray(found).tolist()))).classes
    except TaskError as error:
        raise ModelError(f"cannot import {shown}", error.why, error.fix) from error


def _graph(estimator: Any, width: int, shown: str, *, is_classifier: bool) -> onnx.ModelProto:
    from skl2onnx import convert_sklearn
    from skl2onnx.common.data_types import FloatTensorType

    _register_trees()
    options = {"options": {"zipmap": False}} if is_classifier else {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = convert_sklearn(
                _by_position(estimator),
                initial_types=[(_INPUT, FloatTensorType([None, width]))],
                target_opset=_OPSETS,
                **options,
            )
    except Exception as error:  # each of its converters fails in its own way
        raise ModelError(
            f"cannot export {shown} to ONNX",
            why_failed(error),
            "use estimators that skl2onnx converts, on columns of numbers",
        ) from error
    keep_outputs(graph, [graph.graph.output[-1].name])
    _write_out_scalers(graph.graph)
    versions = {each.domain: 0 for each in graph.opset_import}
    for each in graph.opset_import:
        versions[each.domain] = max(versions[each.domain], each.version)
    del graph.opset_import[:]
    graph.opset_import.extend(onnx.helper.make_opsetid(domain, version) for domain, version in versions.items())
    return checked_onnx(graph, shown)


def _write_out_scalers(graph: onnx.GraphProto) -> None:
    """Replace scalers by a difference and a product, in place: these run on every engine, and can be trained."""
    nodes = []
    for node in graph.node:
        if node.op_type != "Scaler":
            nodes.append(node)
            continue
        (given,), (made,) = node.input, node.output
        centred, constants = f"{made}.centred", []
        for attribute in node.attribute:
            values = np.asarray(attribute.floats, np.float32)
            constants.append(f"{made}.{attribute.name}")
            graph.initializer.append(onnx.numpy_helper.from_array(values, constants[-1]))
        named = dict(zip((each.name for each in node.attribute), constants, strict=True))
        nodes.append(onnx.helper.make_node("Sub", [given, named["offset"]], [centred]))
        nodes.append(onnx.helper.make_node("Mul", [centred, named["scale"]], [made]))
    del graph.node[:]
    graph.node.extend(nodes)


def _by_position(estimator: Any) -> Any:
    """A copy whose ColumnTransformers name columns by position: the graph has one input, without names."""
    names = getattr(estimator, "feature_names_in_", None)
    if names is None:
        return estimator
    from sklearn.compose import ColumnTransformer

    copied, positions = copy.deepcopy(estimator), {name: index for index, name in enumerate(names)}
    for step in _parts(copied):
        if isinstance(step, ColumnTransformer):
            step.transformers_ = [
                (name, part, [positions.get(column, column) for column in columns])
                if isinstance(columns, list | tuple | np.ndarray)
                else (name, part, positions.get(columns, columns) if isinstance(columns, str) else columns)
                for name, part, columns in step.transformers_
            ]
    return copied


def _parts(estimator: Any) -> list[Any]:
    """An estimator with the steps of its pipelines."""
    steps = getattr(estimator, "steps", ())
    return [estimator, *(part for _, step in steps for part in _parts(step))]


def _register_trees() -> None:
    """Teach skl2onnx the trees of LightGBM and XGBoost, where they are loaded."""
    from skl2onnx import update_registered_converter
    from skl2onnx.common.shape_calculator import (
        calculate_linear_classifier_output_shapes,
        calculate_linear_regressor_output_shapes,
    )

    classes: dict[str, Any] = {"nocl": [True, False], "zipmap": [True, False, "columns"]}
    if (lightgbm := sys.modules.get("lightgbm")) is not None:
        from onnxmltools.convert.lightgbm.operator_converters.LightGbm import convert_lightgbm

        classifier, regressor = lightgbm.LGBMClassifier, lightgbm.LGBMRegressor
        shapes = calculate_linear_classifier_output_shapes
        update_registered_converter(classifier, "LightGbmLGBMClassifier", shapes, convert_lightgbm, options=classes)
        shapes = calculate_linear_regressor_output_shapes
        split: dict[str, Any] = {"split": None}
        update_registered_converter(regressor, "LightGbmLGBMRegressor", shapes, convert_lightgbm, options=split)
    if (xgboost := sys.modules.get("xgboost")) is not None:
        from onnxmltools.convert.xgboost.operator_converters.XGBoost import convert_xgboost

        classifier, regressor = xgboost.XGBClassifier, xgboost.XGBRegressor
        shapes = calculate_linear_classifier_output_shapes
        update_registered_converter(classifier, "XGBoostXGBClassifier", shapes, convert_xgboost, options=classes)
        shapes = calculate_linear_regressor_output_shapes
        update_registered_converter(regressor, "XGBoostXGBRegressor", shapes, convert_xgboost)


def _predict(estimator: Any, *, is_classifier: bool) -> Callable[[NDArray[Any]], NDArray[Any]]:
    """Its own answers `(n, outputs)`; of one that was fitted on a table, to tables with the same columns."""
    names = getattr(estimator, "feature_names_in_", None)

    def predict(samples: NDArray[Any]) -> NDArray[Any]:
        given: Any = samples
        if names is not None and "pandas" in sys.modules:
            given = sys.modules["pandas"].DataFrame(samples, columns=names)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            answer = estimator.predict_proba(given) if is_classifier else estimator.predict(given)
        return np.asarray(answer).reshape(len(samples), -1)

    return predict


def _origin(estimator: Any) -> str:
    last = _parts(estimator)[-1]
    package = type(last).__module__.partition(".")[0]
    word = _TREES.get(package, "scikit-learn" if package == "sklearn" else package)
    version = getattr(sys.modules.get(package), "__version__", "")
    kinds = [type(part).__name__ for part in _parts(estimator) if part is not estimator] or [type(estimator).__name__]
    return f"{word} {version}, {', '.join(kinds)}".replace(" ,", ",")

"""Estimators of scikit-learn, LightGBM and XGBoost become bundles for ONNX Runtime; their pickles only with trust."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("skl2onnx", reason="extra tabular")
pytest.importorskip("onnxmltools", reason="extra tabular")

import joblib
from sklearn.compose import ColumnTransformer
from sklearn.datasets import make_classification, make_regression
from sklearn.ensemble import GradientBoostingClassifier, RandomForestClassifier, RandomForestRegressor
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler, StandardScaler
from sklearn.svm import SVC

import rushhour
from rushhour.errors import ModelError
from rushhour.models.doors import bring
from rushhour.task import Task

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def data() -> tuple[NDArray[np.float32], NDArray[Any]]:
    x, y = make_classification(300, 8, n_classes=3, n_informative=6, random_state=0)
    return x.astype(np.float32), np.array(["cat", "dog", "bird"])[y]


def lightgbm() -> Any:
    package = pytest.importorskip("lightgbm")
    return package.LGBMClassifier(n_estimators=10, verbose=-1, n_jobs=1)


def xgboost() -> Any:
    package = pytest.importorskip("xgboost")
    return package.XGBClassifier(n_estimators=10, n_jobs=1)


CLASSIFIERS = {
    "pipeline": lambda: make_pipeline(StandardScaler(), LogisticRegression()),
    "forest": lambda: RandomForestClassifier(10, random_state=0),
    "boosting": lambda: GradientBoostingClassifier(n_estimators=10),
    "lightgbm": lightgbm,
    "lightgbm pipeline": lambda: make_pipeline(StandardScaler(), lightgbm()),
    "xgboost": xgboost,
}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifier_becomes_a_bundle(name: str, data: tuple[Any, Any], tmp_path: Path) -> None:
    x, y = data
    labels = np.searchsorted(np.unique(y), y) if name == "xgboost" else y
    estimator = CLASSIFIERS[name]().fit(x, labels)
    found = rushhour.import_model(estimator, out=tmp_path / "out")
    assert found.understood.from_original is not None
    assert found.understood.from_original < 1e-4
    manifest = found.bundle.manifest
    assert manifest.task.classes == tuple(map(str, estimator.classes_))
    (spec,) = manifest.signature.inputs
    assert (spec.name, spec.dtype, spec.shape) == ("input", "float32", (8,))
    (answer,) = manifest.signature.outputs
    assert (answer.dtype, answer.shape) == ("float32", (3,))
    assert "ai.onnx.ml" in found.understood.why_untrainable
    assert any("ONNX Runtime only" in note for note in found.understood.notes)


def test_regressors_give_values(tmp_path: Path) -> None:
    x, y = make_regression(200, 5, random_state=0)
    x = x.astype(np.float32)
    forest = RandomForestRegressor(10, random_state=0).fit(x, y)
    found = rushhour.import_model(forest, out=tmp_path / "forest")
    assert found.bundle.manifest.task == Task("regression", outputs=1)
    for name, kind in (("lightgbm", "LGBMRegressor"), ("xgboost", "XGBRegressor")):
        package = pytest.importorskip(name)
        trees = getattr(package, kind)(n_estimators=10, n_jobs=1).fit(x, y)
        assert rushhour.import_model(trees, out=tmp_path / name).understood.task_from == "the estimator is a regressor"
    several = Ridge().fit(x, np.stack([y, -y], 1))
    assert rushhour.import_model(several, out=tmp_path / "ridge").bundle.manifest.task.outputs == 2


def test_what_needs_no_trees_can_be_trained(data: tuple[Any, Any], tmp_path: Path) -> None:
    """A perceptron is made of ordinary operators once its labels are left out, and its scaler too."""
    x, y = data
    network = make_pipeline(StandardScaler(), MLPClassifier((16,), max_iter=50, random_state=0)).fit(x, y)
    finer = rushhour.train(network, (x, y), out=tmp_path / "finer", epochs=1, tensorboard=False)
    assert [step.what for step in finer.bundle.manifest.lineage] == ["import", "train"]


def test_columns_of_a_table_are_found_by_their_place(data: tuple[Any, Any], tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    x, y = data
    table = pandas.DataFrame(x, columns=[f"column {index}" for index in range(8)])
    scaled = ColumnTransformer(
        [("standard", StandardScaler(), ["column 3", "column 1"]), ("least", MinMaxScaler(), ["column 0"])],
        remainder="passthrough",
    )
    pipeline = make_pipeline(scaled, LogisticRegression()).fit(table, y)
    found = rushhour.import_model(pipeline, out=tmp_path / "out")
    assert found.understood.from_original is not None
    assert found.understood.from_original < 1e-4
    assert list(pipeline.steps[0][1].transformers_[0][2]) == ["column 3", "column 1"]


def test_it_is_served_by_onnx_runtime(data: tuple[Any, Any], tmp_path: Path) -> None:
    x, y = data
    forest = RandomForestClassifier(10, random_state=0).fit(x, y)
    found = rushhour.import_model(forest, out=tmp_path / "out", data=(x, y))
    with rushhour.serve(found, http_port=0, grpc_port=None) as server:
        assert "onnxruntime" in str(server.way)
        import json
        from urllib.request import Request, urlopen

        body = {"inputs": [{"name": "input", "shape": [2, 8], "datatype": "FP32", "data": x[:2].ravel().tolist()}]}
        url = f"{server.url}/v2/models/{server.model}/infer"
        with urlopen(Request(url, json.dumps(body).encode()), timeout=30) as answer:
            output = json.load(answer)["outputs"][0]
    np.testing.assert_allclose(np.reshape(output["data"], (2, 3)), forest.predict_proba(x[:2]), atol=1e-5)


def test_a_file_is_read_only_if_it_is_trusted(data: tuple[Any, Any], tmp_path: Path) -> None:
    x, y = data
    forest = RandomForestClassifier(5, random_state=0).fit(x, y)
    file, other = tmp_path / "forest.joblib", tmp_path / "forest"
    joblib.dump(forest, file)
    other.write_bytes(pickle.dumps(forest))
    assert bring(other) is not None
    with pytest.raises(ModelError, match=r"will not open .*forest.joblib: it is a pickle"):
        rushhour.import_model(file, out=tmp_path / "out")
    with pytest.raises(ModelError, match="will not open"):
        rushhour.import_model(file, out=tmp_path / "out", trust=str(other))
    assert not (tmp_path / "out").exists()
    found = rushhour.import_model(file, out=tmp_path / "out", trust=str(file))
    assert found.bundle.manifest.name == "forest"
    joblib.dump({"weights": 1}, file)
    with pytest.raises(ModelError, match="holds a dict"):
        rushhour.import_model(file, out=tmp_path / "no", trust=str(file))
    file.write_bytes(file.read_bytes()[:10])
    with pytest.raises(ModelError, match="cannot read the model"):
        rushhour.import_model(file, out=tmp_path / "no", trust=str(file))
    assert not (tmp_path / "no").exists()


def test_what_cannot_be_imported_is_said(data: tuple[Any, Any], tmp_path: Path) -> None:
    x, y = data
    for estimator, why in (
        (RandomForestClassifier(), "not fitted"),
        (StandardScaler().fit(x), "no predict"),
        (SVC().fit(x, y), "no probabilities"),
    ):
        with pytest.raises(ModelError, match=why):
            rushhour.import_model(estimator, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()

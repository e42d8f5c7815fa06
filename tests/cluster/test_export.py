"""`rushhour export`: what is written follows from the Plan, and nothing else is ever replaced."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import re
import sys
import zipfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema_rs
import msgspec
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from plans import MODEL, run_of
from schemas import COMPOSE, INFERENCE_SERVICE, SERVING_RUNTIME

import rushhour
from rushhour.bundle import Bundle
from rushhour.cli import main
from rushhour.cluster import Deployment, compose_file, default_name, kserve_file
from rushhour.cluster.yaml import document
from rushhour.errors import EngineError, GoalError, PlanError, RushhourError, StorageError
from rushhour.plan import PLAN, Plan, Policy, Variant
from rushhour.serve import open_target

GIB = 2**30


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return run_of(tmp_path / "run")


def exported(run: Path, **how: Any) -> rushhour.api.ExportResult:  # type: ignore[name-defined]
    return rushhour.export(run, **{"memory": GIB, **how})


def deployment_of(run: Path, **how: Any) -> Deployment:
    given = {"name": "parts", "image": None, "port": 8080, "grpc_port": None, "replicas": 1, "memory_mib": 1024}
    return Deployment.of(open_target(run), **{**given, **how})


# -- YAML

TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\x7f", exclude_categories=("Cs", "Cc", "Cn", "Co")))
SCALARS = (
    TEXTS | st.integers(-(10**9), 10**9) | st.booleans() | st.sampled_from(["yes", "No", "null", "1", "1e3", "-", ""])
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4), max_leaves=20
)


@given(st.dictionaries(TEXTS, VALUES, max_size=4))
def test_yaml_reads_back_equal(value: dict[str, Any]) -> None:
    assert yaml.safe_load(document(value)) == value


# -- manifests


@pytest.mark.parametrize("replicas", [1, 3])
@pytest.mark.parametrize("grpc_port", [None, 9000])
def test_the_manifests_are_valid_by_the_published_schemas(run: Path, replicas: int, grpc_port: int | None) -> None:
    deployment = deployment_of(run, replicas=replicas, grpc_port=grpc_port)
    runtime, service = yaml.safe_load_all(kserve_file(deployment))
    jsonschema_rs.validate(SERVING_RUNTIME, runtime)
    jsonschema_rs.validate(INFERENCE_SERVICE, service)
    jsonschema_rs.validate(COMPOSE, yaml.safe_load(compose_file(deployment)))


def test_the_schemas_refuse_what_the_published_ones_refuse(run: Path) -> None:
    runtime, service = yaml.safe_load_all(kserve_file(deployment_of(run)))
    runtime["spec"]["terminationGracePeriodSeconds"] = 30
    service["spec"]["predictor"]["minReplicas"] = "1"
    for schema, document_ in ((SERVING_RUNTIME, runtime), (INFERENCE_SERVICE, service)):
        with pytest.raises(jsonschema_rs.ValidationError):
            jsonschema_rs.validate(schema, document_)


@pytest.mark.parametrize(
    ("cores", "policy", "cpus"),
    [
        (2, Policy(streams=2), 2),
        (2, Policy(streams=1, threads=2), 2),
        (2, Policy(streams=1), 2),  # the event loop had the other core
        (1, Policy(streams=1), 1),
        (8, Policy(cells=2, streams=2, threads=1), 6),
        (2, Policy(streams=4), 4),
    ],
)
def test_cores_layout_and_admission_are_the_plans(tmp_path: Path, cores: int, policy: Policy, cpus: int) -> None:
    policy = msgspec.structs.replace(policy, max_batch=8, queue_bound=77, deadline_ms=45.0)
    run = run_of(tmp_path / "run", cores=cores, policy=policy)
    deployment = deployment_of(run, memory_mib=700, replicas=2)
    runtime, service = yaml.safe_load_all(kserve_file(deployment))
    (container,) = runtime["spec"]["containers"]
    model = service["spec"]["predictor"]["model"]
    amount = {"cpu": str(cpus), "memory": "700Mi"}
    assert container["resources"] == model["resources"] == {"requests": amount, "limits": amount}
    notes = service["metadata"]["annotations"]
    for name in ("cells", "streams", "threads"):
        assert notes[f"rushhour/{name}"] == str(getattr(policy, name))
    assert (notes["rushhour/max-batch"], notes["rushhour/queue-bound"], notes["rushhour/deadline-ms"]) == (
        "8",
        "77",
        "45",
    )
    assert (notes["rushhour/slo"], notes["rushhour/capacity-rps"]) == ("p99<50ms", "9120")
    composed = yaml.safe_load(compose_file(deployment))["services"]["parts"]
    limits = composed["deploy"]["resources"]["limits"]
    assert (limits, composed["deploy"]["replicas"]) == ({"cpus": str(cpus), "memory": "700M"}, 2)
    assert composed["ports"] == ["127.0.0.1:8080-8081:8080"]


def test_the_grace_period_is_longer_than_draining(run: Path) -> None:
    """As docs/operations.md says: the delay, the time for what is in flight, and 10 s to end."""
    runtime, service = yaml.safe_load_all(kserve_file(deployment_of(run)))
    (container,) = runtime["spec"]["containers"]
    assert container["args"] == ["--drain-delay=10s", "--model-name=parts"][: 1 + (MODEL != "parts")]
    assert service["spec"]["predictor"]["terminationGracePeriodSeconds"] == 10 + 30 + 10
    composed = yaml.safe_load(compose_file(deployment_of(run)))["services"]["parts"]
    assert (composed["command"], composed["stop_grace_period"]) == (["--drain-delay=0s"], "40s")


def test_under_kserve_the_model_has_the_name_of_the_service(run: Path) -> None:
    runtime, _ = yaml.safe_load_all(kserve_file(deployment_of(run, name="other")))
    assert "--model-name=other" in runtime["spec"]["containers"][0]["args"]


# -- the container


def test_the_context_has_the_plan_and_what_it_serves(run: Path, tmp_path: Path) -> None:
    result = exported(run, docker=tmp_path / "image")
    image = tmp_path / "image"
    assert sorted(file.name for file in image.iterdir()) == [
        *("Dockerfile", "export.json", "install.sh", "requirements.txt", "run", "wheels"),
    ]
    plan = Plan.load(image / "run" / "plan.json")
    assert plan == Plan.load(run / "plan.json")
    assert [folder.name for folder in (image / "run" / "bundles").iterdir()] == ["best"]
    assert open_target(image / "run").name == MODEL
    assert Bundle.open(image / "run" / "bundles" / "best").manifest.hash == plan.variants[0].bundle_hash
    facts = json.loads((image / "export.json").read_text())["deployment"]
    assert (facts["cpus"], facts["memory-mib"], facts["streams"]) == (result.cpus, 1024, "2") == (2, 1024, "2")
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in image.rglob("*"))  # of the container's user too


def test_a_plan_without_a_name_gets_that_of_its_reference(run: Path, tmp_path: Path) -> None:
    """Plans of older versions are served under the name of the reference, which is not exported."""
    msgspec.structs.replace(Plan.load(run / "plan.json"), model="").save(run / "plan.json")
    exported(run, docker=tmp_path / "image")
    assert open_target(tmp_path / "image" / "run").name == MODEL


def test_the_dockerfile_says_how_it_is_run(run: Path, tmp_path: Path) -> None:
    exported(run, docker=tmp_path / "image", port=9001, grpc_port=9002)
    text = (tmp_path / "image" / "Dockerfile").read_text()
    assert f"FROM python:{sys.version_info.major}.{sys.version_info.minor}-slim\n" in text
    assert re.search(r"^USER \d{4,}:\d{4,}$", text, re.MULTILINE)
    assert "EXPOSE 9001 9002\n" in text
    found = re.search(r"^ENTRYPOINT (.*)$", text, re.MULTILINE)
    health = re.search(r"^    CMD (.*)$", text, re.MULTILINE)
    assert found is not None
    assert health is not None
    command = json.loads(found[1])
    assert command[:4] == ["python", "-m", "rushhour", "serve"]
    assert {"--host=0.0.0.0", "--http-port=9001", "--grpc-port=9002"} < set(command)
    assert "9001" in json.loads(health[1])[-1]


@pytest.mark.parametrize(
    ("variant", "how", "there", "not_there"),
    [
        ({}, {}, ["openvino", "pillow", "numpy"], ["onnxruntime", "grpcio", "onnx"]),
        ({"engine": "onnxruntime"}, {}, ["onnxruntime"], ["openvino", "protobuf", "sympy"]),
        ({}, {"grpc_port": 9000}, ["grpcio", "protobuf"], []),
    ],
)
def test_the_requirements_are_those_of_this_server(
    tmp_path: Path, variant: dict[str, str], how: dict[str, int], there: list[str], not_there: list[str]
) -> None:
    run = run_of(tmp_path / "run", **variant)
    result = exported(run, docker=tmp_path / "image", **how)
    lines = (tmp_path / "image" / "requirements.txt").read_text().splitlines()
    assert lines == list(result.requirements)
    pinned = dict(line.split("==") for line in lines)
    for package in there:
        assert pinned[package] == version(package)
    for package in ("torch", "nncf", "matplotlib", "optuna", "tensorboard", "kornia", "rich", *not_there):
        assert package not in pinned


def test_a_server_of_texts_gets_the_tokenizers_and_nothing_that_downloads(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers", reason="extra text")
    from test_texts import text_bundle

    run = run_of(tmp_path / "run")
    served = text_bundle(run / "bundles" / "texts")
    plan = Plan.load(run / PLAN)
    variant = Variant("texts", "bundles/texts", served.manifest.hash, "openvino", "f32")
    msgspec.structs.replace(plan, variants=(variant,)).save(run / PLAN)
    pinned = dict(line.split("==") for line in exported(run, docker=tmp_path / "image").requirements)
    assert pinned["tokenizers"] == version("tokenizers")
    assert not {"huggingface-hub", "pillow", "torch"} & pinned.keys()
    assert (tmp_path / "image" / "run" / "bundles" / "texts" / "tokenizer.json").is_file()


def test_the_wheel_is_this_rushhour(run: Path, tmp_path: Path) -> None:
    exported(run, docker=tmp_path / "image")
    (wheel,) = (tmp_path / "image" / "wheels").iterdir()
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (record,) = (name for name in names if name.endswith(".dist-info/RECORD"))
        rows = list(csv.reader(archive.read(record).decode().splitlines()))
        assert {row[0] for row in rows} == names
        for name, digest, size in rows:
            if name != record:
                content = archive.read(name)
                assert (
                    digest
                    == f"sha256={base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip('=')}"
                )
                assert int(size) == len(content)
        assert archive.read("rushhour/plan.py") == Path(rushhour.__file__).with_name("plan.py").read_bytes()
    assert not any(name.startswith("rushhour/testing") or "__pycache__" in name for name in names)
    again = exported(run, docker=tmp_path / "again")
    assert next((tmp_path / "again" / "wheels").iterdir()).read_bytes() == wheel.read_bytes()
    assert again.cpus == 2


# -- what is refused, and what is never replaced


def test_only_an_older_export_is_replaced_and_only_by_force(run: Path, tmp_path: Path) -> None:
    places = {"docker": tmp_path / "image", "kserve": tmp_path / "k.yaml", "compose": tmp_path / "c.yaml"}
    exported(run, **places)
    before = (tmp_path / "k.yaml").read_text()
    for name, place in places.items():
        with pytest.raises(StorageError, match="--force"):
            exported(run, **{name: place})
    exported(run, **places, port=8081, force=True)
    assert (tmp_path / "k.yaml").read_text() != before
    assert yaml.safe_load((tmp_path / "c.yaml").read_text())["services"][MODEL]["build"] == {"context": "./image"}
    (tmp_path / "image" / "run" / "notes.txt").write_text("mine")
    (tmp_path / "k.yaml").write_text("mine: true\n")
    for name in ("docker", "kserve"):
        with pytest.raises(StorageError, match="will not"):
            exported(run, **{name: places[name]}, force=True)
    assert (tmp_path / "image" / "run" / "notes.txt").read_text() == "mine"
    assert (tmp_path / "k.yaml").read_text() == "mine: true\n"


Broken = Callable[[Path], dict[str, Any]]


def bundle_alone(folder: Path) -> dict[str, Any]:
    return {"run": folder / "run" / "bundles" / "best", "docker": folder / "image"}


def on_torch(folder: Path) -> dict[str, Any]:
    return {"run": run_of(folder / "torch", engine="torch", name="eager"), "docker": folder / "image"}


def damaged(folder: Path) -> dict[str, Any]:
    (folder / "run" / "bundles" / "best" / "model.onnx").write_bytes(b"")
    return {"docker": folder / "image"}


def in_the_context(folder: Path) -> dict[str, Any]:
    return {"docker": folder / "image", "compose": folder / "image" / "compose.yaml"}


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        (lambda folder: {}, GoalError, "nothing to export"),
        (lambda folder: {"run": folder / "none", "docker": folder / "image"}, PlanError, "nothing to serve"),
        (bundle_alone, PlanError, "is a bundle, not a run"),
        (on_torch, PlanError, "runs the network's own code on torch"),
        (damaged, RushhourError, "is damaged"),
        (in_the_context, GoalError, "cannot write both"),
        (lambda folder: {"docker": folder / "run"}, StorageError, "will not write to"),
        (lambda folder: {"kserve": folder / "run" / "plan.json"}, StorageError, "will not replace"),
        (lambda folder: {"docker": folder / "run" / "plan.json" / "x"}, StorageError, "a part of the path is a file"),
        (lambda folder: {"docker": folder / "image", "name": "Parts_1"}, GoalError, "DNS label"),
        (lambda folder: {"docker": folder / "image", "name": "1parts"}, GoalError, "DNS label"),
        (lambda folder: {"docker": folder / "image", "name": "p" * 54}, GoalError, "DNS label"),
        (lambda folder: {"docker": folder / "image", "image": "Parts: 1"}, GoalError, "cannot use the image"),
        (lambda folder: {"docker": folder / "image", "port": 70_000}, GoalError, "1 to 65,535"),
        (lambda folder: {"docker": folder / "image", "grpc_port": 8080}, GoalError, "a port of its own"),
        (lambda folder: {"docker": folder / "image", "replicas": 0}, GoalError, "replicas"),
        (lambda folder: {"docker": folder / "image", "memory": 1}, GoalError, "64 MiB"),
    ],
)
def test_what_cannot_be_exported_is_one_line_and_writes_nothing(
    run: Path, tmp_path: Path, given: Broken, error: type[RushhourError], says: str
) -> None:
    how = given(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error, match=says) as raised:
        exported(**{"run": run, **how})
    assert str(raised.value).count(";") == 1
    assert "\n" not in str(raised.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_package_that_is_missing_here_is_named(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rushhour.cluster import requirements

    def missing(name: str) -> Any:
        raise requirements.PackageNotFoundError(name)

    monkeypatch.setattr("rushhour.cluster.requirements.distribution", missing)
    with pytest.raises(EngineError, match="is not installed"):
        exported(run, docker=tmp_path / "image")


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("parts", "parts"),
        ("article-fashion-mnist", "article-fashion-mnist"),
        ("My_Model.v2", "my-model-v2"),
        ("2026", "model-2026"),
        ("x" * 64, "x" * 53),
    ],
)
def test_a_name_follows_from_the_models(model: str, name: str) -> None:
    assert default_name(model) == name


# -- the command


def test_the_command_exports_and_measures_the_memory(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {kind: str(tmp_path / name) for kind, name in (("kserve", "k.yaml"), ("compose", "c.yaml"))}
    options = [word for kind, place in places.items() for word in (f"--{kind}", place)]
    monkeypatch.setattr(sys, "argv", ["rushhour", "export", str(run), *options, "--json", str(tmp_path / "e.json")])
    main()
    said = capsys.readouterr().out
    result = json.loads((tmp_path / "e.json").read_text())
    assert {kind: result[kind] for kind in places} == places
    assert f"1 x 2 CPUs and {result['memory_mib']} MiB" in said
    assert 512 < result["memory_mib"] < 2048  # what requests may hold, and the server of a tiny model
    assert re.fullmatch(rf"{MODEL}:[0-9a-f]{{12}}", result["image"])
    assert result["plan"]["streams"] == "2"

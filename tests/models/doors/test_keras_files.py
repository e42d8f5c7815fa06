"""Files of Keras are checked before Keras sees them: nothing in them runs, nothing is written, nothing is unpacked."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rushhour.errors import ModelError
from rushhour.models.doors import Opening, bring
from rushhour.models.doors.keras import KerasDoor
from rushhour.models.doors.keras.archive import is_archive
from rushhour.models.doors.keras.files import describe
from rushhour.models.doors.keras.loading import load

h5py = pytest.importorskip("h5py")
if importlib.util.find_spec("keras") is None:
    pytest.skip("Keras is not installed", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in Keras itself

OLD = Path(__file__).parents[2] / "files" / "keras-2"
DENSE = {"module": "keras.layers", "class_name": "Dense", "config": {"units": 2}, "registered_name": None}


def described(*layers: dict[str, Any], **more: Any) -> dict[str, Any]:
    first = {"module": "keras.layers", "class_name": "InputLayer", "config": {"batch_shape": [None, 4]}}
    config = {"name": "sequential", "layers": [first, *layers]}
    return {"module": "keras", "class_name": "Sequential", "config": config, "registered_name": None, **more}


def weights(**arrays: Any) -> bytes:
    held = io.BytesIO()
    with h5py.File(held, "w") as file:
        group = file.create_group("layers/dense/vars")
        for name, array in (arrays or {"0": np.zeros((4, 2)), "1": np.zeros(2)}).items():
            group[name] = array
    return held.getvalue()


def archive(path: Path, description: Any = None, held: bytes | None = None, **more: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("metadata.json", json.dumps({"keras_version": "3.15.1"}))
        made.writestr("config.json", json.dumps(description or described(DENSE)))
        made.writestr("model.weights.h5", weights() if held is None else held)
        for name, content in more.items():
            made.writestr(name, content)
    return path


def layer(name: str, module: str | None = "keras.layers", **config: Any) -> dict[str, Any]:
    return {"module": module, "class_name": name, "config": {"name": "x", **config}, "registered_name": None}


@contextmanager
def watched() -> Iterator[list[str]]:
    """What runs code or leaves a trace while this lasts."""
    events: list[str] = []
    watching = True

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if not watching:
            return
        if event in ("exec", "marshal.loads", "marshal.load", "pickle.find_class", "subprocess.Popen", "os.system"):
            events.append(f"{event} {arguments[:1]}")
        elif (
            event == "open" and len(arguments) > 1 and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        ):
            events.append(f"open {arguments[0]}")
        elif event in ("os.mkdir", "os.rename", "os.symlink", "socket.connect", "shutil.copyfile"):
            events.append(f"{event} {arguments[:1]}")

    sys.addaudithook(hook)
    try:
        yield events
    finally:
        watching = False


def refused(file: Path, match: str) -> None:
    brought = bring(file)
    assert brought is not None
    assert isinstance(brought.door, KerasDoor)
    before = sorted(file.parent.rglob("*"))
    with pytest.raises(ModelError):
        brought.open()  # Python imports what it needs for this
    with watched() as events, pytest.raises(ModelError, match=match) as error:
        brought.open()
    assert not events
    assert "\n" not in str(error.value)
    assert sorted(file.parent.rglob("*")) == before


HOSTILE = {
    "Lambda": (layer("Lambda", function={"class_name": "__lambda__", "config": {"value": "AA=="}}), "it is code"),
    "a lambda as an activation": (
        layer("Dense", units=2, activation={"class_name": "__lambda__", "config": {"value": "AA=="}}),
        "it is code",
    ),
    "a module of any name": (layer("system", "os"), "os.system is none of Keras' own"),
    "a function of any module": (
        layer("Activation", activation={"module": "os", "class_name": "function", "config": "system"}),
        "its function system is none",
    ),
    "a pickle": (layer("TorchModuleWrapper", module="AA=="), "read from a pickle"),
    "a SavedModel": (layer("TFSMLayer", filepath="/tmp/x"), "reads a SavedModel from elsewhere"),
    "a file of words": (layer("StringLookup", vocabulary="/etc/passwd"), "works on texts or in a lookup table"),
    "a function of Keras that reads files": (layer("get_file", "keras.utils"), "keras.utils.get_file is none"),
    "a setting of Keras": (layer("enable_unsafe_deserialization", "keras.config"), "none of Keras' own"),
    "an own layer": (layer("Mine", None), r"its layer Mine is none.*load it yourself"),
    "an own name": ({**layer("Dense", units=2), "registered_name": "mine>Dense"}, "none of Keras' own"),
    "a loop": (layer("Map", "keras.src.ops.core"), "keras.src.ops.core.Map is none"),
    "no name": (layer(3), "description is damaged"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("case", HOSTILE)
def test_only_layers_of_keras_are_taken(case: str, tmp_path: Path) -> None:
    hostile, match = HOSTILE[case]
    refused(archive(tmp_path / "model.keras", described(hostile)), match)


@pytest.mark.parametrize("place", ["build_config", "quantization_config"])
def test_what_stands_beside_a_description_is_checked_too(place: str, tmp_path: Path) -> None:
    refused(archive(tmp_path / "model.keras", described(DENSE, **{place: layer("Lambda")})), "it is code")


def test_losses_of_the_user_do_not_matter(tmp_path: Path) -> None:
    """They are not needed to answer, and are not loaded."""
    own = {"loss": {"module": "mine", "class_name": "function", "config": "loss"}}
    file = archive(tmp_path / "model.keras", described(DENSE, compile_config=own))
    assert load(file, describe(file)).get_weights()[0].shape == (4, 2)


def test_what_is_in_an_archive(tmp_path: Path) -> None:
    for name, match in {
        "../outside": "lies outside of it", "/etc/x": "lies outside of it", "a/../../b": "lies outside of it",
        "c:evil": "lies outside of it", "assets/words.txt": "a vocabulary or other file",
        "model.weights.npz": "may hold a pickle", "run.py": "a part of the name 'run.py'",
    }.items():  # fmt: skip
        refused(archive(tmp_path / "model.keras", **{name: b"x"}), match)
    with pytest.warns(UserWarning, match="Duplicate name"):
        twice = archive(tmp_path / "model.keras", **{"config.json": b"{}"})
    refused(twice, "two parts of the name 'config.json'")
    archive(tmp_path / "model.keras")
    whole = (tmp_path / "model.keras").read_bytes()
    (tmp_path / "model.keras").write_bytes(whole[: len(whole) // 2])
    refused(tmp_path / "model.keras", "it is no archive")


def test_compressed_parts_are_refused_before_they_are_unpacked(tmp_path: Path) -> None:
    """Their size in the list of contents may be a lie."""
    with zipfile.ZipFile(tmp_path / "model.keras", "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("metadata.json", "{}")
        made.writestr("config.json", json.dumps(described(DENSE)))
        made.writestr("model.weights.h5", bytes(20_000_000))
    refused(tmp_path / "model.keras", "its part metadata.json is compressed, which Keras does not do")


def test_an_archive_of_very_many_parts_is_not_listed(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "model.keras", "w") as made:
        for number in range(20_000):
            made.writestr(f"{number:020}", b"")
    refused(tmp_path / "model.keras", "too many parts")
    assert not is_archive(tmp_path / "model.keras")


def test_a_description_that_cannot_be_read(tmp_path: Path) -> None:
    for text, match in {
        "{": "cannot be read", "[1]": "describes no model", "[" * 100_000: "cannot be read",
        '{"config": 1}': "describes no model",
    }.items():  # fmt: skip
        with zipfile.ZipFile(tmp_path / "model.keras", "w") as made:
            made.writestr("metadata.json", "{}")
            made.writestr("config.json", text)
            made.writestr("model.weights.h5", weights())
        refused(tmp_path / "model.keras", match)


def linked(change: Any) -> bytes:
    held = io.BytesIO()
    with h5py.File(held, "w") as file:
        change(file)
    return held.getvalue()


def test_weights_are_plain_arrays_inside_the_file(tmp_path: Path) -> None:
    def external(file: Any) -> None:
        file["layers"] = h5py.ExternalLink("/etc/other.h5", "/x")

    def soft(file: Any) -> None:
        file["layers"] = h5py.SoftLink("/elsewhere")

    def stored_outside(file: Any) -> None:
        file.create_dataset("x", (8,), "u1", external=[("/etc/passwd", 0, 8)])

    def virtual(file: Any) -> None:
        layout = h5py.VirtualLayout((4,), "f4")
        layout[:] = h5py.VirtualSource("/etc/other.h5", "x", (4,))
        file.create_virtual_dataset("x", layout)

    def huge(file: Any) -> None:
        file.create_dataset("x", (50_000_000_000,), "f4", chunks=(1_000_000,))

    def packed(file: Any) -> None:
        file.create_dataset("x", data=np.zeros(100), compression="gzip")

    def objects(file: Any) -> None:
        file.create_dataset("x", (2,), h5py.string_dtype())

    cases = {
        external: "is a link to the file /etc/other.h5", soft: "is a link to /elsewhere",
        stored_outside: "is in another file", virtual: "is in another file",
        huge: "take 200,000,000,000 bytes", packed: "is compressed", objects: "are numbers",
    }  # fmt: skip
    for change, match in cases.items():
        refused(archive(tmp_path / "model.keras", held=linked(change)), match)
        (tmp_path / "model.h5").write_bytes(linked(change))
        refused(tmp_path / "model.h5", match)
    refused(archive(tmp_path / "model.keras", held=b"no hdf5"), "its weights cannot be read")


def test_a_group_that_holds_itself_ends(tmp_path: Path) -> None:
    def cyclic(file: Any) -> None:
        file["a/b"] = np.zeros(3)
        file["a/c"] = file["a"]

    (tmp_path / "model.h5").write_bytes(linked(cyclic))
    refused(tmp_path / "model.h5", "has weights, but no description of a model")


def test_code_in_files_of_keras_2_is_not_run() -> None:
    executed = Path("/tmp/executed")
    executed.unlink(missing_ok=True)
    refused(OLD / "lambda.h5", "its layer Lambda is not taken: it is code")
    assert not executed.exists()
    refused(OLD / "operation.h5", "TFOpLambda is not taken: it is an operation of TensorFlow")
    refused(OLD / "of-keras-2.keras", r"written by Keras 2.15.0, whose .keras files .* save it there as .h5")


def test_a_description_with_more_weights_than_the_file_has(tmp_path: Path) -> None:
    """A few bytes of text could ask for all of the memory: 32 TB here."""
    wide = described({**DENSE, "config": {"units": 2 * 10**12}})
    with pytest.raises(ModelError, match=r"cannot load .*variable.shape=\(4, 2000000000000\)"):
        KerasDoor().open(archive(tmp_path / "model.keras", wide), Opening("m", "m"))

"""Data sets: the real one and the ways to it, arrays, folders of pictures, and what is wrong with each."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import shutil
import struct
import subprocess
import threading
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from rushhour.bundle import Preprocessing
from rushhour.data import Dataset, Files, Split, decoded, load
from rushhour.data import fashion as fashion_module
from rushhour.data.arrays import from_splits, load_npz
from rushhour.data.elpv import elpv
from rushhour.data.fashion import cache, fashion_mnist, find
from rushhour.data.splits import stratified
from rushhour.errors import DataError, RushhourError, TaskError
from rushhour.task import Task

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
NOWHERE = Path("/nowhere")
needs_fashion = pytest.mark.skipif(not DEBIAN.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")


# Fashion-MNIST


@needs_fashion
def test_fashion_mnist_is_the_real_one() -> None:
    began = time.perf_counter()
    data = load("fashion-mnist")
    assert time.perf_counter() - began < 5  # 0.8 s alone; other tests may share the machine
    assert (len(data.train), len(data.validation), len(data.test)) == (55_000, 5_000, 10_000)
    assert data.sample_shape == (28, 28, 1)
    assert data.train.inputs.dtype == np.uint8
    assert data.train.inputs.flags.writeable
    assert data.train.targets.dtype == np.int64
    assert data.task.classes[9] == "Ankle boot"
    assert data.train.targets[0] == 9  # the first picture is known to be an ankle boot
    assert np.bincount(data.test.targets).tolist() == [1000] * 10
    pixels = data.train.inputs / 255
    assert abs(pixels.mean() - data.preprocessing.mean[0]) < 1e-3
    assert abs(pixels.std() - data.preprocessing.std[0]) < 1e-3
    assert data.preprocessing.layout == "NHWC->NCHW"
    assert len(data.fingerprint) == 64


@pytest.fixture
def small_fashion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files of the same form, with 5,002 + 3 pictures of 2x2, and their checksums put in place of the real ones."""
    folder = tmp_path / "origin"
    folder.mkdir()
    random = np.random.default_rng(0)
    checksums = {}
    for part, n in (("train", 5_002), ("t10k", 3)):
        for kind, shape in (("images-idx3", (n, 2, 2)), ("labels-idx1", (n,))):
            content = struct.pack(f">{1 + len(shape)}I", 0x800 + len(shape), *shape)
            content += random.integers(0, 10, shape, dtype=np.uint8).tobytes()
            name = f"{part}-{kind}-ubyte.gz"
            (folder / name).write_bytes(gzip.compress(content, 1))
            checksums[name] = hashlib.sha256(content).hexdigest()
    monkeypatch.setattr(fashion_module, "_FILES", checksums)
    return folder


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *words: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), lambda *given: Quiet(*given, directory=str(folder))
    ) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def no_tools(command: list[str], folder: Path) -> None:
    raise FileNotFoundError(f"there is no {command[0]} here")


def test_fashion_mnist_is_fetched_once_and_checked(small_fashion: Path, tmp_path: Path) -> None:
    cached = tmp_path / "cache"
    with serving(small_fashion) as home:
        folder = find(cached, debian=NOWHERE, homes=(f"{home}/missing", home), run=no_tools)
    assert folder == cached / "fashion-mnist"
    assert find(cached, debian=NOWHERE, homes=(), run=no_tools) == folder  # the server is gone
    assert not [file for file in folder.iterdir() if file.name.startswith(".")]


def test_fashion_mnist_is_read_from_the_cache(
    small_fashion: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUSHHOUR_DATA", str(tmp_path / "own"))
    shutil.copytree(small_fashion, tmp_path / "own" / "fashion-mnist")
    data = fashion_mnist()
    assert (len(data.train), len(data.validation), len(data.test)) == (2, 5_000, 3)


@pytest.mark.parametrize(
    "harm",
    [b"", b"no gzip", gzip.compress(b"other content"), "cut", "flip"],
    ids=["empty", "no gzip", "other content", "cut", "flip"],  # gzip writes the time into its bytes
)
def test_fashion_mnist_that_is_not_what_it_should_be_is_not_kept(
    small_fashion: Path, tmp_path: Path, harm: bytes | str
) -> None:
    file = small_fashion / "train-images-idx3-ubyte.gz"
    whole = file.read_bytes()
    if isinstance(harm, str):
        harm = whole[:-20] if harm == "cut" else whole[:200] + bytes([whole[200] ^ 255]) + whole[201:]
    file.write_bytes(harm)
    with serving(small_fashion) as home, pytest.raises(DataError, match="cannot find or download"):
        find(tmp_path / "cache", debian=NOWHERE, homes=(home,), run=no_tools)
    assert not (tmp_path / "cache" / "fashion-mnist" / file.name).exists()


def test_fashion_mnist_comes_out_of_debians_package(small_fashion: Path, tmp_path: Path) -> None:
    asked = []

    def run(command: list[str], folder: Path) -> None:
        asked.append(command[:2])
        if command[:2] == ["apt-get", "download"]:
            if asked.count(command[:2]) == 1:
                raise subprocess.CalledProcessError(100, command)
            (folder / "dataset-fashion-mnist_1_all.deb").write_bytes(b"")
        elif command[0] == "dpkg-deb":
            shutil.copytree(small_fashion, folder / command[-1] / DEBIAN.relative_to("/"))

    def unprivileged() -> int:
        return 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.geteuid", unprivileged)
        folder = find(tmp_path / "cache", debian=NOWHERE, homes=(), run=run)
    assert asked == [["apt-get", "download"], ["apt-get", "update"], ["apt-get", "download"], ["dpkg-deb", "-x"]]
    assert sorted(file.name for file in folder.iterdir()) == sorted(file.name for file in small_fashion.iterdir())


def test_fashion_mnist_that_is_nowhere_names_all_that_was_tried(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        find(tmp_path / "cache", debian=NOWHERE, homes=("http://127.0.0.1:9",), run=no_tools)
    line = str(caught.value)
    for word in (str(tmp_path / "cache"), "/nowhere", "127.0.0.1:9", "apt-get download", "apt-get install"):
        assert word in line
    assert "\n" not in line


def test_apt_that_leaves_no_package_is_said(small_fashion: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="left no package"):
        find(tmp_path / "cache", debian=NOWHERE, homes=(), run=lambda command, folder: None)


def test_a_cache_that_cannot_be_written_is_said(small_fashion: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with serving(small_fashion) as home, pytest.raises(DataError, match="a part of the path is a file"):
        find(tmp_path / "file" / "cache", debian=NOWHERE, homes=(home,), run=no_tools)


@pytest.mark.parametrize("harm", ["empty", "cut", "flip", "other"])
def test_damaged_files_in_the_cache_are_named(
    small_fashion: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    monkeypatch.setenv("RUSHHOUR_DATA", str(tmp_path))
    small_fashion.rename(tmp_path / "fashion-mnist")
    file = tmp_path / "fashion-mnist" / "t10k-images-idx3-ubyte.gz"
    whole = file.read_bytes()
    file.write_bytes(
        {
            "empty": b"",
            "cut": whole[:-9],
            "flip": whole[:15] + bytes([whole[15] ^ 255]) + whole[16:],
            "other": gzip.compress(b"x"),
        }[harm]
    )
    with pytest.raises(DataError, match=r"t10k-images.*downloaded again"):
        fashion_mnist()


def test_the_cache_is_where_the_user_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RUSHHOUR_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache() == Path("/somewhere/rushhour")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache() == Path.home() / ".cache/rushhour"
    monkeypatch.setenv("RUSHHOUR_DATA", "/here")
    assert cache() == Path("/here")


# ELPV


@pytest.fixture(scope="module")
def made_up_elpv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for sys.path with a package of its form: cells of 8x8 pixels, each as bright as its number."""
    package = tmp_path_factory.mktemp("site") / "elpv_dataset"
    (package / "data" / "images").mkdir(parents=True)
    (package / "__init__.py").touch()
    lines = []
    for index in range(2624):
        name = f"images/cell{index:04d}.png"
        Image.fromarray(np.full((8, 8), index % 251, np.uint8)).save(package / "data" / name)
        lines.append(f"{name}  {('0.0', '0.3333333333333333', '0.6666666666666666', '1.0')[index % 4]}  "
                     f"{'mono' if index % 3 else 'poly'}")  # fmt: skip
    (package / "data" / "labels.csv").write_text("\n".join(lines) + "\n")
    return package.parent


def damaged_elpv(good: Path, path: Path) -> Path:
    shutil.copytree(good, path)
    return path / "elpv_dataset" / "data"


def test_cells_are_defective_above_one_half_and_split_by_seed(
    made_up_elpv: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(made_up_elpv)
    data = load("elpv", size=(4, 6), seed=1)
    assert (data.name, data.task.classes) == ("elpv", ("functional", "defective"))
    assert [len(part) for part in (data.train, data.validation, data.test)] == [1574, 394, 656]
    assert data.sample_shape == (4, 6, 1)
    assert data.preprocessing.decoding is not None
    by_brightness: dict[int, set[int]] = {brightness: set() for brightness in range(251)}
    for index in range(2624):
        by_brightness[index % 251].add(int(index % 4 >= 2))
    for part in (data.train, data.validation, data.test):
        assert abs(part.targets.mean() - 0.5) < 0.01, "every part has its share of every class"
        for picture, label in zip(part.inputs, part.targets, strict=True):
            assert int(label) in by_brightness[int(picture[0, 0, 0])]
    assert load("elpv", size=(4, 6), seed=1).fingerprint == data.fingerprint
    assert load("elpv", size=(4, 6), seed=2).fingerprint != data.fingerprint


def test_elpv_that_is_not_installed_says_how_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"CC BY-NC-SA 4.0.*pip install 'rushhour\[elpv\]'"):
        load("elpv")


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda data: (data / "labels.csv").unlink(), "labels.csv"),
        (lambda data: (data / "labels.csv").write_text("one.png 1.0 mono\n"), "1 annotated pictures, not 2,624"),
        (lambda data: (data / "labels.csv").write_text("one.png two\n"), "labels.csv"),
        (lambda data: (data / "images" / "cell0007.png").write_bytes(b"PNG"), "cell0007.png: it is damaged"),
        (lambda data: (data / "images" / "cell0007.png").unlink(), "cell0007.png"),
    ],
    ids=["no labels", "too few", "no number", "damaged", "gone"],
)
def test_elpv_that_is_not_what_it_should_be(
    made_up_elpv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: Callable[[Path], Any], words: str
) -> None:
    harm(damaged_elpv(made_up_elpv, tmp_path / "site"))
    monkeypatch.syspath_prepend(tmp_path / "site")
    with pytest.raises(DataError, match=words):
        elpv(size=(4, 4))


def test_elpv_is_the_real_one() -> None:
    pytest.importorskip("elpv_dataset", reason="the extra elpv is not installed")
    data = load("elpv")
    assert data.sample_shape == (96, 96, 1)
    defective = sum(int(part.targets.sum()) for part in (data.train, data.validation, data.test))
    assert defective == 821  # 106 + 715 in table 1 of Deitsch et al.


# Arrays


def saved(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def pictures(n: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (n, 4, 5, 3), dtype=np.uint8)


def test_x_and_y_are_split_by_seed_with_every_class_in_training(tmp_path: Path) -> None:
    labels = np.repeat(np.arange(3), [70, 20, 10])
    file = saved(tmp_path / "My data.npz", x=pictures(100), y=labels)
    data = load(str(file))
    assert data.name == "my-data"
    assert 70 <= len(data.train) <= 90
    assert set(data.train.targets) == {0, 1, 2}
    seen = np.concatenate([data.train.inputs, data.validation.inputs, data.test.inputs])
    assert len(np.unique(seen.reshape(100, -1), axis=0)) == 100
    by_picture = {picture.tobytes(): label for picture, label in zip(pictures(100), labels, strict=True)}
    for picture, label in zip(data.test.inputs, data.test.targets, strict=True):
        assert by_picture[picture.tobytes()] == label
    assert load(str(file)).fingerprint == data.fingerprint
    assert load(str(file), seed=1).fingerprint != data.fingerprint


def test_pictures_are_normalised_by_channel_as_measured_on_train(tmp_path: Path) -> None:
    data = load(str(saved(tmp_path / "a.npz", x=pictures(50), y=np.arange(50) % 2)))
    pixels = data.train.inputs.reshape(-1, 3) / 255
    assert data.preprocessing.layout == "NHWC->NCHW"
    assert data.preprocessing.scale == 1 / 255
    np.testing.assert_allclose(data.preprocessing.mean, pixels.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(data.preprocessing.std, pixels.std(axis=0), rtol=1e-6)


def test_features_are_normalised_and_constants_left_alone(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    x = np.stack([random.normal(1e6, 10, 40), np.full(40, 7.1), random.normal(0, 1e-3, 40)], axis=1)
    data = load(str(saved(tmp_path / "a.npz", x=x, y=x.sum(axis=1))))
    assert data.task.unscaled == Task(kind="regression", outputs=1)
    assert data.train.inputs.dtype == data.train.targets.dtype == np.float32
    assert data.train.targets.shape[1:] == (1,)
    normal = (data.train.inputs.astype(np.float64) - data.preprocessing.mean) / data.preprocessing.std
    np.testing.assert_allclose(normal.std(axis=0), [1, 0, 1], atol=1e-3)
    np.testing.assert_allclose(normal.mean(axis=0), 0, atol=1e-2)


def test_parts_that_are_given_are_kept(tmp_path: Path) -> None:
    parts = {
        f"{array}_{part}": values
        for part, n in (("train", 20), ("validation", 5), ("test", 6))
        for array, values in (("x", pictures(n, n)), ("y", np.arange(n) % 3))
    }
    data = load(str(saved(tmp_path / "a.npz", **parts)))
    np.testing.assert_array_equal(data.validation.inputs, parts["x_validation"])
    del parts["x_validation"], parts["y_validation"]
    data = load(str(saved(tmp_path / "b.npz", **parts)))
    assert len(data.train) + len(data.validation) == 20
    assert len(data.test) == 6
    np.testing.assert_array_equal(data.test.inputs, parts["x_test"])


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("it was unpickled",))


def test_objects_are_never_unpickled(tmp_path: Path) -> None:
    file = saved(tmp_path / "a.npz", x=np.array([Malicious()], dtype=object), y=np.arange(1))
    with pytest.raises(DataError, match="would have to be unpickled"):
        load(str(file))


GOOD = {"x": pictures(20), "y": np.arange(20) % 2}


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"z": GOOD["x"]}, "it needs x_train"),
        ({"x_train": GOOD["x"]}, "it needs x_train"),
        ({"x": GOOD["x"]}, "has no labels"),
        ({"x": GOOD["x"], "y": np.arange(19)}, "each sample needs one target"),
        ({"x": np.float32(1), "y": np.arange(19)}, "each sample needs one target"),
        ({"x": GOOD["x"][:9], "y": np.arange(9)}, "at least 10"),
        ({"x": np.zeros((60, 2)), "y": np.arange(60) * 7}, "60 different|different whole numbers"),
        ({"x": GOOD["x"], "y": np.zeros(20, int)}, "1 class"),
        ({"x": GOOD["x"], "y": GOOD["y"].astype(complex)}, "convert them"),
        ({"x": GOOD["x"], "y": np.zeros((20, 2, 2))}, "convert them"),
        ({"x": GOOD["x"].astype(np.int32), "y": GOOD["y"]}, "convert them"),
        ({"x": GOOD["x"][:, :0], "y": GOOD["y"]}, "convert them"),
        ({"x": np.full((20, 3), np.nan), "y": GOOD["y"]}, "NaN or infinity"),
        ({"x": GOOD["x"], "y": np.full(20, np.inf)}, "NaN or infinity"),
        ({"x_train": GOOD["x"], "y_train": GOOD["y"][:9], "x_test": GOOD["x"], "y_test": GOOD["y"]}, "one target"),
        ({"x_train": GOOD["x"], "y_train": GOOD["y"], "x_test": GOOD["x"], "y_test": GOOD["y"] + 1}, "from 1 to 2"),
        ({"x_train": GOOD["x"], "y_train": GOOD["y"], "x_test": GOOD["x"][:0], "y_test": GOOD["y"][:0]}, "is empty"),
        ({"x_train": GOOD["x"], "y_train": GOOD["y"], "x_test": GOOD["x"][:, 1:], "y_test": GOOD["y"]}, "in shape"),
        (
            {"x_train": GOOD["x"], "y_train": np.ones((20, 2)), "x_test": GOOD["x"], "y_test": np.ones((20, 1))},
            "same number for every sample",
        ),
    ],
)
def test_arrays_that_do_not_fit_are_refused_in_one_line(tmp_path: Path, arrays: dict[str, Any], words: str) -> None:
    with pytest.raises(RushhourError, match=words) as caught:
        load(str(saved(tmp_path / "a.npz", **arrays)))
    assert isinstance(caught.value, DataError | TaskError)
    assert caught.value.fix
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("harm", ["empty", "text", "pickle", "cut", "flip", "npy", "huge"])
def test_damaged_archives_are_refused(tmp_path: Path, harm: str) -> None:
    file = saved(tmp_path / "a.npz", **GOOD)
    whole = file.read_bytes()
    if harm == "npy":
        np.save(tmp_path / "b.npy", GOOD["x"])
        (tmp_path / "b.npy").rename(file)
    elif harm == "huge":
        header = b"\x93NUMPY\x01\x00" + struct.pack("<H", 118)
        header += b"{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000000000,), }".ljust(117) + b"\n"
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("x.npy", header)
            archive.writestr("y.npy", header)
    else:
        file.write_bytes(
            {
                "empty": b"",
                "text": b"hello",
                "pickle": b"\x80\x04K\x01.",
                "cut": whole[: len(whole) // 2],
                "flip": whole[:300] + bytes([whole[300] ^ 255]) + whole[301:],
            }[harm]
        )
    with pytest.raises(DataError, match="cannot read"):
        load(str(file))


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    for spec in (str(tmp_path / "a.npz"), str(tmp_path / "folder"), "fashion", ""):
        with pytest.raises(DataError, match="there is no data"):
            load(spec)
    with pytest.raises(DataError, match="does not exist"):
        load_npz(tmp_path / "a.npz", seed=0)


@pytest.mark.parametrize("counts", [[5, 5, 5], [1, 1, 98], [2] * 50, [37, 3, 60], [10] * 10])
def test_held_out_parts_leave_every_class_in_train(counts: list[int]) -> None:
    labels = np.repeat(np.arange(len(counts)), counts)
    for seed in range(20):
        parts = stratified(Split(np.arange(len(labels))[:, None], labels), (0.1, 0.1), seed=seed)
        assert sorted(np.concatenate([part.inputs[:, 0] for part in parts]).tolist()) == list(range(len(labels)))
        assert set(parts[0].targets) == set(labels)
        for part in parts:
            np.testing.assert_array_equal(labels[part.inputs[:, 0]], part.targets)
            found = np.bincount(part.targets, minlength=len(counts))
            assert (np.abs(found - np.array(counts) * len(part) / len(labels)) <= 1.5).all()


def test_held_out_values_are_split_too() -> None:
    parts = stratified(Split(np.arange(30)[:, None], np.linspace(0, 1, 30)), (0.2,), seed=0)
    assert [len(part) for part in parts] == [24, 6]


# Folders of pictures


def painted(folder: Path, classes: dict[str, int], *, size: tuple[int, int] = (6, 8), mode: str = "RGB") -> Path:
    for number, (name, n) in enumerate(classes.items()):
        (folder / name).mkdir(parents=True)
        for index in range(n):
            value = 40 * number + index
            colour: Any = value if mode in ("L", "I;16") else (value, 255 - value, 7)
            Image.new(mode, (size[1], size[0]), colour).save(folder / name / f"{index}.png")
    return folder


def test_a_folder_for_each_class(tmp_path: Path) -> None:
    folder = painted(tmp_path / "Pets", {"dog": 20, "cat": 30})
    data = load(str(folder))
    assert data.name == "pets"
    assert data.task.classes == ("cat", "dog")
    assert data.sample_shape == (6, 8, 3)
    for part in (data.train, data.validation, data.test):
        # cats were painted second: red from 40 on
        np.testing.assert_array_equal(part.inputs[:, 0, 0, 0] < 40, part.targets == 1)
    assert len(data.train) + len(data.validation) + len(data.test) == 50
    assert len(data.preprocessing.mean) == 3
    assert load(str(folder)).fingerprint == data.fingerprint


def test_grey_pictures_stay_grey_and_mixed_ones_get_colours(tmp_path: Path) -> None:
    folder = painted(tmp_path / "a", {"x": 10, "y": 10}, mode="L")
    assert load(str(folder)).sample_shape == (6, 8, 1)
    Image.new("RGB", (8, 6)).save(folder / "x" / "colour.png")
    assert load(str(folder)).sample_shape == (6, 8, 3)


def test_sixteen_bits_of_grey_are_scaled_not_clipped(tmp_path: Path) -> None:
    for name, value in (("dark", 0x1000), ("light", 0x8000)):
        (tmp_path / name).mkdir()
        for index in range(10):
            Image.fromarray(np.full((3, 3), value, np.uint16)).save(tmp_path / name / f"{index}.png")
    data = load(str(tmp_path))
    assert data.sample_shape == (3, 3, 1)
    assert set(np.unique(data.train.inputs)) == {0x10, 0x80}


def test_pictures_are_brought_to_one_size(tmp_path: Path) -> None:
    folder = painted(tmp_path / "a", {"x": 10, "y": 10})
    painted(tmp_path / "b", {"z": 5}, size=(20, 10))
    (tmp_path / "b" / "z").rename(folder / "z")
    assert load(str(folder)).sample_shape == (6, 8, 3)
    assert load(str(folder), size=(5, 4)).sample_shape == (5, 4, 3)


def test_a_folder_that_is_split_already(tmp_path: Path) -> None:
    for part, n in (("train", 10), ("validation", 2), ("test", 3)):
        painted(tmp_path / part, {"x": n, "y": n})
    data = load(str(tmp_path))
    assert (len(data.train), len(data.validation), len(data.test)) == (20, 4, 6)
    shutil.rmtree(tmp_path / "validation")
    data = load(str(tmp_path))
    assert len(data.train) + len(data.validation) == 20
    assert len(data.test) == 6


def test_hidden_files_and_other_files_are_no_pictures(tmp_path: Path) -> None:
    folder = painted(tmp_path / "a", {"x": 10, "y": 10})
    (folder / "x" / "._0.png").write_bytes(b"what macOS leaves")
    (folder / "x" / "notes.txt").write_text("no picture")
    (folder / ".git").mkdir()
    (folder / "README.md").write_text("no class")
    data = load(str(folder))
    assert data.task.classes == ("x", "y")
    assert len(data.train) + len(data.validation) + len(data.test) == 20
    assert data.files == Files(23, 20, {"hidden": 1, ".txt": 1, "outside class folders": 1})
    assert data.notes == ("left out 3 of 23 files: hidden 1, outside class folders 1, .txt 1",)


def test_folders_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no classes"):
        load(str(tmp_path / "empty"))
    with pytest.raises(TaskError, match=r"1 class.*at least two classes"):
        load(str(painted(tmp_path / "one", {"only": 30})))
    folder = painted(tmp_path / "hole", {"x": 10, "y": 10, "z": 0})
    with pytest.raises(DataError, match=r"the class 'z' .* is empty"):
        load(str(folder))
    painted(tmp_path / "half" / "test", {"x": 10, "y": 10})
    painted(tmp_path / "half" / "val", {"x": 10, "y": 10})
    with pytest.raises(DataError, match="no folder train"):
        load(str(tmp_path / "half"))
    painted(tmp_path / "odd" / "train", {"x": 10, "y": 10})
    painted(tmp_path / "odd" / "test", {"x": 10, "z": 10})
    with pytest.raises(DataError, match="the same classes"):
        load(str(tmp_path / "odd"))


@pytest.mark.parametrize("harm", ["empty", "cut", "text", "bomb"])
def test_a_picture_that_cannot_be_read_is_named(tmp_path: Path, harm: str) -> None:
    folder = painted(tmp_path / "a", {"x": 10, "y": 10}, size=(64, 64))
    file = folder / "x" / "3.png"
    whole = file.read_bytes()
    if harm == "bomb":
        # 30,000 x 5,000: over Pillow's own warning, and 150 kB on the disk
        Image.new("1", (30_000, 5_000)).save(file)
    else:
        file.write_bytes({"empty": b"", "cut": whole[: len(whole) // 2], "text": b"hello"}[harm])
    with pytest.raises(DataError) as caught:
        load(str(folder))
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_warnings_of_others_survive(tmp_path: Path) -> None:
    folder = painted(tmp_path / "a", {"x": 20, "y": 20})
    before = list(warnings.filters)
    load(str(folder))
    assert list(warnings.filters) == before


# module:factory


def made() -> Dataset:
    return from_splits("made", *(Split(pictures(n), np.arange(n) % 2) for n in (8, 4, 4)))


def nothing() -> None:
    return None


def broken() -> Dataset:
    raise KeyError("oops")


def particular() -> Dataset:
    raise TaskError("no task", "because", "do something")


def test_a_callable_of_the_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    assert len(load("test_data:made").train) == 8
    with pytest.raises(DataError, match="NoneType"):
        load("test_data:nothing")
    with pytest.raises(DataError, match="KeyError"):
        load("test_data:broken")
    with pytest.raises(DataError, match="AttributeError"):
        load("test_data:absent")
    with pytest.raises(DataError, match="ModuleNotFoundError"):
        load("no_such_module:made")
    with pytest.raises(TaskError, match="no task"):
        load("test_data:particular")


def test_a_data_set_refuses_what_does_not_fit() -> None:
    good = Split(pictures(4), np.arange(4) % 2)
    task = Task.classification(("a", "b"))
    for bad in (good.head(0), Split(good.inputs, good.targets[:2]), Split(good.inputs[:, 1:], good.targets)):
        with pytest.raises(DataError):
            Dataset("a", task, good, bad, good, Preprocessing(), "")


# Folders with what is broken in them, and many pictures


def spoiled(folder: Path, *names: str) -> Path:
    for name in names:
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2])
    return folder


def test_a_corrupt_picture_is_named_and_ends_it_unless_it_may_be_skipped(tmp_path: Path) -> None:
    folder = spoiled(painted(tmp_path / "a", {"x": 20, "y": 20}), "x/3.png", "y/7.png")
    with pytest.raises(DataError, match=r"cannot read the picture .*x/3\.png \(and 1 more\).*--skip-corrupt"):
        load(str(folder))
    heard: list[DataError] = []
    data = load(str(folder), on_corrupt=heard.append)
    assert [error.what.rpartition(" ")[2] for error in heard] == [str(folder / "x/3.png"), str(folder / "y/7.png")]
    assert len(data.train) + len(data.validation) + len(data.test) == 38
    for name in ("x/3.png", "y/7.png"):
        (folder / name).unlink()
    assert load(str(folder)).fingerprint == data.fingerprint, "as if they had never been there"


def test_a_class_of_nothing_but_corrupt_pictures_is_an_empty_class(tmp_path: Path) -> None:
    folder = painted(tmp_path / "a", {"x": 20, "y": 2})
    spoiled(folder, "y/0.png", "y/1.png")
    with pytest.raises(DataError, match=r"the class 'y' .* is empty: none of its 2 pictures can be read"):
        load(str(folder), on_corrupt=lambda error: None)
    alone = spoiled(painted(tmp_path / "b", {"x": 1, "y": 1}), "x/0.png", "y/0.png")
    with pytest.raises(DataError, match="none of 2 pictures can be read"):
        load(str(alone), on_corrupt=lambda error: None)


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(decoded, "WORTH_CACHING", 0)
    monkeypatch.setenv("RUSHHOUR_DATA", str(tmp_path / "cache"))
    return tmp_path / "cache" / "pictures"


def owner(array: NDArray[Any]) -> Any:
    """What an array's memory belongs to, behind all views."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def test_many_pictures_are_decoded_once_and_mapped(
    tmp_path: Path, cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = spoiled(painted(tmp_path / "a", {"x": 30, "y": 30}), "x/3.png")
    heard: list[DataError] = []
    first = load(str(folder), on_corrupt=heard.append)
    assert isinstance(owner(first.train.inputs), np.memmap)
    assert first.train.inputs.flags.writeable
    (place,) = (path for path in cached.iterdir() if path.is_dir())
    assert not (place / "decoded.npy").exists()

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("it was decoded again")

    with monkeypatch.context() as patched:
        patched.setattr(decoded, "decode", never)
        again = load(str(folder), on_corrupt=heard.append)
        assert again.fingerprint == first.fingerprint
        assert len(heard) == 2
        with pytest.raises(DataError, match=r"x/3\.png"):
            load(str(folder))
    monkeypatch.setattr(decoded, "WORTH_CACHING", 10**12)
    in_memory = load(str(folder), on_corrupt=heard.append)
    assert not isinstance(owner(in_memory.train.inputs), np.memmap)
    assert in_memory.fingerprint == first.fingerprint


def test_a_cache_of_other_pictures_is_made_anew(tmp_path: Path, cached: Path) -> None:
    folder = painted(tmp_path / "a", {"x": 20, "y": 20})
    first = load(str(folder))
    Image.new("RGB", (8, 6), "white").save(folder / "x" / "0.png")
    second = load(str(folder))
    assert second.fingerprint != first.fingerprint
    (place,) = (path for path in cached.iterdir() if path.is_dir())
    (place / "index.json").write_bytes(b"{")
    assert load(str(folder)).fingerprint == second.fingerprint
    assert load(str(folder), size=(3, 3)).sample_shape == (3, 3, 3)


def test_without_a_place_for_a_cache_pictures_stay_in_memory(tmp_path: Path, cached: Path) -> None:
    folder = painted(tmp_path / "a", {"x": 20, "y": 20})
    cached.parent.write_bytes(b"a file where the folder should be")
    assert not isinstance(owner(load(str(folder)).train.inputs), np.memmap)

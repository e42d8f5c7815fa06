"""What arrays mean: labels in every form people write them, values, and where the channels of pictures are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from rushhour.bundle import Bundle, Preprocessing
from rushhour.data import Dataset, Split, load
from rushhour.data.arrays import from_splits
from rushhour.data.splits import divide, keys_of_rows
from rushhour.errors import DataError, RushhourError, TaskError
from rushhour.task import Task

N = 60
X = np.random.default_rng(0).normal(size=(N, 3)).astype(np.float32)
FOUR = np.arange(N) % 4
ABC = np.array(["cat", "ant", "bee"])[np.arange(N) % 3]


def data_of(tmp_path: Path, y: NDArray[Any], x: NDArray[Any] = X, **how: Any) -> Dataset:
    np.savez(tmp_path / "d.npz", x=x, y=y)
    return load(str(tmp_path / "d.npz"), **how)


def whole(data: Dataset) -> tuple[NDArray[Any], NDArray[Any]]:
    """All samples and all targets, in the order of the first column of the samples."""
    parts = (data.train, data.validation, data.test)
    inputs, targets = (np.concatenate([getattr(part, what) for part in parts]) for what in ("inputs", "targets"))
    order = np.argsort(inputs.reshape(len(inputs), -1)[:, 0], kind="stable")
    return inputs[order], targets[order]


LABELS: dict[str, tuple[NDArray[Any], tuple[str, ...], str]] = {
    "whole floats": (FOUR.astype(np.float64), ("0", "1", "2", "3"), "4 classes; --task regression"),
    "whole floats from 1": (FOUR.astype(np.float32) + 1, ("1", "2", "3", "4"), "--task regression"),
    "floats of (n, 1)": (FOUR.astype(np.float32)[:, None], ("0", "1", "2", "3"), "--task regression"),
    "one-hot": (np.eye(4, dtype=np.float32)[FOUR], ("0", "1", "2", "3"), "single 1: taken as 4 classes"),
    "one-hot, int": (np.eye(4, dtype=np.int64)[FOUR], ("0", "1", "2", "3"), "single 1"),
    "one-hot, bool": (np.eye(4, dtype=bool)[FOUR], ("0", "1", "2", "3"), "single 1"),
    "bool": (FOUR < 2, ("false", "true"), "false, true"),
    "bool of (n, 1)": ((FOUR < 2)[:, None], ("false", "true"), "false, true"),
    "(n, 1)": (FOUR[:, None], ("0", "1", "2", "3"), ""),
    "(n, 1, 1)": (FOUR[:, None, None], ("0", "1", "2", "3"), ""),
    "int32": (FOUR.astype(np.int32), ("0", "1", "2", "3"), ""),
    "uint8": (FOUR.astype(np.uint8), ("0", "1", "2", "3"), ""),
    "big-endian": (FOUR.astype(">i2"), ("0", "1", "2", "3"), ""),
    "uint64": (FOUR.astype(np.uint64), ("0", "1", "2", "3"), ""),
    "text": (ABC, ("ant", "bee", "cat"), "ant, bee, cat"),
    "bytes": (ABC.astype("S"), ("ant", "bee", "cat"), "ant, bee, cat"),
    "negative": (FOUR % 2 * 2 - 1, ("-1", "1"), "-1, 1: taken as 2 classes"),
    "with gaps": (np.array([7, 20, 3, 100])[FOUR], ("3", "7", "20", "100"), "3, 7, 20, 100"),
}


@pytest.mark.parametrize("form", LABELS)
def test_labels_in_every_form_are_classes_and_said(tmp_path: Path, form: str) -> None:
    y, classes, says = LABELS[form]
    data = data_of(tmp_path, y)
    assert data.task == Task.classification(classes)
    assert says in " ".join(data.notes)
    assert bool(says) == bool(data.notes)
    _, targets = whole(data)
    flat = y.reshape(N, -1)
    mine = flat.argmax(axis=1) if flat.shape[1] > 1 else np.unique(flat[:, 0], return_inverse=True)[1]
    np.testing.assert_array_equal(targets, mine[np.argsort(X[:, 0], kind="stable")])
    assert targets.dtype == np.int64


VALUES: dict[str, tuple[NDArray[Any], int]] = {
    "fractions": (np.linspace(0, 1, N), 1),
    "one fraction among whole numbers": (np.where(np.arange(N) == 3, 0.5, FOUR), 1),
    "prices": (np.arange(N) * 1000.0, 1),
    "ages": (18.0 + np.arange(N) % 50, 1),
    "shares that add up to 1": (np.full((N, 4), 0.25), 4),
    "(n, 1)": (np.linspace(-1, 1, N)[:, None], 1),
}


@pytest.mark.parametrize("form", VALUES)
def test_what_is_no_label_is_a_value(tmp_path: Path, form: str) -> None:
    y, outputs = VALUES[form]
    data = data_of(tmp_path, y)
    assert data.task.unscaled == Task(kind="regression", outputs=outputs)
    _, targets = whole(data)
    assert targets.dtype == np.float32
    np.testing.assert_allclose(targets, y.reshape(N, -1)[np.argsort(X[:, 0], kind="stable")], rtol=1e-6)
    if form in ("prices", "ages"):
        assert "--task classification" in " ".join(data.notes)


def test_rows_with_any_number_of_ones_are_several_labels(tmp_path: Path) -> None:
    y = (np.arange(N)[:, None] % np.array([2, 3]) == 0).astype(np.float32)
    data = data_of(tmp_path, y)
    assert data.task == Task.multilabel(("0", "1"))
    assert "2 labels of which any number holds" in " ".join(data.notes)
    _, targets = whole(data)
    np.testing.assert_array_equal(targets, y[np.argsort(X[:, 0], kind="stable")])
    assert data_of(tmp_path, y, kind="regression").task.kind == "regression"


@pytest.mark.parametrize("form", ["whole floats", "one-hot", "bool", "(n, 1)", "int32", "with gaps", "negative"])
def test_a_user_who_says_regression_gets_values(tmp_path: Path, form: str) -> None:
    y = LABELS[form][0]
    data = data_of(tmp_path, y, kind="regression")
    assert data.task.kind == "regression"
    _, targets = whole(data)
    np.testing.assert_array_equal(targets, y.reshape(N, -1).astype(np.float32)[np.argsort(X[:, 0], kind="stable")])


def test_a_user_who_says_classification_gets_classes_or_is_told_why_not(tmp_path: Path) -> None:
    ages = 18.0 + np.arange(N) % 50
    assert data_of(tmp_path, ages, kind="classification").task.outputs == 50
    many = np.arange(N) * 7
    with pytest.raises(DataError, match="could be labels or values; use --task regression or --task classification"):
        data_of(tmp_path, many)
    assert data_of(tmp_path, many, kind="regression").task.unscaled == Task(kind="regression", outputs=1)
    for y in (np.linspace(0, 1, N), np.full((N, 4), 0.25)):
        with pytest.raises(DataError, match="--task regression"):
            data_of(tmp_path, y, kind="classification")
    with pytest.raises(DataError, match="the task needs numbers"):
        data_of(tmp_path, ABC, kind="regression")


def test_labels_that_training_never_saw_are_refused() -> None:
    x = X.reshape(-1, 3)
    for train, held in ((ABC, np.array(["dog"])), (FOUR, np.array([9])), (FOUR.astype(float), np.array([4.0]))):
        with pytest.raises(DataError, match=r"held-out labels .*(dog|9|4)"):
            from_splits("d", Split(x, train), Split(x[:1], held), Split(x[:1], train[:1]))


def test_labels_get_the_numbers_of_the_model_that_the_data_is_for(tmp_path: Path) -> None:
    task = Task.classification(("cat", "bee", "ant", "dog"))
    _, targets = whole(data_of(tmp_path, ABC, task=task))
    mine = np.array([{"cat": 0, "bee": 1, "ant": 2}[each] for each in ABC])
    np.testing.assert_array_equal(targets, mine[np.argsort(X[:, 0], kind="stable")])
    assert data_of(tmp_path, FOUR.astype(np.float32), task=task).task == task, "positions among the classes"
    gaps = Task.classification(("3", "7", "20", "100"))
    assert set(whole(data_of(tmp_path, np.array([7, 20])[FOUR % 2], task=gaps))[1]) == {1, 2}
    values = Task(kind="regression", outputs=1)
    assert data_of(tmp_path, FOUR.astype(np.float32), task=values).task == values, "no label for a model of values"
    for y, bad in ((np.array(["elk", "cat"])[FOUR % 2], task), (FOUR + 1, task), (np.eye(4)[FOUR], values)):
        with pytest.raises(TaskError):
            data_of(tmp_path, y, task=bad)


# Data sets that a user's own factory makes


@pytest.mark.parametrize(
    "labels",
    [
        FOUR.astype(np.int32), FOUR.astype(np.uint8), FOUR.astype(">i8"), FOUR.astype(np.float64), FOUR[:, None],
        np.eye(4, dtype=np.float32)[FOUR], np.array(list("abcd"))[FOUR], FOUR.tolist(),
    ],
    ids=["int32", "uint8", "big-endian", "float64", "(n, 1)", "one-hot", "text", "list"],
)  # fmt: skip
def test_a_data_set_takes_labels_in_any_form(labels: Any) -> None:
    part = Split(X, labels)
    data = Dataset("own", Task.classification(tuple("abcd")), part, part, part, Preprocessing(), "own")
    for split in (data.train, data.validation, data.test):
        assert split.targets.dtype == np.int64
        np.testing.assert_array_equal(split.targets, FOUR)


def test_a_data_set_refuses_what_torch_could_not_read() -> None:
    task = Task.classification(tuple("abcd"))
    good = Split(X, FOUR)
    for bad in (
        Split(X, np.linspace(0, 3, N)),
        Split(X, np.array(list("abce"))[FOUR]),
        Split(X.astype(str), FOUR),
        Split(X.astype(object), FOUR),
        Split(X.astype(np.float64), FOUR),
    ):
        with pytest.raises(RushhourError) as caught:
            Dataset("own", task, good, bad, good, Preprocessing(), "own")
        assert "\n" not in str(caught.value)
    part = Split(X.astype(">f4"), FOUR)
    swapped = Dataset("own", task, part, part, part, Preprocessing(), "own")
    assert swapped.train.inputs.dtype.isnative
    values = Split(X, np.arange(N, dtype=np.int32))
    data = Dataset("own", Task(kind="regression"), values, values, values, Preprocessing(), "own")
    assert (data.train.targets.dtype, data.train.targets.shape) == (np.float32, (N, 1))


# Where channels are


def pictures(*shape: int, dtype: Any = np.uint8) -> NDArray[Any]:
    return np.random.default_rng(1).integers(0, 256, (N, *shape)).astype(dtype)


@pytest.mark.parametrize(
    ("given", "becomes"),
    [
        ((3, 32, 32), (32, 32, 3)), ((1, 28, 28), (28, 28, 1)), ((4, 8, 20), (8, 20, 4)), ((12, 16, 16), (16, 16, 12)),
        ((32, 32, 3), None), ((3, 32, 3), None), ((16, 16, 12), None), ((2, 2, 8), None), ((6, 9, 1), None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_pictures_with_channels_first_are_turned_and_said(
    tmp_path: Path, given: tuple[int, ...], becomes: tuple[int, ...] | None, dtype: Any
) -> None:
    x = pictures(*given, dtype=dtype)
    data = data_of(tmp_path, FOUR, x)
    if dtype is np.float32 and given in ((12, 16, 16), (16, 16, 12), (2, 2, 8), (3, 32, 3)):
        assert data.preprocessing.layout == "none", "floats may be anything"
        return
    assert data.preprocessing.layout == "NHWC->NCHW"
    assert data.sample_shape == (becomes or given)
    assert ("they become" in " ".join(data.notes)) == (becomes is not None)
    turned = x.transpose(0, 2, 3, 1) if becomes else x
    inputs = np.concatenate([data.train.inputs, data.validation.inputs, data.test.inputs])
    assert {each.tobytes() for each in inputs} == {np.ascontiguousarray(each).tobytes() for each in turned}
    assert len(data.preprocessing.mean) == data.sample_shape[-1]


def test_floats_of_four_dimensions_that_are_no_pictures_stay(tmp_path: Path) -> None:
    for shape in ((16, 4, 4), (5, 6, 7), (8, 10, 10)):
        data = data_of(tmp_path, FOUR, pictures(*shape, dtype=np.float32))
        assert (data.sample_shape, data.preprocessing.layout) == (shape, "none")


def test_parts_whose_samples_differ_are_refused(tmp_path: Path) -> None:
    def parts(train: NDArray[Any], test: NDArray[Any]) -> str:
        np.savez(tmp_path / "d.npz", x_train=train, y_train=FOUR, x_test=test, y_test=FOUR)
        return str(tmp_path / "d.npz")

    for train, test, says in (
        (pictures(8, 8, 3), pictures(8, 7, 3), "differ in shape"),
        (X, X[:, :2], "differ in shape"),
        (pictures(8, 8, 3), pictures(3, 8, 9), "differ in shape"),
        (pictures(8, 8, 3), pictures(8, 8, 3, dtype=np.float32), "one type"),
    ):
        with pytest.raises(DataError, match=says):
            load(parts(train, test))
    mixed = load(parts(pictures(3, 8, 8), pictures(8, 8, 3)))
    assert mixed.sample_shape == (8, 8, 3)


# Splits that more data does not move


@pytest.mark.parametrize("kind", ["pictures", "rows", "values"])
def test_more_data_moves_no_sample_to_another_part(tmp_path: Path, kind: str) -> None:
    random = np.random.default_rng(3)
    x = random.integers(0, 256, (300, 5, 5, 3), dtype=np.uint8) if kind == "pictures" else random.normal(size=(300, 4))
    y = np.arange(300) % 3 if kind != "values" else random.normal(size=300)
    (tmp_path / "small").mkdir()
    before = data_of(tmp_path / "small", y[:120], x[:120])
    shuffled = random.permutation(300)
    after = data_of(tmp_path, y[shuffled], x[shuffled])

    def contents(split: Split) -> set[bytes]:
        return {sample.tobytes() for sample in split.inputs}

    for part in ("train", "validation", "test"):
        assert contents(getattr(before, part)) < contents(getattr(after, part))
    assert not contents(after.train) & contents(after.test)
    assert load(str(tmp_path / "d.npz"), seed=1).fingerprint != after.fingerprint


def test_every_class_is_trained_on_and_no_part_is_empty() -> None:
    for n in range(4, 40):
        for seed in range(10):
            labels = np.arange(n) % 3 if n > 8 else np.zeros(n, int)
            rows = divide(keys_of_rows(np.arange(n), seed=seed), labels)
            assert sorted(np.concatenate(list(rows.values())).tolist()) == list(range(n))
            assert all(len(part) for part in rows.values())
            assert set(labels[rows["train"]]) == set(labels)


def test_equal_samples_share_a_part_unless_most_are_equal() -> None:
    photos = np.arange(100) % 70
    rows = divide(keys_of_rows(photos, seed=0))
    parts = [set(photos[part]) for part in rows.values()]
    assert not parts[0] & parts[1] | parts[0] & parts[2] | parts[1] & parts[2]
    table = np.arange(1000) % 5
    assert 50 < len(divide(keys_of_rows(table, seed=0))["test"]) < 150


def test_a_bundle_of_another_task_knows_its_own(tiny: Bundle, tmp_path: Path) -> None:
    shape, task = tiny.manifest.signature.inputs[0].shape, tiny.manifest.task
    x = np.random.default_rng(0).integers(0, 256, (N, *shape), dtype=np.uint8)
    data = data_of(tmp_path, (np.arange(N) % task.outputs).astype(np.float64), x, bundle=tiny)
    assert data.task == task


def test_parts_on_another_scale_and_sizes_of_arrays_are_refused(tmp_path: Path) -> None:
    bright = pictures(8, 8, 3, dtype=np.float32)
    with pytest.raises(DataError, match="one part is scaled and another is not"):
        from_splits("d", Split(bright, FOUR), Split(bright, FOUR), Split(bright / 255, FOUR))
    with pytest.raises(DataError, match="leave out --size"):
        data_of(tmp_path, FOUR, bright, size=(4, 4))


@pytest.mark.parametrize(
    "names", [("train", "val"), ("train", "valid", "test"), ("Train", "dev"), ("training", "test")]
)
def test_parts_of_arrays_by_any_name_are_read_and_other_arrays_said(tmp_path: Path, names: tuple[str, ...]) -> None:
    x = {f"X_{part}": X[:40] + number for number, part in enumerate(names)}
    y = {f"y_{part}": FOUR[:40] for part in names}
    np.savez(tmp_path / "d.npz", weights=X, **x, **y)
    data = load(str(tmp_path / "d.npz"))
    assert "arrays left out: weights" in data.notes
    sizes = [len(data.train), len(data.validation), len(data.test)]
    assert sum(sizes) == 40 * len(names)
    assert (sizes.count(40) == 3) == (len(names) == 3)
    if len(names) == 2:
        assert "part: about a tenth of train is held out for it" in " ".join(data.notes)


def test_arrays_that_cannot_be_told_apart_are_refused(tmp_path: Path) -> None:
    for arrays, says in (
        (
            {"x_train": X, "y_train": FOUR, "x_val": X, "y_val": FOUR, "x_dev": X, "y_dev": FOUR},
            "two arrays for x_valid",
        ),
        ({"x_train": X, "y_train": FOUR, "x_test": X}, "has x_test but no y_test"),
        ({"x_train": X, "y_train": FOUR, "y_test": FOUR}, "has y_test but no x_test"),
    ):
        np.savez(tmp_path / "d.npz", **arrays)
        with pytest.raises(DataError, match=says):
            load(str(tmp_path / "d.npz"))
    both = {"x": X, "y": FOUR, "x_test": X, "y_test": FOUR}
    np.savez(tmp_path / "d.npz", **both)
    assert load(str(tmp_path / "d.npz")).notes == ("arrays left out: x_test, y_test",)


def test_floats_that_are_too_large_for_whole_numbers_are_values(tmp_path: Path) -> None:
    data = data_of(tmp_path, FOUR * 1e30)
    assert (data.task.kind, data.notes) == ("regression", ())


@pytest.mark.parametrize(
    ("y", "says"),
    [
        (np.linspace(0.1, 1, N) * 1e300, r"cannot be kept in float32: they go up to .*e\+299; scale them"),
        (1.7e9 + np.linspace(0.1, 9, N), "rounding changes them by .*; subtract a constant"),
    ],
    ids=["too large", "times in seconds"],
)
def test_targets_that_float32_cannot_keep_are_refused(tmp_path: Path, y: NDArray[Any], says: str) -> None:
    """They became infinite, or all the same."""
    with pytest.raises(DataError, match=says):
        data_of(tmp_path, y)


def test_a_constant_target_is_no_loss(tmp_path: Path) -> None:
    assert data_of(tmp_path, np.full(N, 7.1)).task.kind == "regression"


def test_features_that_float32_cannot_keep_are_refused(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(N, 3))
    x[:, 1] += 1.7e9
    with pytest.raises(DataError, match=r"feature 1 of .* cannot be kept in float32: .*; subtract a constant"):
        data_of(tmp_path, FOUR, x)
    x[:, 1] = 1.7e9
    assert data_of(tmp_path, FOUR, x + np.array([1e3, 0, -1e4])).sample_shape == (3,)


def test_several_labels_for_a_sample_are_said(tmp_path: Path) -> None:
    y = np.random.default_rng(0).integers(0, 2, (N, 4))
    data = data_of(tmp_path, y)
    assert (data.task.kind, data.task.outputs) == ("multilabel", 4)
    assert data.notes == (
        "targets are rows of 0 and 1: taken as 4 labels of which any number holds; --task regression if not",
    )
    assert data_of(tmp_path, y + 0.5).notes == ()


def test_probabilities_as_targets_are_values_and_it_is_said(tmp_path: Path) -> None:
    y = np.random.default_rng(0).dirichlet(np.ones(3), N)
    data = data_of(tmp_path, y)
    assert (data.task.kind, data.task.outputs) == ("regression", 3)
    assert "rows that sum to 1, as probabilities do: taken as 3 values; to classify" in data.notes[0]

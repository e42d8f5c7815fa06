"""Data in objects of torch, TensorFlow and Keras: read once, into arrays."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from rushhour.api.inputs import load_data
from rushhour.data.objects import is_data_object, read_data_object
from rushhour.errors import DataError
from rushhour.progress import Silent

Sizes = tuple[int | None, ...] | None

X, Y = torch.randn(40, 5), torch.arange(40) % 2


class Pictures(Dataset[Any]):
    """Gives Pillow's pictures and the names of their classes."""

    def __init__(self, sides: tuple[int, ...] = (8,), count: int = 40) -> None:
        self.sides, self.count = sides, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Image.Image, str]:
        side = self.sides[index % len(self.sides)]
        pixels = np.full((side, side, 3), index, np.uint8)
        return Image.fromarray(pixels), ("cat", "dog")[index % 2]


class Endless(IterableDataset[Any]):
    """Has no length."""

    def __iter__(self) -> Iterator[tuple[int, int]]:
        yield 1, 2


def test_data_sets_and_loaders_are_read_in_their_order() -> None:
    for data in (TensorDataset(X, Y), DataLoader(TensorDataset(X, Y), batch_size=7)):
        found = load_data(data, Silent())  # type: ignore[arg-type]
        whole = np.concatenate([part.inputs for part in (found.train, found.validation, found.test)])
        assert sorted(map(tuple, whole.tolist())) == sorted(map(tuple, X.numpy().tolist()))
        assert found.task.classes == ("0", "1")
    arrays = read_data_object(TensorDataset(X, Y))
    assert arrays is not None
    assert (arrays["x"] == X.numpy()).all()
    assert (arrays["y"] == Y.numpy()).all()


class Pairs(Dataset[Any]):
    """Gives samples of two inputs."""

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> tuple[dict[str, Any], int]:
        return {"user": X[index, :2], "item": X[index, 2:]}, int(Y[index])


def test_samples_of_several_inputs_are_dictionaries() -> None:
    for data in (Pairs(), DataLoader(Pairs(), batch_size=7), {"train": Pairs(), "test": Pairs()}):
        arrays = read_data_object(data)
        assert arrays is not None
        x, y = (next(array for name, array in arrays.items() if name.startswith(what)) for what in "xy")
        assert x.dtype.names == ("user", "item")
        assert (np.concatenate([x["user"], x["item"]], axis=1) == X.numpy()).all()
        assert (y == Y.numpy()).all()


def test_pictures_and_parts() -> None:
    found = load_data({"train": Pictures(), "test": Pictures(count=20)}, Silent())  # type: ignore[dict-item]
    assert found.train.inputs.dtype == np.uint8
    assert found.sample_shape == (8, 8, 3)
    assert found.task.classes == ("cat", "dog")
    assert len(found.test) == 20
    loader = DataLoader(Pictures(), batch_size=4, collate_fn=lambda rows: tuple(map(list, zip(*rows, strict=True))))
    assert load_data(loader, Silent()).task.classes == ("cat", "dog")  # type: ignore[arg-type]


class DatasetV2:
    """A `tf.data.Dataset` as its users see it: `element_spec`, `cardinality` and NumPy iteration."""

    def __init__(self, elements: list[Any], x: Sizes, y: Sizes, count: int = 0):
        self.elements, self.count = elements, count or len(elements)
        self.element_spec = tuple(SimpleNamespace(shape=Shape(shape)) for shape in (x, y))

    def cardinality(self) -> NDArray[np.int64]:
        return np.array(self.count)

    def as_numpy_iterator(self) -> Iterator[Any]:
        return iter(self.elements)


class Shape(tuple[int | None, ...]):
    """As `tf.TensorShape`; of unknown rank where it is empty and says so."""

    rank: int | None

    def __new__(cls, sizes: tuple[int | None, ...] | None) -> Shape:
        made = super().__new__(cls, sizes or ())
        made.rank = None if sizes is None else len(sizes)
        return made


DatasetV2.__module__ = "tensorflow.python.data.ops.dataset_ops"


@pytest.mark.parametrize(
    ("elements", "x", "y"),
    [
        ([(X[at : at + 16], Y[at : at + 16]) for at in (0, 16, 32)], (None, 5), (None,)),
        ([(X[at : at + 8], Y[at : at + 8]) for at in range(0, 40, 8)], (8, 5), (8,)),
        (list(zip(X, Y, strict=True)), (5,), ()),
        (list(zip(X, Y, strict=True)), None, None),
        ([(X[:30], Y[:30]), (X[30:], Y[30:])], None, None),
    ],
    ids=["batches", "equal batches", "samples", "samples, no shapes", "batches, no shapes"],
)
def test_tensorflow_gives_batches_or_samples(elements: list[Any], x: Any, y: Any) -> None:
    given = DatasetV2([tuple(map(np.asarray, each)) for each in elements], x, y)
    arrays = read_data_object(given)
    assert arrays is not None
    assert (arrays["x"] == X.numpy()).all()
    assert (arrays["y"] == Y.numpy()).all()
    with pytest.raises(DataError, match=r"has no end.*repeat"):
        read_data_object(DatasetV2(given.elements, x, y, count=-1))


@pytest.mark.slow
def test_data_sets_of_keras_give_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    keras = pytest.importorskip("keras")

    class Batches(keras.utils.PyDataset):  # type: ignore[misc, name-defined]
        def __len__(self) -> int:
            return 5

        def __getitem__(self, at: int) -> tuple[Any, Any]:
            return X[8 * at : 8 * at + 8].numpy(), Y[8 * at : 8 * at + 8].numpy()

    found = load_data({"train": Batches(), "test": Batches()}, Silent())
    assert (found.test.inputs == X.numpy()).all()
    assert found.task.classes == ("0", "1")


def test_what_cannot_be_read_is_said() -> None:
    for data, why in (
        (Pictures((8, 9)), "differ in shape"),
        (TensorDataset(X), "a sample comes with its target"),
        (Pictures(count=0), "gives no sample"),
        (Endless(), "needs a DataLoader"),
        ({"train": Pictures(), "tset": Pictures()}, "cannot read the part 'tset'"),
    ):
        with pytest.raises(DataError, match=why):
            load_data(data, Silent())  # type: ignore[arg-type]
    assert not is_data_object(Dataset)
    assert read_data_object({"x": X, "y": Y}) is None
    assert read_data_object((X, Y)) is None

"""Data in objects of torch: read once, into arrays."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from rushhour.api.inputs import load_data
from rushhour.data.objects import is_torch_data, read_torch_data
from rushhour.errors import DataError
from rushhour.progress import Silent

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
    arrays = read_torch_data(TensorDataset(X, Y))
    assert arrays is not None
    assert (arrays["x"] == X.numpy()).all()
    assert (arrays["y"] == Y.numpy()).all()


def test_pictures_and_parts() -> None:
    found = load_data({"train": Pictures(), "test": Pictures(count=20)}, Silent())  # type: ignore[dict-item]
    assert found.train.inputs.dtype == np.uint8
    assert found.sample_shape == (8, 8, 3)
    assert found.task.classes == ("cat", "dog")
    assert len(found.test) == 20
    loader = DataLoader(Pictures(), batch_size=4, collate_fn=lambda rows: tuple(map(list, zip(*rows, strict=True))))
    assert load_data(loader, Silent()).task.classes == ("cat", "dog")  # type: ignore[arg-type]


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
    assert not is_torch_data(Dataset)
    assert read_torch_data({"x": X, "y": Y}) is None
    assert read_torch_data((X, Y)) is None

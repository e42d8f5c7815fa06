"""Networks for tables: what they compute, and that an unknown category has a row of its own that is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from rushhour.bundle import Column, Preprocessing, Table
from rushhour.compress.distil import without_dropout
from rushhour.errors import ModelError
from rushhour.models import build, deepfm, source_for, tabular
from rushhour.models.fields import Fields
from rushhour.task import Task

SIZES = (0, 0, 4, 3)
SAMPLES = torch.tensor([[0.5, -1.0, 3.0, 1.0], [2.0, 0.0, 0.0, 2.0]])


def test_codes_that_no_table_has_are_unknown() -> None:
    fields = Fields(SIZES).eval()
    samples = SAMPLES.clone()
    samples[0, 2], samples[0, 3], samples[1, 2] = 4, -1, float("nan")
    numbers, rows = fields(samples)
    assert numbers.tolist() == SAMPLES[:, :2].tolist()
    assert fields(torch.tensor([[float("nan"), 2.0, 0, 0]]))[0].tolist() == [[0.0, 2.0]]
    assert rows.tolist() == [[0, 4], [0, 6]]


def test_unknown_rows_are_trained_by_hiding_categories() -> None:
    torch.manual_seed(0)
    fields = Fields((9,)).train()
    _, rows = fields(torch.full((10_000, 1), 5.0))
    assert set(rows.unique().tolist()) == {0, 5}
    assert (rows == 0).float().mean() == pytest.approx(0.02, abs=0.01)
    assert (fields.eval()(torch.full((100, 1), 5.0))[1] == 5).all()


def test_distillation_goes_on_hiding_categories() -> None:
    network: Any = tabular(SIZES, 1, dropout=0.5).train()
    without_dropout(network)
    trained = {layer for layer in network.modules() if isinstance(layer, nn.Dropout) and layer.training}
    assert trained == {network[0].fields.hiding}


@pytest.mark.parametrize("factory", [tabular, deepfm])
@pytest.mark.parametrize("sizes", [SIZES, (0, 0), (4, 3)])
def test_networks_take_any_mixture_of_columns(factory: Any, sizes: tuple[int, ...]) -> None:
    network = factory(sizes, 2, dimension=3, hidden=8, depth=1).eval()
    samples = SAMPLES[:, :2] if sizes == (0, 0) else SAMPLES if sizes == SIZES else SAMPLES[:, 2:]
    assert network(samples).shape == (2, 2)
    network.train()(samples).sum().backward()
    assert all(each.grad is not None for name, each in network.named_parameters() if "embedding" not in name)


def test_deepfm_is_the_sum_over_all_pairs() -> None:
    torch.manual_seed(1)
    network: Any = deepfm(SIZES, 1, dimension=3, hidden=4, depth=1).eval()
    nn.init.normal_(network.single.weight)
    nn.init.zeros_(network.deep[-1].weight)
    nn.init.zeros_(network.deep[-1].bias)
    with torch.no_grad():
        _, rows = network.fields(SAMPLES)
        vectors = torch.cat([SAMPLES[:, :2, None] * network.factors, network.embedding(rows)], dim=1)
        pairs = sum(vectors[:, one] * vectors[:, other] for one in range(4) for other in range(one))
        expected = network.linear(SAMPLES[:, :2]) + network.single(rows).sum(1) + network.pairs(pairs)
        torch.testing.assert_close(network(SAMPLES), expected)


@pytest.mark.parametrize(
    "arguments", [((), 1), ((3, 0), 1), ((-1,), 1), ((0,), 0), ((0,), 1, 0), ((0,), 1, 2, 8, 1, 1.0)]
)
@pytest.mark.parametrize("factory", [tabular, deepfm])
def test_sizes_that_cannot_be(factory: Any, arguments: tuple[Any, ...]) -> None:
    with pytest.raises(ModelError, match="cannot build"):
        factory(*arguments)


def own(sizes: tuple[int, ...], classes: int) -> nn.Module:
    return tabular(sizes, classes, hidden=4, depth=1)


def test_a_table_says_the_sizes() -> None:
    table = Table((Column("age", "number"), Column("job", "category", ("a", "b"))))
    preprocessing = Preprocessing(table=table)
    source = source_for("deepfm", (2,), Task("ranking"), preprocessing)
    assert source.arguments == {"sizes": (0, 3), "outputs": 1}
    build(source)
    source = source_for(f"{__name__}:own", (2,), Task("ranking"), preprocessing)
    assert source.arguments == {"sizes": (0, 3), "classes": 1}
    assert source_for("tabular", (5,), Task("ranking")).arguments["sizes"] == (0,) * 5
    with pytest.raises(ModelError, match="mlp cannot take categories"):
        source_for("mlp", (2,), Task("ranking"), preprocessing)
    with pytest.raises(ModelError, match="columns of a table"):
        source_for("tabular", (4, 4, 1), Task("ranking"))


@pytest.mark.parametrize(
    "columns",
    [
        (Column("a", "number"), Column("a", "number")),
        (Column("a", "category"), Column("b", "number")),
    ],
)
def test_a_table_with_columns_that_cannot_be(columns: tuple[Column, ...], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="columns"):
        Table(columns)


def test_categories_are_not_repeated() -> None:
    with pytest.raises(ValueError, match="repeat"):
        Column("a", "category", ("x", "x"))
    assert np.prod(Table((Column("a", "category", ("x", "y")),)).sizes) == 3

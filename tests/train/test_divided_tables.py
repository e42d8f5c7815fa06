"""Embedding tables divided over workers: which may be, when they are, and that a training cannot tell."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import torch.distributed as dist
from test_train import Notes
from test_train_loop import learned, same
from torch import Tensor, nn
from torch.nn import functional

from rushhour.bundle import Preprocessing, Source
from rushhour.data.dataset import Dataset, Split
from rushhour.errors import ModelError, PlanError
from rushhour.models import deepfm
from rushhour.task import Task
from rushhour.testing.mortal import KILLS, Mortal
from rushhour.testing.networks import ANY
from rushhour.train import ParallelSettings, TrainSettings
from rushhour.train.parallel import ParallelPlan, launch
from rushhour.train.parallel.cost import EmbeddingTable, Layer, Link
from rushhour.train.parallel.layer_table import table_of, with_lookups
from rushhour.train.parallel.planner import plan_layers
from rushhour.train.parallel.tables import DividedEmbedding, Router

BETWEEN = msgspec.structs.replace(ANY, reduce=Link(1e-4, 1e-8), exchange=Link(1e-4, 1e-8), send=Link(1e-4, 1e-8))
"""Machines with a network of 100 MB/s between them."""


class Used(nn.Module):
    """Tables of all kinds, of which only two can be divided."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.padded = nn.Embedding(50, 4), nn.Embedding(60, 4, padding_idx=0)
        self.tied, self.called = nn.Embedding(50, 4), nn.Embedding(50, 4)
        self.out = nn.Linear(4, 50, bias=False)
        self.out.weight = self.tied.weight
        self.read, self.bounded = nn.Embedding(50, 4), nn.Embedding(50, 4, max_norm=1.0)
        self.frozen = nn.Embedding(50, 4).requires_grad_(False)
        self.spare, self.sized = nn.Embedding(50, 4), nn.Embedding(50, 4)

    def forward(self, x: Tensor) -> Tensor:
        ids = x.long() % self.plain.num_embeddings
        found = self.plain(ids).to(self.padded.weight.dtype) + self.padded(ids) + self.tied(ids) + self.bounded(ids)
        found = found + self.read(ids) + self.frozen(ids) + self.sized(ids % self.sized.weight.shape[0])
        found = found + functional.embedding(ids, self.called.weight)
        scores: Tensor = self.out(found.sum(1)) + found.sum(1) @ self.read.weight.t()
        return scores


def test_only_tables_that_nothing_else_uses_can_be_divided() -> None:
    with torch.device("meta"):
        (layer,) = table_of(Used(), (3,), 50)
    assert layer.tables == (EmbeddingTable("plain", 50, 4, 3.0), EmbeddingTable("padded", 60, 4, 3.0, follows=True))
    with pytest.raises(PlanError, match=r"no nn.Embedding that is looked up in, and used in no other way, has 70"):
        plan_layers((layer,), workers=70, batch=70, mode="tables", constants=ANY)


@functools.cache
def recommender(people: int) -> tuple[Layer, ...]:
    with torch.device("meta"):
        return table_of(deepfm([0, 0, people, 40], 1, dropout=0.0), (4,), 1)


def test_rows_that_data_looks_up_are_counted() -> None:
    random = np.random.default_rng(0)
    ids = (random.zipf(1.3, (256, 1)) % 5_000).astype(np.float32)
    samples = torch.from_numpy(np.concatenate([np.zeros((256, 2), np.float32), ids, ids % 40], 1))
    network = deepfm([0, 0, 5_000, 40], 1)
    network.fields.hiding.p = 0.0
    (layer,) = with_lookups(recommender(5_000), network, (samples,))
    codes = np.stack([ids[:, 0], 5_000 + ids[:, 0] % 40], 1)
    assert [table.name for table in layer.tables] == ["embedding", "single"]
    assert layer.tables[0].touched == tuple(len(np.unique(codes[: 2**power])) for power in range(9))
    assert layer.tables[0].touched_by(256) == len(np.unique(codes))
    assert layer.tables[0].touched_by(96) == pytest.approx(len(np.unique(codes[:96])), rel=0.1)
    even = recommender(5_000)[0].tables[0]
    assert even.touched_by(256) > layer.tables[0].touched_by(256), "without data it is the most that is likely"
    assert even.touched_by(1e9) == pytest.approx(5_040)


def test_large_tables_are_divided_and_small_ones_are_not() -> None:
    def planned(people: int, **how: Any) -> ParallelPlan:
        return plan_layers(recommender(people), workers=4, batch=256, constants=BETWEEN, **how)

    large, replicas = planned(2_000_000), planned(2_000_000, mode="data")
    assert large.mode == "tables"
    assert large.predicted.sent_bytes < replicas.predicted.sent_bytes / 500
    assert large.predicted.state_bytes == pytest.approx(replicas.predicted.state_bytes / 4, rel=0.01)
    said = large.explain()
    assert "table embedding, 2,000,040 rows of 8: 1/4 of them on each worker, which looks up and sends at most" in said
    assert "* tables (4 x 1 x 1)" in said
    assert "  data (4 x 1 x 1)" in said
    assert msgspec.json.decode(msgspec.json.encode(large), type=ParallelPlan) == large
    assert planned(30).mode == "data"
    forced = planned(30, mode="tables").layers[0].tables
    assert [(table.name, table.divided) for table in forced] == [("embedding", True), ("single", False)]
    assert "table single, 70 rows of 1: replicated" in planned(30, mode="tables").explain()


def looked_up() -> tuple[Any, ...]:
    """Two steps with a part of a table: its answers, its gradient, and what is said of an id that is too large."""
    torch.manual_seed(0)
    whole = nn.Embedding(11, 3, padding_idx=4, dtype=torch.float64)
    rank, group = dist.get_rank(), dist.group.WORLD
    assert group is not None
    part = DividedEmbedding(whole, Router(group))
    assert (part.num_embeddings, part.embedding_dim, len(part.weight)) == (11, 3, 6 - rank)
    ids = torch.tensor([[0, 4, 7, 7], [10, 0, 4, 4]])[rank]
    if rank == 0:
        ids = ids[:3]  # the workers need not ask for as many
    answers = []
    for step in range(2):
        part.weight.grad = None
        out = part(ids + step * (ids < 10))
        answers.append(out.detach().numpy())
        (out * torch.arange(1.0, 4.0)).sum().backward()
    assert part.weight.grad is not None
    none = part(ids[:0])
    try:
        part(torch.tensor([11]))
    except ModelError as error:
        return answers, part.weight.grad.numpy(), tuple(none.shape), str(error)
    return ()


def test_a_lookup_gives_the_rows_and_their_owners_the_gradients() -> None:
    torch.manual_seed(0)
    whole = nn.Embedding(11, 3, padding_idx=4, dtype=torch.float64)
    parts = launch(looked_up, 2)
    for step in range(2):
        whole.weight.grad = None
        for part, ids in zip(parts, ([0, 4, 7], [10, 0, 4, 4]), strict=True):
            out = whole(torch.tensor([one + step * (one < 10) for one in ids]))
            assert np.array_equal(part[0][step], out.detach().numpy())
            (out * torch.arange(1.0, 4.0)).sum().backward()
    assert whole.weight.grad is not None
    for rank, (_, gradient, none, said) in enumerate(parts):
        assert np.array_equal(gradient, whole.weight.grad.numpy()[rank::2]), "of the last step alone"
        assert none == (0, 3)
        assert said.startswith("the network looks up row 11 of an embedding table: it has 11 rows, from 0")


class Clicks(nn.Module):
    """DeepFM without random masks, so that one worker trains just as several do; it may die."""

    def __init__(self) -> None:
        super().__init__()
        self.network = deepfm([0, 300, 90, 7], 1, dropout=0.0)
        self.network.fields.hiding.p = 0.0
        self.mortal = Mortal()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.network(self.mortal(x))
        return out


def clicks() -> nn.Module:
    return Clicks()


SOURCE = Source("test_divided_tables:clicks")
SETTINGS = TrainSettings(
    epochs=3, batch=33, optimizer="adamw", weight_decay=0.05, schedule="constant", ema=0.9, clip=0.5, bf16=False
)


def clicked() -> Dataset:
    random = np.random.default_rng(0)
    ids = np.minimum(random.zipf(1.3, (380, 3)), (299, 89, 6))
    inputs = np.concatenate([random.normal(size=(380, 1)), ids], 1).astype(np.float32)
    values = (inputs[:, :1] + np.sin(ids[:, :1]) + 0.1 * ids[:, 2:]).astype(np.float32)
    parts = [Split(inputs[at], values[at]) for at in (slice(0, -80), slice(-80, -40), slice(-40, None))]
    return Dataset("clicks", Task("regression", outputs=1), *parts, Preprocessing(), "sum")


def trained(folder: Path, workers: int, notes: Notes | None = None, **settings: Any) -> dict[str, Tensor]:
    return learned(
        folder, clicked(), SOURCE, msgspec.structs.replace(SETTINGS, **settings), workers=workers,
        parallel=ParallelSettings("tables", constants=ANY), trusted=(SOURCE.factory,), checkpoint_every_s=0.0,
        progress=notes or Notes(),
    )  # fmt: skip


@pytest.mark.slow
def test_one_worker_and_two_train_and_resume_alike(tmp_path: Path) -> None:
    """Decay, clipping and averages move rows that no sample looked up, too; after each epoch another number goes on."""
    alone = trained(tmp_path / "alone", 1)
    notes = Notes()
    together = trained(tmp_path / "together", 2, notes)
    assert "1/2 of them on each worker, which looks up and sends about" in " ".join(notes.said)
    changing, resumed = Notes(), {}
    for epochs, workers in ((1, 2), (2, 1), (3, 2)):
        resumed = trained(tmp_path / "changing", workers, changing, epochs=epochs)
    assert sum(note.startswith("resumed after step") for note in changing.notes) == 2
    for name, tensor in alone.items():
        torch.testing.assert_close(together[name], tensor, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(resumed[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.long
@pytest.mark.slow
def test_a_worker_that_is_killed_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    undisturbed = trained(tmp_path / "undisturbed", 2, epochs=2)
    monkeypatch.setenv(KILLS, f"1 5 {tmp_path / 'killed'}")
    notes = Notes()
    got = trained(tmp_path / "disturbed", 2, notes, epochs=2)
    assert (tmp_path / "killed").exists()
    assert any(note.startswith("resumed after step ") for note in notes.notes)
    assert same(got, undisturbed)

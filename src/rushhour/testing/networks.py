"""Small networks of different kinds, and a proof that a parallel plan trains them as one process would."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from rushhour.models import article, mlp, residual
from rushhour.testing.meters import sent_bytes
from rushhour.train.parallel import BatchNorm, Constants, GradientCompression, ParallelPlan, parallelise
from rushhour.train.parallel.candidate import Place
from rushhour.train.parallel.cost import Layer, Layout, Link, Mesh
from rushhour.train.parallel.layer_table import table_of, with_lookups
from rushhour.train.parallel.planner import plan_layers

CLASSES = 5
ANY = Constants(
    workers=0,
    dense_flops=3e10,
    convolution_flops=4e10,
    bandwidth=5e9,
    operation_s=1e-5,
    solo=1.0,
    reduce=Link(1e-4, 1e-9),
    exchange=Link(1e-4, 1e-9),
    send=Link(1e-4, 1e-9),
)
"""For tests in which any plan will do."""


class _Block(nn.Module):
    """Self-attention and a perceptron, each after a normalisation and with a residual connection (pre-norm)."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self._heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.perceptron = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        parts = self.attention(self.before(x)).view(rows, length, 3, self._heads, width // self._heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        x = x + self.dropout(self.out(mixed.transpose(1, 2).reshape(rows, length, width)))
        out: Tensor = x + self.dropout(self.perceptron(self.between(x)))
        return out


class _Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def transformer(
    inputs: int = 8, outputs: int = CLASSES, width: int = 16, blocks: int = 2, heads: int = 2, dropout: float = 0.1
) -> nn.Sequential:
    """An encoder: float `(n, length, inputs)` to logits `(n, outputs)`."""
    layers = [_Block(width, heads, dropout) for _ in range(blocks)]
    return nn.Sequential(nn.Linear(inputs, width), *layers, nn.LayerNorm(width), _Mean(), nn.Linear(width, outputs))


class _Clicks(nn.Module):
    """Random numbers become ids, few of them often, and are looked up: `(n, inputs)` to `(n, 4 * width + 2)`."""

    def __init__(self, people: int, goods: int, width: int) -> None:
        super().__init__()
        self._people, self._goods = people, goods
        self.people, self.more = nn.Embedding(people, width), nn.Embedding(people, 2 * width)
        self.goods, self.days = nn.Embedding(goods, width, padding_idx=0), nn.Embedding(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        # log-normal, so that frequencies are as different as those of clicks
        ids = (2 * x).exp().mul(10).long()
        half = ids.shape[1] // 2
        people, goods = ids[:, :half] % self._people, ids[:, half:] % self._goods
        found = [self.people(people), self.more(people), self.goods(goods)]
        return torch.cat([*(one.mean(1) for one in found), self.days(goods[:, 0] % 7)], 1)


def recommender(people: int, goods: int, width: int) -> nn.Sequential:
    """Embedding tables and a perceptron: float `(n, inputs)` of which ids are made, to logits `(n, CLASSES)`."""
    return nn.Sequential(
        _Clicks(people, goods, width), nn.Linear(4 * width + 2, 12), nn.ReLU(), nn.Dropout(0.1), nn.Linear(12, CLASSES)
    )


SMALL: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "article": (lambda: article(input_size=8, channels=1, classes=CLASSES, width=0.25, dense=13), (1, 8, 8)),
    "residual": (lambda: residual(input_size=8, channels=1, classes=CLASSES, width=4, blocks=1), (1, 8, 8)),
    "mlp": (lambda: mlp(inputs=10, outputs=CLASSES, hidden=12, depth=7), (10,)),
    "transformer": (transformer, (6, 8)),
    "recommender": (lambda: recommender(83, 59, 3), (6,)),
}
"""Name -> a factory, and the shape of a sample as the network takes it. Few sizes divide evenly."""


WIDE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "article": (lambda: article(input_size=32, channels=3, classes=CLASSES, dense=128), (3, 32, 32)),
    "residual": (lambda: residual(input_size=16, channels=1, classes=CLASSES, width=64, blocks=1), (1, 16, 16)),
    "mlp": (lambda: mlp(inputs=512, outputs=CLASSES, hidden=512, depth=7), (512,)),
    "transformer": (lambda: transformer(inputs=64, width=128, blocks=2), (16, 64)),
    "recommender": (lambda: recommender(800, 500, 128), (64,)),
}
"""The same, large enough that the payload of messages outweighs their overhead."""


@functools.cache
def table_for(name: str, wide: bool = False) -> tuple[Layer, ...]:
    """The layer table of one of `SMALL` or `WIDE`."""
    factory, shape = (WIDE if wide else SMALL)[name]
    with torch.device("meta"):
        table = table_of(factory(), shape, CLASSES)
    if not any(layer.tables for layer in table):
        return table
    return with_lookups(table, factory(), (torch.randn(64, *shape, generator=torch.Generator().manual_seed(2)),))


def arranged(
    layers: tuple[Layer, ...],
    mesh: Mesh,
    *,
    batch: int,
    constants: Constants,
    dense: Layout = "data",
    rest: Layout = "data",
    microbatches: int = 1,
) -> ParallelPlan:
    """A plan made by hand: equal stages, one layout for the dense layers that can be split and one for the others."""
    each = -(-len(layers) // mesh.pipeline)
    plans = []
    for index, layer in enumerate(layers):
        cut = layer.kind == "dense" and min(layer.in_width, layer.out_width) >= mesh.tensor
        layout: Layout = (dense if cut else rest) if layer.parameters else "local"
        if layout == "tables" and not layer.tables:
            layout = "data"
        divided = tuple(table.name for table in layer.tables if layout == "tables")
        plans.append(Place(layout, divided).of(layer, index // each, mesh, batch, microbatches))
    return msgspec.structs.replace(
        plan_layers(layers, workers=1, batch=batch, constants=constants),
        workers=mesh.inner * mesh.pipeline,
        mesh=mesh,
        mode="hybrid",
        layers=tuple(plans),
        microbatches=microbatches,
    )


class Trained(msgspec.Struct):
    """The result of a short training on one worker.

    Attributes:
        state: of the whole network, on worker 0; empty elsewhere.
        losses: of each step, over the whole batch.
        state_bytes: on this worker: parameters, gradients, and two moments of the optimizer.
        sent_bytes: by this worker in the last step.
    """

    state: dict[str, Any]
    losses: list[float]
    state_bytes: int
    sent_bytes: int


def sum_of_losses(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy, summed over rows."""
    return functional.cross_entropy(outputs, targets, reduction="sum")


def short_training(
    name: str,
    plan: ParallelPlan,
    *,
    double: bool = True,
    steps: int = 5,
    clip: float | None = None,
    compression: GradientCompression = "none",
    batch_norm: BatchNorm = "whole",
    shared_memory: bool = True,
    wide: bool = False,
) -> Trained:
    """Train one of `SMALL` or `WIDE` for some steps on seeded random data, alone or as a worker of the default group.

    In float64 by Adam; in float32 by SGD with momentum, because Adam turns gradients that are rounding errors only into
    whole steps.
    """
    factory, shape = (WIDE if wide else SMALL)[name]
    torch.manual_seed(0)
    dtype = torch.float64 if double else torch.float32
    network = factory().to(dtype)
    generator = torch.Generator().manual_seed(1)
    parallel = parallelise(network, plan, compression=compression, batch_norm=batch_norm, shared_memory=shared_memory)
    if double:
        optimizer: torch.optim.Optimizer = torch.optim.Adam(parallel.parameters(), lr=1e-2)
    else:
        optimizer = torch.optim.SGD(parallel.parameters(), lr=1e-2, momentum=0.9)
    losses = []
    sent = 0
    for _ in range(steps):
        inputs = torch.randn(plan.batch, *shape, generator=generator, dtype=torch.float64).to(dtype)
        targets = torch.randint(CLASSES, (plan.batch,), generator=generator)
        own = parallel.rows(plan.batch)
        before = sent_bytes()
        losses.append(parallel.step((inputs[own],), targets[own], sum_of_losses, plan.batch))
        sent = sent_bytes() - before
        if clip is not None:
            parallel.clip(clip)
        optimizer.step()
    kept = sum(3 * one.nbytes + (0 if one.grad is None else one.grad.nbytes) for one in parallel.parameters())
    merged = parallel.full_state_dict()
    return Trained({} if merged is None else {key: value.numpy() for key, value in merged.items()}, losses, kept, sent)


def all_of(cases: list[tuple[str, ParallelPlan, dict[str, Any]]]) -> list[Trained]:
    """`short_training` of each case in turn, in one `launch`, which is slow to start."""
    done = []
    for name, plan, how in cases:
        done.append(short_training(name, plan, **how))
        if dist.is_initialized():
            dist.barrier()
    return done


def distance(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest relative difference (in the 2-norm) of a tensor in two states with the same names."""
    if one.keys() != other.keys():
        raise ValueError(f"the states hold different tensors: {sorted(one.keys() ^ other.keys())}")
    worst = 0.0
    for name, tensor in one.items():
        a, b = torch.as_tensor(tensor).double(), torch.as_tensor(other[name]).double()
        if a.shape != b.shape:
            raise ValueError(f"{name} has shapes {tuple(a.shape)} and {tuple(b.shape)}")
        worst = max(worst, float((a - b).norm() / b.norm().clamp(min=1e-30)))
    return worst

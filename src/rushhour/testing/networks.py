"""Small networks of different kinds, and a proof that a parallel plan trains them as one process would."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from rushhour.models import article, mlp, residual
from rushhour.train.parallel import parallelise
from rushhour.train.plan import ParallelPlan
from rushhour.train.reducer import Compression

CLASSES = 5


class _Block(nn.Module):
    """Self-attention and a perceptron, each after a normalisation and with a way around it (pre-norm)."""

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


SMALL: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "article": (lambda: article(input_size=8, channels=1, classes=CLASSES, width=0.25, dense=13), (1, 8, 8)),
    "residual": (lambda: residual(input_size=8, channels=1, classes=CLASSES, width=4, blocks=1), (1, 8, 8)),
    "mlp": (lambda: mlp(inputs=10, outputs=CLASSES, hidden=12, depth=7), (10,)),
    "transformer": (transformer, (6, 8)),
}
"""Name -> a factory, and the shape of a sample as the network takes it. Few sizes divide evenly."""


class Trained(msgspec.Struct):
    """What a short training came to: the state on worker 0, empty elsewhere, the losses, and bytes kept here."""

    state: dict[str, Any]
    losses: list[float]
    state_bytes: int


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
    compression: Compression = "none",
) -> Trained:
    """Train one of `SMALL` for some steps on seeded random data, as one worker of the default group, or alone.

    In float64 by Adam; in float32 by SGD with momentum, because Adam makes whole steps of gradients that are rounding
    errors only.
    """
    factory, shape = SMALL[name]
    torch.manual_seed(0)
    dtype = torch.float64 if double else torch.float32
    network = factory().to(dtype)
    generator = torch.Generator().manual_seed(1)
    parallel = parallelise(network, plan, compression=compression)
    if double:
        optimizer: torch.optim.Optimizer = torch.optim.Adam(parallel.parameters(), lr=1e-2)
    else:
        optimizer = torch.optim.SGD(parallel.parameters(), lr=1e-2, momentum=0.9)
    losses = []
    for _ in range(steps):
        inputs = torch.randn(plan.batch, *shape, generator=generator, dtype=torch.float64).to(dtype)
        targets = torch.randint(CLASSES, (plan.batch,), generator=generator)
        own = parallel.rows(plan.batch)
        losses.append(parallel.step(inputs[own], targets[own], sum_of_losses, plan.batch))
        if clip is not None:
            parallel.clip(clip)
        optimizer.step()
    kept = sum(3 * one.nbytes + (0 if one.grad is None else one.grad.nbytes) for one in parallel.parameters())
    merged = parallel.full_state_dict()
    return Trained({} if merged is None else {key: value.numpy() for key, value in merged.items()}, losses, kept)


def all_of(cases: list[tuple[str, ParallelPlan, dict[str, Any]]]) -> list[Trained]:
    """`short_training` of each case in turn; for `launch`, which is slow to start."""
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

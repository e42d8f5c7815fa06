"""What the workers of `make bench-train` do; all of it is started by `rushhour.train.parallel.launch`."""

from __future__ import annotations

import math
import os
import random
import sys
import time
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rushhour.models import article, mlp, residual
from rushhour.testing.meters import loopback_bytes, peak_bytes, sent_bytes
from rushhour.testing.mortal import Mortal
from rushhour.testing.networks import sum_of_losses, transformer
from rushhour.train.parallel import BatchNorm, ParallelPlan, parallelise
from rushhour.train.parallel.autotune import fastest
from rushhour.train.parallel.choice import TRIAL_S

CLASSES = 10
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "article": (lambda: article(input_size=64, classes=CLASSES), (3, 64, 64), 32),
    "residual": (lambda: residual(input_size=32, channels=3, classes=CLASSES, width=32), (3, 32, 32), 32),
    "mlp": (lambda: mlp(inputs=256, outputs=CLASSES, hidden=1024, depth=6), (256,), 256),
    "transformer": (
        lambda: transformer(inputs=64, outputs=CLASSES, width=256, blocks=4, heads=4),
        (32, 64),
        32,
    ),
}
"""Name -> a factory, the shape of a sample, samples in a step; a step takes some tenths of a second on 2 cores."""


class Stepped(msgspec.Struct):
    """What a worker measured in some steps.

    Attributes:
        losses: of each step.
        step_s: of each step, the optimizer's included.
        sent_bytes: by this worker, in each step.
        loopback_bytes: carried by the loopback in each step, for all; measured by worker 0.
        state_bytes: parameters, gradients and the optimizer's moments, kept by this worker.
        parameters: learned by this worker.
        peak_bytes: memory of this process at its largest.
    """

    losses: list[float]
    step_s: list[float]
    sent_bytes: list[int]
    loopback_bytes: list[int]
    state_bytes: int
    parameters: int
    peak_bytes: int


def stepped(
    factory: Callable[..., nn.Module],
    arguments: dict[str, Any],
    shape: tuple[int, ...],
    classes: int,
    plan: ParallelPlan,
    steps: int,
    adam: bool,
    shared_memory: bool = True,
) -> Stepped:
    """Steps on random data; the network never lies whole in any worker but where the plan says so.

    Args:
        adam: else plain descent, which keeps no moments: the bytes on the wire are the same.
        shared_memory: where gradients are added up, instead of sending them.
    """
    with torch.device("meta"):
        network = factory(**arguments)
    parallel = parallelise(network, plan, shared_memory=shared_memory)
    del network
    learned = list(parallel.parameters())
    optimizer: torch.optim.Optimizer = (
        torch.optim.Adam(learned, lr=1e-4, foreach=False) if adam else torch.optim.SGD(learned, lr=1e-3, foreach=False)
    )
    generator = torch.Generator().manual_seed(0)
    own = parallel.rows(plan.batch)
    found = Stepped([], [], [], [], 0, sum(one.numel() for one in learned), 0)
    for _ in range(steps):
        inputs = torch.randn(plan.batch, *shape, generator=generator)[own]
        targets = torch.randint(classes, (plan.batch,), generator=generator)[own]
        dist.barrier()
        began, sent, carried = time.perf_counter(), sent_bytes(), loopback_bytes()
        found.losses.append(parallel.step((inputs,), targets, sum_of_losses, plan.batch))
        found.sent_bytes.append(sent_bytes() - sent)
        dist.barrier()
        found.loopback_bytes.append(loopback_bytes() - carried)
        optimizer.step()
        dist.barrier()
        found.step_s.append(time.perf_counter() - began)
    moments = [tensor for state in optimizer.state.values() for tensor in state.values() if tensor.dim()]
    gradients = [one.grad for one in learned if one.grad is not None]
    found.state_bytes = sum(one.nbytes for one in (*learned, *gradients, *moments))
    found.peak_bytes = peak_bytes()
    return found


def deep(width: int, layers: int) -> nn.Sequential:
    """A uniform network: `layers` dense layers of `width * (width + 1)` parameters each."""
    made: list[nn.Module] = []
    for _ in range(layers):
        made += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*made[:-1])


def one_epoch(folder: str, plan: ParallelPlan, hidden: int, classes: int) -> list[float]:
    """Each step's loss, over arrays that lie in a folder, in their order."""
    inputs = np.load(f"{folder}/inputs.npy", mmap_mode="r")
    targets = np.load(f"{folder}/targets.npy", mmap_mode="r")
    torch.manual_seed(0)
    network = mlp(inputs=inputs.shape[1], outputs=classes, hidden=hidden, depth=2)
    parallel = parallelise(network, plan)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.05)
    own = parallel.rows(plan.batch)
    losses = []
    for first in range(0, len(inputs), plan.batch):
        rows = slice(first + own.start, first + own.stop)
        x, y = torch.from_numpy(inputs[rows].copy()), torch.from_numpy(targets[rows].copy())
        losses.append(parallel.step((x,), y, sum_of_losses, plan.batch))
        optimizer.step()
    return losses


Step = Callable[[], float]
_MEMORY = 8e9
OWN_ROWS = "own rows"
"""Batch normalisations see each worker's own rows, and the plan is chosen for that."""


class Timed(msgspec.Struct):
    """What took turns, and which plan had been chosen before.

    Attributes:
        chosen: the mode of the plan that a training would have taken: tried, as a training tries them.
        step_s: seconds of a step, by contestant and round.
    """

    chosen: str
    step_s: dict[str, list[float]]


def timed(
    name: str,
    plans: list[ParallelPlan],
    rounds: int,
    steps: int,
    only: tuple[str, ...] = (),
    fabric: str | None = None,
    ddp: bool = False,
    own_rows: bool = False,
) -> Timed:
    """Choose a plan; then, in each round, all take turns, in an order drawn anew.

    Args:
        name: of one of `NETWORKS`.
        plans: ours, the fastest by prediction first.
        only: modes that are timed besides the chosen one; all where none is given.
        fabric: where Lightning Fabric is installed, if it takes part.
        ddp: whether torch's own replicas take part.
        own_rows: whether training takes part once more with batch normalisations that see each worker's own rows, by
            the plan that is chosen for it.
    """

    def choose(batch_norm: BatchNorm) -> ParallelPlan:
        return fastest(plans, lambda plan: _ours(name, plan, batch_norm), budget_s=TRIAL_S, memory_bytes=_MEMORY)

    chosen = choose("whole").mode
    contestants: dict[str, Step] = {
        plan.mode: _ours(name, plan) for plan in plans if not only or plan.mode in (chosen, *only)
    }
    if own_rows:
        contestants[OWN_ROWS] = _ours(name, choose("local"), "local")
    if ddp:
        contestants["DDP"] = _ddp(name)
    if fabric is not None:
        contestants["Fabric"] = _fabric(name, fabric)
    for step in contestants.values():
        for _ in range(2):
            step()
    order = random.Random(0)
    taken: dict[str, list[float]] = {one: [] for one in contestants}
    for _ in range(rounds):
        for one in order.sample(sorted(contestants), len(contestants)):
            dist.barrier()
            began = time.perf_counter()
            for _ in range(steps):
                loss = contestants[one]()
            dist.barrier()
            taken[one].append((time.perf_counter() - began) / steps)
            if not math.isfinite(loss):
                raise ValueError(f"{one} does not train: its loss is {loss}")
    return Timed(chosen, taken)


def _made(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    factory, shape, batch = NETWORKS[name]
    torch.manual_seed(0)
    network = factory()
    generator = torch.Generator().manual_seed(1)
    return network, torch.randn(batch, *shape, generator=generator), torch.arange(batch) % CLASSES


def _ours(name: str, plan: ParallelPlan, batch_norm: BatchNorm = "whole") -> Step:
    network, inputs, targets = _made(name)
    parallel = parallelise(network, plan, batch_norm=batch_norm)
    optimizer = torch.optim.Adam(parallel.parameters(), lr=1e-4)
    own = parallel.rows(plan.batch)
    inputs, targets = inputs[own], targets[own]

    def step() -> float:
        loss = parallel.step((inputs,), targets, sum_of_losses, plan.batch)
        optimizer.step()
        return loss

    return step


def _replica_rows(batch: int) -> slice:
    each = batch // dist.get_world_size()
    return slice(dist.get_rank() * each, (dist.get_rank() + 1) * each)


def _ddp(name: str) -> Step:
    network, inputs, targets = _made(name)
    model = DistributedDataParallel(network, gradient_as_bucket_view=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    own = _replica_rows(len(inputs))
    inputs, targets = inputs[own], targets[own]

    def step() -> float:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return float(loss.detach())

    return step


def _fabric(name: str, site: str) -> Step:
    sys.path.append(site)  # last: whatever both have is ours
    # it joins the group that is there already, if it takes itself to be torchrun's
    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    os.environ |= {
        "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "bench",
    }  # fmt: skip
    from lightning_fabric import Fabric  # type: ignore[import-not-found]
    from lightning_fabric.strategies import DDPStrategy  # type: ignore[import-not-found]

    network, inputs, targets = _made(name)
    fabric = Fabric(accelerator="cpu", devices=int(size), strategy=DDPStrategy(gradient_as_bucket_view=True))
    fabric.launch()
    model, optimizer = fabric.setup(network, torch.optim.Adam(network.parameters(), lr=1e-4))
    own = _replica_rows(len(inputs))
    inputs, targets = inputs[own], targets[own]

    def step() -> float:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), targets)
        fabric.backward(loss)
        optimizer.step()
        return float(loss.detach())

    return step


def mortal() -> nn.Sequential:
    """A small network that may die, on its first worker or its last."""
    return nn.Sequential(Mortal(), nn.Linear(20, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 4), Mortal())

"""A recommender with large embedding tables, synthetic clicks, and what workers of `make bench-train` do with them."""

from __future__ import annotations

import random
import time
from typing import Any

import msgspec
import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from rushhour.models import deepfm
from rushhour.testing.meters import sent_bytes
from rushhour.testing.networks import distance
from rushhour.train.parallel import Layer, ParallelNetwork, ParallelPlan, parallelise, with_lookups
from rushhour.train.parallel.layer_table import table_of

NUMBERS = 4
_SHARES = (0.8, 0.18, 0.019, 0.0009, 0.0001)
"""Of all ids: those of each column."""
_EXPONENT = 1.1
"""Of the Zipf distribution of the ids of a column."""
_DIMENSION = 16


class Clicked(msgspec.Struct):
    """What one worker measured under one plan.

    Attributes:
        losses: of the first steps.
        error: the largest relative difference of a merged tensor from one worker's after these; on worker 0.
        sent_bytes: in each of them.
        state_bytes: parameters, gradients and the optimizer's moments, kept by this worker.
        step_s: of each round.
    """

    losses: list[float]
    error: float
    sent_bytes: list[int]
    state_bytes: int
    step_s: list[float]


def sizes(ids: int) -> tuple[int, ...]:
    """Of the columns: numbers, and tables of `ids` rows in all."""
    return (*[0] * NUMBERS, *(max(2, round(share * ids)) for share in _SHARES))


def network_of(ids: int) -> nn.Module:
    """DeepFM on these columns, the same each time."""
    torch.manual_seed(0)
    return deepfm(sizes(ids), 1, dimension=_DIMENSION)


def table_for(ids: int, batch: int) -> tuple[Layer, ...]:
    """Its layer table, with the rows that a batch looks up."""
    with torch.device("meta"):
        table = table_of(deepfm(sizes(ids), 1, dimension=_DIMENSION), (len(sizes(ids)),), 1)
    return with_lookups(table, network_of(ids), (Clicks(ids, batch)(0)[0],))


class Clicks:
    """Synthetic clicks: the ids of each column follow a Zipf distribution, in an order that says nothing.

    Args:
        ids: of all columns.
        batch: samples in a step.
    """

    def __init__(self, ids: int, batch: int) -> None:
        self._batch = batch
        self._chances = []
        for size in sizes(ids)[NUMBERS:]:
            weights = np.arange(1, size, dtype=np.float64) ** -_EXPONENT
            order = np.random.default_rng(size).permutation(size - 1) + 1  # 0 is that of unknown ids
            self._chances.append((np.cumsum(weights) / weights.sum(), order))

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Samples `(batch, columns)` and whether each was clicked, `(batch, 1)`."""
        drawn = np.random.default_rng((1, step))
        columns: list[NDArray[Any]] = [drawn.standard_normal((self._batch, NUMBERS))]
        for chances, order in self._chances:
            columns.append(order[np.searchsorted(chances[:-1], drawn.random(self._batch))][:, None])
        samples = np.concatenate(columns, 1).astype(np.float32)
        wanted = (samples[:, 0] + np.sin(samples[:, NUMBERS]) > 0.5).astype(np.float32)
        return torch.from_numpy(samples), torch.from_numpy(wanted[:, None])


def clicked(
    ids: int, plans: dict[str, ParallelPlan], steps: int, rounds: int, reference: str, sharing: tuple[str, ...]
) -> dict[str, Clicked]:
    """Train by each plan in turns, round by round, after some steps that are compared with one worker's.

    Args:
        ids: of all tables.
        plans: name -> plan.
        steps: that are compared.
        rounds: that are timed, of as many steps.
        reference: file of the weights of one worker, which one worker writes.
        sharing: names of plans whose workers sum gradients in shared memory.
    """
    leads = not dist.is_initialized() or dist.get_rank() == 0
    found, runs = {}, {}
    for name, plan in plans.items():
        parallel = parallelise(network_of(ids), plan, shared_memory=name in sharing)
        optimizer = torch.optim.AdamW(parallel.parameters(), lr=1e-3, weight_decay=0.01, fused=True)
        clicks, one = Clicks(ids, plan.batch), Clicked([], 0.0, [], 0, [])
        runs[name] = parallel, optimizer, clicks
        found[name] = one
        for step in range(steps):
            before = sent_bytes()
            one.losses.append(_stepped(parallel, clicks(step)))
            one.sent_bytes.append(sent_bytes() - before)
            optimizer.step()
        learned = list(parallel.parameters())
        kept = [parameter.grad for parameter in learned if parameter.grad is not None]
        moments = [tensor for state in optimizer.state.values() for tensor in state.values() if tensor.dim()]
        one.state_bytes = sum(tensor.nbytes for tensor in (*learned, *kept, *moments))
        merged = parallel.full_state_dict()
        if plan.workers == 1 and merged is not None:
            torch.save(merged, reference)
        elif leads and merged is not None:
            one.error = distance(merged, torch.load(reference, weights_only=True))
    order = random.Random(0)
    for turn in range(rounds):
        for name in order.sample(sorted(runs), len(runs)):
            parallel, optimizer, clicks = runs[name]
            given = [clicks(steps + turn * steps + step) for step in range(steps)]
            if dist.is_initialized():
                dist.barrier()
            began = time.perf_counter()
            for samples in given:
                _stepped(parallel, samples)
                optimizer.step()
            if dist.is_initialized():
                dist.barrier()
            found[name].step_s.append((time.perf_counter() - began) / steps)
    return found


def _stepped(parallel: ParallelNetwork, given: tuple[Tensor, Tensor]) -> float:
    samples, wanted = given
    own = parallel.rows(len(samples))
    return parallel.step((samples[own],), wanted[own], _loss, len(samples))


def _loss(outputs: Tensor, wanted: Tensor) -> Tensor:
    return functional.binary_cross_entropy_with_logits(outputs, wanted, reduction="sum")

"""Embedding tables whose rows are divided over the workers: a step sends the rows that it touches, and no others.

Worker i of k has the rows i, i + k, i + 2k, ... of a table, because frequent ids are often neighbours. A lookup asks
each owner once for each row that any of its samples names; the gradients of these rows go the same way back. What is
left to the optimizer is an ordinary parameter with a dense gradient, a k-th of the whole: it moves all rows, touched or
not, as it does on one worker.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from rushhour.errors import ModelError
from rushhour.train.parallel.collectives import Group, exchange


class Route(NamedTuple):
    """Where the rows of a lookup come from.

    Attributes:
        positions: of each id among the rows that are wanted, as many as there are ids.
        wanted: how many rows this worker wants of each worker.
        given: the rows that each worker wants of this one, as places in its part; none of them twice.
    """

    positions: Tensor
    wanted: tuple[int, ...]
    given: tuple[Tensor, ...]


class Router:
    """Finds routes. Tables that are asked for the same ids, one after the other, share the route of these.

    Args:
        group: over which tables are divided.
    """

    def __init__(self, group: Group) -> None:
        self.group = group
        self._known: tuple[Tensor, int, int, Route] | None = None

    def route(self, ids: Tensor, rows: int) -> Route:
        """The route for some ids of a table of so many rows; all workers of the group call this.

        Raises:
            ModelError: if an id is of no row.
        """
        if self._known is not None:
            known, version, of, route = self._known
            if known is ids and version == ids._version and of == rows:
                return route
        route = self._found(ids.reshape(-1).to(torch.int64), rows)
        self._known = ids, ids._version, rows, route
        return route

    def _found(self, ids: Tensor, rows: int) -> Route:
        if ids.numel():
            least, most = torch.aminmax(ids)
            if least < 0 or most >= rows:
                raise ModelError(
                    f"the network looks up row {int(least if least < 0 else most)} of an embedding table",
                    f"it has {rows:,} rows, from 0",
                    "check the ids, or give the table more rows",
                )
        workers = self.group.size()
        each = -(-rows // workers)
        # by owner, and then by place in the owner's part: one sort finds the rows, without repetition, in that order
        keys, positions = torch.unique(ids % workers * each + ids // workers, return_inverse=True)
        counts = torch.bincount(keys // each, minlength=workers)
        asked = torch.stack(exchange(list(counts), [()] * workers, self.group)).tolist()
        wanted = tuple(counts.tolist())
        places = (keys % each).to(torch.int32 if each < 2**31 else torch.int64)
        given = exchange(list(places.split(list(wanted))), [(count,) for count in asked], self.group)
        return Route(positions, wanted, tuple(one.to(torch.int64) for one in given))


class DividedEmbedding(nn.Embedding):
    """This worker's part of an `nn.Embedding`; it answers with rows of the whole table, and has its attributes.

    Args:
        whole: the table; its rows are copied.
        router: of its group.
    """

    def __init__(self, whole: nn.Embedding, router: Router) -> None:
        nn.Module.__init__(self)
        for name in nn.Embedding.__constants__:  # a network may ask for its size
            setattr(self, name, getattr(whole, name))
        workers, rank = router.group.size(), dist.get_rank(router.group)
        self._router = router
        own = own_rows(whole.weight.detach(), rank, workers).clone(memory_format=torch.contiguous_format)
        self.weight = nn.Parameter(own)
        padding = whole.padding_idx
        self._padding = None if padding is None or padding % workers != rank else padding // workers
        # the optimizer sees it as an ordinary gradient; only touched rows are written, and cleared again
        self._gradient: Tensor | None = None
        self._touched: list[Tensor] = []
        # those that note which layer is computed
        self._forward_hooks, self._forward_pre_hooks = whole._forward_hooks, whole._forward_pre_hooks

    def forward(self, ids: Tensor) -> Tensor:
        """Ids of any shape to `(*shape, width)`."""
        route = self._router.route(ids, self.num_embeddings)
        rows: Tensor = _Lookup.apply(self.weight, self, route)  # type: ignore[no-untyped-call]
        return functional.embedding(route.positions, rows).view(*ids.shape, self.embedding_dim)

    def fetch(self, route: Route) -> Tensor:
        """The rows that this worker wants, `(sum(wanted), width)`."""
        own = self.weight.detach()
        return torch.cat(
            exchange(
                [own.index_select(0, places) for places in route.given],
                [(count, self.embedding_dim) for count in route.wanted],
                self._router.group,
            )
        )

    def add_gradients(self, route: Route, gradients: Tensor) -> None:
        """Send the gradients of the rows that were wanted to their owners, and add those of own rows."""
        received = exchange(
            list(gradients.split(list(route.wanted))),  # type: ignore[no-untyped-call]
            [(len(places), self.embedding_dim) for places in route.given],
            self._router.group,
        )
        if self.weight.grad is None:
            self.weight.grad = self._cleared()
        total = self.weight.grad
        for places, part in zip(route.given, received, strict=True):
            total[places] = total.index_select(0, places) + part
        self._touched += route.given
        if self._padding is not None:
            total[self._padding] = 0

    def _cleared(self) -> Tensor:
        if self._gradient is None:
            self._gradient = torch.zeros_like(self.weight)
        for places in self._touched:
            self._gradient.index_fill_(0, places, 0)
        self._touched = []
        return self._gradient


class _Lookup(torch.autograd.Function):
    """The weight is an argument so that autograd comes back here; its gradient is never made dense by autograd."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, table: DividedEmbedding, route: Route) -> Tensor:
        ctx.how = table, route
        return table.fetch(route)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        table, route = ctx.how
        table.add_gradients(route, grads[0])
        return None, None, None


def divide_tables(unit: nn.Module, names: Collection[str], group: Group) -> nn.Module:
    """The unit with this worker's parts in place of its tables of these names.

    Args:
        unit: changed in place.
        names: of the tables' modules in it; empty for the unit itself.
        group: over which they are divided.
    """
    router = Router(group)
    for name in names:
        whole = unit.get_submodule(name)
        assert isinstance(whole, nn.Embedding)
        part = DividedEmbedding(whole, router).train(whole.training)
        if not name:
            return part
        parent, _, last = name.rpartition(".")
        setattr(unit.get_submodule(parent), last, part)
    return unit


def own_rows(whole: Tensor, worker: int, workers: int) -> Tensor:
    """What a worker has of a tensor that is divided as tables are."""
    return whole[worker::workers]


def joined_rows(parts: list[Tensor]) -> Tensor:
    """The whole tensor from the parts of all workers, in the order of the ranks."""
    whole = parts[0].new_empty((sum(map(len, parts)), *parts[0].shape[1:]))
    for worker, part in enumerate(parts):
        whole[worker :: len(parts)] = part
    return whole

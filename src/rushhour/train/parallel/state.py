"""The state of a network that is divided over workers: who holds which part, and how parts become the whole."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rushhour.errors import ModelError
from rushhour.train.parallel.collectives import shares
from rushhour.train.parallel.groups import WorkerGroups
from rushhour.train.parallel.plan import ParallelPlan
from rushhour.train.parallel.tables import joined_rows, own_rows

Cut = Literal[0, 1, "flat", "table"] | None
"""Along which dimension a tensor is divided over a replica; `flat`: as a vector over the whole stage; `table`: by rows
over the whole stage, as `DividedEmbedding` has them; None: it is replicated."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of the network's state, and which workers hold it.

    Attributes:
        name: in the network's state dict.
        shape: of the whole tensor.
        dtype: of its numbers.
        stage: that holds it.
        cut: how it is divided over the workers of the stage.
        held: the name under which it is held: another entry's, where parameters are tied.
        learned: whether it is a parameter that is trained.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    stage: int
    cut: Cut
    held: str
    learned: bool


class DividedState:
    """The state of a network, divided by a plan.

    Args:
        network: whole, or on the meta device.
        units: its layers, as `chain` lists them.
        plan: for this network.
        groups: of this worker.

    Attributes:
        entries: the network's state, in its own order.
    """

    def __init__(
        self, network: nn.Module, units: list[tuple[str, nn.Module]], plan: ParallelPlan, groups: WorkerGroups
    ) -> None:
        self.entries = _entries(network, units, plan)
        self._mesh = plan.mesh
        self._groups = groups

    def merged(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """Whole tensors from the parts that the workers hold, on worker 0; None on the others, which all call this too.

        Args:
            tensors: name in the network -> a tensor shaped like the part that is held here, such as a moment of the
                optimizer. Names that no worker has are left out, but all holders of one must give it.
        """
        known = self._dtypes(tensors)
        rank, world = self._groups.rank, self._groups.world
        whole: dict[str, Tensor] = {}
        for entry in self.entries:
            if entry.held not in known:
                continue
            if entry.held != entry.name and entry.held in whole:
                whole[entry.name] = whole[entry.held]
                continue
            pieces = []
            for holder, shape in self._holders(entry):
                if rank == 0:
                    if holder == 0:
                        pieces.append(tensors[entry.held].detach().clone())
                    else:
                        piece = torch.empty(shape, dtype=known[entry.held])
                        dist.recv(piece, group=world, group_src=holder)
                        pieces.append(piece)
                elif rank == holder:
                    dist.send(tensors[entry.held].detach().contiguous(), group=world, group_dst=0)
            if rank == 0:
                whole[entry.name] = _joined(pieces, entry)
        return whole if rank == 0 else None

    def parts(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of `merged`: what this worker holds of each tensor in `whole`, which is shaped as the network's.

        Raises:
            ModelError: if a tensor has another shape than the network's.
        """
        own: dict[str, Tensor] = {}
        for entry in self.entries:
            if entry.stage != self._groups.stage or entry.name != entry.held or entry.name not in whole:
                continue
            tensor = whole[entry.name]
            if tuple(tensor.shape) != entry.shape:
                raise ModelError(
                    f"the tensor {entry.name} has shape {tuple(tensor.shape)}",
                    f"the network's has {entry.shape}",
                    "use the state of this very network",
                )
            if entry.cut == "flat":
                sizes = shares(tensor.numel(), self._mesh.inner)
                own[entry.name] = torch.split(tensor.reshape(-1), list(sizes))[self._groups.inner]
            elif entry.cut == "table":
                own[entry.name] = own_rows(tensor, self._groups.inner, self._mesh.inner)
            elif entry.cut is None:
                own[entry.name] = tensor
            else:
                sizes = shares(tensor.shape[entry.cut], self._mesh.tensor)
                own[entry.name] = torch.split(tensor, list(sizes), entry.cut)[self._groups.tensor]
        return own

    def _dtypes(self, tensors: Mapping[str, Tensor]) -> dict[str, torch.dtype]:
        """Names that any worker has -> dtype."""
        own = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()}
        if self._groups.world is None:
            return {name: getattr(torch, dtype) for name, dtype in own.items()}
        of_all: list[Any] = [None] * self._groups.world.size()
        dist.all_gather_object(of_all, own, group=self._groups.world)
        return {name: getattr(torch, dtype) for one in of_all for name, dtype in one.items()}

    def _holders(self, entry: Entry) -> list[tuple[int, tuple[int, ...]]]:
        """Ranks of the workers whose parts make the whole, in order, and the shapes of the parts."""
        mesh = self._mesh
        first = entry.stage * mesh.inner
        if entry.cut is None or (entry.cut in ("flat", "table") and mesh.inner == 1):
            return [(first, entry.shape)]
        if entry.cut == "flat":
            return [(first + index, (size,)) for index, size in enumerate(shares(math.prod(entry.shape), mesh.inner))]
        if entry.cut == "table":
            sizes = shares(entry.shape[0], mesh.inner)
            return [(first + index, (size, *entry.shape[1:])) for index, size in enumerate(sizes)]
        return [
            (first + index, (*entry.shape[: entry.cut], size, *entry.shape[entry.cut + 1 :]))
            for index, size in enumerate(shares(entry.shape[entry.cut], mesh.tensor))
        ]


def _joined(pieces: list[Tensor], entry: Entry) -> Tensor:
    if entry.cut is None:
        return pieces[0]
    if entry.cut == "flat":
        return torch.cat(pieces).view(entry.shape)
    if entry.cut == "table":
        return joined_rows(pieces)
    return torch.cat(pieces, entry.cut)


def _entries(network: nn.Module, units: list[tuple[str, nn.Module]], plan: ParallelPlan) -> tuple[Entry, ...]:
    divided = {
        ".".join(filter(None, (layer.name, table.name, "weight")))
        for layer in plan.layers
        for table in layer.tables
        if table.divided
    }
    of_unit = {
        (f"{name}.{key}" if name else key): layer
        for layer, (name, unit) in zip(plan.layers, units, strict=True)
        for key in unit.state_dict(keep_vars=True)
    }
    first: dict[int, str] = {}
    entries = []
    for name, tensor in network.state_dict(keep_vars=True).items():
        layer = of_unit[name]
        learned = isinstance(tensor, nn.Parameter) and tensor.requires_grad
        last = name.rpartition(".")[2]
        cut: Cut = None
        if plan.mesh.tensor > 1 and layer.layout == "column":
            cut = 0
        elif plan.mesh.tensor > 1 and layer.layout == "row" and last == "weight":
            cut = 1
        elif layer.layout == "sharded" and learned and plan.mesh.inner > 1:
            cut = "flat"
        elif name in divided and plan.mesh.inner > 1:
            cut = "table"
        held = first.setdefault(id(tensor), name)
        entries.append(Entry(name, tuple(tensor.shape), tensor.dtype, layer.stage, cut, held, learned))
    return tuple(entries)

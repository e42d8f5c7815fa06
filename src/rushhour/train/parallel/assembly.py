"""This worker's layers of a network: those of its stage, divided as the plan says, with the exchanges between them."""

from __future__ import annotations

import itertools
from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rushhour.errors import ModelError
from rushhour.train.parallel.buffers import Owners
from rushhour.train.parallel.collectives import Group, shares
from rushhour.train.parallel.groups import WorkerGroups
from rushhour.train.parallel.layer_table import ELEMENTWISE
from rushhour.train.parallel.layers import (
    Column,
    Dropout,
    ForwardContext,
    Row,
    Sharded,
    SyncBatchNorm,
    ToFeatures,
    ToRows,
)
from rushhour.train.parallel.plan import LayerPlan, ParallelPlan
from rushhour.train.parallel.tables import divide_tables


class Assembly(NamedTuple):
    """What this worker computes and holds.

    Attributes:
        layers: in order.
        tensors: name in the network's state -> what this worker holds of it.
        owners: of the buffers among them.
    """

    layers: nn.ModuleList
    tensors: dict[str, Tensor]
    owners: Owners


def assemble(
    network: nn.Module,
    units: list[tuple[str, nn.Module]],
    plan: ParallelPlan,
    groups: WorkerGroups,
    context: ForwardContext,
    *,
    held: Collection[str],
    seed: int,
    whole_batch_norm: bool,
) -> Assembly:
    """Build the layers of this worker's stage.

    Args:
        network: whole, or on the meta device; its modules are taken over.
        units: its layers, as `chain` lists them.
        plan: for this network.
        groups: of this worker.
        context: that the layers read.
        held: names in the network's state under which tensors are held.
        seed: of the weights of layers on the meta device.
        whole_batch_norm: whether batch normalisation sees the rows of all workers of the stage.

    Raises:
        ModelError: if a layer on the meta device cannot initialise its weights.
    """
    numbering = itertools.count()
    numbers = {id(module): next(numbering) for module in network.modules() if type(module) is nn.Dropout}
    layers: list[nn.Module] = []
    tensors: dict[str, Tensor] = {}
    owners: dict[str, tuple[dict[str, Tensor | None], str]] = {}
    features: int | None = None  # of the whole activations, where they are divided by features
    for index, (planned, (name, unit)) in enumerate(zip(plan.layers, units, strict=True)):
        if planned.stage != groups.stage:
            continue
        _materialise(unit, seed, index)
        if planned.layout == "row" and features is None and plan.mesh.tensor > 1:
            layers.append(ToFeatures(context, _existing(groups.tensor_group)))
        elif planned.layout != "row" and features is not None and not isinstance(unit, ELEMENTWISE):
            layers.append(ToRows(features, context, _existing(groups.tensor_group)))
            features = None
        cut = None
        if features is not None:
            cut = features, sum(shares(features, plan.mesh.tensor)[: groups.tensor])
        unit = _independent(
            unit, numbers, context, cut, batch_norm_group=groups.stage_group if whole_batch_norm else None
        )
        layer = _divided(planned, unit, groups, context)
        if planned.layout == "column":
            assert isinstance(unit, nn.Linear)
            features = unit.out_features
        elif planned.layout == "row":
            features = None
        layers.append(layer)
        prefix = f"{name}." if name else ""
        tensors |= {prefix + key: one for key, one in _state(layer).items() if prefix + key in held}
        for path, module in whole_layer(layer).named_modules(prefix=name):
            for key in module._buffers:
                full = f"{path}.{key}" if path else key
                if full in tensors:
                    owners[full] = module._buffers, key
    if features is not None:
        layers.append(ToRows(features, context, _existing(groups.tensor_group)))
    return Assembly(nn.ModuleList(layers), tensors, owners)


def whole_layer(layer: nn.Module) -> nn.Module:
    """The network's own layer, where its parameters are sharded; else the layer itself."""
    module: nn.Module = layer.__dict__["module"] if isinstance(layer, Sharded) else layer
    return module


def _existing(group: Group | None) -> Group:
    assert group is not None
    return group


def _independent(
    unit: nn.Module,
    numbers: dict[int, int],
    context: ForwardContext,
    cut: tuple[int, int] | None,
    *,
    batch_norm_group: Group | None,
) -> nn.Module:
    """The unit with dropout and batch normalisation that compute the same on any number of workers.

    Args:
        unit: changed in place.
        numbers: id of a dropout layer -> its number in the network.
        context: that the layers read.
        cut: see `Dropout`.
        batch_norm_group: the workers whose rows batch normalisation sees; None: each its own.
    """

    def replaced(module: nn.Module) -> nn.Module:
        if type(module) is nn.Dropout:
            return Dropout(module.p, numbers[id(module)], context, cut).train(module.training)
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, SyncBatchNorm):
            return module if batch_norm_group is None else SyncBatchNorm(module, batch_norm_group)
        for name, child in module.named_children():
            setattr(module, name, replaced(child))
        return module

    return replaced(unit)


def _divided(planned: LayerPlan, unit: nn.Module, groups: WorkerGroups, context: ForwardContext) -> nn.Module:
    if planned.layout in ("column", "row") and groups.tensor_group is not None:
        assert isinstance(unit, nn.Linear)
        kind = Column if planned.layout == "column" else Row
        return kind(unit, context, groups.tensor_group)
    if planned.layout == "sharded" and groups.stage_group is not None:
        return Sharded(unit, groups.stage_group)
    if planned.layout == "tables" and groups.stage_group is not None:
        return divide_tables(unit, [table.name for table in planned.tables if table.divided], groups.stage_group)
    return unit


def _state(layer: nn.Module) -> dict[str, Tensor]:
    """What this worker holds of a layer, by the names in the network's own layer."""
    if not isinstance(layer, Sharded):
        state: dict[str, Tensor] = layer.state_dict(keep_vars=True)
        return state
    parts: dict[str, Tensor] = dict(zip(layer.names, layer.parts, strict=True))
    return parts | {
        key: tensor
        for key, tensor in whole_layer(layer).state_dict(keep_vars=True).items()
        if tensor.device.type != "meta"
    }


def _materialise(unit: nn.Module, seed: int, index: int) -> None:
    """Give a layer on the meta device fresh weights, the same under every plan."""
    if not any(tensor.is_meta for tensor in (*unit.parameters(), *unit.buffers())):
        return
    unit.to_empty(device="cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed * 1_000_003 + index)
        for module in unit.modules():
            if not list(module.parameters(recurse=False)) and not list(module.buffers(recurse=False)):
                continue
            reset = getattr(module, "reset_parameters", None)
            if not callable(reset):
                raise ModelError(
                    f"cannot give {type(module).__name__} fresh weights",
                    "it has parameters but no reset_parameters",
                    "build the network outside the meta device",
                )
            reset()

"""Low rank: a dense layer that holds most of a network becomes a product of two narrow ones.

The directions are chosen by the outputs of the layer for real samples, not by its weights alone: of all products of
that rank, the one whose outputs are nearest (the best approximation of W X, Eckart and Young 1936).
"""

from __future__ import annotations

import math
from collections import Counter

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from rushhour.compress.prune import fast_multiple
from rushhour.data.dataset import Dataset
from rushhour.errors import ModelError
from rushhour.models import Deployed, split_dense, tensors_of

_SAMPLES, _BATCH = 2_048, 128
_QUAD = 4
"""Ranks are multiples of it: int8 instructions multiply four numbers at a time."""
_DOMINANT = 0.25
"""A dense layer with this share of all parameters is worth splitting."""


class LowRank(msgspec.Struct, frozen=True, tag_field="step", tag="lowrank"):
    """Split dense layers in two, with few features between; without training, so `distil` should follow.

    One of the first three decides the rank; by default a tenth of the layer's parameters stays.

    Attributes:
        keep: share of the layer's parameters that stays, at most.
        rank: features between the two.
        energy: share of the variance of the layer's outputs that is kept, at least.
        layers: which, by name; by default those with a quarter of all parameters or more.
    """

    keep: float | None = None
    rank: int | None = None
    energy: float | None = None
    layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        given = [value for value in (self.keep, self.rank, self.energy) if value is not None]
        shares = [value for value in (self.keep, self.energy) if value is not None]
        if len(given) > 1 or not all(0 < share < 1 for share in shares) or (self.rank or 1) < 1:
            raise ModelError(
                f"cannot split layers with keep={self.keep}, rank={self.rank}, energy={self.energy}",
                "give one of them: keep and energy are shares between 0 and 1, rank is 1 or more",
                "write for example lowrank:0.1",
            )


def split(deployed: Deployed, dataset: Dataset, step: LowRank, *, seed: int, name: str) -> dict[str, int]:
    """Split dense layers of the network of `deployed`, in place.

    Args:
        deployed: with its weights.
        dataset: the layers' outputs are computed on its training part; labels are not needed.
        step: how far.
        seed: of the samples.
        name: of the model, for messages.

    Returns:
        Layer -> rank, of the layers that were split; empty where no layer becomes smaller.

    Raises:
        ModelError: if the network has no layer that the step names.
    """
    network = deployed.eval().network
    dense = _dense(network)
    for layer in step.layers:
        if layer not in dense:
            raise ModelError(
                f"there is no dense layer {layer!r} in {name}",
                f"its dense layers are {', '.join(sorted(dense)) or 'none'}",
                "name one of these, or leave layers out",
            )
    ranks: dict[str, int] = {}
    chosen = step.layers or tuple(dominant(network))
    seen = _outputs(deployed, dataset, {layer: dense[layer] for layer in chosen}, seed)
    for layer, (mean, moment) in seen.items():
        module = dense[layer]
        # centred where a bias can hold the rest of the mean
        values, directions = torch.linalg.eigh(moment if module.bias is None else moment - torch.outer(mean, mean))
        rank = _rank(module, values.flip(0), step)
        if rank * (module.in_features + module.out_features) >= module.in_features * module.out_features:
            continue
        _put(network, layer, module, directions.flip(1)[:, :rank], mean)
        ranks[layer] = rank
    return ranks


def dominant(network: nn.Module) -> list[str]:
    """Dense layers that can be split and have a quarter of all parameters or more, by name."""
    whole = sum(parameter.numel() for parameter in network.parameters())
    return [layer for layer, module in _dense(network).items() if module.weight.numel() >= _DOMINANT * whole]


def _dense(network: nn.Module) -> dict[str, nn.Linear]:
    """Dense layers that can be split: with weights that no other layer has, and called as layers.

    Splitting a layer with shared weights would not make the others smaller; attention reads the weights of its last
    layer without calling it.
    """
    owners = Counter(id(one) for module in network.modules() for one in module.parameters(recurse=False))
    return {
        layer: module
        for layer, module in network.named_modules()
        if type(module) is nn.Linear
        and layer
        and "weight" in dict(module.named_parameters(recurse=False))
        and owners[id(module.weight)] == 1
    }


def _outputs(
    deployed: Deployed, dataset: Dataset, layers: dict[str, nn.Linear], seed: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """Of each layer the mean of its outputs without the bias, and the mean product of all pairs of them; float64."""
    found: dict[str, tuple[Tensor, Tensor, int]] = {}
    hooks = []
    for layer, module in layers.items():

        def note(module: nn.Module, inputs: tuple[Tensor, ...], given: Tensor, layer: str = layer) -> None:
            assert isinstance(module, nn.Linear)
            out = given if module.bias is None else given - module.bias
            rows = out.flatten(0, -2).double()
            mean, moment, count = found.get(layer, (torch.zeros(()), torch.zeros(()), 0))
            found[layer] = (mean + rows.sum(0), moment + rows.T @ rows, count + len(rows))

        hooks.append(module.register_forward_hook(note))
    order = np.random.default_rng(seed).permutation(len(dataset.train))[:_SAMPLES]
    try:
        with torch.no_grad():
            size = dataset.fitting_batch(_BATCH)
            for at in range(0, len(order), size):
                deployed.logits(*tensors_of(dataset.train.inputs[order[at : at + size]]))
    finally:
        for hook in hooks:
            hook.remove()
    return {layer: (mean / count, moment / count) for layer, (mean, moment, count) in found.items()}


def _rank(module: nn.Linear, values: Tensor, step: LowRank) -> int:
    """How many directions stay: a multiple of the vector registers, where there are enough."""
    most = min(module.in_features, module.out_features)
    if step.rank is not None:
        return min(step.rank, most)
    if step.energy is not None:
        shares = values.clamp_min(0).cumsum(0) / values.clamp_min(0).sum().clamp_min(1e-30)
        rank = int((shares < step.energy).sum()) + 1
        return min(most, math.ceil(rank / _QUAD) * _QUAD)
    keep = 0.1 if step.keep is None else step.keep
    rank = int(keep * module.in_features * module.out_features / (module.in_features + module.out_features))
    granule = fast_multiple()
    while granule > _QUAD and rank < granule:
        granule //= 2
    return min(most, max(granule, rank - rank % granule))


def _put(network: nn.Module, layer: str, old: nn.Linear, directions: Tensor, mean: Tensor) -> None:
    """Replace a layer by its product: outputs are projected onto the directions around their mean."""
    with torch.random.fork_rng(devices=[]):  # the fresh weights are replaced; the caller's generator must not advance
        first, second = split_dense(network, layer, directions.shape[1])
    with torch.no_grad():
        first.weight.copy_(directions.T @ old.weight.double())
        second.weight.copy_(directions)
        rest = mean - directions @ (directions.T @ mean)
        if second.bias is not None:
            second.bias.copy_(old.bias.double() + rest)

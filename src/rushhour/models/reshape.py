"""A network that was pruned or factorised is recorded as sizes, and built again from what its factory builds.

Nothing is unpickled: some dense layers of the factory's network are split in two, and tensors are cut to the recorded
sizes. Layers only become smaller: a record with larger sizes is damaged.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from rushhour.bundle import Reshape
from rushhour.errors import ModelError


def split_dense(network: nn.Module, name: str, rank: int) -> tuple[nn.Linear, nn.Linear]:
    """Replace a dense layer by two, `NAME.0` without bias and `NAME.1`, with fresh weights.

    Args:
        network: changed in place.
        name: of a `torch.nn.Linear` in it.
        rank: features between the two, at most as many as the layer takes or gives.

    Returns:
        The two.

    Raises:
        ModelError: if there is no such layer, or the rank does not fit it.
    """
    layer = dict(network.named_modules()).get(name)
    if not isinstance(layer, nn.Linear) or not name:
        raise ModelError(
            f"cannot split the layer {name!r}",
            "the network has no dense layer of that name",
            f"its dense layers are {', '.join(n for n, m in network.named_modules() if isinstance(m, nn.Linear))}",
        )
    if not 1 <= rank <= min(layer.in_features, layer.out_features):
        raise ModelError(
            f"cannot split the layer {name} at rank {rank}",
            f"it has {layer.in_features} inputs and {layer.out_features} outputs",
            "use a rank from 1 to the smaller of them",
        )
    first = nn.Linear(layer.in_features, rank, bias=False).requires_grad_(layer.weight.requires_grad)
    second = nn.Linear(rank, layer.out_features, bias=layer.bias is not None).requires_grad_(layer.weight.requires_grad)
    parent, _, leaf = name.rpartition(".")
    setattr(network.get_submodule(parent), leaf, nn.Sequential(first, second).train(layer.training))
    return first, second


def reshape(network: nn.Module, change: Reshape, model: str) -> None:
    """Split and narrow `network` in place, as `change` says.

    A tensor keeps the values of its first rows and columns, so that a fresh network is initialised as by its factory.

    Args:
        network: as its factory built it.
        change: the recorded sizes.
        model: its name, for the message.

    Raises:
        ModelError: if the record does not fit the network.
    """
    for name, rank in change.ranks.items():
        split_dense(network, name, rank)
    state = network.state_dict(keep_vars=True)
    cut: dict[int, Tensor] = {}  # by identity, so that tied weights stay tied
    for name, shape in change.shapes.items():
        old = state.get(name)
        if (
            old is None
            or len(shape) != old.dim()
            or any(new > size for new, size in zip(shape, old.shape, strict=True))
        ):
            found = "there is none" if old is None else f"it has {tuple(old.shape)}"
            raise ModelError(
                f"cannot bring {name} of the model {model} to the shape {tuple(shape)}",
                f"{found}, and layers only become smaller",
                "make the bundle again with the installed code",
            )
        if id(old) not in cut:
            kept = old.detach()[tuple(slice(size) for size in shape)].clone(memory_format=torch.contiguous_format)
            cut[id(old)] = nn.Parameter(kept, old.requires_grad) if isinstance(old, nn.Parameter) else kept
        path, _, leaf = name.rpartition(".")
        setattr(network.get_submodule(path), leaf, cut[id(old)])
    for path in {name.rpartition(".")[0] for name in change.shapes}:
        _update_sizes(network.get_submodule(path))


def reshape_of(fresh: nn.Module, network: nn.Module, ranks: Mapping[str, int], model: str) -> Reshape:
    """What turns `fresh` into a network of the sizes of `network`.

    Args:
        fresh: as the factory built it; its layers are split here.
        network: the same, split and narrowed.
        ranks: the splits.
        model: its name, for the message.

    Raises:
        ModelError: if they differ in more than sizes.
    """
    for name, rank in ranks.items():
        split_dense(fresh, name, rank)
    # lazy tensors take the shape of any weights that they are given
    before = {name: None if is_lazy(tensor) else tuple(tensor.shape) for name, tensor in fresh.state_dict().items()}
    after = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    if before.keys() != after.keys():
        apart = sorted(before.keys() ^ after.keys())
        raise ModelError(
            f"cannot record how the model {model} was changed",
            f"it differs from its factory's in {', '.join(apart[:3])}",
            "give a factory that builds the same layers every time",
        )
    changed = {name: shape for name, shape in after.items() if before[name] not in (None, shape)}
    return Reshape(ranks=dict(ranks), shapes=changed)


def _update_sizes(module: nn.Module) -> None:
    """Set the sizes that a layer keeps beside its tensors to those of the tensors."""
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.modules.conv._ConvNd):
        if module.groups == module.in_channels == module.out_channels > 1:  # one filter for each channel
            module.groups = module.weight.shape[0]
        wide, narrow = module.weight.shape[0], module.weight.shape[1] * module.groups
        module.out_channels, module.in_channels = (narrow, wide) if module.transposed else (wide, narrow)
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        kept = weight if weight is not None else module.running_mean
        module.num_features = len(kept) if kept is not None else module.num_features
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm) and weight is not None:
        module.normalized_shape = tuple(weight.shape)
    elif isinstance(module, nn.GroupNorm) and weight is not None:
        module.num_channels = len(weight)
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = module.weight.shape
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(module.weight)

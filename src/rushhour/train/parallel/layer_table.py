"""The layer table: what each layer of a network computes and keeps for one sample.

It comes from the network on the meta device, where nothing is computed.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from rushhour.bundle import Source, TensorSpec
from rushhour.errors import ModelError
from rushhour.models import build
from rushhour.train.parallel.cost import Kind, Layer

ELEMENTWISE: tuple[type[nn.Module], ...] = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Hardswish,
    nn.Dropout, nn.Identity,
)  # fmt: skip
"""Layers that work on any part of the features alone."""
_NORM = nn.modules.batchnorm._BatchNorm


def chain(network: nn.Module) -> list[tuple[str, nn.Module]]:
    """The layers that run one after the other: the leaves of nested `nn.Sequential`s; else the network, named ''.

    A network that uses one parameter in two layers stays whole: both layers must be on the same worker.
    """
    found: list[tuple[str, nn.Module]] = []

    def walk(name: str, module: nn.Module) -> None:
        if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward and len(module):
            for key, child in module.named_children():
                walk(f"{name}.{key}" if name else key, child)
        else:
            found.append((name, module))

    walk("", network)
    owners: dict[int, int] = {}
    for index, (_, module) in enumerate(found):
        for tensor in (*module.parameters(), *module.buffers()):
            if owners.setdefault(id(tensor), index) != index:
                return [("", network)]
    # one module named twice is listed once by named_children: then the chain is not the network
    if sum(1 for _ in _leaves(network)) != len(found):
        return [("", network)]
    return found


def _leaves(module: nn.Module) -> Iterator[nn.Module]:
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward and len(module):
        for child in module:
            yield from _leaves(child)
    else:
        yield module


def layer_table(source: Source, sample: TensorSpec, outputs: int, trusted: tuple[str, ...] = ()) -> tuple[Layer, ...]:
    """The layer table of the network that `source` names.

    Raises:
        ModelError: if it cannot be built, cannot take such samples, or does not answer with `outputs` numbers.
    """
    try:
        with torch.device("meta"):
            network = build(source, trusted)
    except ModelError:
        # a factory may need the values of tensors, for example to scale its weights
        network = build(source, trusted).to("meta")
    shape = sample.shape
    if sample.name == "image" and len(shape) == 3:
        shape = (shape[2], shape[0], shape[1])
    whole = sample.dtype in ("int64", "int32") and sample.name != "image"
    return table_of(network, shape, outputs, torch.int64 if whole else torch.float32)


def table_of(
    network: nn.Module, shape: tuple[int, ...], outputs: int | None = None, dtype: torch.dtype = torch.float32
) -> tuple[Layer, ...]:
    """The layer table of a network on the meta device, for samples of `shape` as the network takes them."""
    rows = 2  # batch normalisation takes no single sample
    x = torch.empty((rows, *shape), device="meta", dtype=dtype)
    table = []
    name = ""
    try:
        for name, module in chain(network.train()):
            own = {id(tensor) for tensor in module.parameters()}
            saved: dict[int, int] = {}

            def keep(tensor: Tensor, own: set[int] = own, saved: dict[int, int] = saved) -> Tensor:
                if id(tensor) not in own and not isinstance(tensor, nn.Parameter) and tensor._base is None:
                    saved[id(tensor)] = tensor.numel()
                return tensor

            entry = x.detach()
            if entry.is_floating_point():
                entry.requires_grad_()
            counter = FlopCounterMode(display=False)
            with counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                y: Tensor = module(entry)
            leaves = [leaf for leaf in module.modules() if not list(leaf.children())]
            table.append(
                Layer(
                    name=name,
                    kind=_kind(module, leaves),
                    flops=counter.get_total_flops() / rows,
                    parameters=sum(tensor.numel() for tensor in module.parameters()),
                    inputs=x.numel() // rows,
                    outputs=y.numel() // rows,
                    in_width=x.shape[-1],
                    out_width=y.shape[-1] if y.dim() == 2 or not _norms(leaves) else y.shape[1],
                    saved=max(
                        sum(saved.values()) // rows, y.numel() // rows if not isinstance(module, nn.Flatten) else 0
                    ),
                    operations=len(leaves),
                    norms=_norms(leaves),
                )
            )
            x = y
    except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError, AttributeError) as error:
        raise ModelError(
            f"cannot trace the network{f' in its layer {name}' if name else ''}",
            f"{type(error).__name__}: {error}",
            "use modules that run on torch's meta device, with samples that fit them",
        ) from error
    if outputs is not None and tuple(x.shape[1:]) != (outputs,):
        raise ModelError(
            f"the network answers with shape {tuple(x.shape[1:])}",
            f"the task has {outputs} outputs",
            "change one of them",
        )
    return tuple(table)


def _norms(leaves: list[nn.Module]) -> int:
    return sum(isinstance(leaf, _NORM) for leaf in leaves)


def _kind(module: nn.Module, leaves: list[nn.Module]) -> Kind:
    if type(module) is nn.Linear:
        return "dense"
    if isinstance(module, ELEMENTWISE):
        return "elementwise"
    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return "convolution" if any(isinstance(leaf, convolutions) for leaf in leaves) else "other"

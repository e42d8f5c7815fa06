"""The layer table: what each layer of a network computes and keeps for one sample.

It comes from the network on the meta device, where nothing is computed.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from rushhour.bundle import Source, TensorSpec
from rushhour.errors import ModelError
from rushhour.models import Inputs, build
from rushhour.train.parallel.cost import EmbeddingTable, Kind, Layer

ELEMENTWISE: tuple[type[nn.Module], ...] = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Hardswish,
    nn.Dropout, nn.Identity,
)  # fmt: skip
"""Layers that work on any part of the features alone."""
_NORM = nn.modules.batchnorm._BatchNorm
_ROWS = 2
"""Samples that pass through a layer: batch normalisation takes no single one."""


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


def layer_table(
    source: Source,
    sample: tuple[TensorSpec, ...],
    outputs: int | tuple[int, ...],
    trusted: tuple[str, ...] = (),
) -> tuple[Layer, ...]:
    """The layer table of the network that `source` names.

    Args:
        source: the network.
        sample: one sample: each input.
        outputs: length of one answer; its shape, where it is about places.
        trusted: factories that may be imported besides those of `rushhour.models`.

    Raises:
        ModelError: if it cannot be built, cannot take such samples, or answers with other numbers.
    """
    try:
        with torch.device("meta"):
            network = build(source, trusted)
    except ModelError:
        # a factory may need the values of tensors, for example to scale its weights
        network = build(source, trusted).to("meta")
    if len(sample) > 1:  # the network gets them as they are
        inputs = tuple(_empty(spec.shape, getattr(torch, spec.dtype)) for spec in sample)
        return _table(network, inputs, outputs)
    (spec,) = sample
    shape = spec.shape
    if spec.name == "image" and len(shape) == 3:
        shape = (shape[2], shape[0], shape[1])
    whole = spec.dtype in ("int64", "int32") and spec.name != "image"
    return table_of(network, shape, outputs, torch.int64 if whole else torch.float32)


def table_of(
    network: nn.Module,
    shape: tuple[int, ...],
    outputs: int | tuple[int, ...] | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Layer, ...]:
    """The layer table of a network on the meta device, for samples of `shape` as the network takes them."""
    return _table(network, (_empty(shape, dtype),), outputs)


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty((_ROWS, *shape), device="meta", dtype=dtype)


def _table(network: nn.Module, inputs: Inputs, outputs: int | tuple[int, ...] | None) -> tuple[Layer, ...]:
    """Of several inputs, the first layer takes all: it is the whole network then."""
    rows = _ROWS
    x, *others = inputs
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

            entries = [each.detach() for each in (x, *others)]
            for each in entries:
                each.requires_grad_(each.is_floating_point())
            counter, lookups = FlopCounterMode(display=False), _Lookups(module)
            with counter, lookups.watched(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                y: Tensor = module(*entries)
            leaves = [leaf for leaf in module.modules() if not list(leaf.children())]
            table.append(
                Layer(
                    name=name,
                    kind=_kind(module, leaves),
                    flops=counter.get_total_flops() / rows,
                    parameters=sum(tensor.numel() for tensor in module.parameters()),
                    inputs=sum(each.numel() for each in entries) // rows,
                    outputs=y.numel() // rows,
                    in_width=x.shape[-1],
                    out_width=y.shape[-1] if y.dim() == 2 or not _norms(leaves) else y.shape[1],
                    saved=max(
                        sum(saved.values()) // rows, y.numel() // rows if not isinstance(module, nn.Flatten) else 0
                    ),
                    operations=len(leaves),
                    norms=_norms(leaves),
                    tables=lookups.tables(rows),
                )
            )
            x, others = y, []
    except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError, AttributeError) as error:
        raise ModelError(
            f"cannot trace the network{f' in its layer {name}' if name else ''}",
            f"{type(error).__name__}: {error}",
            "use modules that run on torch's meta device, with samples that fit them",
        ) from error
    wanted = (outputs,) if isinstance(outputs, int) else outputs
    if wanted is not None and tuple(x.shape[1:]) != wanted:
        raise ModelError(
            f"the network answers with shape {tuple(x.shape[1:])}",
            f"the task has {outputs} outputs" if isinstance(outputs, int) else f"the task needs {outputs}",
            "change one of them",
        )
    return tuple(table)


def with_lookups(layers: tuple[Layer, ...], network: nn.Module, samples: Inputs) -> tuple[Layer, ...]:
    """The layer table with the rows of embedding tables that these samples look up.

    Args:
        layers: of the network.
        network: with weights; one pass in training mode goes through it.
        samples: a tensor `(n, ...)` for each input, as the network takes them.
    """
    seen: dict[str, list[Tensor]] = {}
    handles, rows = [], len(samples[0])
    for layer in layers:
        for table in layer.tables:
            name = ".".join(filter(None, (layer.name, table.name)))

            def before(module: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
                ids = inputs[0]
                # ids that are not of samples, such as positions, are the same for any number of them
                of_samples = ids.dim() > 0 and len(ids) == rows
                seen.setdefault(name, []).append(ids.reshape(rows, -1) if of_samples else ids.reshape(1, -1))

            handles.append(network.get_submodule(name).register_forward_pre_hook(before))
    if not handles:
        return layers
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            network.train()(*samples)
    finally:
        for handle in handles:
            handle.remove()

    def touched(name: str) -> tuple[int, ...]:
        counts = (2**power for power in range(rows.bit_length()))
        return tuple(len(torch.unique(torch.cat([ids[:count].reshape(-1) for ids in seen[name]]))) for count in counts)

    return tuple(
        msgspec.structs.replace(
            layer,
            tables=tuple(
                msgspec.structs.replace(table, touched=touched(name)) if name in seen else table
                for table in layer.tables
                for name in (".".join(filter(None, (layer.name, table.name))),)
            ),
        )
        for layer in layers
    )


def _norms(leaves: list[nn.Module]) -> int:
    return sum(isinstance(leaf, _NORM) for leaf in leaves)


def _kind(module: nn.Module, leaves: list[nn.Module]) -> Kind:
    if type(module) is nn.Linear:
        return "dense"
    if isinstance(module, ELEMENTWISE):
        return "elementwise"
    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return "convolution" if any(isinstance(leaf, convolutions) for leaf in leaves) else "other"


class _Lookups(TorchFunctionMode):
    """Finds the embedding tables of a layer, and how often each is looked up in, while the layer computes.

    A table counts if its rows can be divided without any difference but in rounding: it learns, it is an `nn.Embedding`
    without options that need all rows or all ids at once, and nothing else uses its weight.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        uses = Counter(id(tensor) for _, tensor in layer.named_parameters(remove_duplicate=False))
        self._found = {
            name: module
            for name, module in layer.named_modules()
            if type(module) is nn.Embedding
            and module.weight.requires_grad
            and uses[id(module.weight)] == 1
            and module.max_norm is None
            and not (module.sparse or module.scale_grad_by_freq)
            and not (module._forward_hooks or module._forward_pre_hooks)
        }
        self._weights = {id(module.weight) for module in self._found.values()}
        self._used_apart: set[int] = set()
        self._inside = 0
        self._ids: dict[str, list[Tensor]] = {}

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """While the block runs, what uses the tables is noted."""
        if not self._found:
            yield
            return
        handles = []
        for name, module in self._found.items():

            def before(module: nn.Module, inputs: tuple[Any, ...], name: str = name) -> None:
                self._inside = id(module.weight)
                if len(inputs) == 1 and isinstance(inputs[0], Tensor):
                    self._ids.setdefault(name, []).append(inputs[0])

            def after(module: nn.Module, inputs: Any, output: Any) -> None:
                self._inside = 0

            handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        used = {id(one) for one in tree_leaves((args, given)) if isinstance(one, Tensor)} & self._weights
        if used and func not in _ABOUT:
            self._used_apart |= used - ({self._inside} if func is functional.embedding else set())
        return func(*args, **given)

    def tables(self, samples: int) -> tuple[EmbeddingTable, ...]:
        """The tables that were looked up in, in the order of their first lookups, by so many samples."""
        tables = []
        before: list[Tensor] = []
        for name, ids in self._ids.items():
            weight = self._found[name].weight
            if id(weight) in self._used_apart:
                continue
            follows = len(ids) == len(before) == 1 and ids[0] is before[0]
            lookups = sum(one.numel() for one in ids) / samples
            rows, width = weight.shape
            tables.append(EmbeddingTable(name, rows, width, lookups, follows))
            before = ids
        return tuple(tables)


_ABOUT = (torch.Tensor.dtype.__get__, torch.Tensor.device.__get__)  # type: ignore[attr-defined]
"""What may be asked of a table besides its rows: the answer is that of any part."""

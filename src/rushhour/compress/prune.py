"""Structured pruning: whole channels and units go, so that what is left is a smaller dense network, and a faster one.

Torch-Pruning finds what hangs together and cuts it (Fang et al. 2023, DepGraph); which channels matter least is the
first-order Taylor estimate (Molchanov et al. 2019), ranked among layers of the same structure (Fang et al. 2024).
Zeroing single weights instead would make nothing faster here: no engine of ours skips zeros on a CPU without AMX.
"""

from __future__ import annotations

import copy
import math
from typing import Any, Literal

import msgspec
import torch
import torch_pruning
from torch import Tensor, nn

from rushhour import machine
from rushhour.data.dataset import Dataset
from rushhour.errors import ModelError
from rushhour.models import Deployed
from rushhour.train.loss import loss_for
from rushhour.train.memory_format import MemoryFormat, guard

_GRADIENT_SAMPLES, _GRADIENT_BATCH = 1024, 128
_TRIAL_SHARE = 0.25
_BISECTIONS = 7
_LAYERS = (nn.modules.conv._ConvNd, nn.Linear)


class Prune(msgspec.Struct, frozen=True, tag_field="step", tag="prune"):
    """Remove the channels that matter least, then fine-tune under distillation from the bundle before.

    Attributes:
        ratio: share of the channels that goes, over all layers that can be pruned; parameters fall faster, by about
            its square.
        parameters: share of the parameters that goes, in place of `ratio`.
        limit: no layer loses more than this share of its channels.
        limits: the same for single layers, by name.
        ignored: layers that keep all their channels.
        round_to: channels are left in multiples of this (less in layers with fewer than two of it): others leave
            vector registers partly empty. By default what the processor's registers hold.
        importance: `taylor` needs labels; without them, or on request, the size of the weights decides.
        iterations: cut and fine-tune so many times, a part each time.
        epochs: of fine-tuning after each cut.
        lr: peak learning rate of that.
    """

    ratio: float = 0.5
    parameters: float | None = None
    limit: float = 0.8
    limits: dict[str, float] = {}
    ignored: tuple[str, ...] = ()
    round_to: int | None = None
    importance: Literal["taylor", "magnitude"] = "taylor"
    iterations: int = 1
    epochs: int = 2
    lr: float = 1e-3

    def __post_init__(self) -> None:
        shares = [
            self.ratio,
            self.limit,
            *self.limits.values(),
            *([] if self.parameters is None else [self.parameters]),
        ]
        if not all(0 <= share < 1 for share in shares) or 0 in (self.ratio, self.parameters):
            raise ModelError(
                f"cannot prune by ratio {self.ratio:g} with limits {', '.join(f'{share:g}' for share in shares[1:])}",
                "each is a share that goes, above 0 and below 1",
                "write for example prune:0.5",
            )
        if self.iterations < 1 or self.epochs < 0 or (self.round_to or 1) < 1 or not self.lr > 0:
            raise ModelError(
                f"cannot prune in {self.iterations} iterations with {self.epochs} epochs each at lr {self.lr:g}",
                f"round_to is {self.round_to}; iterations, round_to and lr are above 0, epochs not below",
                "change that setting",
            )


def fast_multiple() -> int:
    """Channels that fill this processor's vector registers: 16 floats with AVX-512, else 8."""
    return 16 if "avx512f" in machine.describe().features else 8


def prune(deployed: Deployed, dataset: Dataset, step: Prune, iteration: int, *, seed: int, name: str) -> None:
    """Cut the network of `deployed`, in place, as far as `iteration` of the step goes.

    Which channels go follows from the weights, the data and the seed alone.

    Args:
        deployed: with the weights of the bundle before, or of the iteration before.
        dataset: its training part tells what matters.
        step: how much, and what not.
        iteration: from 0.
        seed: of the samples for gradients.
        name: of the model, for messages.

    Raises:
        ModelError: if a layer named in the step is not there, or the network cannot be traced.
    """
    network = deployed.network
    _check_names(network, step, name)
    deployed.eval()
    with torch.no_grad():
        example = deployed.preprocess(torch.from_numpy(dataset.train.inputs[:2].copy()))
    kept = [network.get_submodule(layer) for layer in step.ignored]
    kept += _fixed_layers(network, example, name)
    taylor = step.importance == "taylor" and dataset.train.labelled
    if taylor:
        _accumulate_gradients(deployed, dataset, seed)
    if step.parameters is not None:
        target = _parameters(network) * (1 - step.parameters) ** (1 / step.iterations)
        ratio = _ratio_for(network, example, step, kept, taylor, target)
    else:
        done, until = iteration / step.iterations, (iteration + 1) / step.iterations
        ratio = 1 - (1 - step.ratio * until) / (1 - step.ratio * done)
    _cut(network, example, ratio, step, kept, taylor)
    network.zero_grad()


def _check_names(network: nn.Module, step: Prune, name: str) -> None:
    layers = {layer for layer, module in network.named_modules() if isinstance(module, _LAYERS)}
    for layer in (*step.ignored, *step.limits):
        if layer not in layers:
            raise ModelError(
                f"there is no layer {layer!r} in {name}",
                f"its layers are {', '.join(sorted(layers))}",
                "name one of these in ignored or limits",
            )


def _accumulate_gradients(deployed: Deployed, dataset: Dataset, seed: int) -> None:
    """Leave in every weight the gradient of the loss over a few batches, without dropout, in float32."""
    loss_of, split = loss_for(dataset.task), dataset.train
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(split), generator=generator)[:_GRADIENT_SAMPLES].numpy()
    form = guard(deployed, split.inputs) or MemoryFormat(channels_last=not deployed.preprocess.contiguous)
    form.lay(deployed)
    deployed.network.zero_grad()
    with form.in_force():
        for at in range(0, len(rows), _GRADIENT_BATCH):
            part = rows[at : at + _GRADIENT_BATCH]
            loss = loss_of(deployed.logits(torch.from_numpy(split.inputs[part])), torch.from_numpy(split.targets[part]))
            (loss * (len(part) / len(rows))).backward()  # type: ignore[no-untyped-call]


def _graph(network: nn.Module, example: Tensor, name: str) -> Any:
    """What hangs together with what."""
    try:
        return torch_pruning.DependencyGraph().build_dependency(network, example_inputs=example)
    except Exception as error:  # tracing may fail in any way on a user's model
        reason = str(error).strip().splitlines() or [""]
        raise ModelError(
            f"cannot prune {name}",
            f"what depends on what cannot be traced: {type(error).__name__}: {reason[0]}",
            "leave prune out of the recipe, or distil into a smaller network",
        ) from error


def _fixed_layers(network: nn.Module, example: Tensor, name: str) -> list[nn.Module]:
    """Layers whose channels cannot go.

    A channel can go if the network without it is the network in which nobody listens to it. That is tried on a copy,
    because code of any kind lies between layers: the last layer's channels are answers, those of attention have a place
    in a head, those of a residual stream are counted in a LayerNorm's mean.
    """
    names = {module: layer for layer, module in network.named_modules()}
    graph = _graph(network, example, name)
    fixed = []
    for group in graph.get_all_groups(root_module_types=list(_LAYERS)):
        root, handler = group[0].dep.target.module, group[0].dep.handler
        width = graph.get_out_channels(root)
        some = list(range(max(1, int(width * _TRIAL_SHARE))))
        if width < 2 or not _can_go(network, example, names[root], handler, some, name):
            fixed.append(root)
    return fixed


def _can_go(network: nn.Module, example: Tensor, layer: str, handler: Any, channels: list[int], name: str) -> bool:
    deaf, without = copy.deepcopy(network), copy.deepcopy(network)
    graph, trial = _graph(deaf, example, name), _graph(without, example, name)
    listened = False
    with torch.no_grad():
        for part, rows in graph.get_pruning_group(deaf.get_submodule(layer), handler, channels):
            module = part.target.module
            if graph.is_in_channel_pruning_fn(part.handler) and isinstance(module, _LAYERS):
                transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
                module.weight[(rows,) if transposed else (slice(None), rows)] = 0.0
                listened = True
        if not listened:
            return False
        expected = deaf(example)
        try:
            trial.get_pruning_group(without.get_submodule(layer), handler, channels).prune()
            answer = without(example)
        except Exception:  # code between the layers counts on the width
            return False
    tolerance = 1e-4 * max(1e-3, float(expected.abs().max()))
    return answer.shape == expected.shape and bool(((answer - expected).abs() <= tolerance).all())


def _cut(network: nn.Module, example: Tensor, ratio: float, step: Prune, kept: list[nn.Module], taylor: bool) -> None:
    """Remove about `ratio` of the channels, by rank, in whole multiples, within the limits."""
    importance = (torch_pruning.importance.GroupTaylorImportance if taylor else _magnitude())()
    granule, names = step.round_to or fast_multiple(), {module: name for name, module in network.named_modules()}
    pruner = torch_pruning.BasePruner(
        network,
        example,
        importance=importance,
        global_pruning=True,
        isomorphic=True,
        pruning_ratio=ratio,
        ignored_layers=kept,
        # its own defaults are shared between all pruners of a process
        in_channel_groups={},
        out_channel_groups={},
        num_heads={},
    )
    for proposed in pruner.step(interactive=True):
        root, handler = proposed[0].dep.target.module, proposed[0].dep.handler
        width = pruner.DG.get_out_channels(root)
        whole = pruner.DG.get_pruning_group(root, handler, list(range(width)))
        layers = {names[part.target.module] for part, _ in whole if part.target.module in names}
        limit = min([step.limit, *(share for layer, share in step.limits.items() if layer in layers)])
        left = _rounded(width - len(proposed[0].idxs), width, limit, granule)
        if left < width and pruner.out_channel_groups.get(root, 1) == 1:
            order = torch.argsort(importance(whole), stable=True)[: width - left]
            pruner.DG.get_pruning_group(root, handler, sorted(order.tolist())).prune()


def _magnitude() -> Any:
    return torch_pruning.importance.GroupMagnitudeImportance


def _rounded(wanted: int, width: int, limit: float, granule: int) -> int:
    """The width to leave: a multiple of the granule near `wanted`, within the limit."""
    while granule > 1 and width < 2 * granule:
        granule //= 2
    least = math.ceil(max(1, math.ceil(width * (1 - limit) - 1e-9)) / granule) * granule
    return min(width, max(least, granule * round(wanted / granule)))


def _ratio_for(
    network: nn.Module, example: Tensor, step: Prune, kept: list[nn.Module], taylor: bool, target: float
) -> float:
    """The smallest ratio, found by trying on copies, that leaves `target` parameters or fewer."""
    low, high = 0.0, step.limit
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        trial, gradients = copy.deepcopy(network), [parameter.grad for parameter in network.parameters()]
        for parameter, gradient in zip(trial.parameters(), gradients, strict=True):
            parameter.grad = gradient
        names = {module: name for name, module in network.named_modules()}
        _cut(trial, example, middle, step, [trial.get_submodule(names[layer]) for layer in kept], taylor)
        low, high = (low, middle) if _parameters(trial) <= target else (middle, high)
    return high


def _parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())

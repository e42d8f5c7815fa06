"""Structured pruning: removes whole channels and units, which leaves a smaller and faster dense network.

Torch-Pruning finds which channels depend on each other and removes them (DepGraph, Fang et al. 2023). The least
important ones are found by the first-order Taylor estimate (Molchanov et al. 2019), ranked among layers of the same
structure (Fang et al. 2024). Zeroing single weights would make nothing faster: our engines do not skip zeros on a CPU
without AMX.
"""

from __future__ import annotations

import contextlib
import copy
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Literal, TypeVar

import msgspec
import torch
import torch_pruning
from torch import Tensor, nn
from torch.nn import functional

from rushhour.data.dataset import Dataset
from rushhour.errors import ModelError
from rushhour.models import Deployed, Inputs, tensors_of
from rushhour.system import machine
from rushhour.system.faults import summary_of
from rushhour.train.loss import loss_for
from rushhour.train.memory_format import MemoryFormat, guard

_GRADIENT_SAMPLES, _GRADIENT_BATCH = 1024, 128
_TRIAL_SHARE = 0.25
_BISECTIONS = 7
_CONVOLUTION = nn.modules.conv._ConvNd
_LAYERS = (_CONVOLUTION, nn.Linear)
_ASKED, _ANSWERS = "it was asked for", "its channels are the answers"
_COUNTED = "code between the layers depends on all its channels"

R = TypeVar("R")


class Prune(msgspec.Struct, frozen=True, tag_field="step", tag="prune"):
    """Remove the least important channels, then fine-tune under distillation from the bundle before.

    Attributes:
        ratio: share of the channels to remove, over all layers that can be pruned; of the parameters about the square
            of the rest stays.
        parameters: share of the parameters to remove, in place of `ratio`.
        limit: no layer loses more than this share of its channels.
        limits: the same for single layers, by name.
        ignored: layers that keep all their channels.
        round_to: the channels that stay are a multiple of this (of less in layers with fewer than twice as many), or
            vector registers stay partly empty. By default what the processor's registers hold.
        importance: `taylor` needs labels; without them, or by request, the magnitude of the weights decides.
        iterations: prune and fine-tune so many times, a part each time.
        epochs: of fine-tuning after each pruning.
        lr: peak learning rate of the fine-tuning.
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
                "each is a share to remove, above 0 and below 1",
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


def prune(deployed: Deployed, dataset: Dataset, step: Prune, iteration: int, *, seed: int, name: str) -> dict[str, str]:
    """Prune the network of `deployed`, in place, as far as `iteration` of the step says.

    The channels follow from the weights, the data and the seed alone. Some layers stay unchanged: frozen ones, those
    that share or compute their weights, and those whose channels other code depends on.

    Args:
        deployed: with the weights of the bundle before, or of the iteration before.
        dataset: importance is estimated on its training part.
        step: how much, and which layers not.
        iteration: from 0.
        seed: of the samples for gradients.
        name: of the model, for messages.

    Returns:
        Layer -> why it keeps all its channels, without the layers in `step.ignored` and those that give the answers.

    Raises:
        ModelError: if the network has no layer that the step names, cannot be traced or copied, or does not run after
            pruning.
    """
    network = deployed.network
    _check_names(network, step, name)
    deployed.eval()
    with torch.no_grad():
        example = deployed.prepared(*tensors_of(dataset.train.inputs[:2]))
    with _trainable(network) as frozen, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Torch-Pruning, on parameters that are in no layer
        before = _answers(network, example)
        kept = {**dict.fromkeys(step.ignored, _ASKED), **_kept(network, example, frozen, name)}
        taylor = step.importance == "taylor" and dataset.train.labelled
        if taylor:
            _accumulate_gradients(deployed, dataset, seed)
        if step.parameters is not None:
            target = _parameters(network) * (1 - step.parameters) ** (1 / step.iterations)
            ratio = _ratio_for(network, example, step, kept, taylor, target, name)
        else:
            done, until = iteration / step.iterations, (iteration + 1) / step.iterations
            ratio = 1 - (1 - step.ratio * until) / (1 - step.ratio * done)
        _cut(network, example, ratio, step, kept, taylor)
        after = _tried(lambda: _answers(network, example))
    if after is None or [one.shape for one in after] != [one.shape for one in before]:
        raise ModelError(
            f"cannot prune {name}",
            "with fewer channels it fails, or gives answers of another shape",
            "leave prune out of the recipe, or name layers to keep: prune:0.5:ignored=stem+head",
        )
    return {layer: why for layer, why in kept.items() if why not in (_ASKED, _ANSWERS)}


@contextlib.contextmanager
def _trainable(network: nn.Module) -> Iterator[set[str]]:
    """With gradients for every parameter, which tracing needs too; yields the names of the frozen ones."""
    frozen = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}

    def thaw(is_thawed: bool) -> None:
        for name, parameter in network.named_parameters(remove_duplicate=False):
            if name in frozen and parameter.is_floating_point():
                parameter.requires_grad_(is_thawed)

    thaw(True)
    try:
        yield frozen
    finally:
        network.zero_grad()
        thaw(False)


def _answers(network: nn.Module, example: Inputs) -> list[Tensor]:
    """All output tensors of the network."""
    with torch.no_grad():
        return [leaf for leaf in torch.utils._pytree.tree_leaves(network(*example)) if isinstance(leaf, Tensor)]


def _tried(what: Callable[[], R]) -> R | None:
    """The result; None where it fails: a user's network may fail in any way."""
    try:
        return what()
    except Exception:
        return None


def _copied(network: nn.Module, example: Inputs, name: str) -> nn.Module:
    try:
        _answers(network, example)  # without gradients, so that computed weights can be copied
        return copy.deepcopy(network)
    except Exception as error:  # a module may hold what cannot be copied
        raise ModelError(
            f"cannot prune {name}",
            f"channels are removed from copies first, and it cannot be copied: {summary_of(error)}",
            "leave prune out of the recipe",
        ) from error


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
    form.apply(deployed)
    deployed.network.zero_grad()
    with form.active():
        size = dataset.fitting_batch(_GRADIENT_BATCH)
        for at in range(0, len(rows), size):
            part = rows[at : at + size]
            loss = loss_of(deployed.logits(*tensors_of(split.inputs[part])), torch.from_numpy(split.targets[part]))
            (loss * (len(part) / len(rows))).backward()  # type: ignore[no-untyped-call]
    for parameter in deployed.network.parameters():
        if parameter.grad is None and parameter.requires_grad:  # nothing of the loss reaches it
            parameter.grad = torch.zeros_like(parameter)


def _graph(network: nn.Module, example: Inputs, name: str) -> Any:
    """Which channels depend on each other."""
    try:
        return torch_pruning.DependencyGraph().build_dependency(network, example, forward_fn=_forward)
    except Exception as error:  # tracing may fail in any way on a user's model
        raise ModelError(
            f"cannot prune {name}",
            f"the dependencies of its channels cannot be traced: {summary_of(error)}",
            "leave prune out of the recipe, or distil into a smaller network",
        ) from error


def _forward(network: nn.Module, example: Inputs) -> Any:
    """A call with a tensor for each input."""
    return network(*example)


def _kept(network: nn.Module, example: Inputs, frozen: set[str], name: str) -> dict[str, str]:
    """Layer -> why its channels cannot be removed.

    A channel can be removed if the network without it computes the same as the network whose later layers ignore it.
    That is tried on a copy, because any code may lie between layers: channels of attention belong to a head, those of a
    residual stream count in the mean of a LayerNorm, and a shuffle moves them. Group normalisation counts as a scale of
    each channel: where every group loses the same share, its statistics are those of the channels that stay.
    """
    names = {module: layer for layer, module in network.named_modules()}
    held = _held(network, frozen)
    graph = _graph(network, example, name)
    kept = {
        layer: "it is not called in a way that can be traced"
        for module, layer in names.items()
        if isinstance(module, _LAYERS) and module not in graph.module2node
    }
    seen: set[Any] = set()
    for root in list(graph.module2node):
        if not isinstance(root, _LAYERS) or root in seen:
            continue
        handler = graph.get_pruner_of_module(root).prune_out_channels
        group = _tried(partial(_whole, graph, root, handler))
        together = [part.target.module for part, _ in group or () if graph.is_out_channel_pruning_fn(part.handler)]
        layers = [names[one] for one in (root, *together) if isinstance(one, _LAYERS) and one in names]
        seen.update(together)
        if group is None:
            why = "what depends on its channels cannot be traced"
        else:
            fixed = next((part.target.module for part, _ in group if part.target.module in held), None)
            if fixed is None:
                why = _why_fixed(network, example, graph, group, names, name)
            elif names[fixed] in layers:
                why = f"{names[fixed]} {held[fixed]}"
            else:
                why = f"its channels go into {names[fixed]}, which {held[fixed]}"
        if why:
            kept.update(dict.fromkeys(layers, why))
    return kept


def _held(network: nn.Module, frozen: set[str]) -> dict[nn.Module, str]:
    """Module -> why its weights must not change.

    A frozen normalisation may lose channels: the others are scaled as before. A frozen dense or convolution layer would
    sum other terms.
    """
    owners: dict[int, list[str]] = {}
    for module_name, module in network.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(module_name)
    held = {}
    for module_name, module in network.named_modules():
        own = dict(module.named_parameters(recurse=False))
        others = {other for parameter in own.values() for other in owners[id(parameter)]} - {module_name}
        if others:
            held[module] = f"shares weights with {', '.join(sorted(others))}"
        elif isinstance(module, _LAYERS) and "weight" not in own:
            held[module] = "computes its weights from others (weight_norm or the like)"
        elif isinstance(module, _LAYERS) and f"{module_name}.weight".lstrip(".") in frozen:
            held[module] = "is frozen"
    return held


def _whole(graph: Any, root: nn.Module, handler: Any) -> Any:
    """All channels of a layer, and all that depend on them."""
    return graph.get_pruning_group(root, handler, list(range(graph.get_out_channels(root))))


def _blocks(group: Any) -> int:
    """The number of equal blocks that must lose the same channels: of grouped convolutions and normalisations."""
    counts = [1]
    for part, _ in group:
        module = part.target.module
        if isinstance(module, _CONVOLUTION) and not _is_depthwise(module):
            counts.append(module.groups)
        elif isinstance(module, nn.GroupNorm):
            counts.append(module.num_groups)
    return math.lcm(*counts)


def _is_depthwise(module: nn.modules.conv._ConvNd) -> bool:
    """As Torch-Pruning defines it: its inputs are removed with its outputs."""
    return module.groups == module.out_channels > 1


def _spread(within: list[int], width: int, blocks: int) -> list[int]:
    """The same indices in every block of a layer's channels."""
    size = width // blocks
    return [block * size + place for block in range(blocks) for place in within]


def _why_fixed(
    network: nn.Module, example: Inputs, graph: Any, group: Any, names: dict[nn.Module, str], name: str
) -> str:
    """Why no channels of a group can be removed; empty where some can."""
    root, handler = group[0].dep.target.module, group[0].dep.handler
    width, blocks = graph.get_out_channels(root), _blocks(group)
    if width % blocks or width // blocks < 2:
        return f"its {width} channels are too few for {blocks} groups" if blocks > 1 else "it has one channel"
    some = _spread(list(range(max(1, int(width // blocks * _TRIAL_SHARE)))), width, blocks)
    ignoring = _copied(network, example, name)
    is_used = False
    with torch.no_grad():
        for part, rows in graph.get_pruning_group(root, handler, some):
            module = part.target.module
            if not graph.is_in_channel_pruning_fn(part.handler) or not isinstance(module, _LAYERS):
                continue
            if isinstance(module, _CONVOLUTION) and _is_depthwise(module):
                continue
            if _tried(partial(_ignore_inputs, ignoring.get_submodule(names[module]), rows)) is None:
                return _COUNTED
            is_used = True
    if not is_used:
        taken = any(
            part.target.module in names
            and graph.is_in_channel_pruning_fn(part.handler)
            and not graph.is_out_channel_pruning_fn(part.handler)
            for part, _ in group
        )
        return "the layers after it need all its channels" if taken else _ANSWERS
    _scale_only(ignoring)
    expected = _answers(ignoring, example)

    def without() -> list[Tensor]:
        smaller = _copied(network, example, name)
        _scale_only(smaller)
        trial = _graph(smaller, example, name)
        trial.get_pruning_group(smaller.get_submodule(names[root]), handler, some).prune()
        return _answers(smaller, example)

    answer = _tried(without)
    alike = answer is not None and len(answer) == len(expected) and all(map(_near, answer, expected))
    if alike:
        return ""
    is_last = any(isinstance(part.target.module, torch_pruning.ops._OutputOp) for part, _ in group)
    return _ANSWERS if is_last else _COUNTED


class _Scale(nn.GroupNorm):
    """A group normalisation without its statistics: each channel alone is scaled and shifted."""

    def forward(self, input: Tensor) -> Tensor:
        zeros = input.new_zeros(self.num_channels)
        return functional.batch_norm(input, zeros, zeros + 1, self.weight, self.bias)


def _scale_only(network: nn.Module) -> None:
    for module in network.modules():
        if type(module) is nn.GroupNorm:
            module.__class__ = _Scale


def _ignore_inputs(layer: nn.Module, channels: list[int]) -> bool:
    """Set the weights of these input channels to 0; true."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        weight[channels] = 0.0
    elif isinstance(layer, _CONVOLUTION) and layer.groups > 1:
        size, outputs = layer.in_channels // layer.groups, layer.out_channels // layer.groups
        for channel in channels:
            block, place = divmod(channel, size)
            weight[block * outputs : (block + 1) * outputs, place] = 0.0
    else:
        weight[:, channels] = 0.0
    return True


def _near(answer: Tensor, expected: Tensor) -> bool:
    if answer.shape != expected.shape:
        return False
    if not expected.numel():
        return True
    tolerance = 1e-4 * max(1e-3, float(expected.abs().max()))
    return bool(((answer - expected).abs() <= tolerance).all())


def _cut(network: nn.Module, example: Inputs, ratio: float, step: Prune, kept: Mapping[str, str], taylor: bool) -> None:
    """Remove about `ratio` of the channels, by rank, in whole multiples, within the limits."""
    granule, names = step.round_to or fast_multiple(), {module: name for name, module in network.named_modules()}
    pruner = torch_pruning.BasePruner(
        network,
        example,
        importance=(importance := _Importance(taylor)),
        global_pruning=True,
        isomorphic=True,
        pruning_ratio=ratio,
        ignored_layers=[network.get_submodule(layer) for layer in kept],
        root_module_types=list(_LAYERS),
        forward_fn=_forward,
        # its own defaults are shared by all pruners of a process
        in_channel_groups={},
        out_channel_groups={},
        num_heads={},
    )
    for proposed in pruner.step(interactive=True):
        root, handler = proposed[0].dep.target.module, proposed[0].dep.handler
        width, whole = pruner.DG.get_out_channels(root), _whole(pruner.DG, root, handler)
        blocks = _blocks(whole)
        layers = {names[part.target.module] for part, _ in whole if part.target.module in names}
        limit = min([step.limit, *(share for layer, share in step.limits.items() if layer in layers)])
        left = _rounded(width - len(proposed[0].idxs), width, limit, granule, blocks)
        ranks = importance(whole)
        if left >= width or ranks is None:
            continue
        order = torch.argsort(ranks.view(blocks, -1).mean(dim=0), stable=True)[: (width - left) // blocks]
        pruner.DG.get_pruning_group(root, handler, _spread(sorted(order.tolist()), width, blocks)).prune()


class _Importance:
    """Of each channel of a group: by Taylor's estimate if wanted and finite, else by the magnitude of its weights."""

    def __init__(self, taylor: bool) -> None:
        self._estimators = [torch_pruning.importance.GroupMagnitudeImportance()]
        if taylor:
            self._estimators.insert(0, torch_pruning.importance.GroupTaylorImportance())

    def __call__(self, group: Any) -> Tensor | None:
        for estimator in self._estimators:
            found: Tensor | None = _tried(partial(estimator, group))
            if found is not None and torch.isfinite(found).all():
                return found
        return None


def _rounded(wanted: int, width: int, limit: float, granule: int, blocks: int = 1) -> int:
    """The width that stays: a multiple of the granule near `wanted`, within the limit, the same in every block.

    Each block keeps two channels at least: a grouped layer with one would count as depthwise.
    """
    while granule > 1 and width < 2 * math.lcm(granule, blocks):
        granule //= 2
    whole = math.lcm(granule, blocks)
    fewest = max(1 if blocks == 1 else 2 * blocks, math.ceil(width * (1 - limit) - 1e-9))
    least = math.ceil(fewest / whole) * whole
    return min(width, max(least, whole * round(wanted / whole)))


def _ratio_for(
    network: nn.Module, example: Inputs, step: Prune, kept: Mapping[str, str], taylor: bool, target: float, name: str
) -> float:
    """The smallest ratio, found on copies, that leaves `target` parameters or fewer."""
    low, high = 0.0, step.limit
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        gradients = [parameter.grad for parameter in network.parameters()]
        trial = _copied(network, example, name)
        for parameter, gradient in zip(trial.parameters(), gradients, strict=True):
            parameter.grad = gradient
        _cut(trial, example, middle, step, kept, taylor)
        low, high = (low, middle) if _parameters(trial) <= target else (middle, high)
    return high


def _parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())

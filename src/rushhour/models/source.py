"""How a network is named, and built from its name: a name in a file must never be able to run any code."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

import msgspec
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from rushhour.bundle import Preprocessing, Reshape, Source, Table
from rushhour.errors import ModelError, RushhourError
from rushhour.models.reshape import reshape, reshape_of
from rushhour.system.working_folder import same_working_folder
from rushhour.task import Task

_ROOM = "rushhour.models"
_NAMES = ("article", "residual", "signal", "kernels", "mlp", "tabular", "deepfm", "unet", "detector", "tagger")
_OF_TABLES = ("tabular", "deepfm")
_BUILT_IN = ("minilm", "text_classifier", "converted")
"""Networks of this package that nobody trains from scratch: a pretrained one, and what an ONNX graph became."""
_SPATIAL = {"unet": "a class for each pixel", "detector": "boxes", "tagger": "a class for each token"}
"""What the networks give that answer for places."""
_CLASSES = ("classes", "num_classes", "outputs")
_ANY = (inspect.Parameter.empty, Any, "Any")
_NUMBER = (int, "int")
_NO_SHAPE = (str, "str", bool, "bool", float, "float")

Argument = int | float | str | bool | tuple[int, ...]


def source_for(
    model: str,
    dataset_shape: tuple[int, ...],
    task: Task,
    preprocessing: Preprocessing | None = None,
    inputs: Mapping[str, tuple[int, ...]] | None = None,
) -> Source:
    """The source of a model that a user named, with arguments that fit the data.

    A factory of the user's own gets these arguments, if it has parameters for them: `classes`, `num_classes` or
    `outputs`, the length of the answer; `input`, the shape of one sample as the network gets it, `(channels, height,
    width)` for pictures; of several inputs the shape of each by its name; and of a table `sizes`, of each column the
    rows of an embedding table, 0 for a number.

    Args:
        model: `article`, `residual`, `signal`, `kernels`, `mlp`, `tabular`, `deepfm`, `unet`, `detector`, `tagger`, or
            `module:factory`.
        dataset_shape: of one sample on the wire, `(height, width, channels)` for pictures.
        task: decides the length of the answer.
        preprocessing: of the data, which says whether samples are pictures; by default they are if they have three
            dimensions.
        inputs: the shape of each of several inputs on the wire, as the network gets it; empty where there is one.

    Raises:
        ModelError: if the name is unknown, or that network cannot take samples of this shape.
    """
    table = None if preprocessing is None else preprocessing.table
    sizes = table.sizes if isinstance(table, Table) else ()
    is_picture = len(dataset_shape) == 3 and (preprocessing is None or preprocessing.layout == "NHWC->NCHW")
    if ":" in model:
        seen = (dataset_shape[2], *dataset_shape[:2]) if is_picture else dataset_shape
        return Source(model, _arguments(model, inputs or {"input": seen}, task, sizes))
    if model not in _NAMES:
        raise ModelError(
            f"there is no model {model!r}",
            f"the models of Rushhour are {', '.join(_NAMES)}",
            f"use one of them, or your own as module:factory{_meant(model)}",
        )
    factory = f"{_ROOM}:{model}"
    if inputs:
        raise ModelError(
            f"the model {model} takes one input",
            f"a sample has {len(inputs)}: {', '.join(inputs)}",
            "name a network of your own, module:factory, whose forward takes a tensor for each; or join them into x",
        )
    _check_task(model, task)
    if model in _OF_TABLES and len(dataset_shape) == 1:
        return Source(factory, {"sizes": sizes or (0,) * dataset_shape[0], "outputs": task.outputs})
    if model == "tagger" and not is_picture and len(dataset_shape) in (1, 2):
        return Source(factory, {"channels": (*dataset_shape, 0)[1], "classes": task.outputs})
    if model == "mlp" and any(sizes):
        raise ModelError(
            "the model mlp cannot take categories",
            f"it takes numbers alone, and {sum(map(bool, sizes))} columns are categories",
            "use tabular or deepfm",
        )
    if model in _OF_TABLES:
        raise ModelError(
            f"the model {model} cannot take samples of shape {dataset_shape}",
            "it needs the columns of a table",
            "use mlp, or residual for pictures",
        )
    if model == "mlp":
        return Source(factory, {"inputs": math.prod(dataset_shape), "outputs": task.outputs})
    if model in ("signal", "kernels"):
        if is_picture or len(dataset_shape) not in (1, 2):
            raise ModelError(
                f"the model {model} cannot take samples of shape {dataset_shape}",
                "it needs signals of shape (length,) or (length, channels)",
                "use residual for pictures, or mlp",
            )
        length, channels = (*dataset_shape, 1)[:2]
        return Source(factory, {"length": length, "channels": channels, "outputs": task.outputs})
    if not is_picture:
        raise ModelError(
            f"the model {model} cannot take samples of shape {dataset_shape}",
            "it needs pictures of shape (height, width, channels)",
            "give them a dimension of channels, for example x[..., None]"
            if len(dataset_shape) == 2
            else "use mlp, or your own model as module:factory",
        )
    height, width, channels = dataset_shape
    if model == "article" and height != width:
        raise ModelError(
            f"the model article cannot take pictures of {height}x{width}",
            "its dense layer needs a square picture",
            "use residual, or make the pictures square with --size",
        )
    if model == "detector":
        return Source(factory, {"channels": channels, "classes": task.outputs})
    return Source(factory, {"input_size": max(height, width), "channels": channels, "classes": task.outputs})


def _check_task(model: str, task: Task) -> None:
    """Raise unless the answers of a reference network are of the sort that the task needs."""
    spatial = task.spatial
    wanted = None if spatial is None else spatial.network
    if model != wanted and (wanted is not None or model in _SPATIAL):
        raise ModelError(
            f"the model {model} does not answer for the task {task.kind}",
            f"it gives {_SPATIAL.get(model, 'one answer for the whole sample')}",
            f"use {wanted or 'residual'}, or your own model as module:factory",
        )


def _meant(model: str) -> str:
    """What a file or a dotted name would be as `module:factory`, as a remedy; empty where that is not known."""
    module, _, name = model.partition(":")
    if module.endswith(".py"):
        module = module.removesuffix(".py").removeprefix("./").replace("/", ".")
    elif not name and "/" not in module:
        module, _, name = module.rpartition(".")
    else:
        return ""
    return f": {module}:{name or 'FACTORY'}" if module else ""


def _arguments(
    model: str, shapes: Mapping[str, tuple[int, ...]], task: Task, sizes: tuple[int, ...]
) -> dict[str, Argument]:
    """The arguments that the data decides and the user's factory takes; none where its signature is not known.

    Args:
        shapes: `input`, or each of several inputs by name -> its shape.
    """
    module_name, _, name = model.partition(":")
    try:
        with _undisturbed():
            parameters = inspect.signature(getattr(importlib.import_module(module_name), name)).parameters
    except (Exception, SystemExit):  # then `build` raises
        return {}
    takes = {
        each.name: each.annotation
        for each in parameters.values()
        if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)
    }
    arguments: dict[str, Argument] = {
        each: task.outputs for each in _CLASSES if each in takes and takes[each] in (*_ANY, *_NUMBER)
    }
    if sizes and "sizes" in takes and takes["sizes"] not in (*_NUMBER, *_NO_SHAPE):
        arguments["sizes"] = sizes
    for name, shape in shapes.items():
        if name in takes and takes[name] in _NUMBER:
            arguments |= {name: shape[0]} if len(shape) == 1 else {}
        elif name in takes and takes[name] not in _NO_SHAPE:
            arguments[name] = shape
    return arguments


def build(source: Source, trusted: tuple[str, ...] = ()) -> nn.Module:
    """The network that `source` names, with fresh weights; a compressed one with its layers split and narrowed.

    A bundle alone can name only the reference networks of this package; any other factory must be in `trusted`, which
    comes from the person at the machine.

    Args:
        source: the factory and its arguments.
        trusted: factories (`module:factory`) that may be imported besides.

    Raises:
        ModelError: if the factory is not trusted, does not exist, does not take the arguments, or fails, or if it
            returns no module, or one that the recorded sizes do not fit.
    """
    factory = factory_of(source, trusted)
    try:
        inspect.signature(factory).bind(**source.arguments)
    except TypeError as error:
        raise ModelError(
            f"cannot build the model {source.factory!r}",
            f"its arguments do not fit: {error}",
            f"it takes {inspect.signature(factory)}",
        ) from error
    try:
        with _undisturbed():
            network = factory(**source.arguments)
    except RushhourError:
        raise
    except (Exception, SystemExit) as error:
        raise ModelError(
            f"cannot build the model {source.factory!r}",
            f"{type(error).__name__}: {error}",
            "correct the factory or its arguments",
        ) from error
    if not isinstance(network, nn.Module):
        raise ModelError(
            f"cannot use the model {source.factory!r}",
            f"it returned a {type(network).__name__}, not a torch.nn.Module",
            "name a callable that returns a torch.nn.Module",
        )
    network = plain_network(network)
    _check_kind(network, source.factory)
    make_contiguous(network)
    if isinstance(source.reshape, Reshape):
        reshape(network, source.reshape, source.factory)
    return network


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Restore what a user's code may have changed for the whole process: the working folder, and torch's switches."""
    gradients, dtype, device = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_default_device()
    try:
        with same_working_folder():
            yield
    finally:
        torch.set_grad_enabled(gradients)
        torch.set_default_dtype(dtype)
        if torch.get_default_device() != device:
            torch.set_default_device(device)


def plain_network(network: nn.Module) -> nn.Module:
    """A network without wrappers that change where or how it runs, and not what it computes.

    `torch.compile` would compile each copy of it again, for each number of samples and both modes: minutes.
    """
    while (inner := _wrapped(network)) is not None:
        network = inner
    for module in list(network.modules()):
        if module._compiled_call_impl is not None:  # by `module.compile()`
            module._compiled_call_impl = None
        for name, child in list(module.named_children()):
            if _wrapped(child) is not None:
                setattr(module, name, plain_network(child))
    return network


def forward_names(network: nn.Module) -> tuple[str, ...]:
    """The names of the arguments that a network takes by their place; none where they are not known."""
    try:
        parameters = inspect.signature(network.forward).parameters.values()
    except (TypeError, ValueError):
        return ()
    return tuple(each.name for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD))


def _wrapped(module: nn.Module) -> nn.Module | None:
    """The module inside of one that `torch.compile` or `DataParallel` returned; None where it is neither."""
    inner = getattr(module, "_orig_mod", None) if type(module).__name__ == "OptimizedModule" else None
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        inner = module.module
    return inner if isinstance(inner, nn.Module) else None


def _check_kind(network: nn.Module, factory: str) -> None:
    """Raise unless the network is a fresh Python module with float32 weights in memory.

    Raises:
        ModelError: if it is not.
    """
    why, fix = "", ""
    there = [each for each in (*network.parameters(), *network.buffers()) if not is_lazy(each)]
    floats = {each.dtype for each in there if isinstance(each, nn.Parameter) and each.is_floating_point()}
    if any(isinstance(module, torch.jit.ScriptModule) for module in network.modules()):
        why = "it is TorchScript, in whole or in part, which cannot be exported with a free number of samples"
        fix = "return the Python module that it was made from"
    elif any(tensor.is_meta for tensor in there):
        why = "its weights have no values: they are on torch's meta device"
        fix = "create it on the CPU, or call .to_empty(device='cpu') and initialise it"
    elif floats and torch.float32 not in floats:
        why = f"its weights are {' and '.join(sorted(str(each).removeprefix('torch.') for each in floats))}"
        fix = "end the factory with .float(): networks are trained from float32 weights"
    elif network in _BUILT:
        why = "it returned the same network twice, and each training starts from a new one"
        fix = "create the network inside the factory"
    if why:
        raise ModelError(f"cannot use the model {factory!r}", why, fix)
    _BUILT.add(network)


_BUILT: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Every network that `build` returned, to notice a factory that returns one object again."""


def factory_of(source: Source, trusted: tuple[str, ...] = ()) -> Callable[..., Any]:
    """What builds the network that `source` names; see `build`.

    Raises:
        ModelError: if it is not trusted, or does not exist.
    """
    module_name, _, name = source.factory.partition(":")
    ours = module_name == _ROOM and name in (*_NAMES, *_BUILT_IN)
    if not ours and source.factory not in trusted:
        raise ModelError(
            f"will not import the model {source.factory!r}",
            "it is not a model of Rushhour, and importing it would run its code",
            f"if you trust it, use --trust {source.factory}",
        )
    if not (module_name and name):
        raise ModelError(
            f"cannot read the model {source.factory!r}", "a model is module:factory", "write for example nets:small"
        )
    try:
        with _undisturbed():
            module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # a module can fail to import in any way
        raise ModelError(
            f"cannot import the model {source.factory!r}",
            f"{type(error).__name__}: {error}",
            f"check the name, and that its folder is on PYTHONPATH{_meant(source.factory)}"
            if isinstance(error, Exception)
            else "its code ends the process: put that under `if __name__ == '__main__':`",
        ) from error
    factory: Callable[..., Any] | None = getattr(module, name, None)
    if isinstance(factory, nn.Module):
        raise ModelError(
            f"cannot build the model {source.factory!r}",
            "it is a network, not a function or class that creates one, and each training starts from a new one",
            f"name its class ({type(factory).__name__}), or write a function that creates and returns it",
        )
    if not callable(factory):
        raise ModelError(
            f"there is no model {source.factory!r}",
            f"the module {module_name!r}{_place(module)} has no function or class {name!r}",
            "name a callable that returns a torch.nn.Module",
        )
    return factory


def _place(module: ModuleType) -> str:
    file = getattr(module, "__file__", None)
    return f" ({file})" if file else ""


def make_contiguous(network: nn.Module) -> None:
    """Copy tensors that are transposed or expanded views: those cannot be written to."""
    for tensor in (*network.parameters(), *network.buffers()):
        if not is_lazy(tensor) and tensor.layout == torch.strided and not tensor.is_contiguous():
            tensor.data = tensor.detach().clone(memory_format=torch.contiguous_format)


def resized(
    source: Source, network: nn.Module, ranks: Mapping[str, int] | None = None, trusted: tuple[str, ...] = ()
) -> Source:
    """`source` so that `build` gives a network of the sizes that `network` has now.

    Args:
        source: what `network` was built from, before it was pruned or split.
        network: narrower than that in any of its layers.
        ranks: dense layers that were split since, in that order; see `Reshape`.
        trusted: as for `build`.

    Raises:
        ModelError: if the network differs from its factory's in more than that.
    """
    before = source.reshape.ranks if isinstance(source.reshape, Reshape) else {}
    fresh = build(msgspec.structs.replace(source, reshape=msgspec.UNSET), trusted)
    change = reshape_of(fresh, network, {**before, **(ranks or {})}, source.factory)
    return msgspec.structs.replace(source, reshape=change if change != Reshape() else msgspec.UNSET)

"""Inspects copies of a network before training: what would fail after hours, or silently, is reported at once.

A user's network may mix the samples of a batch, have another output in training, need more than one sample, or not be
exportable. A few samples show all that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rushhour.bundle import TensorSpec, columns_of
from rushhour.data.dataset import Dataset
from rushhour.errors import ModelError, RushhourError
from rushhour.models import Deployed, tensors_of
from rushhour.models.batch_dependence import batch_dependence, largest_gap
from rushhour.models.deployed import Meaning, main_output, named_outputs, try_export
from rushhour.models.failure import why_failed
from rushhour.train.loss import loss_for
from rushhour.train.memory_format import MemoryFormat, guard
from rushhour.train.settings import TrainSettings

_SAMPLES = 5
"""Samples that the network is given, alone and in one batch."""
_TRIED = 3
"""Samples of a trial step."""
_LOOSE, _STRICT = 1e-3, 1e-5
"""Largest difference of outputs in float32 and in float64, as a share of the largest: more than rounding."""
_SAME = 1e-4
"""Largest difference of the outputs of two equal networks, as a share of the largest."""
_NOISE = 0.1
"""Of the weights, relative to their size, in the check in float64."""
_LARGEST_BYTES = 500_000_000
"""Of a network that is checked in float64 too."""
_NAMED = 3
"""Modules, buffers or outputs that a message names, at most."""

_BATCH_NORM = nn.modules.batchnorm._BatchNorm
_INSTANCE_NORM = nn.modules.instancenorm._InstanceNorm


class Inspected(msgspec.Struct, frozen=True):
    """The result of an inspection.

    Attributes:
        meaning: of the network's outputs.
        notes: for the user, a line each.
    """

    meaning: Meaning
    notes: tuple[str, ...] = ()


class Steps(msgspec.Struct, frozen=True):
    """How a training divides its batches.

    Attributes:
        batch: samples in a step.
        parts: in which each worker's samples pass through the network.
        workers: that share a batch.
        whole_batch_norm: batch normalisation sees the samples of all workers.
    """

    batch: int
    parts: int = 1
    workers: int = 1
    whole_batch_norm: bool = True

    @property
    def fewest(self) -> int:
        """The fewest samples that pass through the network at once."""
        return max(1, self.batch // self.workers // self.parts)


def inspect(
    make: Callable[[bool], Deployed],
    dataset: Dataset,
    sample: tuple[TensorSpec, ...],
    settings: TrainSettings,
    steps: Steps,
    *,
    name: str,
    export: bool,
) -> Inspected:
    """Inspect copies of a network.

    Args:
        make: builds the network again, as its factory leaves it; called with true, by other random numbers.
        dataset: some samples of its training part pass through the network.
        sample: one of them, on the wire: each input.
        settings: of the training, resolved.
        steps: how it divides its batches.
        name: of the network, for messages.
        export: try the export too, which takes seconds.

    Raises:
        TaskError: if the network's output does not fit the task.
        ModelError: if the network cannot be trained, served or exported.
    """
    deployed = make(False)
    network = deployed.network
    _check_state(network, name)
    notes = _on_modes(network)
    places = np.linspace(0, len(dataset.train) - 1, min(_SAMPLES, len(dataset.train))).astype(int)
    some: NDArray[Any] = np.ascontiguousarray(dataset.train.inputs[places])
    deployed.settle(some, name)
    dataset.task.check_output(deployed.answer_shape(some, name), name, sample[0].shape)
    _check_finite(deployed, some, name)
    _check_batch_dependence(lambda columns: _answers(deployed, columns), some, _LOOSE, network, name)
    with (guard(deployed, some) or MemoryFormat(channels_last=False)).active():
        notes += _on_training(deployed, dataset, settings, steps, name)
    if sum(parameter.numel() * parameter.element_size() for parameter in network.parameters()) <= _LARGEST_BYTES:
        _check_built_again(deployed, make, some, name)
        _check_in_float64(deployed, some, name)
    if export:
        try_export(make(False), name, sample, some, dataset.task)
    by_meaning = {
        "probabilities": "it ends in a softmax: its outputs are taken as probabilities, and no second softmax is added",
        "chances": "it ends in a sigmoid, which is inverted: a softmax over the classes replaces it",
    }
    if dataset.task.head == "sigmoid":
        by_meaning["chances"] = "it ends in a sigmoid: its outputs are taken as chances, and no second one is added"
    first = [by_meaning[deployed.meaning]] if deployed.meaning in by_meaning else []
    return Inspected(deployed.meaning, (*first, *notes))


def _check_state(network: nn.Module, name: str) -> None:
    """Raise unless there are parameters to learn, and the whole state can be stored."""
    if not any(parameter.requires_grad for parameter in network.parameters()):
        frozen = sum(1 for _ in network.parameters())
        raise ModelError(
            f"cannot train {name}",
            f"all of its {frozen} parameters are frozen (requires_grad is False)" if frozen else "it has no parameters",
            "give the model parameters to learn",
        )
    for key, value in network.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_quantized:
            kind = f"a {value.layout} tensor" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise ModelError(
                f"cannot train {name}",
                f"its state holds {key}, {kind}, and a bundle stores plain dense tensors only",
                "keep it as a dense buffer, or out of the state (persistent=False)",
            )
        if value.is_complex() and isinstance(value, nn.Parameter):
            raise ModelError(
                f"cannot train {name}",
                f"its parameter {key} is complex, and parameters are real numbers",
                "keep its real and imaginary part as one parameter, and use torch.view_as_complex in forward",
            )


def _check_finite(deployed: Deployed, some: NDArray[Any], name: str) -> None:
    """Raise if the network's answers are not numbers before it is trained. -inf can be the logit of a class."""
    answers = _answers(deployed, columns_of(some))
    allowed = answers == -np.inf if isinstance(deployed.head, nn.Softmax) else False
    if (np.isfinite(answers) | allowed).all():
        return
    raise ModelError(
        f"cannot train {name}",
        f"its answers are NaN or infinite before the first step{_first_nonfinite(deployed, some)}",
        "check it for logarithms and roots of negative numbers, divisions by zero, and its initial weights",
    )


def _first_nonfinite(deployed: Deployed, some: NDArray[Any]) -> str:
    """The first parameter, buffer or output of a module that is not finite, as text; empty where none is."""
    network = deployed.network
    for key, value in (*network.named_parameters(), *network.named_buffers()):
        if not bool(value.isfinite().all()):
            return f", as {key} is"
    found: list[str] = []

    def watch(path: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, _: Any, output: Any) -> None:
            if path and isinstance(output, Tensor) and not bool(output.isfinite().all()):
                found.append(f"; the first are those of {type(module).__name__} {path!r}")

        return hook

    handles = [module.register_forward_hook(watch(path)) for path, module in network.named_modules()]
    try:
        _answers(deployed, columns_of(some))
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else ""


def _check_built_again(deployed: Deployed, make: Callable[[bool], Deployed], some: NDArray[Any], name: str) -> None:
    """Raise unless another network of the factory answers alike with the same state: it is sealed and resumed so."""
    with torch.random.fork_rng(devices=[]):
        again = make(True)
    again.settle(some, name)
    fix = "keep random choices and all layers in its state: register_buffer, nn.Parameter, nn.ModuleList"
    try:
        again.network.load_state_dict(deployed.network.state_dict())
    except RuntimeError as error:
        raise ModelError(
            f"cannot train {name}", f"its factory returns networks of different parameters: {why_failed(error)}", fix
        ) from error
    expected, answers = (_answers(each, columns_of(some)) for each in (deployed, again))
    scale = float(np.abs(expected[np.isfinite(expected)]).max(initial=0))
    if expected.shape == answers.shape and largest_gap(expected, answers) <= _SAME * scale:
        return
    raise ModelError(
        f"cannot train {name}",
        "a second network of its factory gives other answers with the same weights"
        f"{_out_of_state(deployed.network, again.network)}, so a bundle would not be the network that was trained",
        fix,
    )


def _out_of_state(one: nn.Module, other: nn.Module) -> str:
    """Tensors and layers that are no part of a network's state, as text; empty where none is found."""
    kept, twin = one.state_dict().keys(), dict(other.named_modules())
    buffers = dict(other.named_buffers())
    found = [
        key
        for key, buffer in one.named_buffers()
        if key not in kept and not (key in buffers and torch.equal(buffer, buffers[key]))
    ]
    for path, module in one.named_modules():
        for key, value in vars(module).items():
            where = f"{path}.{key}".removeprefix(".")
            theirs = getattr(twin.get(path), key, None)
            if isinstance(value, Tensor) and isinstance(theirs, Tensor):
                found += [] if value.shape == theirs.shape and torch.equal(value, theirs) else [where]
            items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
            if not key.startswith("_") and any(isinstance(each, nn.Module) for each in items):
                found.append(f"{where} (a {type(value).__name__} of layers)")
    return f": {_listed(found)} is no part of its state" if found else ""


def _check_batch_dependence(
    predict: Callable[[Sequence[NDArray[Any]]], NDArray[Any]],
    some: NDArray[Any],
    tolerance: float,
    network: nn.Module,
    name: str,
) -> None:
    try:
        dependence = batch_dependence(predict, columns_of(some), tolerance)
    except RushhourError:
        raise
    except Exception as error:  # a user's network may fail in any way
        raise ModelError(
            f"cannot train {name}",
            f"it answers {min(2, len(some))} samples but not other numbers of them: {why_failed(error)}",
            "make it take any number of samples, one included: squeeze, view and reshape with explicit dimensions",
        ) from error
    if dependence is None:
        return
    if "shape" in dependence:
        fix = "give squeeze, view and reshape explicit dimensions: a request may hold a single sample"
    elif "call to call" in dependence:
        fix = "draw random numbers and change buffers only while self.training is true (F.dropout takes it)"
    else:
        fix = (
            _mixing_layer(network)
            or "remove operations that mix samples: a mean, maximum, softmax or sum over dimension 0"
        )
    raise ModelError(f"cannot train {name}", dependence, fix)


def _mixing_layer(network: nn.Module) -> str:
    """The remedy for a layer that is known to mix samples; empty where there is none."""
    for path, module in network.named_modules():
        kind = f"{type(module).__name__} {path!r}"
        layer = getattr(module, "self_attn", module)  # of a transformer's layer
        if getattr(layer, "batch_first", True) is False:
            return f"set batch_first=True in {kind}: it takes the first dimension as time"
        if isinstance(module, _BATCH_NORM) and module.running_mean is None:
            return f"{kind} keeps no running statistics: set track_running_stats=True"
    return ""


def _check_in_float64(deployed: Deployed, some: NDArray[Any], name: str) -> None:
    """Check in float64, with noise in the weights: layers that begin at zero hide mixing. Changes the network."""
    network = deployed.network
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.is_floating_point() or not parameter.numel():
                continue
            size = float(parameter.float().square().mean().sqrt())
            scale = _NOISE * (size if size > _NOISE**2 else 1.0)
            parameter.add_((scale * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype))
    deployed.eval()
    for dtype, tolerance in ((torch.float64, _STRICT), (torch.float32, _LOOSE)):
        try:
            network.to(dtype)
            answers = _answers(deployed, columns_of(some), dtype)
        except Exception:  # its code works in one precision only
            continue
        if np.isfinite(answers).all():
            _check_batch_dependence(lambda columns: _answers(deployed, columns, dtype), some, tolerance, network, name)  # noqa: B023
            return


def _answers(
    deployed: Deployed, columns: Sequence[NDArray[Any]], dtype: torch.dtype = torch.float32
) -> NDArray[np.float64]:
    """The network's main output in evaluation mode."""
    deployed.eval()
    with torch.no_grad():
        inputs = deployed.prepared(*(torch.from_numpy(np.array(column)) for column in columns))
        raw = deployed.network(*(each.to(dtype) if each.is_floating_point() else each for each in inputs))
        return np.asarray(main_output(raw, deployed.outputs).double().numpy())


def _on_training(
    deployed: Deployed, dataset: Dataset, settings: TrainSettings, steps: Steps, name: str
) -> tuple[str, ...]:
    """Notes on two steps with a few samples, and one with a single sample if the training has such."""
    network, rows = deployed.network, min(_TRIED, len(dataset.train))
    before = {key: buffer.clone() for key, buffer in network.named_buffers()}
    main, names = _step(deployed, dataset, settings, rows, name)
    _step(deployed, dataset, settings, rows, name)
    changed = [
        key
        for key, buffer in network.named_buffers()
        if key in before and not (buffer.shape == before[key].shape and torch.equal(buffer, before[key]))
    ]
    if steps.fewest == 1:
        _check_single(deployed, dataset, settings, steps, name)
    notes = []
    if len(names) > 1:
        notes.append(f"it gives {len(names)} outputs ({_listed(names)}): {main} is trained, the others are not used")
    kept = network.state_dict(keep_vars=True)
    if lost := [key for key in changed if key not in kept]:
        notes.append(f"training changes {_listed(lost)}, which is not stored (persistent=False): resuming resets it")
    norms = [module for module in network.modules() if isinstance(module, _BATCH_NORM) and module.training]
    if steps.parts > 1 and norms:
        notes.append(
            f"batch normalisation sees {steps.batch // steps.parts} samples at a time (batch {steps.batch} in "
            f"{steps.parts} parts)"
        )
    if steps.workers > 1 or steps.parts > 1:
        notes += _on_sharing(deployed, dataset, changed, rows, steps)
    return tuple(notes)


def _on_sharing(deployed: Deployed, dataset: Dataset, changed: list[str], rows: int, steps: Steps) -> list[str]:
    """Notes on how a divided step differs from a whole one."""
    notes, network = [], deployed.network
    modules = dict(network.named_modules())
    own = [key for key in changed if not isinstance(modules[key.rpartition(".")[0]], _BATCH_NORM | _INSTANCE_NORM)]
    if own and steps.workers > 1:
        notes.append(
            f"training changes {_listed(own)}: after each step the mean over {steps.workers} workers is taken, "
            "which is exact for means over samples, but not for counts or maxima"
        )
    inputs = tensors_of(dataset.train.inputs[:rows])
    with _plain(deployed), torch.no_grad():
        state = torch.get_rng_state()
        whole = deployed.logits(*inputs)
        draws = not torch.equal(state, torch.get_rng_state())
        if draws:
            if steps.workers > 1:
                notes.append("it draws random numbers outside nn.Dropout: each worker draws its own")
            return notes
        try:
            cut = torch.cat([deployed.logits(*(each[row : row + 1] for each in inputs)) for row in range(rows)])
        except Exception:  # it takes no single sample in training: whether it must is checked elsewhere
            return notes
        scale = float(whole.abs().max())
        if cut.shape != whole.shape or not bool(((whole - cut).abs() <= _LOOSE * scale).all()):
            notes.append("it mixes samples in training: a divided step gives other results than a whole one")
    return notes


@contextlib.contextmanager
def _plain(deployed: Deployed) -> Iterator[None]:
    """Training mode, except for layers that compute the same however a batch is divided."""
    deployed.train()
    exact = [one for one in deployed.network.modules() if isinstance(one, _BATCH_NORM) or type(one) is nn.Dropout]
    before = [(one, one.training) for one in exact]
    for one in exact:
        one.training = False
    try:
        yield
    finally:
        for one, mode in before:
            one.training = mode


def _step(
    deployed: Deployed, dataset: Dataset, settings: TrainSettings, rows: int, name: str
) -> tuple[str, tuple[str, ...]]:
    """Forward and backward in training mode; the names of the network's main output and of all."""
    try:
        deployed.train()
        return _try_step(deployed, dataset, rows, bf16=bool(settings.bf16))
    except RushhourError:
        raise
    except Exception as error:  # a user's network may fail in any way
        fix = "make it run in training mode, forward and backward, twice"
        if "does not require grad" in str(error):
            fix = "let its answer depend on its parameters: no detach, no_grad, argmax or numpy on the way"
        elif settings.bf16:
            with contextlib.suppress(Exception):
                _try_step(deployed, dataset, rows, bf16=False)
                fix = "it runs in float32: use --no-bf16"
        raise ModelError(f"cannot train {name}", f"its first step fails: {why_failed(error)}", fix) from error


def _try_step(deployed: Deployed, dataset: Dataset, rows: int, *, bf16: bool) -> tuple[str, tuple[str, ...]]:
    inputs = tensors_of(dataset.train.inputs[:rows])
    targets = torch.from_numpy(np.array(dataset.train.targets[:rows]))
    deployed.zero_grad()
    with torch.enable_grad():
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            raw = deployed.network(*deployed.prepared(*inputs))
            out = deployed.as_logits(raw)
        wanted = (rows, *dataset.task.raw_shape(dataset.sample_shape))
        if tuple(out.shape) != wanted:
            raise ModelError(
                "the network has another output in training",
                f"for {rows} sample{'' if rows == 1 else 's'} it gives {_described(raw)}, and {wanted} is needed",
                "return that in training too, alone or among other outputs",
            )
        loss_for(dataset.task)(out, targets).backward()  # type: ignore[no-untyped-call]
    return named_outputs(raw, deployed.outputs)


def _check_single(deployed: Deployed, dataset: Dataset, settings: TrainSettings, steps: Steps, name: str) -> None:
    """Raise unless a single sample can be trained on."""
    deployed.train()
    if steps.workers > 1 and steps.whole_batch_norm:  # it sees those of all workers
        for module in deployed.network.modules():
            if isinstance(module, _BATCH_NORM):
                module.training = False
    try:
        _try_step(deployed, dataset, 1, bf16=bool(settings.bf16))
    except Exception as error:  # a user's network may fail in any way
        cut = f"a batch of {steps.batch}"
        cut += f" in {steps.parts} parts" if steps.parts > 1 else ""
        cut += f" on {steps.workers} workers" if steps.workers > 1 else ""
        raise ModelError(
            f"cannot train {name} on one sample at a time",
            f"{cut} leads to that, and the network fails: {why_failed(error)}",
            "use a larger --batch" + (", or fewer parts (--accumulate)" if steps.parts > 1 else ""),
        ) from error


def _on_modes(network: nn.Module) -> tuple[str, ...]:
    """Notes on modules that the factory left in evaluation mode."""
    if not network.training and not any(module.training for module in network.modules()):
        return (
            "its factory leaves it in evaluation mode, and it is trained so: dropout is off, batch normalisation keeps "
            "its statistics; end the factory with .train() if that is not intended",
        )
    in_evaluation: list[str] = []
    for path, module in network.named_modules():
        inside = any(path.startswith(f"{other}.") for other in in_evaluation)
        if path and not module.training and not inside:
            in_evaluation.append(path)
    return (f"{_listed(in_evaluation)} stays in evaluation mode, as the factory left it",) if in_evaluation else ()


def _described(raw: Any) -> str:
    if isinstance(raw, Tensor):
        return f"shape {tuple(raw.shape)}"
    return f"a {type(raw).__name__} of {_listed(named_outputs(raw, 0)[1])}"


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_NAMED])
    return shown if len(names) <= _NAMED else f"{shown} and {len(names) - _NAMED} more"

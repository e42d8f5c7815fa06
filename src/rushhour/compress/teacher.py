"""The teacher of a distillation: what a bundle answers to samples of the training part.

Where nothing is augmented, every epoch, every rung and every student needs the same answers. They are computed once, on
a compiled engine, which is faster than the torch module, and kept in a file under the key of all that decides them.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rushhour.bundle import Bundle, columns_of
from rushhour.data.dataset import Dataset
from rushhour.engines import EngineConfig, Runner, open_engine
from rushhour.errors import ModelError
from rushhour.models import Deployed, load_deployed
from rushhour.plan import EngineName, Precision
from rushhour.progress import Progress
from rushhour.records import identity
from rushhour.system import machine
from rushhour.system.storage import write_whole
from rushhour.task import Task, are_chances, are_probabilities
from rushhour.train.memory_format import MemoryFormat

_LARGEST_BYTES: Final = 256_000_000
"""Of the answers to the whole training part that are kept."""
_ENGINES: Final[tuple[EngineName, ...]] = ("openvino", "onnxruntime")
_BATCH, _CHUNK = 128, 2048
"""Samples that an engine takes at once, and that are answered between two reports of progress."""
_PROBED: Final = 32
"""Samples whose outputs show whether a graph gives probabilities or logits."""
_COARSE: Final = 0.05
"""By which the sum of an int8 graph's probabilities may differ from 1."""
_TINY: Final = 1e-12
_EXTREME: Final = 1e-6
"""Chances are not taken to be nearer to 0 or 1: an int8 graph gives exactly these."""

Teacher = Callable[..., Tensor]
"""Samples, a tensor `(n, *shape)` for each input, as on the wire (a single one is float32 once augmented) -> logits or
values `(n, outputs)`, in float32."""


def sample_order(samples: int) -> NDArray[np.int64]:
    """A fixed random order of the samples of a training part: a share of it is the first of them."""
    return np.random.default_rng(0).permutation(samples)


def kept_answers(
    teacher: Bundle, dataset: Dataset, samples: int, *, folder: Path | None, progress: Progress
) -> Tensor | None:
    """The teacher's answers to the training part without augmentation, from a file or computed now.

    The file grows: answers that are in it are not computed again.

    Args:
        teacher: the bundle.
        dataset: with samples as it takes them (`Dataset.fitted_to`), whose training part is answered.
        samples: of `sample_order` that are needed, at least.
        folder: of the file; None to keep nothing.
        progress: receives what is computed.

    Returns:
        Logits or values of shape `(n, outputs)`, float32, NaN where nothing is needed; None where they are too many to
        be kept, no engine runs the graph, or an answer is not finite: the torch module may then be asked instead.

    Raises:
        StorageError: if the disk does not take the file.
    """
    n, outputs = len(dataset.train), dataset.task.outputs
    if dataset.task.spatial is not None:
        return None  # a head that chooses has no inverse
    if n * outputs * 4 > _LARGEST_BYTES:
        return None
    order, needed = sample_order(n), min(n, -(-samples // _BATCH) * _BATCH)
    file = None if folder is None else folder / f"{_key(teacher, dataset)[:24]}.npy"
    known = np.empty((0, outputs), np.float32) if file is None else _read(file, n, outputs)
    if len(known) < needed:
        found = _computed(teacher, dataset, order[len(known) : needed], progress)
        if found is None:
            return None
        known = np.concatenate([known, found])
        if file is not None:
            content = io.BytesIO()
            np.save(content, known, allow_pickle=False)
            write_whole(file, content.getvalue())
    answers = np.full((n, outputs), np.nan, np.float32)
    answers[order[: len(known)]] = known
    return _inverse(teacher.manifest.task, known[:_PROBED])(torch.from_numpy(answers))


def _key(teacher: Bundle, dataset: Dataset) -> str:
    return identity.key(
        teacher=teacher,
        data=dataset,
        precision=_precision(teacher),
        batch=_BATCH,
        versions={name: importlib.metadata.version(name) for name in ("numpy", *_ENGINES)},
        features=machine.describe().features,
    )


def _read(file: Path, n: int, outputs: int) -> NDArray[np.float32]:
    """The answers in the file, in the order of `sample_order`; none where there is none, or it is damaged."""
    with contextlib.suppress(OSError, ValueError, EOFError):
        known: NDArray[np.float32] = np.load(file, allow_pickle=False)
        whole = isinstance(known, np.ndarray) and known.dtype == np.float32 and known.shape[1:] == (outputs,)
        if whole and (len(known) == n or (len(known) < n and len(known) % _BATCH == 0)) and np.isfinite(known).all():
            return known
    return np.empty((0, outputs), np.float32)


def _precision(teacher: Bundle) -> Precision:
    """In which the graph answers: as the torch module would, in bfloat16 where the processor has it."""
    own = teacher.manifest.precision
    return "bf16" if own == "f32" and machine.describe().has_bf16 else own


def _computed(
    teacher: Bundle, dataset: Dataset, rows: NDArray[np.int64], progress: Progress
) -> NDArray[np.float32] | None:
    """What the graph gives for these samples of the training part; None where no engine gives it."""
    signature = teacher.manifest.signature
    names, output = [spec.name for spec in signature.inputs], signature.outputs[0].name
    for engine in _ENGINES:
        precision = _precision(teacher)
        if engine == "onnxruntime" and precision == "bf16":
            precision = "f32"
        config = EngineConfig(engine, precision, streams=machine.cores(), threads=1, max_batch=_BATCH)
        progress.start(f"answers of the teacher to {dataset.name}", len(rows))
        try:
            opened = open_engine(teacher, config)
            try:
                runner, parts = Runner(opened), []
                for at in range(0, len(rows), _CHUNK):
                    samples = np.ascontiguousarray(dataset.train.inputs[rows[at : at + _CHUNK]])
                    given = dict(zip(names, columns_of(samples), strict=True))
                    parts.append(np.asarray(runner.infer(given)[output], np.float32))
                    progress.advance(len(samples))
            finally:
                opened.close()
        except Exception as error:  # an engine may fail in any way on a user's graph; the torch module is left
            progress.done(f"{engine}: {' '.join(str(error).split())}", good=False)
            continue
        answers = np.concatenate(parts)
        if answers.shape != (len(rows), dataset.task.outputs) or not np.isfinite(answers).all():
            progress.done(f"{engine}: not all of them are numbers", good=False)
            continue
        progress.done(f"{engine} in {precision}")
        return answers
    return None


def _inverse(task: Task, outputs: NDArray[Any]) -> Callable[[Tensor], Tensor]:
    """What turns a graph's answers into logits: the inverse of the task's head, if they passed one.

    Log-probabilities are logits up to a constant, which softmax at any temperature ignores.

    Args:
        task: decides the head.
        outputs: some of the answers.
    """
    if task.head == "softmax" and are_probabilities(outputs, _COARSE):
        # a calibrated teacher's logits were divided by its temperature, and those of its student will be
        scale = task.temperature if isinstance(task.temperature, float) else 1.0
        return lambda answers: answers.clamp_min(_TINY).log() * scale
    if task.head == "sigmoid" and are_chances(outputs, _COARSE):
        return lambda answers: torch.logit(answers, eps=_EXTREME)
    return lambda answers: answers


@contextlib.contextmanager
def teaching(
    bundle: Bundle, dataset: Dataset, batch: int, trusted: tuple[str, ...], *, bf16: bool
) -> Iterator[Teacher]:
    """The teacher's answers to any samples, while the block runs: of its torch module, or of its graph."""
    module = _module(bundle, trusted)
    if module is not None:
        # oneDNN's fault is in gradients only, and `load_deployed` has tried channels-last pictures
        MemoryFormat(channels_last=not module.preprocess.contiguous).apply(module)

        def of_module(*inputs: Tensor) -> Tensor:
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                return module.logits(*inputs).float()

        yield of_module
        return
    if dataset.task.spatial is not None:
        raise ModelError(
            f"cannot learn from {bundle.manifest.name}",
            f"its graph gives the answers of {dataset.task.kind}, and a student learns from the numbers before them",
            "name a bundle that has its torch module, and trust its factory (--trust)",
        )
    specs, output = bundle.manifest.signature.inputs, bundle.manifest.signature.outputs[0].name
    precision = bundle.manifest.precision
    config = EngineConfig("onnxruntime", "int8" if precision == "int8" else "f32", 1, machine.cores(), batch)
    engine = open_engine(bundle, config)
    try:
        runner = Runner(engine)

        def infer(columns: Iterable[NDArray[Any]]) -> NDArray[Any]:
            given = {}
            for spec, samples in zip(specs, columns, strict=True):
                # augmented pictures: the graph takes whole pixels
                is_plain = samples.dtype == spec.dtype
                given[spec.name] = samples if is_plain else np.rint(samples).astype(spec.dtype)
            return np.asarray(runner.infer(given)[output], dtype=np.float32)

        first = columns_of(np.ascontiguousarray(dataset.train.inputs[: min(_PROBED, batch)]))
        inverse = _inverse(bundle.manifest.task, infer(first))

        def of_graph(*inputs: Tensor) -> Tensor:
            return inverse(torch.from_numpy(infer(each.numpy() for each in inputs)))

        yield of_graph
    finally:
        engine.close()


def _module(bundle: Bundle, trusted: tuple[str, ...]) -> Deployed | None:
    """The teacher in torch; None where it has no module, or its factory is not trusted: its graph gives the same."""
    if bundle.manifest.source is None or bundle.weights is None:
        return None
    try:
        return load_deployed(bundle, trusted)
    except ModelError:
        return None

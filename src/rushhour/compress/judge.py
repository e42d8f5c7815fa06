"""How good a bundle is: the compiled artefact's answers on held-out data, compared with the reference's."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from rushhour.bundle import Bundle
from rushhour.data.dataset import Split
from rushhour.engines import EngineConfig, Runner, open_engine
from rushhour.errors import DataError
from rushhour.measurement import Accuracy
from rushhour.task import Task


def outputs_of(bundle: Bundle, config: EngineConfig, split: Split, trusted: tuple[str, ...] = ()) -> NDArray[Any]:
    """The answers of `bundle`, compiled as `config` says, to all samples: shape `(n, outputs)`, in order.

    Args:
        trusted: for the torch engine; see `open_engine`.

    Raises:
        DataError: if the samples do not fit the bundle's signature.
        EngineError: if the engine cannot do exactly what `config` says.
    """
    check_fits(bundle, split.inputs)
    engine = open_engine(bundle, config, trusted=trusted)
    try:
        answers = Runner(engine).infer({bundle.manifest.signature.inputs[0].name: split.inputs})
    finally:
        engine.close()
    return answers[bundle.manifest.signature.outputs[0].name]


def judge(
    task: Task,
    split_name: str,
    targets: NDArray[Any],
    outputs: NDArray[Any],
    reference_outputs: NDArray[Any] | None,
) -> Accuracy:
    """The task's metric of `outputs`, and how far it fell below the reference on the same samples.

    Args:
        split_name: which part of the data: `validation`, `test`.
        targets: what was right, as in `Split`.
        outputs: of the artefact that is judged, `(n, outputs)`.
        reference_outputs: of the reference on the same samples; None if this is the reference.
    """
    value, interval = task.evaluate(outputs, targets)
    accuracy = Accuracy(metric=task.metric, value=value, interval=interval, n=len(targets), split=split_name)
    if reference_outputs is None:
        return accuracy
    drop, drop_interval = task.compare(reference_outputs, outputs, targets)
    return Accuracy(
        metric=task.metric,
        value=value,
        interval=interval,
        n=len(targets),
        split=split_name,
        drop=drop,
        drop_interval=drop_interval,
    )


def check_fits(bundle: Bundle, inputs: NDArray[Any]) -> None:
    """Raise unless `inputs` are samples that the bundle takes: one wrong dimension would be broadcast in silence.

    Raises:
        DataError: if their shape or type differs from the signature's.
    """
    if len(bundle.manifest.signature.inputs) != 1:
        raise DataError(
            f"cannot run data through {bundle.manifest.name}",
            f"it has {len(bundle.manifest.signature.inputs)} inputs, and a data set gives one",
            "use a model with one input",
        )
    (spec,) = bundle.manifest.signature.inputs
    if inputs.shape[1:] != spec.shape or inputs.dtype != spec.dtype:
        raise DataError(
            f"the data does not fit the model {bundle.manifest.name}",
            f"it takes samples of {spec.dtype}{spec.shape}, but these are {inputs.dtype}{inputs.shape[1:]}",
            "give the data that the model was made for",
        )

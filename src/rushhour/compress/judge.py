"""The accuracy of a bundle: the compiled graph's answers on held-out data, compared with the reference's."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from rushhour.bundle import Bundle, Signature, cut, own_sizes
from rushhour.data.dataset import Split
from rushhour.engines import EngineConfig, Runner, open_engine
from rushhour.errors import DataError, ModelError
from rushhour.goal import AccuracyBudget
from rushhour.measurement import Accuracy
from rushhour.task import Task, Z

_ROUNDING: Final = 1e-4
"""Share of the answers' range that two engines' float32 results may differ by."""
_STEP: Final = 8
"""Lengths are rounded up to a multiple of it: engines prepare each anew."""
_CLASSES: Final = 100
"""Drops by class are measured for so many classes at most: of more, each has too few samples."""
_UNCHANGED: Final = 2.0
"""Over n: so close to the drop is the upper end of its interval where no answer is right in one of the two only."""


def outputs_of(bundle: Bundle, config: EngineConfig, split: Split, trusted: tuple[str, ...] = ()) -> NDArray[Any]:
    """The answers of `bundle`, compiled as `config` says, to all samples: shape `(n, outputs)`, in order.

    Args:
        trusted: for the torch engine; see `open_engine`.

    Raises:
        DataError: if the samples do not fit the bundle's signature, or hold NaN or infinity.
        EngineError: if the engine cannot do exactly what `config` says.
        ModelError: if an answer is NaN or infinite.
    """
    inputs = named_inputs(bundle, split.inputs)
    engine = open_engine(bundle, config, trusted=trusted)
    try:
        answers = _answers(Runner(engine), bundle.manifest.signature, inputs, config.max_batch)
    finally:
        engine.close()
    wrong = ~np.isfinite(answers.reshape(len(answers), -1)).all(axis=1)
    if wrong.any():
        raise ModelError(
            f"answers of {bundle.manifest.name} on {config.engine} in {config.precision} are no numbers",
            f"{int(wrong.sum())} of {len(answers)} samples, the first of them number {int(wrong.argmax())}, gave NaN "
            "or infinity",
            "check its weights, and the range of its inputs; it may overflow in this precision only",
        )
    return answers


def _answers(runner: Runner, signature: Signature, inputs: Mapping[str, NDArray[Any]], most: int) -> NDArray[Any]:
    """The answers in order; samples of like length share batches, without the padding behind the longest of them.

    Padding changes no answer (`rushhour.engines.agreement` checks it), but it costs: texts are padded to the longest
    one of the data set, of which most are a third.
    """
    output = signature.outputs[0].name
    if signature.padded is None or signature.open_axes.get(output):
        return runner.infer(inputs)[output]
    whole, own = signature.sizes_of(inputs), own_sizes(signature, inputs)
    order = np.array(sorted(range(len(own)), key=own.__getitem__), np.intp)
    futures = []
    for rows in (order[at : at + most] for at in range(0, len(order), most)):
        longest = (max(own[row][place] for row in rows.tolist()) for place in range(len(whole)))
        sizes = tuple(min(-(-size // _STEP) * _STEP, end) for size, end in zip(longest, whole, strict=True))
        futures.append(runner.submit(cut(signature, {name: array[rows] for name, array in inputs.items()}, sizes)))
    answers = np.concatenate([future.result()[output] for future in futures])
    found = np.empty_like(answers)
    found[order] = answers
    return found


def judge(
    task: Task,
    split_name: str,
    targets: NDArray[Any],
    outputs: NDArray[Any],
    reference_outputs: NDArray[Any] | None,
    groups: NDArray[Any] | None = None,
) -> Accuracy:
    """The task's metric of `outputs`, and how far it fell below the reference on the same samples.

    Where there are no targets it is fidelity instead: the agreement with the reference's answers, 1 for the reference
    itself. The difference to 1 is the drop, under the same budget. Outputs that differ from the reference's by rounding
    only have no drop, on however few samples.

    Args:
        split_name: which part of the data: `validation`, `test`.
        targets: as in `Split`.
        outputs: of the bundle that is judged, `(n, outputs)`.
        reference_outputs: of the reference on the same samples; None if this is the reference.
        groups: as in `Split`.
    """
    if not Split(outputs, targets).labelled:
        return _fidelity(task, split_name, outputs, reference_outputs)
    value, interval = task.evaluate(outputs, targets, groups)
    accuracy = Accuracy(metric=task.metric, value=value, interval=interval, n=len(targets), split=split_name)
    if reference_outputs is None or _is_rounding(outputs, reference_outputs):
        return accuracy
    drop, drop_interval = task.compare(reference_outputs, outputs, targets, groups)
    return Accuracy(
        metric=task.metric,
        value=value,
        interval=interval,
        n=len(targets),
        split=split_name,
        drop=drop,
        drop_interval=drop_interval,
        class_drops=_class_drops(task, outputs, reference_outputs, targets),
    )


def why_outside(accuracy: Accuracy, budget: AccuracyBudget) -> str:
    """Why the drop is not shown to be inside the budget, and the remedy; empty where it is shown.

    The upper end of the paired interval must be inside, not the drop alone: of bundles whose true drop is the whole
    budget, one in forty passes, and not one in two.
    """
    drop, (_, high), allowed, n = accuracy.drop, accuracy.drop_interval, budget.max_drop, accuracy.n
    if high <= allowed:
        return ""
    sentence = (
        f"{accuracy.metric} drops by {drop * 100:.2f} points on {n:,} samples of the {accuracy.split} part, "
        f"by {high * 100:.2f} at most, and {budget} is allowed"
    )
    if drop > allowed:
        return sentence
    wider = f"a budget of {math.ceil(high * 1000) / 10:g}%"
    if not allowed:
        return f"{sentence}: no number of samples shows that there is no drop at all; {wider} would do"
    is_unchanged = high - drop <= _UNCHANGED / n
    enough = least_samples(budget) if is_unchanged else n * ((high - drop) / max(1e-9, allowed - drop)) ** 2
    more = f"about {math.ceil(enough):,} samples in that part would show it, or {wider}" if enough < 1e7 else wider
    return f"{sentence}: {more}"


def least_samples(budget: AccuracyBudget) -> int:
    """The fewest samples that can show that a classifier is inside the budget, if no answer changes."""
    return math.ceil(Z / budget.max_drop) - 2 if budget.max_drop else sys.maxsize


def too_few(task: Task, split_name: str, split: Split, budget: AccuracyBudget) -> str:
    """The remedy for a part of the data with too few samples to show the budget; empty where it has enough."""
    n, least = len(split), least_samples(budget)
    if not task.is_share or n >= least or not budget.max_drop:
        return ""
    return (
        f"{n:,} samples of the {split_name} part cannot show that accuracy drops by less than {budget}, even if no "
        f"answer changes: give {least:,} or more, or a budget of {math.ceil(1000 * Z / (n + 2)) / 10:g}%"
    )


def _is_rounding(outputs: NDArray[Any], reference: NDArray[Any]) -> bool:
    if outputs.shape != reference.shape:
        return False
    spread = max(1e-3, float(np.ptp(reference)) if reference.size else 0.0)
    return bool(np.abs(np.asarray(outputs, np.float64) - reference).max(initial=0.0) <= _ROUNDING * spread)


def _fidelity(task: Task, split_name: str, outputs: NDArray[Any], reference: NDArray[Any] | None) -> Accuracy:
    same = reference is None or _is_rounding(outputs, reference)
    value, (low, high) = (1.0, (1.0, 1.0)) if reference is None or same else task.fidelity(reference, outputs)
    return Accuracy(
        metric=task.fidelity_metric,
        value=value,
        interval=(low, high),
        n=len(outputs),
        split=split_name,
        drop=1 - value,
        drop_interval=(1 - high, 1 - low),
        class_drops=() if same or reference is None else _class_drops(task, outputs, reference, None),
    )


def _class_drops(
    task: Task, outputs: NDArray[Any], reference: NDArray[Any], targets: NDArray[Any] | None
) -> tuple[float, ...]:
    """The drop among the samples that are answered with each class; the mean drop for a class that is never answered.

    Weighted by how often each class is answered, they add up to the drop.

    Args:
        targets: the labels; None where the reference's answers are.
    """
    if task.kind != "classification" or task.outputs > _CLASSES:
        return ()
    answers, before = outputs.argmax(axis=1), reference.argmax(axis=1)
    right = before if targets is None else targets
    lost = (before == right).astype(np.float64) - (answers == right)
    counts = np.bincount(answers, minlength=task.outputs)
    sums = np.bincount(answers, weights=lost, minlength=task.outputs)
    drops = np.where(counts > 0, sums / np.maximum(counts, 1), lost.mean())
    return tuple(round(float(drop), 6) for drop in drops)


def check_fits(bundle: Bundle, inputs: NDArray[Any]) -> None:
    """Raise unless `inputs` are samples that the bundle takes; see `named_inputs`.

    Raises:
        DataError: if they are not.
    """
    named_inputs(bundle, inputs)


def named_inputs(bundle: Bundle, inputs: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """Samples of a data set as the bundle takes them: input name -> array of shape `(n, *shape)`, views.

    Args:
        inputs: as in `Split`; a field for each input where the bundle has several.

    Raises:
        DataError: if names, shapes or types differ from the signature's (a wrong dimension would be broadcast
            silently), or if they hold NaN or infinity.
    """
    signature = bundle.manifest.signature
    specs = {spec.name: spec for spec in signature.inputs}
    fields = inputs.dtype.names or ()
    named = {name: inputs[name] for name in fields} or dict.fromkeys(list(specs)[:1], inputs)
    if named.keys() != specs.keys():
        raise DataError(
            f"the data does not fit the model {bundle.manifest.name}",
            f"it takes {_listed(list(specs))}, but a sample has {_listed(list(fields) or ['one array'])}",
            "give the data that the model was made for: a field for each input",
        )
    for name, array in named.items():
        spec, of = specs[name], f" for {name}" if fields else ""
        if not signature.takes(spec, array.shape[1:]) or array.dtype != spec.dtype:
            shape = signature.described(spec) if signature.dimensions else spec.shape
            raise DataError(
                f"the data does not fit the model {bundle.manifest.name}",
                f"it takes samples of {spec.dtype}{shape}{of}, but these are {array.dtype}{array.shape[1:]}",
                "give the data that the model was made for",
            )
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            row = int((~np.isfinite(array.reshape(len(array), -1)).all(axis=1)).argmax())
            raise DataError(
                f"the data for {bundle.manifest.name} holds NaN or infinity",
                f"sample {row}{of} is the first that does",
                "remove or fill such samples",
            )
    return named


def _listed(names: list[str]) -> str:
    return f"{len(names)} inputs ({', '.join(names)})" if len(names) > 1 else names[0]

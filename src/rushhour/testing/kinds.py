"""The conformance kit of tasks: what `rushhour.task.Kind` promises, for a class of a user's own."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from rushhour.task import Head, Kind, Places, Spatial


def check_kind(kind: Kind, outputs: NDArray[Any], targets: NDArray[Any]) -> None:
    """Raise unless a kind keeps its promises.

    Args:
        kind: of a user's own.
        outputs: answers of any network to some samples, `(n, outputs)`, ten samples or more, not all equal. Of a kind
            that answers for places, `(n, *answer_shape)`; a loss of its own is then not tried.
        targets: real ones for them, `(n, ...)`.

    Raises:
        AssertionError: what is wrong, in words.
    """
    for name in ("metric", "agreement", "output"):
        assert isinstance(getattr(kind, name, None), str), f"`{name}` is no text"
    heads = get_args(Head)
    assert kind.head in heads, f"`head` {kind.head!r} is none of {', '.join(heads)}"
    if isinstance(kind, Spatial):
        assert kind.places in get_args(Places), f"`places` {kind.places!r} is none of {', '.join(get_args(Places))}"
        assert outputs.dtype == kind.dtype, f"answers are {outputs.dtype}, and `dtype` is {kind.dtype}"
    assert isinstance(kind.is_share, bool), "`is_share` is no bool"
    assert len(outputs) == len(targets) >= 10, "give ten samples or more, and as many targets"
    assert kind.why_wrong(targets) == "", f"it does not take these targets: {kind.why_wrong(targets)}"

    found = kind.statistics(outputs, targets)
    shape = getattr(found, "shape", None)
    by_sample = f"`statistics` gives {shape}, and one row for each of {len(targets)} samples is needed"
    assert shape is not None, by_sample
    assert (len(shape), shape[0]) == (2, len(targets)), by_sample
    assert np.isfinite(found).all(), "`statistics` holds NaN or infinity"
    value = kind.reduce(found)
    assert isinstance(value, float), f"`reduce` gives {value!r}, not a float"
    assert np.isfinite(value), f"`reduce` gives {value}"
    order = np.random.default_rng(0).permutation(len(targets))
    assert np.isclose(kind.reduce(found[order]), value), "the metric depends on the order of the samples"
    some = order[: len(order) // 2]
    again = kind.statistics(outputs[some], targets[some])
    assert again.shape[1] == found.shape[1], "the number of statistics depends on the number of samples"
    assert np.isfinite(kind.reduce(found[np.resize(some, len(order))])), "the metric of repeated samples is no number"
    if kind.is_share:
        assert found.shape[1] == 1, "a share needs one column"
        assert np.isin(found, (0, 1)).all(), "a share needs a column of 0 and 1"
        assert np.isclose(value, found.mean()), "a share is the mean of `statistics`"
    wanted = kind.as_targets(outputs)
    assert kind.why_wrong(wanted) == "", "`as_targets` gives no targets of the task"
    own = kind.reduce(kind.statistics(outputs, wanted))
    assert np.isclose(own, 1.0), f"a model agrees with itself by {own:.3f}, and it must be 1"
    if callable(kind.loss) and not isinstance(kind, Spatial):
        _check_loss(kind.loss, outputs, targets)


def _check_loss(loss: Any, outputs: NDArray[Any], targets: NDArray[Any]) -> None:
    import torch

    answers = torch.from_numpy(np.asarray(outputs, np.float32)).requires_grad_()
    losses = loss(answers, torch.from_numpy(np.asarray(targets)))
    assert tuple(losses.shape) == (len(outputs),), f"`loss` gives {tuple(losses.shape)}, not one number for each sample"
    losses.sum().backward()
    assert answers.grad is not None, "`loss` has no gradient"
    assert torch.isfinite(answers.grad).all(), "the gradient of `loss` is no number"

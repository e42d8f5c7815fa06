"""The course of a training as a page: `rushhour report` of the folder that `rushhour train` tracked into."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from markupsafe import Markup

from rushhour.records.curves import Epoch, best_of, read_curves, read_record
from rushhour.records.judged import Residuals
from rushhour.report.page import is_page, render
from rushhour.system.storage import write_own

_OPEN: Final = 15
"""Epochs that a table shows at once, about; the others are folded."""
_MOST: Final = 2_000
_SMALL: Final = 12
"""Classes whose whole matrix is shown."""
_CONFUSED: Final = 10
"""Confusions that are named."""
_CURVES: Final = 20
_VALUES: Final = 6
"""Classes whose precision is drawn, and values whose residuals are."""


def write_training_report(folder: Path, file: Path | None = None) -> Path:
    """Render `report.html` of a training's folder from its `curves.jsonl`. The file loads nothing from anywhere.

    Args:
        folder: the training's folder.
        file: where it is written; in that folder by default.

    Returns:
        The path of the file.

    Raises:
        DataError: if there are no curves, or they are damaged.
        StorageError: if the files cannot be read or written.
    """
    from rushhour.report import charts  # matplotlib takes a second to import

    epochs, record = read_curves(folder), read_record(folder)
    best = best_of(epochs)
    sealed = next((epoch for epoch in epochs if record is not None and epoch.epoch == record.sealed), epochs[-1])

    def marks(epoch: Epoch) -> str:
        words = (("in the bundle", epoch is sealed and record is not None), ("best", epoch is best))
        return ", ".join(word for word, applies in words if applies)

    classified = None if record is None else record.classified
    found = () if record is None else record.found[:_CURVES]
    residuals = () if record is None else record.residuals[:_VALUES]
    calibration = None if record is None else record.calibration
    path = file or folder / "report.html"
    page = render(
        "training.html",
        name=folder.resolve().name,
        epochs=epochs,
        shown=_shown(epochs, (best, sealed)),
        most=_MOST,
        best=best,
        sealed=sealed,
        record=record,
        classified=classified,
        small=classified is not None and 0 < len(classified.confusion) <= _SMALL,
        confused=[] if classified is None else classified.confusions()[:_CONFUSED],
        reliability=None
        if classified is None
        else charts.wide_and_narrow(lambda narrow: charts.reliability(classified.bins, narrow)),
        found=found,
        curve=charts.wide_and_narrow(lambda narrow: charts.precision_recall(found, narrow)) if found else None,
        residuals=[_residuals(each, f"residuals-{at}") for at, each in enumerate(residuals)],
        calibration=calibration,
        calibrated=None
        if calibration is None
        else [
            charts.wide_and_narrow(lambda narrow: charts.reliability(calibration.before.bins, narrow, "before")),
            charts.wide_and_narrow(lambda narrow: charts.reliability(calibration.after.bins, narrow, "after")),
        ],
        marks=marks,
        loss=charts.wide_and_narrow(lambda narrow: charts.training_loss(epochs, narrow)),
        metric=charts.wide_and_narrow(lambda narrow: charts.training_metric(epochs, narrow)),
    )
    write_own(path, page, is_page)
    return path


def _residuals(of: Residuals, name: str) -> Markup | None:
    from rushhour.report import charts

    return charts.wide_and_narrow(lambda narrow: charts.residuals(of, narrow, name))


def _shown(epochs: Sequence[Epoch], always: Sequence[Epoch]) -> list[Epoch]:
    """All, if they are few; else the first, the last, those of `always`, and some between at equal distances."""
    every = -(-len(epochs) // _OPEN)
    last = len(epochs) - 1
    return [epoch for at, epoch in enumerate(epochs) if at % every == 0 or at == last or epoch in always]

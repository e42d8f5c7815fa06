"""The verb `report`: a run, a training or a compression becomes an HTML page."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Final

from rushhour.api.values import StrPath, read_path
from rushhour.bundle import is_bundle
from rushhour.errors import PlanError
from rushhour.plan import Plan
from rushhour.records.compression import COMPRESSION
from rushhour.records.curves import CURVES
from rushhour.records.journal import JOURNAL
from rushhour.system.extras import require
from rushhour.system.storage import try_file

_OF_A_RUN: Final = (
    "plan.json", "plan-so-far.json", "measurements.jsonl", "curves.jsonl", "compression.json", "report.html"
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ReportResult:
    """A written report. It is a path too: that of the file.

    Attributes:
        file: one HTML file, which loads nothing from elsewhere.
        plan: of a tuning run; None of a training or a compression.
        finished: whether the run is finished; if not, `plan` is the best plan so far.
    """

    file: Path
    plan: Plan | None = None
    finished: bool = True

    def __fspath__(self) -> str:
        return str(self.file)

    def as_dict(self) -> dict[str, Any]:
        """What `rushhour report --json` writes."""
        facts: dict[str, Any] = {"report": str(self.file)}
        return facts if self.plan is None else facts | {"plan": self.plan, "finished": self.finished}


def report(run: StrPath, *, out: StrPath | None = None) -> ReportResult:
    """Write the report of a tuning run, a training or a compression: one HTML file that works offline.

        rushhour.report("runs/photos").file
        rushhour.report(rushhour.train("mlp", "parts.npz", out="runs/parts"))

    Args:
        run: the folder of a tuning run, or a file in it such as `plan.json`; a bundle that was trained or compressed,
            or the folder beside it (`BUNDLE-training`, `BUNDLE-steps`); or the result of `train`, `compress` or `tune`.
        out: the file; `RUN/report.html` by default.

    Raises:
        PlanError: if there is no run.
        RushhourError: if its files are damaged, or the report cannot be written.
    """
    require("report")
    from rushhour.report import read_plan, write_compression_report, write_report, write_training_report

    folder, file = read_path(run), None if out is None else read_path(out)
    if folder.is_file():
        if folder.name not in _OF_A_RUN:
            raise PlanError(
                f"{folder} is no run",
                f"a run is a folder with a {_OF_A_RUN[0]}",
                "name the folder that `rushhour tune` or `rushhour demo` wrote",
            )
        folder = folder.parent
    folder = _reported(folder)
    if folder.is_dir():
        try_file(file or folder / "report.html")
    if not (folder / JOURNAL).exists():  # a tuning run has one, whatever else is in its folder
        for sign, write in ((COMPRESSION, write_compression_report), (CURVES, write_training_report)):
            if (folder / sign).is_file():
                return ReportResult(write(folder, file))
    written = write_report(folder, file)
    plan, finished = read_plan(folder)
    return ReportResult(written, plan, finished)


def _reported(run: Path) -> Path:
    """The folder to report on: of a bundle, the one beside it of its compression or training."""
    if run.exists() and not is_bundle(run):
        return run
    beside = (run.with_name(f"{run.name}-{kind}") for kind in ("steps", "training") if run.name)
    found = next((folder for folder in beside if folder.is_dir()), run)
    if found == run and is_bundle(run):
        raise PlanError(
            f"there is nothing to report of the bundle {run}",
            f"its curves and steps are in {run.name}-training or {run.name}-steps beside it, and neither is there",
            "name the folder in which they are",
        )
    return found

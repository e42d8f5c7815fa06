"""The verb `tune`: a network or bundle, an SLO and an accuracy budget become a Plan."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rushhour.api.importing import Known, brought_of, imported_for
from rushhour.api.inputs import load_data, read_model, source_of
from rushhour.api.settings import fitted, settings_of
from rushhour.api.trials import built_by
from rushhour.api.values import (
    StrPath,
    check_name,
    read_accuracy_budget,
    read_budget,
    read_path,
    read_seconds,
    read_slo,
    read_texts,
)
from rushhour.bundle import Bundle, Source
from rushhour.errors import GoalError
from rushhour.goal import SLO, AccuracyBudget, Goal
from rushhour.plan import Plan, Preference
from rushhour.progress import Progress, Silent
from rushhour.system.extras import require
from rushhour.system.storage import check_claim, claimed, try_folder

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from rushhour.api.inputs import GivenColumns
    from rushhour.data import Dataset


@dataclasses.dataclass(frozen=True)
class TuneResult:
    """A finished tuning run. It is a path too: that of the run's folder, which `rushhour.serve` takes.

    Attributes:
        plan: what to serve and how, with the evidence.
        run: the folder: `plan.json`, `bundles/`, `measurements.jsonl`, `report.html`.
        report: the HTML page about it.
    """

    plan: Plan
    run: Path
    report: Path

    def __fspath__(self) -> str:
        return str(self.run)

    def __repr__(self) -> str:
        """Short, for a notebook."""
        assert self.plan.evidence is not None
        kind = "nearest miss" if not self.feasible else "proven" if self.plan.evidence.proven else "estimated"
        return f"<TuneResult {self.capacity_rps:,.0f} requests/s, {kind}: {self.run}>"

    @property
    def feasible(self) -> bool:
        """Whether the plan meets the goal; if not, it is the one that came closest."""
        return self.plan.feasible

    @property
    def capacity_rps(self) -> float:
        """Requests per second that the plan carries inside both limits; see `Evidence.proven`."""
        assert self.plan.evidence is not None
        return self.plan.evidence.capacity_rps


def tune(
    model: StrPath | Source | Callable[..., Any],
    data: StrPath | Dataset | tuple[ArrayLike | Mapping[str, ArrayLike], ArrayLike] | Mapping[str, ArrayLike],
    *,
    out: StrPath,
    slo: str | SLO = "p99<50ms",
    max_accuracy_drop: str | AccuracyBudget = "1%",
    budget: str | float | None = None,
    stretch: str | float | None = None,
    recipes: Literal["auto", "none"] = "auto",
    prefer: Preference = "capacity",
    cascade: bool = False,
    epochs: int | None = None,
    batch: int | None = None,
    lr: float | None = None,
    seed: int = 0,
    channels_last: bool = True,
    task: str | None = None,
    size: str | tuple[int, int] | None = None,
    columns: GivenColumns = None,
    skip_corrupt: bool = False,
    trust: str | Sequence[str] = (),
    name: str | None = None,
    cold: bool = False,
    ladder: bool = False,
    cluster: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> TuneResult:
    """Find how to serve a model so that it answers the most requests per second inside an SLO and an accuracy budget.

    A network is trained first; a bundle is taken as it is. Smaller networks are made of it: pruned, with dominating
    dense layers split, and trained by distillation. Candidates (networks, precisions, engines, streams, threads, batch
    bounds) are served by real servers under real open-loop load. The answer is a Plan, measured against the untouched
    model in the same run. An interrupted run continues when it is called again with the same arguments.

        tuned = rushhour.tune("article", "photos/", out="runs/photos", slo="p99<50ms", max_accuracy_drop="1%")
        tuned.plan.variants[0], tuned.capacity_rps
        server = rushhour.serve(tuned)

    Args:
        model: a bundle or its folder; a model from elsewhere, as of `rushhour.import_model`, which is imported first;
            or a network to be trained, as of `rushhour.train`.
        data: as of `rushhour.train`: to train, calibrate and judge with.
        out: the run's folder.
        slo: the latency limit: a percentile, `<` and a time.
        max_accuracy_drop: the accuracy budget in percentage points: with `1%`, 90% may become 89%.
        budget: time that all of it may take, about: `8m`, or seconds. The least decisive measurements are left out,
            and training takes fewer than the default epochs on a slow machine. Without it there is no limit.
        stretch: time that the budget grows by, at most, where training takes more than its share of it: `3m`, or
            seconds. Not at all by default.
        recipes: `auto` makes smaller networks too, where the network can be trained and the time allows it; `none`
            leaves it as it is, and only quantises.
        prefer: what decides within the limits: the most requests per second (`capacity`); the same, among candidates
            that are not measurably less accurate than the most accurate one (`accuracy`); or the smallest model with at
            least half of the best capacity (`memory`).
        cascade: after the search, try pairs of its candidates as a cascade: the small one answers what it is sure of,
            the rest goes on to the larger one. The plan is one where it carries more within the same limits. Of a
            classification only.
        epochs: as of `rushhour.train`; of a network that is trained first, as all up to `channels_last`.
        batch: as of `rushhour.train`.
        lr: as of `rushhour.train`.
        seed: as of `rushhour.train`.
        channels_last: as of `rushhour.train`.
        task: as of `rushhour.train`.
        size: as of `rushhour.train`.
        columns: as of `rushhour.train`; a bundle knows its own.
        skip_corrupt: as of `rushhour.train`.
        trust: factories (`module:factory`) that may be imported to build a bundle's network; or the path of a model
            from elsewhere, where reading it runs its code.
        name: the model's name, under which it is served; by default a bundle's own, or that of the folder `out`.
        cold: ignore what earlier runs on this machine measured (the cost of serving, how far predictions were off, the
            time of a training step). It is only a start: a run's own measurements weigh more.
        ladder: give the plan a ladder of the candidates that were measured, from the most accurate to the fastest: its
            server moves along it as the load changes, and spends the accuracy budget on average (docs/ladder.md).
        cluster: `HOST:PORT` of a Ray cluster whose nodes make the smaller networks, or `auto` for the one that runs on
            this machine; by default all are made here. What is timed, judged and loaded, is so on this machine.
        force: replace the plan of a run at `out` that had other arguments; measurements that still hold are used.
        progress: gets the progress, and notes on what was left out or chosen.

    Raises:
        RushhourError: if the model, the data or the goal cannot be used; the message says what to do.
    """
    require("compress")
    from rushhour.report import write_report
    from rushhour.tune import TuneSettings, tune_run

    goal = Goal(slo=read_slo(slo), budget=read_accuracy_budget(max_accuracy_drop))
    seconds = None if budget is None else read_budget(budget)
    longer = 0.0 if stretch is None else read_seconds(stretch)
    if longer and seconds is None:
        why = "without a budget there is no limit that could grow"
        raise GoalError("the stretch of the budget has no effect", why, "give a budget too, or leave it out")
    settings = TuneSettings(
        budget_s=seconds, stretch_s=longer, recipes=recipes, prefer=prefer, ladder=ladder, cascade=cascade
    )
    name, progress, run = check_name(name), progress or Silent(), read_path(out)
    training: dict[str, Any] = {
        "epochs": epochs,
        "batch": batch,
        "lr": lr,
        "seed": seed,
        "channels_last": channels_last,
    }
    try_folder(run)
    check_claim(run)
    settings_of(training)  # errors in them are raised before data is loaded
    read: str | Bundle | Source
    reading: dict[str, Any] | None = None
    if (brought := brought_of(model)) is not None:
        known = Known(trust, name)
        with claimed(run):
            imported, dataset = imported_for(
                brought, data, run / ".imported", progress,
                size=size, skip_corrupt=skip_corrupt, task=task, columns=columns, known=known,
            )  # fmt: skip
        read = imported.bundle
    else:
        read = read_model(model)
        reading = {"size": size, "skip_corrupt": skip_corrupt, "task": task, "columns": columns}
        reading["trusted"] = read_texts(trust)
        dataset = load_data(data, progress, read, **reading)
    source, trusted = source_of(read, dataset)
    if isinstance(source, Source):
        training = fitted(training, len(dataset.train), progress, largest=dataset.fitting_batch(sys.maxsize))
    with built_by(cluster, dataset, progress, given=data, model=read, reading=reading) as builder:
        plan = tune_run(
            source,
            dataset,
            goal,
            run=run,
            training=settings_of(training),
            settings=settings,
            progress=progress,
            trusted=(*trusted, *read_texts(trust)),
            fit_epochs=epochs is None,
            name=name,
            force=force,
            cold=cold,
            builder=builder,
        )
    progress.start("Writing the report")
    report = write_report(run)
    progress.done(str(report))
    return TuneResult(plan, run, report)

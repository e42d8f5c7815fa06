"""The verb: applies recipes to a bundle and leaves the best result, chosen by what every step's bundle measures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from rushhour.bundle import Bundle, check_place
from rushhour.compress.builder import Builder, Work
from rushhour.compress.evaluation import Evaluation
from rushhour.compress.judge import too_few, why_outside
from rushhour.compress.recipe import TRAINS, Recipe, step_text
from rushhour.compress.run import NothingToDo, apply, check_data
from rushhour.compress.selection import decided
from rushhour.compress.speed import Artefact, Bench, Speed, bench_artefacts
from rushhour.compress.store import Store
from rushhour.data.dataset import Dataset
from rushhour.errors import RushhourError, StorageError
from rushhour.goal import AccuracyBudget
from rushhour.plan import EngineName
from rushhour.progress import Progress
from rushhour.records import identity
from rushhour.records.compression import COMPRESSION, Attempt, Compression, Stage
from rushhour.system.machine import describe
from rushhour.system.storage import alone_at, claimed

_BLOCKS, _MORE_BLOCKS = 6, 18
"""Of a comparison with the parent: at first, and again where it shows neither a gain nor a loss."""


def compress(
    reference: Bundle,
    dataset: Dataset,
    recipes: Sequence[Recipe],
    *,
    budget: AccuracyBudget,
    out: Path,
    steps: Path,
    seed: int = 0,
    engine: EngineName = "openvino",
    bench: Bench | None = None,
    progress: Progress,
    trusted: tuple[str, ...] = (),
    name: str | None = None,
    force: bool = False,
    builder: Builder | None = None,
) -> Compression:
    """Apply the recipes, judge the compiled bundle of every step, and leave the best at `out`.

    Where int8 that is correct on any machine costs clearly more accuracy than int8 that needs VNNI, both are made.

    The best is inside the budget, and shown to be faster than the reference, or smaller and no slower. It is slower
    than neither the reference nor the bundle its step began with. Of these it is the fastest, and the smallest of those
    as fast. Inside the budget means the whole interval of the paired drop. That is decided on the validation part, and
    confirmed on the test part in the order of the drop, up to the best, ending with the first that is outside there.
    Each is tested at the level of one test, and all of them together err as seldom as one (a fixed sequence; Maurer,
    Hothorn and Lehmacher 1995). The answer is the last that was confirmed. Where nothing is inside the budget it is the
    nearest miss; where no gain is shown, the reference. The verdict says which.

    Args:
        reference: what to compress; also what drops are measured from.
        dataset: validation decides, test confirms.
        recipes: from gentle to strong: after one that trained and is outside the budget, no stronger one is tried. A
            recipe that cannot be applied is noted and passed over, unless it is the only one. A step that would change
            nothing is left out of its recipe, and the others are applied.
        budget: the largest accuracy drop allowed.
        out: the bundle's folder. The int8 for other machines, where there is one, lies beside it: `OUT-vnni`, or
            `OUT-any` where the answer is the one that needs VNNI.
        steps: the store of all bundles that are made, and of what was found: `compression.json`.
        seed: of all that is random.
        engine: that compiles everything.
        bench: times bundles; 6 interleaved blocks by default, and 18 where these are not enough.
        progress: receives every step.
        trusted: as for `apply`.
        name: of the answer; the reference's by default.
        force: whether a bundle that other work left at `out`, or beside it, may be replaced.
        builder: makes bundles elsewhere, so many recipes at once as it can; None to make all of them here. What they
            measure is measured here in either case.

    Raises:
        DataError: if the data does not fit the bundle, or holds NaN; before any work.
        RushhourError: if the only recipe cannot be applied at all.
        EngineError: if the engine cannot run the reference.
        StorageError: if there is something else at `out`, or another process works there; before any work. Also if the
            disk does not take it.
    """
    with alone_at(out), claimed(steps):
        asked = {
            "model": name,
            "bundle": reference.content_key,
            "dataset": dataset.name,
            "fingerprint": dataset.content_key,
            "recipes": " ".join(map(str, recipes)),
            "steps": identity.key(recipes=recipes),
            "accuracy budget": str(budget),
            "seed": seed,
            "engine": engine,
            "machine": str(describe()),
        }
        _check_places(out, steps, asked, force=force)
        check_data(reference, dataset)
        short = _too_few(dataset, budget)
        if short:
            progress.start("samples to judge with")
            progress.done(short, good=False)
        evaluation = Evaluation(reference, dataset, engine, bench or _bench, progress, budget)
        work = Work(reference, dataset, Store(steps), seed, budget.max_drop, trusted)
        attempts = _attempts(work, recipes, evaluation, budget=budget, progress=progress, builder=builder)
        found = Compression(
            model=reference.manifest.name,
            engine=engine,
            budget=budget,
            reference=evaluation.reference_stage,
            attempts=tuple(attempts),
            best=None,
            verdict="no gain",
            summary="",
            test=evaluation.reference_test,
            reference_test=evaluation.reference_test,
            request=asked,
        )
        chosen = decided(found, evaluation.confirmation, short)
        return _written(chosen, reference, out, steps, name or reference.manifest.name)


def _check_places(out: Path, steps: Path, asked: Mapping[str, Any], *, force: bool) -> None:
    """Raise unless what is at `out` and beside it was left by the same work, or may be replaced."""
    before = Compression.load(steps).request if (steps / COMPRESSION).is_file() else {}
    why = ", ".join(identity.changes(before, asked)) if before else "the compression that made it"
    is_same = not why
    for path in (out, *(out.with_name(f"{out.name}-{target}") for target in ("vnni", "any"))):
        check_place(path, force=force or is_same, why=why)


def _too_few(dataset: Dataset, budget: AccuracyBudget) -> str:
    parts = (("validation", dataset.validation), ("test", dataset.test))
    return next(filter(None, (too_few(dataset.task, name, part, budget) for name, part in parts)), "")


def _attempts(
    work: Work,
    recipes: Sequence[Recipe],
    evaluation: Evaluation,
    *,
    budget: AccuracyBudget,
    progress: Progress,
    builder: Builder | None,
) -> list[Attempt]:
    """Every recipe that was applied, and how each of its steps was judged."""
    attempts: list[Attempt] = []
    queue, built = list(recipes), list[Recipe]()
    while queue:
        if builder is not None and builder.width and queue[0] not in built:
            ahead = [each for each in queue if each not in built][: builder.width]
            builder.build(ahead, work, progress)
            built += ahead
        recipe = queue.pop(0)
        stages: list[Stage] = []
        why, before = "", work.bundle
        if len(recipes) > 1:
            progress.start(f"recipe {len(attempts) + 1} of {len(attempts) + 1 + len(queue)}")
            progress.done(str(recipe))
        try:
            bundles = apply(
                recipe,
                work.bundle,
                work.dataset,
                work.store,
                seed=work.seed,
                max_drop=work.max_drop,
                progress=progress,
                trusted=work.trusted,
            )
            for step, bundle in zip(recipe.steps, bundles, strict=True):
                stages.append(evaluation.stage(step_text(step), bundle, before))
                before = bundle
        except StorageError:
            raise
        except RushhourError as error:
            rest = _without(recipe, len(stages)) if isinstance(error, NothingToDo) else None
            if len(recipes) == 1 and not stages and not attempts and rest is None:
                raise
            why = str(error)
            progress.start(str(recipe))
            progress.done(why, good=False)
            if rest is not None and str(rest) not in set(map(str, (*(attempt.recipe for attempt in attempts), *queue))):
                queue.insert(0, rest)
        attempts.append(Attempt(str(recipe), tuple(stages), why))
        if (with_all_bits := evaluation.with_all_bits(recipe, stages)) is not None:
            queue.insert(0, with_all_bits)
            continue
        trains = any(isinstance(step, TRAINS) for step in recipe.steps)
        if trains and len(stages) == len(recipe.steps) and why_outside(stages[-1].accuracy, budget):
            break
    return attempts


def _without(recipe: Recipe, at: int) -> Recipe | None:
    """The recipe without one of its steps; None where nothing would be left."""
    steps = (*recipe.steps[:at], *recipe.steps[at + 1 :])
    return Recipe(steps) if steps else None


def _written(found: Compression, reference: Bundle, out: Path, steps: Path, name: str) -> Compression:
    """Write the answer to `out`, and what was found to the store."""
    if found.best is None:
        found.save(steps)
        reference.copy_to(out, name)
        return found
    chosen, stage = Bundle.open(Path(found.answer.bundle)), found.answer
    if found.also is not None:
        other = found.stage(found.also)
        beside = out.with_name(f"{out.name}-{other.needs or 'any'}")
        Bundle.open(Path(other.bundle)).copy_to(beside, name).with_metrics({"validation": other.accuracy})
        found = msgspec.structs.replace(found, summary=f"{found.summary}; {_two_forms(stage, other, beside)}")
    found.save(steps)  # first, so that a later call knows what lies at `out`, even if this one is killed
    # copied first, so that the store keeps the bundle as its key made it
    chosen.copy_to(out, name).with_metrics({"validation": stage.accuracy, "test": found.test})
    return found


def _two_forms(answer: Stage, other: Stage, beside: Path) -> str:
    wide, safe = (answer, other) if answer.needs else (other, answer)
    cost = (wide.accuracy.value - safe.accuracy.value) * 100
    any_machine, vnni = "is correct on any machine", "is correct only on processors with VNNI"
    own, others = (vnni, any_machine) if answer.needs else (any_machine, vnni)
    return (
        f"weights of 7 bits, which are correct on any machine, cost {cost:.2f} points of {safe.accuracy.metric} "
        f"against 8 bits: this bundle {own}, and {beside} {others}"
    )


def _bench(parent: Artefact, children: Mapping[str, Artefact]) -> dict[str, Speed]:
    found = bench_artefacts(parent, children, blocks=_BLOCKS, seconds=0.25)
    if all(speed.throughput.low > 1 or speed.throughput.high < 1 for speed in found.values()):
        return found
    return bench_artefacts(parent, children, blocks=_MORE_BLOCKS, seconds=0.25)

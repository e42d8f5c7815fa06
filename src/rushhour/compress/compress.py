"""The verb: recipes in, one bundle out, chosen by what was measured on the compiled artefact of every step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
from numpy.typing import NDArray

from rushhour import identity
from rushhour.bundle import Bundle, check_place
from rushhour.compress.distil import Distil
from rushhour.compress.judge import judge, outputs_of
from rushhour.compress.lowrank import LowRank
from rushhour.compress.prune import Prune
from rushhour.compress.quantize import COSTLY
from rushhour.compress.recipe import Quantize, Recipe, Store, apply, check_data, said
from rushhour.compress.speed import Artefact, Ratio, Speed, bench_artefacts
from rushhour.compression import COMPRESSION, Attempt, Compression, Factor, Stage, Verdict
from rushhour.data.dataset import Dataset, Split
from rushhour.engines import EngineConfig, full_range
from rushhour.errors import EngineError, ModelError
from rushhour.goal import AccuracyBudget
from rushhour.machine import cores, describe
from rushhour.measurement import Accuracy
from rushhour.plan import EngineName
from rushhour.progress import Progress
from rushhour.storage import alone_at, claimed

_TIE: Final = 0.02
"""Artefacts whose speed differs by less than this count as equally fast."""
_ALIKE: Final = 0.05
"""Of those that are within this share of the fastest, the smallest is taken."""
_BATCH: Final = 16

Bench = Callable[[Artefact, Mapping[str, Artefact]], dict[str, Speed]]
"""Times children beside their parent; a seam for tests."""


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
) -> Compression:
    """Apply the recipes, judge the artefact of every step, and leave the best at `out`.

    Where int8 that is right on any machine costs clearly more of the metric than int8 that needs VNNI, both are made.

    The best is inside the budget and slower neither than the reference nor than the bundle its step began with; of
    these the fastest, and the smallest of those as fast. Where nothing is inside the budget it is the nearest miss;
    where all that is inside is slower, the bundle as it was. There is always something, and the verdict says what.

    Args:
        reference: what to compress; also what drops are measured from.
        dataset: validation decides, test confirms.
        recipes: from gentle to strong: after one that trained and still missed the budget, no stronger one is tried.
            A recipe that cannot be done is noted and passed over, unless it is the only one.
        budget: the most the metric may fall.
        out: the bundle's folder. The int8 for other machines, where there is one, lies beside it: `OUT-vnni`, or
            `OUT-any` where the answer is the one that needs VNNI.
        steps: the store of all that is made on the way, and of what was found: `compression.json`.
        seed: of all that is random.
        engine: that compiles everything.
        bench: times artefacts; 6 interleaved blocks by default.
        progress: hears of every step.
        trusted: as for `apply`.
        name: of the answer; the reference's by default.
        force: whether a bundle that other work left at `out`, or beside it, may be replaced.

    Raises:
        DataError: if the data does not fit the bundle, or holds NaN; before any work.
        ModelError: if the only recipe cannot be done at all.
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
        return _compress(
            reference,
            dataset,
            recipes,
            budget=budget,
            out=out,
            steps=steps,
            seed=seed,
            engine=engine,
            bench=bench,
            progress=progress,
            trusted=trusted,
            name=name or reference.manifest.name,
            asked=asked,
        )


def _check_places(out: Path, steps: Path, asked: Mapping[str, Any], *, force: bool) -> None:
    """Raise unless what is at `out` and beside it was left by the same work, or may be replaced."""
    before = Compression.load(steps).asked if (steps / COMPRESSION).is_file() else {}
    why = ", ".join(identity.changes(before, asked)) if before else "the compression that left it"
    is_same = not why
    for path in (out, *(out.with_name(f"{out.name}-{target}") for target in ("vnni", "any"))):
        check_place(path, force=force or is_same, why=why)


def _compress(
    reference: Bundle,
    dataset: Dataset,
    recipes: Sequence[Recipe],
    *,
    budget: AccuracyBudget,
    out: Path,
    steps: Path,
    seed: int,
    engine: EngineName,
    bench: Bench | None,
    progress: Progress,
    trusted: tuple[str, ...],
    name: str,
    asked: dict[str, Any],
) -> Compression:
    check_data(reference, dataset)
    trial = _Trial(reference, dataset, engine, bench or _bench, progress)
    store = Store(steps)
    attempts: list[Attempt] = []
    queue = list(recipes)
    while queue:
        recipe = queue.pop(0)
        stages: list[Stage] = []
        why, before = "", reference
        try:
            made = apply(
                recipe,
                reference,
                dataset,
                store,
                seed=seed,
                max_drop=budget.max_drop,
                progress=progress,
                trusted=trusted,
            )
            for step, bundle in zip(recipe.steps, made, strict=True):
                stages.append(trial.judged(said(step), bundle, before))
                before = bundle
        except (ModelError, EngineError) as error:
            if len(recipes) == 1 and not stages:
                raise
            why = str(error)
        attempts.append(Attempt(str(recipe), tuple(stages), why))
        if (wider := trial.wider(recipe, stages)) is not None:
            queue.insert(0, wider)
            continue
        trains = any(isinstance(step, Prune | LowRank | Distil) for step in recipe.steps)
        if trains and stages and stages[-1].accuracy.drop > budget.max_drop:
            break
    best, verdict, sentence = _chosen(attempts, budget)
    also = _counterpart(attempts, best)
    found = Compression(
        model=reference.manifest.name,
        engine=engine,
        budget=budget,
        reference=trial.reference_stage,
        attempts=tuple(attempts),
        best=best,
        verdict=verdict,
        said=sentence,
        test=trial.reference_test,
        reference_test=trial.reference_test,
        also=also,
        asked=asked,
    )
    return _left(found, reference, trial, out, steps, name)


def _left(found: Compression, reference: Bundle, trial: _Trial, out: Path, steps: Path, name: str) -> Compression:
    """Confirm the answer on the test part, and leave it at `out`."""
    if found.best is None:
        found.save(steps)
        reference.copy_to(out, name)
    else:
        chosen, stage = Bundle.open(Path(found.answer.bundle)), found.answer
        test, drop_allowed = trial.accuracy(chosen, "test"), found.budget.max_drop
        if found.verdict == "best" and test.drop > drop_allowed:
            found = msgspec.structs.replace(
                found,
                verdict="nearest miss",
                said=f"{test.metric} falls by {stage.accuracy.drop * 100:.2f} points on the validation part but by "
                f"{test.drop * 100:.2f} on the test part, and {found.budget} is allowed: this is the nearest miss",
            )
        found = msgspec.structs.replace(found, test=test)
        if found.also is not None:
            attempt, stage_at = found.also
            other = found.attempts[attempt].stages[stage_at]
            beside = out.with_name(f"{out.name}-{other.needs or 'any'}")
            Bundle.open(Path(other.bundle)).copy_to(beside, name).with_metrics({"validation": other.accuracy})
            found = msgspec.structs.replace(found, said=f"{found.said}; {_beside(stage, other, beside)}")
        found.save(steps)  # first, so that what lies at `out` is known to be of this work, whenever it is killed
        # copied first, so that the store keeps the bundle as its key made it
        chosen.copy_to(out, name).with_metrics({"validation": stage.accuracy, "test": test})
    return found


def _chosen(attempts: Sequence[Attempt], budget: AccuracyBudget) -> tuple[tuple[int, int] | None, Verdict, str]:
    every = [(at, index) for at, attempt in enumerate(attempts) for index in range(len(attempt.stages))]

    def stage(place: tuple[int, int]) -> Stage:
        return attempts[place[0]].stages[place[1]]

    def speed(place: tuple[int, int]) -> float:
        ratio = stage(place).throughput
        return ratio.value if ratio is not None else 0.0

    if not every:
        return None, "no gain", "no recipe could be done: the bundle is as it was"
    inside = [place for place in every if stage(place).accuracy.drop <= budget.max_drop]
    if not inside:
        nearest = min(every, key=lambda place: (stage(place).accuracy.drop, -speed(place)))
        drop = stage(nearest).accuracy
        return (
            nearest,
            "nearest miss",
            (
                f"nothing is inside the budget of {budget}: {drop.metric} falls by {drop.drop * 100:.2f} points at "
                "least, this is the nearest miss"
            ),
        )
    good = [place for place in inside if not stage(place).slower]
    if not good:
        return (
            None,
            "no gain",
            "what is inside the budget is slower than what it was made from: the bundle is as it was",
        )
    fastest = max(map(speed, good))
    best = min(
        (place for place in good if speed(place) >= (1 - _ALIKE) * fastest),
        # of the same network in int8 the one that is right on any machine, if both are inside the budget
        key=lambda place: (stage(place).needs, stage(place).bytes, -speed(place)),
    )
    return best, "best", f"{attempts[best[0]].recipe}, up to its step {stage(best).step}"


def _counterpart(attempts: Sequence[Attempt], best: tuple[int, int] | None) -> tuple[int, int] | None:
    """The int8 that was made beside the answer for other machines; the two are attempts next to each other."""
    if best is None:
        return None
    at, index = best
    here = attempts[at].stages[index]
    step = 1 if not here.needs else -1
    if here.precision != "int8" or not 0 <= at + step < len(attempts):
        return None
    other = attempts[at + step].stages
    paired = len(other) == index + 1 == len(attempts[at].stages) and other[index].needs != here.needs
    same = paired and [stage.hash for stage in other[:index]] == [stage.hash for stage in attempts[at].stages[:index]]
    return (at + step, index) if same else None


def _beside(answer: Stage, other: Stage, beside: Path) -> str:
    wide, safe = (answer, other) if answer.needs else (other, answer)
    cost = (wide.accuracy.value - safe.accuracy.value) * 100
    which = (
        "this one is right only where the processor has VNNI" if answer.needs else "this one is right on any machine"
    )
    rest = "is right on any machine" if answer.needs else "is right only where the processor has VNNI"
    return (
        f"7 bits of the weights, which are right on any machine, cost {cost:.2f} points of {safe.accuracy.metric} "
        f"against 8 bits: {which}, and {beside}, which {rest}, lies beside it"
    )


class _Trial:
    """Judges bundles beside the reference, compiled alike."""

    def __init__(
        self, reference: Bundle, dataset: Dataset, engine: EngineName, bench: Bench, progress: Progress
    ) -> None:
        self._reference = reference
        self._dataset = dataset
        self._engine = engine
        self._bench = bench
        self._progress = progress
        self._answers: dict[str, NDArray[Any]] = {}
        self._known: dict[tuple[str, str], Stage] = {}
        self.reference_stage = self._stage("", reference, self.accuracy(reference, "validation"))

    @property
    def reference_test(self) -> Accuracy:
        """The reference on the test part."""
        return self.accuracy(self._reference, "test")

    def accuracy(self, bundle: Bundle, part: str) -> Accuracy:
        """Of the compiled artefact on a part of the data, paired with the reference."""
        split: Split = getattr(self._dataset, part)
        if part not in self._answers:
            self._answers[part] = outputs_of(*self._artefact(self._reference), split)
        expected = self._answers[part]
        if bundle is self._reference:
            return judge(self._dataset.task, part, split.targets, expected, None)
        outputs = outputs_of(*self._artefact(bundle), split)
        return judge(self._dataset.task, part, split.targets, outputs, expected)

    def judged(self, step: str, bundle: Bundle, before: Bundle) -> Stage:
        """The bundle that a step made from `before`, with all its figures; recipes that begin alike share them."""
        known = self._known.get((bundle.manifest.hash, before.manifest.hash))
        if known is not None:
            return msgspec.structs.replace(known, step=step)
        self._progress.start(f"judge {bundle.manifest.name}")
        accuracy = self.accuracy(bundle, "validation")
        speed = self._timed(self._reference, bundle)
        over_parent = speed if before is self._reference else self._timed(before, bundle)
        stage = msgspec.structs.replace(
            self._stage(step, bundle, accuracy),
            throughput=_factor(speed.throughput),
            over_parent=_factor(over_parent.throughput),
            latency=_factor(speed.latency),
            samples_per_s=speed.samples_per_s,
            slower=_is_slower(speed.throughput) or _is_slower(over_parent.throughput),
        )
        self._progress.done(
            f"{accuracy.metric} {accuracy.value:.4f}, {speed.throughput.value:.2f}x the reference's throughput"
        )
        self._known[bundle.manifest.hash, before.manifest.hash] = stage
        return stage

    def wider(self, recipe: Recipe, stages: Sequence[Stage]) -> Recipe | None:
        """The same recipe with weights of all 8 bits, if keeping to 7 has cost too much and this machine can tell."""
        last = recipe.steps[-1]
        if not isinstance(last, Quantize) or last.target != "any" or len(stages) != len(recipe.steps):
            return None
        before = stages[-2] if len(stages) > 1 else self.reference_stage
        cost = stages[-1].accuracy.drop - before.accuracy.drop
        return recipe.for_machines("vnni") if cost > COSTLY and not describe().saturates else None

    def _timed(self, parent: Bundle, child: Bundle) -> Speed:
        return self._bench(self._artefact(parent), {"child": self._artefact(child)})["child"]

    def _artefact(self, bundle: Bundle) -> Artefact:
        precision = bundle.manifest.precision
        return bundle, EngineConfig(self._engine, precision, streams=cores(), threads=1, max_batch=_BATCH)

    def _stage(self, step: str, bundle: Bundle, accuracy: Accuracy) -> Stage:
        manifest = bundle.manifest
        return Stage(
            step=step,
            bundle=str(bundle.path),
            hash=manifest.hash,
            parameters=manifest.parameters,
            bytes=bundle.model_bytes,
            precision=manifest.precision,
            accuracy=accuracy,
            needs="vnni" if full_range(bundle) else "",
        )


def _bench(parent: Artefact, children: Mapping[str, Artefact]) -> dict[str, Speed]:
    return bench_artefacts(parent, children, blocks=6, seconds=0.25)


def _is_slower(ratio: Ratio) -> bool:
    """Shown to be slower, or slower by more than a tie."""
    return ratio.high < 1 or ratio.value < 1 - _TIE


def _factor(ratio: Ratio) -> Factor:
    return Factor(ratio.value, ratio.interval, ratio.n)

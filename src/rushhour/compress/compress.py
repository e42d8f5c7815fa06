"""The verb: recipes in, one bundle out, chosen by what was measured on the compiled artefact of every step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
from numpy.typing import NDArray

from rushhour.bundle import Bundle, check_place
from rushhour.compress.distil import Distil
from rushhour.compress.judge import judge, outputs_of, too_few, why_outside
from rushhour.compress.lowrank import LowRank
from rushhour.compress.prune import Prune
from rushhour.compress.quantize import COSTLY
from rushhour.compress.recipe import LEFT, NothingToDo, Quantize, Recipe, Store, apply, check_data, said
from rushhour.compress.speed import Artefact, Ratio, Speed, bench_artefacts
from rushhour.data.dataset import Dataset, Split
from rushhour.engines import EngineConfig, full_range
from rushhour.errors import RushhourError, StorageError
from rushhour.goal import AccuracyBudget
from rushhour.measurement import Accuracy
from rushhour.plan import EngineName
from rushhour.progress import Progress
from rushhour.records import identity
from rushhour.records.compression import COMPRESSION, Attempt, Compression, Confirmation, Factor, Stage
from rushhour.system.machine import cores, describe
from rushhour.system.storage import alone_at, claimed

_TIE: Final = 0.02
"""Artefacts whose speed differs by less than this count as equally fast."""
_ALIKE: Final = 0.05
"""Of those that are within this share of the fastest, the smallest is taken."""
_SMALLER: Final = 0.9
"""An artefact of at most so much of the reference's size on disk is smaller."""
_BATCH: Final = 16
_BLOCKS, _MORE_BLOCKS = 6, 18
"""Of a race with the parent: at first, and once more where no gain is shown and none is refuted."""

Place = tuple[int, int]
"""A stage: its recipe and step, as places in the attempts and their stages."""

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

    The best is inside the budget, and shown to be faster than the reference, or smaller and no slower. It is slower
    than neither the reference nor the bundle its step began with. Of these it is the fastest, and the smallest of those
    as fast. Inside the budget means the whole interval of the paired drop. That is decided on the validation part, and
    confirmed on the test part: the gentlest first, up to the best, ending with the first that misses there. Each is
    tried at the level of one test, and all of them together err as seldom as one (a fixed sequence; Maurer, Hothorn and
    Lehmacher 1995). The answer is the last that was confirmed. Where nothing is inside it is the nearest miss; where no
    gain is shown, the bundle as it was. There is always something, and the verdict says what.

    Args:
        reference: what to compress; also what drops are measured from.
        dataset: validation decides, test confirms.
        recipes: from gentle to strong: after one that trained and still missed the budget, no stronger one is tried.
            A recipe that cannot be done is noted and passed over, unless it is the only one. A step that would change
            nothing is left out of its recipe, and the others are done.
        budget: the most the metric may fall.
        out: the bundle's folder. The int8 for other machines, where there is one, lies beside it: `OUT-vnni`, or
            `OUT-any` where the answer is the one that needs VNNI.
        steps: the store of all that is made on the way, and of what was found: `compression.json`.
        seed: of all that is random.
        engine: that compiles everything.
        bench: times artefacts; 6 interleaved blocks by default, and 18 where these are not enough.
        progress: hears of every step.
        trusted: as for `apply`.
        name: of the answer; the reference's by default.
        force: whether a bundle that other work left at `out`, or beside it, may be replaced.

    Raises:
        DataError: if the data does not fit the bundle, or holds NaN; before any work.
        RushhourError: if the only recipe cannot be done at all.
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
    short = _too_few(dataset, budget)
    if short:
        progress.start("samples to judge with")
        progress.done(short, good=False)
    trial = _Trial(reference, dataset, engine, bench or _bench, progress, budget)
    store = Store(steps)
    attempts: list[Attempt] = []
    queue = list(recipes)
    while queue:
        recipe = queue.pop(0)
        stages: list[Stage] = []
        why, before = "", reference
        if len(recipes) > 1:
            progress.start(f"recipe {len(attempts) + 1} of {len(attempts) + 1 + len(queue)}")
            progress.done(str(recipe))
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
        if (wider := trial.wider(recipe, stages)) is not None:
            queue.insert(0, wider)
            continue
        trains = any(isinstance(step, Prune | LowRank | Distil) for step in recipe.steps)
        if trains and len(stages) == len(recipe.steps) and why_outside(stages[-1].accuracy, budget):
            break
    found = Compression(
        model=reference.manifest.name,
        engine=engine,
        budget=budget,
        reference=trial.reference_stage,
        attempts=tuple(attempts),
        best=None,
        verdict="no gain",
        said="",
        test=trial.reference_test,
        reference_test=trial.reference_test,
        asked=asked,
    )
    return _left(_decided(found, trial, short), reference, out, steps, name)


def _too_few(dataset: Dataset, budget: AccuracyBudget) -> str:
    parts = (("validation", dataset.validation), ("test", dataset.test))
    return next(filter(None, (too_few(dataset.task, name, part, budget) for name, part in parts)), "")


def _without(recipe: Recipe, at: int) -> Recipe | None:
    """The recipe without one of its steps; None where nothing would be left."""
    steps = (*recipe.steps[:at], *recipe.steps[at + 1 :])
    return Recipe(steps) if steps else None


def _decided(found: Compression, trial: _Trial, short: str) -> Compression:
    """With the verdict: chosen by the validation part, confirmed by the test part.

    Args:
        short: what to say of data that cannot show the budget; else empty.
    """
    every = [(at, index) for at, attempt in enumerate(found.attempts) for index in range(len(attempt.stages))]
    budget = found.budget
    if not every:
        return _as_it_was(found, "no recipe could be done")
    inside = [place for place in every if not why_outside(found.stage(place).accuracy, budget)]
    if not inside:
        nearest = min(every, key=lambda place: (_most(found.stage(place).accuracy), -_speed(found.stage(place))))
        why = short or why_outside(found.stage(nearest).accuracy, budget)
        return _missed(found, nearest, trial.tested(nearest, found), f"nothing is inside the budget of {budget}: {why}")
    good = [place for place in inside if not found.stage(place).slower]
    if not good:
        return _as_it_was(found, "what is inside the budget is slower than what it was made from")
    gains = [place for place in good if _gain(found.stage(place), found.reference)]
    if not gains:
        nearest = max(good, key=lambda place: _speed(found.stage(place)))
        near = found.stage(nearest)
        shown = f"{_called(found, nearest)} comes nearest, with {_times(near.throughput)} the throughput"
        return _as_it_was(found, f"no gain is shown: {shown}")
    best = _preferred(found, gains)
    confirmations: list[Confirmation] = []
    for place in _sequence(found, gains, best):
        confirmations.append(trial.tested(place, found))
        if confirmations[-1].why and confirmations[-1].accuracy is not None:  # what cannot be judged says nothing
            break
    found = msgspec.structs.replace(found, confirmations=tuple(confirmations))
    held = [confirmation for confirmation in confirmations if not confirmation.why]
    if not held:
        first = confirmations[0]
        said_ = f"{_called(found, first.stage)} is inside the budget on the validation part, but on the test part "
        return _missed(found, first.stage, first, f"{said_}{short or first.why}")
    last = held[-1]
    assert last.accuracy is not None
    sentence = f"{_called(found, last.stage)}: {_bought(found.stage(last.stage), found.reference)}"
    if last.stage != best:
        missed = next(each for each in reversed(confirmations) if each.why)
        sentence += f"; {_called(found, missed.stage)} promised more, but on the test part {missed.why}"
    return msgspec.structs.replace(
        found,
        best=last.stage,
        verdict="best",
        said=sentence,
        test=last.accuracy,
        also=_counterpart(found.attempts, last.stage),
    )


def _as_it_was(found: Compression, why: str) -> Compression:
    return msgspec.structs.replace(found, verdict="no gain", said=f"{why}: the bundle is as it was")


def _missed(found: Compression, place: Place, tested: Confirmation, why: str) -> Compression:
    return msgspec.structs.replace(
        found,
        best=place,
        verdict="nearest miss",
        said=f"{why}; this is the nearest miss",
        test=tested.accuracy or found.test,
        confirmations=found.confirmations or (tested,),
        also=_counterpart(found.attempts, place),
    )


def _preferred(found: Compression, places: Sequence[Place]) -> Place:
    fastest = max(_speed(found.stage(place)) for place in places)
    return min(
        (place for place in places if _speed(found.stage(place)) >= (1 - _ALIKE) * fastest),
        # of the same network in int8 the one that is right on any machine, if both are inside the budget
        key=lambda place: (found.stage(place).needs, found.stage(place).bytes, -_speed(found.stage(place))),
    )


def _sequence(found: Compression, places: Sequence[Place], best: Place) -> list[Place]:
    """Gentler ones that would be the answer without `best`, gentlest first, and `best` at the end."""
    sequence: list[Place] = []
    for place in sorted(places, key=lambda place: (_most(found.stage(place).accuracy), place)):
        if place == best:
            break
        if not sequence or _preferred(found, [*sequence, place]) == place:
            sequence.append(place)
    return [*sequence, best]


def _most(accuracy: Accuracy) -> float:
    """By how much it falls at most."""
    return accuracy.drop_interval[1]


def _speed(stage: Stage) -> float:
    return stage.throughput.value if stage.throughput is not None else 0.0


def _gain(stage: Stage, reference: Stage) -> Literal["", "faster", "smaller"]:
    """What is shown to be better than the reference: no proven gain is no gain."""
    if stage.throughput is None:
        return ""
    if stage.throughput.interval[0] > 1:
        return "faster"
    is_smaller = stage.bytes <= _SMALLER * reference.bytes
    return "smaller" if is_smaller and stage.throughput.interval[0] >= 1 - _ALIKE else ""


def _bought(stage: Stage, reference: Stage) -> str:
    size = f"{reference.bytes / stage.bytes:.1f}x smaller on disk"
    if _gain(stage, reference) == "faster":
        smaller = f", {size}" if stage.bytes <= _SMALLER * reference.bytes else ""
        return f"{_times(stage.throughput)} the throughput{smaller}"
    return f"{size} and no slower, {_times(stage.throughput)} the throughput"


def _times(factor: Factor | None) -> str:
    assert factor is not None
    return f"{factor.value:.2f}x ({factor.interval[0]:.2f} to {factor.interval[1]:.2f})"


def _called(found: Compression, place: Place) -> str:
    """The recipe, and how far it was gone."""
    attempt, stages = found.attempts[place[0]], found.attempts[place[0]].stages[: place[1] + 1]
    is_whole = ",".join(stage.step for stage in stages) == attempt.recipe
    return attempt.recipe if is_whole else f"{attempt.recipe}, up to its step {stages[-1].step}"


def _left(found: Compression, reference: Bundle, out: Path, steps: Path, name: str) -> Compression:
    """Leave the answer at `out`, and what was found in the store."""
    if found.best is None:
        found.save(steps)
        reference.copy_to(out, name)
    else:
        chosen, stage = Bundle.open(Path(found.answer.bundle)), found.answer
        if found.also is not None:
            attempt, stage_at = found.also
            other = found.attempts[attempt].stages[stage_at]
            beside = out.with_name(f"{out.name}-{other.needs or 'any'}")
            Bundle.open(Path(other.bundle)).copy_to(beside, name).with_metrics({"validation": other.accuracy})
            found = msgspec.structs.replace(found, said=f"{found.said}; {_beside(stage, other, beside)}")
        found.save(steps)  # first, so that what lies at `out` is known to be of this work, whenever it is killed
        # copied first, so that the store keeps the bundle as its key made it
        chosen.copy_to(out, name).with_metrics({"validation": stage.accuracy, "test": found.test})
    return found


def _counterpart(attempts: Sequence[Attempt], best: Place) -> Place | None:
    """The int8 that was made beside the answer for other machines; the two are attempts next to each other."""
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
        self,
        reference: Bundle,
        dataset: Dataset,
        engine: EngineName,
        bench: Bench,
        progress: Progress,
        budget: AccuracyBudget,
    ) -> None:
        self._reference = reference
        self._dataset = dataset
        self._engine = engine
        self._bench = bench
        self._progress = progress
        self._budget = budget
        self._answers: dict[str, NDArray[Any]] = {}
        self._known: dict[tuple[str, str], Stage] = {}
        self.reference_stage = self._stage("", reference, self.accuracy(reference, "validation"))
        self.reference_test = self.accuracy(reference, "test")

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

    def tested(self, place: Place, found: Compression) -> Confirmation:
        """What the test part says of a stage; no other decision has seen it."""
        bundle = Bundle.open(Path(found.stage(place).bundle))
        self._progress.start(f"confirm {bundle.manifest.name} on the test part", len(self._dataset.test))
        try:
            accuracy = self.accuracy(bundle, "test")
        except StorageError:
            raise
        except RushhourError as error:
            self._progress.done(str(error), good=False)
            return Confirmation(place, None, str(error))
        why = why_outside(accuracy, self._budget)
        self._progress.done(why or f"{accuracy.metric} {accuracy.value:.4f}", good=not why)
        return Confirmation(place, accuracy, why)

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
            kept=str(bundle.manifest.lineage[-1].settings.get(LEFT, "")) if bundle.manifest.lineage else "",
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
    found = bench_artefacts(parent, children, blocks=_BLOCKS, seconds=0.25)
    if all(speed.throughput.low > 1 or speed.throughput.high < 1 for speed in found.values()):
        return found
    return bench_artefacts(parent, children, blocks=_MORE_BLOCKS, seconds=0.25)


def _is_slower(ratio: Ratio) -> bool:
    """Shown to be slower, or slower by more than a tie."""
    return ratio.high < 1 or ratio.value < 1 - _TIE


def _factor(ratio: Ratio) -> Factor:
    return Factor(ratio.value, ratio.interval, ratio.n)

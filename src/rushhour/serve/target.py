"""`Target`: what `rushhour serve` serves: a run, a plan or a bundle, opened as a plan and its bundles.

A plan may come from another machine: its layout is scaled to the cores here (`Target.scaled_to`), and if this machine
cannot run the plan's first variant correctly, the next best one is served (`Target.variants`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from rushhour.bundle import Bundle, suggest_bundle
from rushhour.cascade import refused, why_no_score
from rushhour.engines import EngineConfig
from rushhour.errors import BundleError, PlanError
from rushhour.goal import SLO, Goal
from rushhour.ladder import LadderPoint
from rushhour.plan import SO_FAR, EngineName, Plan, Policy, Precision, Variant
from rushhour.system.machine import cores, describe
from rushhour.system.storage import explained

_MODELS: Final = "config.json", "saved_model.pb"
"""By which a folder is that of a model: of Hugging Face, of TensorFlow."""
_ITSELF = "."
"""The folder of the bundle in the plan that is made of a bundle alone."""
_ENGINE: Final = 3.0
"""Memory of an engine over the size of its graph, about: as it is read, as it is compiled, and in between."""
_ENGINES: Final[tuple[EngineName, ...]] = ("openvino", "onnxruntime")


@dataclasses.dataclass(frozen=True)
class ServedVariant:
    """What answers requests: a bundle, and how its engine runs it.

    Attributes:
        name: in the plan, or what it is instead.
    """

    bundle: Bundle
    config: EngineConfig
    name: str = ""

    def is_same(self, other: ServedVariant) -> bool:
        """Whether bundle and engine settings are equal."""
        return self.config == other.config and self.bundle.manifest.hash == other.bundle.manifest.hash

    def __str__(self) -> str:
        config = self.config
        return (
            f"{self.bundle.manifest.name} by {config.engine} in {config.precision}: {config.streams} streams of "
            f"{config.threads} threads, batches up to {config.max_batch}"
        )


@dataclasses.dataclass(frozen=True)
class Target:
    """A plan, and the opened bundle of its first variant.

    Attributes:
        path: that was opened, to open it again.
        folder: that the plan's bundles are in.
    """

    path: Path
    plan: Plan
    bundle: Bundle
    folder: Path

    @property
    def name(self) -> str:
        """The model's name for clients: of the model that was tuned, whichever variant won; of a bundle its own."""
        if self.plan.model:
            return self.plan.model
        reference = self._reference()
        return (self.bundle if reference is None else reference).manifest.name

    @property
    def engine_config(self) -> EngineConfig:
        """How the plan runs its first variant."""
        return _config(self.plan.variants[0], self.plan.policy)

    @property
    def first(self) -> ServedVariant:
        """The plan's first variant, exactly as the plan says."""
        return ServedVariant(self.bundle, self.engine_config, self.plan.variants[0].name)

    @property
    def ladder_hash(self) -> str:
        """Equal for ladders of equal bundles only; empty without a ladder."""
        if not self.plan.ladder:
            return ""
        hashes = {variant.name: variant.bundle_hash for variant in self.plan.variants}
        return hashlib.sha256(" ".join(hashes[point.variant] for point in self.plan.ladder).encode()).hexdigest()

    def without_ladder(self) -> Target:
        """The same with its first variant alone, whatever the load."""
        return dataclasses.replace(self, plan=msgspec.structs.replace(self.plan, ladder=()))

    def rung(self, point: LadderPoint, room: int | None) -> ServedVariant:
        """The variant of a point of the ladder.

        Args:
            room: cores that it may use; None for as many as the plan says.

        Raises:
            PlanError, BundleError: as `open_target`.
        """
        plan = self.plan
        variant = next(each for each in plan.variants if each.name == point.variant)
        bundle = self.bundle if variant is plan.variants[0] else _opened(self.folder, variant)
        policy = msgspec.structs.replace(plan.policy, max_batch=point.max_batch)
        return ServedVariant(bundle, _config(variant, policy if room is None else _fitted(policy, room)), variant.name)

    def cascaded(self, room: int | None) -> list[ServedVariant]:
        """The variants of the plan's cascade, in the order in which they are asked.

        Args:
            room: cores that they may use; None for as many as the plan says.

        Raises:
            PlanError, BundleError: as `open_target`.
        """
        plan, rule = self.plan, self.plan.cascade
        assert rule is not None
        named = {variant.name: variant for variant in plan.variants}
        policy = plan.policy if room is None else _fitted(plan.policy, room)
        bounds = [*(step.max_batch or policy.max_batch for step in rule.steps), policy.max_batch]
        found = []
        for name, bound in zip(rule.variants, bounds, strict=True):
            variant = named[name]
            bundle = self.bundle if variant is plan.variants[0] else _opened(self.folder, variant)
            found.append(
                ServedVariant(bundle, _config(variant, msgspec.structs.replace(policy, max_batch=bound)), name)
            )
        return found

    def cascade_hash(self) -> str:
        """Equal for cascades of equal bundles by the same rule only."""
        hashes = {variant.name: variant.bundle_hash for variant in self.plan.variants}
        assert self.plan.cascade is not None
        parts = [
            *(hashes[name] for name in self.plan.cascade.variants),
            msgspec.json.encode(self.plan.cascade).decode(),
        ]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()

    def with_layout(self, streams: int | None, threads: int | None, room: int) -> Target:
        """The same with so many streams and threads of each stream; None is what the plan says.

        Args:
            streams: batches that run at the same time.
            threads: of each.
            room: cores that serve. A bundle without a plan gets as many streams as fit.
        """
        policy = self.plan.policy
        threads = threads or policy.threads
        usual = max(1, room // threads) if self.plan.variants[0].bundle == _ITSELF else policy.streams
        return self._with(msgspec.structs.replace(policy, streams=streams or usual, threads=threads))

    def fitted_to(self, room: int) -> Target:
        """The same on so many cores: as many streams as fit, and the remaining cores as threads."""
        return self._with(_fitted(self.plan.policy, room))

    def scaled_to(self, room: int) -> Target:
        """The same on so many cores of each cell: the engine uses the share of them that it used where it was measured.

        A plan without evidence is not changed.
        """
        policy, evidence = self.plan.policy, self.plan.evidence
        measured = room if evidence is None else max(1, evidence.machine.cores // policy.cells)
        if measured == room:
            return self
        lanes = max(1, room * policy.streams * policy.threads // measured)
        # As many threads of a stream as the plan has; fewer where more of the cores are used then.
        threads = max(range(min(policy.threads, lanes), 0, -1), key=lambda each: lanes // each * each)
        return self._with(msgspec.structs.replace(policy, streams=lanes // threads, threads=threads))

    def bundle_of(self, variant: Variant) -> Bundle:
        """The bundle of one of the plan's variants.

        Raises:
            PlanError, BundleError: as `open_target`.
        """
        return _opened(self.folder, variant)

    def _with(self, policy: Policy) -> Target:
        return dataclasses.replace(self, plan=msgspec.structs.replace(self.plan, policy=policy))

    def variants(self, cores: int) -> Iterator[ServedVariant]:
        """The plan's first variant, then alternatives for a machine that cannot run it correctly.

        None uses more than `cores` threads. The alternatives are the plan's further variants, the first one's bundle on
        another engine and in full precision, and the run's reference in full precision.
        """
        first, policy = self.plan.variants[0], _fitted(self.plan.policy, cores)
        yield ServedVariant(self.bundle, _config(first, policy), first.name)
        # The smaller variants of a cascade may be outside the accuracy budget alone.
        steps = () if self.plan.cascade is None else self.plan.cascade.variants[:-1]
        for variant in [each for each in self.plan.variants[1:] if each.name not in steps]:
            with contextlib.suppress(BundleError, PlanError):
                yield ServedVariant(_opened(self.folder, variant), _config(variant, policy), variant.name)
        own: Precision = "int8" if first.precision == "int8" else "f32"
        others: tuple[tuple[Bundle | None, Precision], ...] = ((self.bundle, own), (self._reference(), "f32"))
        for bundle, precision in others:
            if bundle is None or bundle.manifest.signature != self.bundle.manifest.signature:
                continue
            for engine in _ENGINES:
                config = msgspec.structs.replace(_config(first, policy), engine=engine, precision=precision)
                if bundle is not self.bundle or config != _config(first, policy):
                    yield ServedVariant(bundle, config, f"{bundle.manifest.name}-{engine}-{precision}")

    def _reference(self) -> Bundle | None:
        """The run's reference bundle, if there is one."""
        try:
            reference = Bundle.open(self.folder / "bundles" / "reference")
        except BundleError:
            return None
        return reference if reference.manifest.hash != self.bundle.manifest.hash else None


def _config(variant: Variant, policy: Policy) -> EngineConfig:
    return EngineConfig(
        engine=variant.engine,
        precision=variant.precision,
        streams=policy.streams,
        threads=policy.threads,
        max_batch=policy.max_batch,
    )


def _fitted(policy: Policy, cores: int) -> Policy:
    """The same on fewer cores: as many streams as fit, and the remaining cores as threads."""
    if policy.streams * policy.threads <= cores:
        return policy
    streams = min(policy.streams, cores)
    return msgspec.structs.replace(policy, streams=streams, threads=max(1, cores // streams))


def is_target(path: Path) -> bool:
    """Whether a folder is that of a run or a bundle, even of a damaged one."""
    return any((path / name).is_file() for name in ("bundle.json", "plan.json", SO_FAR))


def may_be_model(path: Path) -> bool:
    """Whether there may be a model from elsewhere, and no run, plan or bundle; without importing torch."""
    if path.is_dir():
        return not is_target(path) and any((path / name).is_file() for name in _MODELS)
    try:
        with path.open("rb") as file:
            return not file.read(64).lstrip().startswith(b"{")  # a plan is JSON
    except OSError:
        return False


def open_target(path: Path) -> Target:
    """Open a run's folder, a plan's file or a bundle's folder, and check the bundle against its hashes.

    A run whose search was interrupted is served by its best plan so far. A bundle without a plan is served by OpenVINO
    with one stream per core, where that can run it.

    Raises:
        PlanError: if there is nothing to serve at `path`, or the plan cannot be read.
        BundleError: if the bundle is missing, damaged, or not the one that the plan was made for.
    """
    with explained(f"read {path}"):
        is_bundle = (path / "bundle.json").is_file()
        file = path / "plan.json" if path.is_dir() else path
        if path.is_dir() and not file.is_file() and (path / SO_FAR).is_file():
            file = path / SO_FAR
        is_plan = file.is_file()
    if is_bundle:
        bundle = Bundle.open(path)
        return Target(path, _plan_of(bundle), bundle, path)
    if not is_plan:
        raise PlanError(
            f"there is nothing to serve at {path}",
            "it is neither a run with a plan.json, nor a plan, nor a bundle",
            suggest_bundle(path) or "give the path of a run, a plan or a bundle that `rushhour` wrote",
        )
    plan = Plan.load(file)
    bundle = _opened(file.parent, plan.variants[0])
    _check_room(file, plan.policy, bundle)
    target = Target(path, plan, bundle, file.parent)
    if plan.ladder:
        check_rungs(target)
    if plan.cascade is not None:
        check_cascade(target)
    return target


def check_cascade(target: Target) -> None:
    """Refuse a cascade whose variants differ by more than their answers, whose answers have no score, or that memory
    cannot hold.

    Raises:
        PlanError: naming the first fault.
        BundleError: if one of its bundles is missing, damaged, or not the one that the plan was made for.
    """
    plan, rule = target.plan, target.plan.cascade
    assert rule is not None
    variants = target.cascaded(None)
    last = variants[-1].bundle.manifest
    for variant in variants[:-1]:
        what = _difference(variant.bundle, variants[-1].bundle)
        if what:
            raise refused(f"{variant.name} and {rule.last} differ in their {what}", "make all variants of one model")
    if last.tiles is not None:
        raise refused("its model cuts pictures into tiles, whose answers are merged", "serve a plan of one variant")
    spec = next((spec for spec in last.signature.outputs if spec.name == rule.output), None)
    if spec is None:
        raise refused(f"the model has no output {rule.output!r}", "name one of its outputs")
    if why := why_no_score(last.task.kind, spec.shape):
        raise refused(why, "serve a plan of one variant")
    needed, memory = plan.policy.cells * sum(map(_engine_bytes, variants)), describe().memory_gb * 2**30
    if memory and needed > memory / 2:
        why = f"its variants need about {needed / 2**30:.3g} GiB, and this machine has {memory / 2**30:.3g}"
        raise refused(why, "serve a plan of one variant")


def _difference(one: Bundle, other: Bundle) -> str:
    """What clients could tell two variants apart by beside their answers; empty where there is nothing."""
    mine, theirs = one.manifest, other.manifest
    pairs = (
        ("signature", mine.signature, theirs.signature),
        ("task", mine.task, theirs.task),
        ("decoding of pictures", mine.preprocessing.decoding, theirs.preprocessing.decoding),
        ("texts", mine.text, theirs.text),
        ("tiles", mine.tiles, theirs.tiles),
    )
    return next((what for what, own, its in pairs if own != its), "")


def check_rungs(target: Target) -> None:
    """Refuse a ladder whose variants clients could tell apart by more than their answers, or that memory cannot hold.

    A bundle that cannot be opened is no reason: the ladder goes on without it.

    Raises:
        PlanError: naming the first fault.
    """
    plan = target.plan
    name, needed = plan.variants[0].name, 0.0
    for point in plan.ladder:
        try:
            bundle = target.rung(point, None).bundle
        except BundleError:
            continue
        what = _difference(bundle, target.bundle)
        if what:
            raise PlanError(
                f"the ladder of {target.path} cannot be served",
                f"{point.variant} and {name} differ in their {what}",
                "make all variants of one model",
            )
        classes = len(bundle.manifest.task.classes)
        if point.class_drops and len(point.class_drops) != classes:
            raise PlanError(
                f"the ladder of {target.path} cannot be served",
                f"{point.variant} has accuracy drops of {len(point.class_drops)} classes, and the task has {classes}",
                "give one for each class, or none",
            )
        needed += _ENGINE * bundle.model_bytes + _batch_bytes(bundle, plan.policy.streams, point.max_batch)
    needed, memory = plan.policy.cells * needed, describe().memory_gb * 2**30
    if memory and needed > memory / 2:
        raise PlanError(
            f"the ladder of {target.path} cannot be served here",
            f"its {len(plan.ladder)} variants need about {needed / 2**30:.3g} GiB in {plan.policy.cells} worker "
            f"processes, and this machine has {memory / 2**30:.3g}",
            "omit variants, lower `max_batch` of its points, or serve with --fixed",
        )


def needed_bytes(target: Target) -> float:
    """Memory that a target needs in one process, about: its engines and their batches."""
    plan = target.plan
    if plan.ladder:
        with contextlib.suppress(BundleError):
            rungs = [target.rung(point, None) for point in plan.ladder]
            return sum(map(_engine_bytes, rungs))
    return sum(map(_engine_bytes, [target.first] if plan.cascade is None else target.cascaded(None)))


def _engine_bytes(variant: ServedVariant) -> float:
    config = variant.config
    return _ENGINE * variant.bundle.model_bytes + _batch_bytes(variant.bundle, config.streams, config.max_batch)


def _batch_bytes(bundle: Bundle, streams: int, max_batch: int) -> int:
    """Memory of the buffers of an engine: of the batches that it computes, and of as many that wait in it."""
    signature = bundle.manifest.signature
    row = sum(spec.row_bytes for spec in (*signature.inputs, *signature.outputs))
    return 2 * min(streams, cores()) * max_batch * row


def _check_room(file: Path, policy: Policy, bundle: Bundle) -> None:
    """Check that the batches of a plan fit into this machine's memory.

    Raises:
        PlanError: if they do not.
    """
    memory = describe().memory_gb * 2**30
    needed = _batch_bytes(bundle, policy.streams, policy.max_batch)
    if memory and needed > memory / 2:
        raise PlanError(
            f"the plan {file} cannot be served here",
            f"its `max_batch` of {policy.max_batch} samples needs {needed / 2**30:.3g} GiB, and "
            f"this machine has {memory / 2**30:.3g}",
            "lower `max_batch` in `policy`",
        )


def open_planned(path: Path, plan: Plan, folder: Path) -> Target:
    """Open the bundles of a plan that was read before, whatever is at the path by now.

    Args:
        path: that the plan was read from.
        plan: that was read.
        folder: that its bundles are in.

    Raises:
        PlanError, BundleError: if the bundle is missing, damaged, or was replaced.
    """
    return Target(path, plan, _opened(folder, plan.variants[0]), folder)


def _opened(folder: Path, variant: Variant) -> Bundle:
    """A variant's bundle, inside the plan's folder.

    Raises:
        PlanError: if it is outside.
        BundleError: if it is missing, damaged, or not the one that the plan was made for.
    """
    relative = Path(variant.bundle)
    if relative.is_absolute() or ".." in relative.parts:
        raise PlanError(
            f"the plan in {folder} names the bundle {variant.bundle!r}",
            "a bundle must be inside its plan's folder",
            "keep plan and bundles together as `rushhour tune` wrote them",
        )
    bundle = Bundle.open(folder / relative)
    if bundle.manifest.hash != variant.bundle_hash:
        raise BundleError(
            f"the bundle {bundle.path} is not the one that the plan in {folder} was made for",
            f"its hash begins with {bundle.manifest.hash[:12]}, the plan's with {variant.bundle_hash[:12]}",
            "restore the bundle, or tune again",
        )
    return bundle


def _plan_of(bundle: Bundle) -> Plan:
    manifest = bundle.manifest
    variant = Variant(
        name=f"{manifest.name}-{manifest.precision}",
        bundle=_ITSELF,
        bundle_hash=manifest.hash,
        engine="openvino",
        precision=manifest.precision,
    )
    goal = Goal(slo=SLO(percentile=99, limit_s=0.05))
    policy = Policy(streams=cores(), threads=1, max_batch=16)
    return Plan(goal=goal, variants=(variant,), policy=policy, model=manifest.name)

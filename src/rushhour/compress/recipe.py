"""Recipes: ordered, frozen steps of compression. A recipe applied to a bundle gives a bundle for each step.

Every bundle lies in a store under a name made from all that decides its content: the bundle before, the recipe's first
bundle, the step, the data, the seed and the versions of what computes. Nothing is computed twice, a killed run goes on
inside its step, and it ends with the same bytes as one left alone.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import msgspec
import numpy as np
import torch
from torch import nn

from rushhour.bundle import SAMPLES, Bundle, Source, Step
from rushhour.compress.distil import Distil, distil
from rushhour.compress.judge import named_inputs
from rushhour.compress.lowrank import LowRank, dominant, split
from rushhour.compress.prune import Prune, prune
from rushhour.compress.quantize import Target, check_plain, quantize
from rushhour.compress.weights import compress_weights, halve_weights
from rushhour.data.augment import Augmentation
from rushhour.data.dataset import Dataset
from rushhour.errors import BundleError, DataError, GoalError, ModelError, RushhourError
from rushhour.models import Deployed, build, code_of, export, load_deployed, resized, trusted_of
from rushhour.progress import Progress
from rushhour.records import identity
from rushhour.system import machine
from rushhour.system.faults import in_short
from rushhour.train.checkpoint import Checkpoint


class Quantize(msgspec.Struct, frozen=True, tag_field="step", tag="int8"):
    """int8 weights and activations; see `quantize`.

    Attributes:
        calibration: samples to find the ranges of activations with.
        target: the machines that it is for: `any` and `avx2` keep to 7 bits of the weights, `vnni` and `amx` use all 8.
    """

    calibration: int = 300
    target: Target = "any"

    def __post_init__(self) -> None:
        if self.calibration < 1:
            raise ModelError(f"cannot calibrate with {self.calibration} samples", "1 or more are needed", "use 300")


class Precision(msgspec.Struct, frozen=True, tag_field="step", tag="precision"):
    """Fewer bits without data.

    Attributes:
        form: `bf16`: computed in bfloat16 by the engine that serves it; `f16`: weights are stored so, and computed with
            in f32; `w8`: the same in 8 bits. The last two make it smaller on disk, not faster.
    """

    form: Literal["bf16", "f16", "w8"] = "bf16"


AnyStep: TypeAlias = Prune | LowRank | Distil | Quantize | Precision

_TRAINS: Final = (Prune, LowRank, Distil)
"""Steps that need the torch module; all others work on the graph, and end with one that these cannot take."""

LEFT: Final = "left as it is"
"""The setting of a step that is a result: layers that it could not change, and why."""
_NAMED: Final = 4
"""Layers named with one reason, at most."""

_FORMS: Final = ("bf16", "f16", "w8")
_NAMES: Final[dict[str, tuple[type[AnyStep], str]]] = {
    "prune": (Prune, "ratio"),
    "lowrank": (LowRank, "keep"),
    "distil": (Distil, "epochs"),
    "int8": (Quantize, "calibration"),
}
"""Name in a recipe's text -> the step, and the setting that a bare value means."""

_EXAMPLE: Final = "write for example prune:0.5,lowrank:0.1,distil:3,int8"
_VERSIONS: Final = ("numpy", "torch", "torch-pruning", "nncf", "onnx", "onnxscript", "openvino", "onnxruntime")


class Recipe(msgspec.Struct, frozen=True):
    """Ordered steps: those that train come first, then at most one that lays down the bits.

    Attributes:
        steps: one or more.
    """

    steps: tuple[AnyStep, ...]

    def __post_init__(self) -> None:
        if not self.steps:
            raise GoalError("the recipe has no steps", "it would leave the bundle as it is", _EXAMPLE)
        for before, after in zip(self.steps, self.steps[1:], strict=False):
            if not isinstance(before, _TRAINS):
                raise GoalError(
                    f"cannot {said(after)} after {said(before)}",
                    "what is stored in fewer bits can neither be trained nor stored in fewer again",
                    f"let {said(before)} be the last step",
                )
            if isinstance(after, Distil) and after.student is not None:
                raise GoalError(
                    f"cannot distil into another network after {said(before)}",
                    "what the steps before it did would be thrown away",
                    "let distil be the first step, or leave out its student",
                )

    @classmethod
    def parse(cls, text: str) -> Recipe:
        """Read `prune:0.5,lowrank:0.1,distil:3,int8`, or JSON: a list of steps.

        After its first value a step takes settings by name: `prune:0.5:epochs=4:ignored=0+3`. A bare value is prune's
        ratio, what lowrank keeps (or its rank, if it is a whole number), distil's epochs, int8's calibration samples.

        Args:
            text: the steps, or a file of JSON that ends in `.json`, or JSON itself.

        Raises:
            GoalError: if it cannot be read, or the steps are in no sensible order.
            ModelError: if a setting of a step is out of its bounds.
        """
        stripped = text.strip()
        if stripped.endswith(".json"):
            try:
                stripped = Path(stripped).read_text("utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                raise GoalError(f"cannot read the recipe {text}", str(error), "check the path") from error
        if stripped.startswith(("[", "{")):
            try:
                return cls(msgspec.json.decode(stripped, type=tuple[AnyStep, ...]))
            except (msgspec.DecodeError, RecursionError) as error:
                raise GoalError(
                    "cannot read the recipe's JSON", str(error), 'write for example [{"step": "prune", "ratio": 0.5}]'
                ) from error
        return cls(tuple(_read(part.strip()) for part in stripped.split(",")) if stripped else ())

    def __str__(self) -> str:
        return ",".join(said(step) for step in self.steps)

    @property
    def factories(self) -> tuple[str, ...]:
        """Those of the students that it names."""
        return tuple(
            step.student.factory for step in self.steps if isinstance(step, Distil) and step.student is not None
        )

    def for_machines(self, target: Target) -> Recipe:
        """The same, with int8 for these machines."""
        steps = (
            msgspec.structs.replace(step, target=target) if isinstance(step, Quantize) else step for step in self.steps
        )
        return Recipe(tuple(steps))


def _read(text: str) -> AnyStep:
    name, *rest = (piece.strip() for piece in text.split(":"))
    if name in _FORMS and not rest:
        return msgspec.convert({"step": "precision", "form": name}, type=Precision)
    if name not in _NAMES:
        known = ", ".join((*_NAMES, *_FORMS))
        why = f"{name} takes no settings" if name in _FORMS else f"the steps are {known}"
        raise GoalError(f"cannot read the step {text!r} of the recipe", why, _EXAMPLE)
    kind, usual = _NAMES[name]
    settings: dict[str, Any] = {}
    for index, piece in enumerate(rest):
        key, equals, value = piece.partition("=")
        if not equals and index == 0:
            key, value = ("rank" if kind is LowRank and piece.isdecimal() else usual), piece
        if not value or key in settings or key not in kind.__struct_fields__ or key in ("student", "limits"):
            why = "it is there twice" if key in settings else f"{name} has {', '.join(kind.__struct_fields__)}"
            also = "; student and limits can be said in JSON only" if key in ("student", "limits") else ""
            raise GoalError(f"cannot read {piece!r} in the step {text!r}", f"{why}{also}", _EXAMPLE)
        settings[key] = value.split("+") if key in ("ignored", "layers") else value
    if "augment" in settings:
        settings["augment"] = msgspec.to_builtins(Augmentation.parse(settings["augment"].replace("+", ",")))
    try:
        return msgspec.convert({"step": kind.__struct_config__.tag, **settings}, type=kind, strict=False)
    except msgspec.ValidationError as error:
        raise GoalError(f"cannot read the step {text!r} of the recipe", str(error), _EXAMPLE) from error


def said(step: AnyStep) -> str:
    """A step as a recipe's text has it; what text cannot say is left out."""
    if isinstance(step, Precision):
        return step.form
    kind = type(step)
    name = str(kind.__struct_config__.tag)
    default, usual = kind(), _NAMES[name][1]
    settings: list[str] = []
    for field in kind.__struct_fields__:
        value = getattr(step, field)
        if value == getattr(default, field) and field != usual:
            continue
        if value is None or field in ("student", "limits"):
            continue
        if isinstance(value, tuple):
            value = "+".join(value)
        elif isinstance(value, Augmentation):
            value = str(value).replace(",", "+")
        elif isinstance(value, bool):
            value = str(value).lower()
        elif isinstance(value, float):
            value = f"{value:g}"
        if field == "ratio" and isinstance(step, Prune) and step.parameters is not None:
            continue
        if field == usual and value == getattr(default, field) and isinstance(step, Quantize):
            continue
        is_bare = not settings and (field == usual or (field == "rank" and isinstance(step, LowRank)))
        settings.append(f"{value}" if is_bare else f"{field}={value}")
    return ":".join([name, *settings])


class NothingToDo(ModelError):
    """A step that would leave this network as it is: the recipe's others may still be done."""


class Store:
    """A folder of bundles by what they were made from.

    Args:
        folder: made when something is kept; several recipes and several runs may share it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, key: str) -> Path:
        """Where the bundle of this key lies, or will."""
        return self.folder / key[:24]

    def find(self, key: str) -> Bundle | None:
        """The bundle of this key; a damaged one counts as none."""
        try:
            return Bundle.open(self.path(key))
        except BundleError:
            return None

    def checkpoint(self, key: str, part: int) -> Checkpoint:
        """Where training stands, in a part of the step of this key."""
        return Checkpoint(self.folder / ".checkpoints", hashlib.sha256(f"{key}/{part}".encode()).hexdigest())


def apply(
    recipe: Recipe,
    bundle: Bundle,
    dataset: Dataset,
    store: Store,
    *,
    seed: int = 0,
    max_drop: float | None = None,
    progress: Progress,
    trusted: tuple[str, ...] = (),
    checkpoint_every_s: float = 15.0,
) -> Iterator[Bundle]:
    """The bundle after each step, as it is made or found.

    Equal arguments give equal bundles on equal machines, also where the process was killed on the way.

    Args:
        recipe: what to do.
        bundle: what to do it to, and the teacher of `distil`.
        dataset: what to train and calibrate with; labels are used where there are any.
        store: of what was made before.
        seed: of all that is random.
        max_drop: the budget that int8 is held to; see `quantize`.
        progress: hears of every step.
        trusted: factories that may be imported besides those of `rushhour.models`.
        checkpoint_every_s: seconds between checkpoints while training; 0 for one after every step.

    Raises:
        DataError: if the data does not fit the bundle, or holds NaN; before any work.
        ModelError: if a step cannot be done to this network. What was made before stays in the store.
        StorageError: if the disk does not take it.
    """
    check_data(bundle, dataset)
    before, trusted = bundle, trusted_of(bundle, trusted)
    for step in recipe.steps:
        key = key_of(step, before, bundle, dataset, seed, max_drop, trusted)
        made = store.find(key)
        if made is None:
            work = _Work(store, key, dataset, bundle, seed, max_drop, progress, trusted, checkpoint_every_s)
            made = work.done(step, before)
        yield made
        before = made


def check_data(bundle: Bundle, dataset: Dataset) -> None:
    """Raise unless every part of the data fits the bundle and is made of numbers.

    Raises:
        DataError: if not.
    """
    for part in ("train", "validation", "test"):
        split_ = getattr(dataset, part)
        named_inputs(bundle, split_.inputs)
        targets = split_.targets
        if targets.dtype.kind == "f" and not np.isfinite(targets).all():
            row = int((~np.isfinite(targets.reshape(len(targets), -1)).all(axis=1)).argmax())
            raise DataError(
                f"the targets of {dataset.name} hold NaN or infinity",
                f"sample {row} of the {part} part is the first that does",
                "remove or fill such samples",
            )


def key_of(
    step: AnyStep,
    before: Bundle,
    first: Bundle,
    dataset: Dataset,
    seed: int,
    max_drop: float | None = None,
    trusted: tuple[str, ...] = (),
) -> str:
    """All that decides what `step` makes, as a SHA-256.

    Args:
        step: what is done.
        before: to this bundle.
        first: the recipe's first bundle.
        dataset: with this data.
        seed: of all that is random.
        max_drop: the budget, which only int8 minds.
        trusted: factories whose code may be looked at.
    """
    trains, takes_data = isinstance(step, _TRAINS), isinstance(step, (*_TRAINS, Quantize))
    sources = [each.manifest.source for each in (before, first)] + ([step.student] if isinstance(step, Distil) else [])
    return identity.key(
        before=_content(before),
        first=_content(first) if isinstance(step, Distil) else None,
        step=step,
        data=dataset if takes_data else None,
        seed=seed if takes_data else None,
        max_drop=max_drop if isinstance(step, Quantize) else None,
        versions={name: importlib.metadata.version(name) for name in _VERSIONS},
        code=[_code(source, trusted) for source in sources if source is not None] if trains else None,
        # channels are rounded to its registers, and it decides whether training computes in bf16
        features=machine.describe().features if takes_data else None,
    )


def _content(bundle: Bundle) -> list[Any]:
    """What of a bundle can change its children: not its metrics."""
    return [bundle.manifest.name, bundle.manifest.lineage, bundle.content_key]


def _code(source: Source, trusted: tuple[str, ...]) -> dict[str, str]:
    """Of a network; nothing where it may not be imported: then a step does without it, or says so."""
    try:
        return code_of(source, trusted)
    except ModelError:
        return {}


class _Work:
    """One step on one bundle."""

    def __init__(
        self,
        store: Store,
        key: str,
        dataset: Dataset,
        first: Bundle,
        seed: int,
        max_drop: float | None,
        progress: Progress,
        trusted: tuple[str, ...],
        checkpoint_every_s: float,
    ) -> None:
        self._store = store
        self._key = key
        self._out = store.path(key)
        self._dataset = dataset
        self._first = first
        self._seed = seed
        self._max_drop = max_drop
        self._progress = progress
        self._trusted = trusted
        self._every_s = checkpoint_every_s
        self._checkpoints: list[Checkpoint] = []

    def done(self, step: AnyStep, before: Bundle) -> Bundle:
        """The bundle that the step makes, sealed in the store; its checkpoints are gone.

        Raises:
            RushhourError: whatever goes wrong: code of any kind lies in a user's network.
        """
        try:
            made = self._made(step, before)
        except (RushhourError, OSError):
            raise
        except Exception as error:
            raise ModelError(
                f"cannot {said(step)} {before.manifest.name}",
                in_short(error),
                "leave that step out of the recipe",
            ) from error
        for checkpoint in self._checkpoints:
            checkpoint.remove()
        return made

    def _made(self, step: AnyStep, before: Bundle) -> Bundle:
        match step:
            case Prune():
                return self._pruned(step, before)
            case LowRank():
                return self._split(step, before)
            case Distil():
                return self._distilled(step, before)
            case Quantize():
                return quantize(
                    before,
                    self._dataset,
                    self._out,
                    calibration=step.calibration,
                    seed=self._seed,
                    max_drop=self._max_drop,
                    target=step.target,
                    progress=self._progress,
                )
            case Precision():
                return self._lighter(step, before)

    def _pruned(self, step: Prune, before: Bundle) -> Bundle:
        deployed, source = self._opened(before, "prune")
        name, whole = before.manifest.name, _count(deployed)
        kept: dict[str, str] = {}
        # a cut takes seconds and is made again after a kill; its training goes on from a checkpoint
        for iteration in range(step.iterations):
            self._progress.start(f"prune {name}, {iteration + 1} of {step.iterations}")
            kept = prune(deployed, self._dataset, step, iteration, seed=self._seed, name=name)
            as_it_is = f"; left as it is: {_listed(kept)}" if kept else ""
            self._progress.done(f"{whole:,} -> {_count(deployed):,} parameters{as_it_is}")
            if _count(deployed) == whole:
                continue
            _check_rebuilt(deployed, self._resized(source, deployed), before, self._trusted)
            if step.epochs:
                self._teach(before, deployed, Distil(step.epochs, lr=step.lr), iteration)
        if _count(deployed) == whole:
            raise NothingToDo(
                f"nothing of {name} can be pruned",
                _listed(kept) or "no layer has enough channels that can go without others, within its limit",
                "leave the step out; int8, f16 and w8 need no pruning"
                if kept
                else "use a higher ratio, a smaller round_to, or leave the step out",
            )
        notes = {LEFT: _listed(kept)} if kept else {}
        return self._sealed(step, before, deployed, self._resized(source, deployed), notes)

    def _split(self, step: LowRank, before: Bundle) -> Bundle:
        deployed, source = self._opened(before, "split layers of")
        name, whole = before.manifest.name, _count(deployed)
        self._progress.start(f"low rank: {name}")
        ranks = split(deployed, self._dataset, step, seed=self._seed, name=name)
        if not ranks:
            dense = [layer for layer, module in deployed.network.named_modules() if isinstance(module, nn.Linear)]
            raise NothingToDo(
                f"no dense layer of {name} becomes smaller by splitting",
                f"it has {', '.join(sorted(dense)) or 'none'}; by default those with a quarter of all parameters are "
                "tried",
                "name layers, keep less of them, or leave lowrank out of the recipe",
            )
        self._progress.done(f"{whole:,} -> {_count(deployed):,} parameters")
        changed = self._resized(source, deployed, ranks)
        _check_rebuilt(deployed, changed, before, self._trusted)
        return self._sealed(step, before, deployed, changed)

    def _resized(self, source: Source, deployed: Deployed, ranks: Mapping[str, int] | None = None) -> Source:
        return resized(source, deployed.network, ranks, self._trusted)

    def _distilled(self, step: Distil, before: Bundle) -> Bundle:
        if step.student is None:
            deployed, source = self._opened(before, "train")
        else:
            check_plain(before)
            self._check_single_input(before, "distil")
            source, manifest = step.student, before.manifest
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self._seed)
                deployed = Deployed(build(source, self._trusted), manifest.task, manifest.preprocessing)
            self._check_export(step, before, deployed, source)
        self._teach(self._first, deployed, step, 0)
        return self._sealed(step, before, deployed, source)

    def _lighter(self, step: Precision, before: Bundle) -> Bundle:
        if step.form == "w8":
            return compress_weights(before, self._out, progress=self._progress)
        if step.form == "f16":
            return halve_weights(before, self._out, progress=self._progress)
        check_plain(before)
        manifest = msgspec.structs.replace(
            before.manifest,
            precision="bf16",
            lineage=(*before.manifest.lineage, self._lineage(step)),
            metrics={},
            files={},
        )
        weights = before.weights
        return Bundle.create(
            self._out,
            manifest,
            lambda file: _copied(before.model, file),
            None if weights is None else lambda file: _copied(weights, file),
            before.samples() if SAMPLES in before.manifest.files else None,
        )

    def _opened(self, before: Bundle, doing: str) -> tuple[Deployed, Source]:
        """The torch module of a bundle that is to be changed."""
        self._check_single_input(before, doing)
        manifest = before.manifest
        if manifest.precision == "bf16":
            raise ModelError(
                f"cannot {doing} {manifest.name}",
                "it is made to be computed in bf16, and training would make an f32 bundle of it",
                f"{doing.split()[0]} the bundle that it was made from, and let bf16 be the last step",
            )
        if manifest.source is None or before.weights is None or manifest.precision != "f32":
            raise ModelError(
                f"cannot {doing} {manifest.name}",
                "it carries only its graph, and no torch module to be changed",
                "use int8, f16 or w8, or distil it into a student of your own",
            )
        return load_deployed(before, self._trusted), manifest.source

    def _check_single_input(self, before: Bundle, doing: str) -> None:
        if len(before.manifest.signature.inputs) > 1:
            raise ModelError(
                f"cannot {doing} {before.manifest.name}",
                "it has several inputs, and training takes one",
                "use int8, f16 or w8, which need no training",
            )

    def _check_export(self, step: Distil, before: Bundle, deployed: Deployed, source: Source) -> None:
        """Raise if the student could not be sealed: before it is trained, not after."""
        at = self._out.with_name(f".{self._out.name}.trial")
        try:
            self._exported(step, before, deployed, source, at)
        finally:
            shutil.rmtree(at, ignore_errors=True)

    def _teach(self, teacher: Bundle, deployed: Deployed, step: Distil, part: int) -> None:
        self._checkpoints.append(self._store.checkpoint(self._key, part))
        distil(
            teacher,
            deployed,
            self._dataset,
            step,
            seed=self._seed + part,
            checkpoint=self._checkpoints[-1],
            progress=self._progress,
            trusted=self._trusted,
            checkpoint_every_s=self._every_s,
        )

    def _sealed(
        self, step: AnyStep, before: Bundle, deployed: Deployed, source: Source, notes: Mapping[str, str] | None = None
    ) -> Bundle:
        self._progress.start(f"export {before.manifest.name}")
        made = self._exported(step, before, deployed, source, self._out, notes)
        self._progress.done(f"{made.manifest.parameters:,} parameters, {made.model_bytes / 1e6:.2f} MB")
        return made

    def _exported(
        self,
        step: AnyStep,
        before: Bundle,
        deployed: Deployed,
        source: Source,
        out: Path,
        notes: Mapping[str, str] | None = None,
    ) -> Bundle:
        manifest, (spec,) = before.manifest, before.manifest.signature.inputs
        return export(
            deployed.network,
            name=manifest.name,
            task=manifest.task,
            sample_spec=spec,
            preprocessing=manifest.preprocessing,
            source=source,
            lineage=(*manifest.lineage, self._lineage(step, notes)),
            samples=before.samples()[spec.name],
            path=out,
        )

    def _lineage(self, step: AnyStep, notes: Mapping[str, str] | None = None) -> Step:
        settings: dict[str, int | float | str | bool] = {
            name: value if isinstance(value, int | float | str) else msgspec.json.encode(value).decode()
            for name, value in msgspec.to_builtins(step).items()
            if name != "step" and value not in (None, {}, [], ())
        }
        if isinstance(step, _TRAINS):
            data = self._dataset
            settings |= {"dataset": data.name, "fingerprint": data.fingerprint, "marks": data.marks, "seed": self._seed}
        return Step(_tag(step), {**settings, **(notes or {}), "key": self._key[:24]})


def ladder(bundle: Bundle, dataset: Dataset, *, epochs: int = 5, trusted: tuple[str, ...] = ()) -> tuple[Recipe, ...]:
    """What is worth trying on this bundle, from gentle to strong.

    int8 alone; then with half and more of the channels gone, and dominating dense layers split. A bundle that cannot be
    trained gets what needs no training.

    Args:
        bundle: to be compressed.
        dataset: it would be trained on.
        epochs: of distillation at the end of every training.
        trusted: as for `apply`.

    Raises:
        ModelError: if the bundle is compressed already, or its network cannot be built.
    """
    check_plain(bundle, "compress")
    graph_alone = tuple(Recipe((step,)) for step in (Quantize(), Precision("w8"), Precision("f16")))
    manifest = bundle.manifest
    trains = manifest.source is not None and bundle.weights is not None and manifest.precision == "f32"
    if not trains or dataset.train.inputs.dtype.names:
        return graph_alone
    dense = dominant(load_deployed(bundle, trusted).network)
    rungs: list[Recipe] = [graph_alone[0]]
    for ratio, keep in ((0.25, 0.2), (0.5, 0.1), (0.7, 0.05)):
        splits: Sequence[AnyStep] = (LowRank(keep=keep),) if dense else ()
        rungs.append(Recipe((Prune(ratio=ratio, epochs=1), *splits, Distil(epochs), Quantize())))
    return tuple(rungs)


def _listed(kept: Mapping[str, str]) -> str:
    """Layers with the reason why they keep all their channels: those with the same one together."""
    layers: dict[str, list[str]] = {}
    for layer, why in kept.items():
        layers.setdefault(why, []).append(layer)
    said = [
        f"{', '.join(names[:_NAMED])}{f' and {len(names) - _NAMED} more' * (len(names) > _NAMED)} ({why})"
        for why, names in layers.items()
    ]
    return ", ".join(said)


def _check_rebuilt(deployed: Deployed, source: Source, before: Bundle, trusted: tuple[str, ...]) -> None:
    """Raise unless what is built from the record is the network that was changed: before it is trained, not after."""
    name, (spec,) = before.manifest.name, before.manifest.signature.inputs
    samples = torch.from_numpy(before.samples()[spec.name][:2])
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            again = Deployed(build(source, trusted), before.manifest.task, before.manifest.preprocessing).eval()
            again.network.load_state_dict(deployed.network.state_dict(), strict=True)
            same = torch.allclose(again(samples), deployed.eval()(samples), atol=1e-4, equal_nan=True)
    except RushhourError:
        raise
    except Exception:  # a layer may keep sizes of its own that nobody knows of
        same = False
    if not same:
        raise ModelError(
            f"cannot write down how {name} was changed",
            "what its factory builds, brought to the new sizes, is another network",
            "leave prune and lowrank out of the recipe, or name the layers to keep: prune:0.5:ignored=a+b",
        )


def _count(deployed: Deployed) -> int:
    return sum(parameter.numel() for parameter in deployed.network.parameters())


def _tag(step: AnyStep) -> str:
    return str(type(step).__struct_config__.tag)


def _copied(source: Path, to: Path) -> None:
    shutil.copyfile(source, to)

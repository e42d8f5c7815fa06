"""Recipes: ordered steps of compression, their text, and those that are worth trying on a bundle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

import msgspec

from rushhour.bundle import Bundle
from rushhour.compress.distil import Distil
from rushhour.compress.lowrank import LowRank, dominant
from rushhour.compress.prune import Prune
from rushhour.compress.quantize import Quantize, Target, check_plain
from rushhour.compress.weights import ReducedPrecision
from rushhour.data.augment import Augmentation
from rushhour.errors import GoalError
from rushhour.models import load_deployed

AnyStep: TypeAlias = Prune | LowRank | Distil | Quantize | ReducedPrecision

TRAINS: Final = (Prune, LowRank, Distil)
"""Steps on the torch module; all others work on the graph, and their result cannot be changed by these."""

_FORMS: Final = ("bf16", "f16", "w8")
_NAMES: Final[dict[str, tuple[type[AnyStep], str]]] = {
    "prune": (Prune, "ratio"),
    "lowrank": (LowRank, "keep"),
    "distil": (Distil, "epochs"),
    "int8": (Quantize, "calibration"),
}
"""Name in a recipe's text -> the step, and the setting that a bare value means."""

_EXAMPLE: Final = "write for example prune:0.5,lowrank:0.1,distil:3,int8"


class Recipe(msgspec.Struct, frozen=True):
    """Ordered steps: those that train come first, then at most one that reduces the precision.

    Attributes:
        steps: one or more.
    """

    steps: tuple[AnyStep, ...]

    def __post_init__(self) -> None:
        if not self.steps:
            raise GoalError("the recipe has no steps", "it would not change the bundle", _EXAMPLE)
        for before, after in zip(self.steps, self.steps[1:], strict=False):
            if not isinstance(before, TRAINS):
                raise GoalError(
                    f"cannot {step_text(after)} after {step_text(before)}",
                    "a bundle of reduced precision can neither be trained nor reduced again",
                    f"make {step_text(before)} the last step",
                )
            if isinstance(after, Distil) and after.student is not None:
                raise GoalError(
                    f"cannot distil into another network after {step_text(before)}",
                    "the result of the steps before it would be lost",
                    "make distil the first step, or leave out its student",
                )

    @classmethod
    def parse(cls, text: str) -> Recipe:
        """Read `prune:0.5,lowrank:0.1,distil:3,int8`, or JSON: a list of steps.

        After its first value a step takes settings by name: `prune:0.5:epochs=4:ignored=0+3`. A bare value is prune's
        ratio, what lowrank keeps (or its rank, if it is a whole number), distil's epochs, int8's calibration samples.

        Args:
            text: the steps, or a file of JSON that ends in `.json`, or JSON itself.

        Raises:
            GoalError: if it cannot be read, or the steps are in an order that is not possible.
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
        return ",".join(step_text(step) for step in self.steps)

    @property
    def factories(self) -> tuple[str, ...]:
        """Factories of the students that it names."""
        return tuple(
            step.student.factory for step in self.steps if isinstance(step, Distil) and step.student is not None
        )

    def for_machines(self, target: Target) -> Recipe:
        """The same, with int8 for these machines."""
        steps = (
            msgspec.structs.replace(step, target=target) if isinstance(step, Quantize) else step for step in self.steps
        )
        return Recipe(tuple(steps))


def default_recipes(bundle: Bundle, *, epochs: int = 5, trusted: tuple[str, ...] = ()) -> tuple[Recipe, ...]:
    """The recipes that are worth trying on this bundle, from gentle to strong.

    int8 alone; then with 25% to 70% of the channels pruned, and dominating dense layers split. A bundle that cannot be
    trained gets recipes that need no training.

    Args:
        bundle: to be compressed.
        epochs: of distillation at the end of every training.
        trusted: as for `apply`.

    Raises:
        ModelError: if the bundle is compressed already, or its network cannot be built.
    """
    check_plain(bundle, "compress")
    graph_alone = tuple(Recipe((step,)) for step in (Quantize(), ReducedPrecision("w8"), ReducedPrecision("f16")))
    manifest = bundle.manifest
    trains = manifest.source is not None and bundle.weights is not None and manifest.precision == "f32"
    if not trains or manifest.signature.dimensions:
        return graph_alone
    dense = dominant(load_deployed(bundle, trusted).network)
    recipes: list[Recipe] = [graph_alone[0]]
    for ratio, keep in ((0.25, 0.2), (0.5, 0.1), (0.7, 0.05)):
        splits: Sequence[AnyStep] = (LowRank(keep=keep),) if dense else ()
        recipes.append(Recipe((Prune(ratio=ratio, epochs=1), *splits, Distil(epochs), Quantize())))
    return tuple(recipes)


def _read(text: str) -> AnyStep:
    name, *rest = (piece.strip() for piece in text.split(":"))
    if name in _FORMS and not rest:
        return msgspec.convert({"step": "precision", "form": name}, type=ReducedPrecision)
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
            why = "it is given twice" if key in settings else f"{name} has {', '.join(kind.__struct_fields__)}"
            also = "; student and limits can be given in JSON only" if key in ("student", "limits") else ""
            raise GoalError(f"cannot read {piece!r} in the step {text!r}", f"{why}{also}", _EXAMPLE)
        settings[key] = value.split("+") if key in ("ignored", "layers") else value
    if "augment" in settings:
        settings["augment"] = msgspec.to_builtins(Augmentation.parse(settings["augment"].replace("+", ",")))
    try:
        return msgspec.convert({"step": kind.__struct_config__.tag, **settings}, type=kind, strict=False)
    except msgspec.ValidationError as error:
        raise GoalError(f"cannot read the step {text!r} of the recipe", str(error), _EXAMPLE) from error


def step_text(step: AnyStep) -> str:
    """A step as a recipe's text has it; settings that only JSON has are left out."""
    if isinstance(step, ReducedPrecision):
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


def name_of_step(step: AnyStep) -> str:
    """The name of a step in a recipe's JSON and in a lineage."""
    return str(type(step).__struct_config__.tag)

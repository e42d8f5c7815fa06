"""The verb `compress`: a bundle becomes a smaller, faster one inside an accuracy budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from rushhour.api.importing import Known, brought_of, imported_for
from rushhour.api.inputs import load_data, read_logs
from rushhour.api.trials import built_by
from rushhour.api.values import StrPath, check_choice, check_name, read_accuracy_budget, read_path, read_texts
from rushhour.bundle import Bundle, check_folder
from rushhour.errors import GoalError, StorageError
from rushhour.goal import AccuracyBudget
from rushhour.progress import Progress, Silent
from rushhour.records.compression import Compression, Verdict
from rushhour.system.extras import require
from rushhour.system.storage import check_claim, claimed, try_building, try_folder

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from rushhour.api.inputs import GivenColumns
    from rushhour.compress import Recipe
    from rushhour.data import Dataset


@dataclasses.dataclass(frozen=True)
class CompressResult:
    """A finished compression. It is a path too: that of its bundle.

    Attributes:
        bundle: the answer.
        record: every step of every recipe, with its accuracy, size and speed.
        report: the HTML page about it.
    """

    bundle: Bundle
    record: Compression
    report: Path

    def __fspath__(self) -> str:
        return str(self.bundle.path)

    def __repr__(self) -> str:
        """Short, for a notebook."""
        return f"<CompressResult {self.verdict}: {self.bundle.manifest.parameters:,} parameters, {self.bundle.path}>"

    @property
    def verdict(self) -> Verdict:
        """`best`, `no gain` (the bundle is as it was) or `nearest miss` (nothing is inside the budget)."""
        return self.record.verdict

    def as_dict(self) -> dict[str, Any]:
        """What `rushhour compress --json` writes."""
        return {
            **msgspec.to_builtins(self.record),
            "bundle": str(self.bundle.path),
            "report": str(self.report),
            "accuracy": msgspec.to_builtins(self.record.test),
            "bytes": self.record.answer.bytes,
        }


def compress(
    bundle: StrPath,
    data: StrPath | Dataset | tuple[ArrayLike | Mapping[str, ArrayLike], ArrayLike] | Mapping[str, ArrayLike],
    *,
    out: StrPath,
    max_accuracy_drop: str | AccuracyBudget = "1%",
    recipe: str | Recipe | Sequence[str | Recipe] = "auto",
    target: Literal["any", "avx2", "vnni", "amx"] | None = None,
    steps: StrPath | None = None,
    epochs: int = 5,
    seed: int = 0,
    engine: Literal["openvino", "onnxruntime"] = "openvino",
    task: str | None = None,
    size: str | tuple[int, int] | None = None,
    columns: GivenColumns = None,
    skip_corrupt: bool = False,
    trust: str | Sequence[str] = (),
    name: str | None = None,
    cluster: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> CompressResult:
    """Make a bundle smaller and faster inside an accuracy budget, judged on the compiled artefact of every step.

    The result is inside the budget and never slower than the bundle it was made from; its verdict says whether it is
    better. An interrupted compression continues when it is called again, and computes nothing twice.

        rushhour.compress("runs/photos", "photos/", out="runs/small", max_accuracy_drop="1%")
        rushhour.compress("runs/photos", "photos/", out="runs/small", recipe="prune:0.5,lowrank:0.1,distil:10,int8")

    Args:
        bundle: the trained bundle, its folder, or the result of `train`; or a model from elsewhere, as of
            `rushhour.import_model`, which is imported first.
        data: as of `rushhour.train`; the validation part decides, the test part confirms.
        out: the new bundle's folder.
        max_accuracy_drop: the accuracy budget in percentage points: with `1%`, 90% may become 89%.
        recipe: steps with commas between them, or several such recipes to choose from: `prune` (channels), `lowrank`
            (dense layers), `distil` (train on the bundle's answers), then `int8`, `bf16`, `f16` or `w8`; a `.json`
            file; or `auto`, which tries several.
        target: class of processors on which int8 has to be exact. `any` uses 7 bits of the weights, which is exact on
            all of them. By default 8 bits are tried as well where 7 cost more than 0.3 points.
        steps: folder of all bundles on the way and of the report; `OUT-steps` by default.
        epochs: of distillation, in the recipes of `auto`.
        seed: of everything random.
        engine: compiles what is judged.
        task: as of `rushhour.train`.
        size: as of `rushhour.train`; a bundle knows its own.
        columns: as of `rushhour.train`; a bundle knows its own.
        skip_corrupt: as of `rushhour.train`.
        trust: factories (`module:factory`) that may be imported to build the bundle's network; or the path of a model
            from elsewhere, where reading it runs its code.
        name: the new model's name; the bundle's by default.
        cluster: `HOST:PORT` of a Ray cluster whose nodes make the bundles, or `auto` for the one that runs on this
            machine; by default all are made here. What is timed and judged is timed and judged here.
        force: replace another bundle at `out`.
        progress: gets the progress, and notes on what was left out.

    Raises:
        RushhourError: if the bundle, the data or the recipe cannot be used; the message says what to do.
    """
    require("compress")
    from rushhour.compress import Recipe, default_recipes
    from rushhour.compress import compress as compress_bundle
    from rushhour.report import write_compression_report

    budget, progress, path = read_accuracy_budget(max_accuracy_drop), progress or Silent(), read_path(out)
    if target is not None:
        check_choice("target", target, ("any", "avx2", "vnni", "amx"))
    check_choice("engine", engine, ("openvino", "onnxruntime"))
    try_building(path)
    folder = read_logs(steps, path, "steps")
    try_folder(folder)
    trusted, recipes = read_texts(trust), _recipes(recipe)
    texts = [each for each in ([recipe] if isinstance(recipe, str | Recipe) else recipe) if isinstance(each, str)]
    if texts and not any(each.strip().endswith(".json") for each in texts):
        trusted = (*trusted, *(factory for each in recipes or () for factory in each.factories))  # the user named them
    name, brought, parent, dataset = check_name(name), brought_of(bundle), None, None
    if brought is None:
        parent = bundle if isinstance(bundle, Bundle) else Bundle.open(read_path(bundle))
    if parent is not None and path.resolve() == parent.path.resolve():
        raise StorageError(
            f"will not replace {path}",
            "it is the bundle that is compressed, and would be lost",
            "choose another folder with --out",
        )
    check_folder(path)  # before data is loaded
    check_claim(folder)
    reading: dict[str, Any] | None = None
    if parent is None:
        assert brought is not None
        known = Known(trust, name)
        with claimed(folder):
            imported, dataset = imported_for(
                brought, data, folder / "imported", progress,
                size=size, skip_corrupt=skip_corrupt, task=task, columns=columns, known=known,
            )  # fmt: skip
        parent = imported.bundle
    else:
        reading = {"size": size, "skip_corrupt": skip_corrupt, "task": task, "columns": columns, "trusted": trusted}
        dataset = load_data(data, progress, parent, **reading)
    chosen: Sequence[Recipe] = recipes or default_recipes(parent, epochs=epochs, trusted=trusted)
    if target is not None:
        chosen = tuple(each.for_machines(target) for each in chosen)
    with built_by(cluster, dataset, progress, given=data, model=parent, reading=reading) as builder:
        record = compress_bundle(
            parent,
            dataset,
            chosen,
            budget=budget,
            out=path,
            steps=folder,
            seed=seed,
            engine=engine,
            progress=progress,
            trusted=trusted,
            name=name,
            force=force,
            builder=builder,
        )
    return CompressResult(Bundle.open(path), record, write_compression_report(folder))


def _recipes(recipe: str | Recipe | Sequence[str | Recipe]) -> tuple[Recipe, ...]:
    """What a user gave; nothing for `auto`."""
    from rushhour.compress import Recipe

    if isinstance(recipe, str):
        return () if recipe.strip() == "auto" else (Recipe.parse(recipe),)
    if isinstance(recipe, Recipe):
        return (recipe,)
    found = tuple(Recipe.parse(each) if isinstance(each, str) else each for each in recipe or ())
    if not found:
        raise GoalError("there is no recipe", f"{recipe!r} has no steps", "leave it out to try several, or name steps")
    return found

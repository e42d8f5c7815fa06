"""Smaller networks of a run: shapes, rungs of training, the time for both, and how they join the search."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from test_tune import (
    CAPACITY,
    Load,
    answering,
    fates,
    foreign,
    loaded_by,
    own_answers,
    small_data,
    tuned,
    without_engines,
)
from torch import Tensor, nn

from rushhour.bundle import Bundle, Source, Step
from rushhour.clock import VirtualClock
from rushhour.compress import Builder, Distil, LowRank, Prune, Recipe, Store, Work
from rushhour.data import load
from rushhour.engines import Engine
from rushhour.errors import ModelError
from rushhour.goal import SLO, AccuracyBudget, Goal
from rushhour.measurement import Measurement, ServiceTimes, pack_latencies
from rushhour.plan import Plan, Trial
from rushhour.progress import Silent
from rushhour.report import write_report
from rushhour.testing.bundles import tiny_bundle
from rushhour.train import TrainingJob, TrainSettings, train
from rushhour.tune import TuneSettings, tune_run
from rushhour.tune.networks import smaller_networks
from rushhour.tune.rungs import short_lr
from rushhour.tune.settings import Budget
from rushhour.tune.shapes import Shape, shapes_of, why_untrainable

QUARTER, HALF, MOST = Shape(0.25, 1.0), Shape(0.5, 1.0), Shape(0.7, 1.0)
RATES = {"tiny": 1000.0, "prune-0.25": 2000.0, "prune-0.5": 3000.0, "prune-0.7": 4000.0}
"""Requests per second of each network, with inherited weights and trained alike."""


class Maker:
    """Stands in for recipes: what they make is a tiny bundle that is named `ROLE:RUNGS`.

    Args:
        seconds: that a shape takes on `clock`.
        epoch_s: that an epoch takes.
        kill_at: the number of the step, made or found, at which the process is killed.
        fails: role -> what making it raises.
    """

    def __init__(
        self,
        *,
        seconds: float = 0.0,
        epoch_s: float = 0.0,
        kill_at: int | None = None,
        fails: dict[str, Exception] | None = None,
    ) -> None:
        self.clock = VirtualClock()
        self.made: list[str] = []
        self.epochs: list[float] = []
        self._seconds = seconds
        self._epoch_s = epoch_s
        self._left = kill_at
        self._fails = fails or {}

    def apply(self, recipe: Recipe, bundle: Bundle, _: object, store: Store, **__: object) -> Iterator[Bundle]:
        prune, *rungs = recipe.steps
        assert isinstance(prune, Prune)
        assert prune.epochs == 0, "a shape is not trained"
        role = Shape(prune.ratio, 1.0).role
        if role in self._fails:
            raise self._fails[role]
        lineage, length = [Step("prune")], 0.0
        for done in range(len(rungs) + 1):
            if done:
                step = rungs[done - 1]
                assert isinstance(step, Distil)
                length = step.epochs * step.share
                lineage.append(Step("distil", {"epochs": step.epochs, "share": step.share}))
            name = f"{role}:{done}"
            if self._left is not None:
                self._left -= 1
                if self._left < 0:
                    raise KeyboardInterrupt
            folder = store.folder / f"{role}-{done}-{length:g}"
            if not folder.exists():
                self.made.append(name)
                self.clock.advance(length * self._epoch_s if done else self._seconds)
                self.epochs += [length] if done else []
                network(folder, name, (*bundle.manifest.lineage, *lineage))
            yield Bundle.open(folder)


def network(path: Path, name: str, lineage: tuple[Step, ...], **kind: Any) -> Bundle:
    """A tiny bundle with a lineage, and weights of its own."""
    made = tiny_bundle(path, name=name, seed=sum(name.encode()), **kind)
    manifest = msgspec.structs.replace(made.manifest, lineage=lineage, files={})
    content, samples = made.model.read_bytes(), made.samples()
    return Bundle.create(path, manifest, lambda file: file.write_bytes(content) and None, samples=samples)


def timed(engine: Engine, bundle: Bundle, _: float, __: float) -> ServiceTimes:
    """Batches take as long as `RATES` says; half where it is int8."""
    rate = RATES[bundle.manifest.name.partition(":")[0]] * (2 if bundle.manifest.precision == "int8" else 1)
    sizes = tuple(2**power for power in range(engine.config.max_batch.bit_length()))
    seconds = tuple((9 + size) / (2 * rate) * engine.config.streams for size in sizes)
    rates = tuple(size * engine.config.streams / batch for size, batch in zip(sizes, seconds, strict=True))
    return ServiceTimes(sizes, seconds, rates)


def faked(
    patch: pytest.MonkeyPatch,
    maker: Maker,
    shapes: tuple[Shape, ...],
    wrong: dict[str, int],
    epoch_s: float = 1.0,
    least_s: float = 0.0,
) -> None:
    """Where networks are searched, `maker` stands in for recipes, and times and answers are numbers.

    Args:
        wrong: `ROLE:RUNGS` -> wrong answers among the 100 of the validation part.
        epoch_s: seconds of an epoch of training.
        least_s: seconds below which no recipe is begun.
    """
    networks = sys.modules["rushhour.tune.networks"]
    without_engines(patch, answering({name: {"validation": lost} for name, lost in wrong.items()}))
    for module in ("engine_times", "speedometer"):
        patch.setattr(sys.modules[f"rushhour.tune.{module}"], "time_service", timed)
    patch.setattr(networks, "_LEAST_S", least_s)
    patch.setattr(networks, "apply", maker.apply)
    patch.setattr(networks, "why_untrainable", lambda *_: "")
    patch.setattr(networks, "shapes_of", lambda *_: shapes)
    patch.setattr(networks._Search, "_epoch_seconds", lambda *_: epoch_s)


def found(
    run: Path,
    maker: Maker,
    monkeypatch: pytest.MonkeyPatch,
    wrong: dict[str, int],
    *,
    shapes: tuple[Shape, ...] = (HALF, MOST, QUARTER),
    budget_s: float | None = None,
    spent_s: float = 0.0,
    epoch_s: float = 1.0,
    least_s: float = 0.0,
    builder: Builder | None = None,
) -> tuple[list[str], dict[str, tuple[str, str]]]:
    """The names of the bundles that join the search, and how all other shapes ended."""
    with monkeypatch.context() as patch:
        faked(patch, maker, shapes, wrong, epoch_s, least_s)
        budget = Budget(budget_s, maker.clock)
        maker.clock.advance(spent_s)
        bundles, trials = smaller_networks(
            tiny_bundle(run / "bundles" / "reference"),
            own_answers(),
            Goal(SLO.parse("p99<50ms"), AccuracyBudget.parse("5%")),
            run=run,
            settings=TuneSettings(budget_s=budget_s),
            budget=budget,
            progress=Silent(),
            builder=builder,
        )
    assert [bundle.manifest.name.partition(":")[0] for bundle in bundles.values()] == list(bundles)
    return [bundle.manifest.name for bundle in bundles.values()], {
        trial.bundle: (trial.fate, trial.why) for trial in trials
    }


NOTHING_LEARNT = {f"{shape.role}:{rung}": 90 for shape in (QUARTER, HALF, MOST) for rung in range(4)}


def test_a_shape_that_is_no_faster_than_a_gentler_one_is_never_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    maker = Maker()
    monkeypatch.setitem(RATES, "prune-0.5", 2050.0)
    joined, ended = found(tmp_path, maker, monkeypatch, {})
    assert maker.made == ["prune-0.5:0", "prune-0.7:0", "prune-0.25:0", "prune-0.7:1", "prune-0.25:1"]
    assert joined == ["prune-0.7:1", "prune-0.25:1"]
    fate, why = ended["prune-0.5"]
    assert fate == "dominated"
    assert why.startswith("predicted ")
    assert "prune-0.25 removes less and is predicted" in why


def test_shapes_no_faster_than_the_network_leave_it_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    maker = Maker()
    for shape in (QUARTER, HALF, MOST):
        monkeypatch.setitem(RATES, shape.role, 900.0)
    joined, ended = found(tmp_path, maker, monkeypatch, {})
    assert joined == []
    assert len(maker.made) == 3
    assert all(fate == "dominated" and "the whole network removes less" in why for fate, why in ended.values())


def test_hopeless_shapes_are_dropped_after_an_epoch_and_the_better_half_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    maker = Maker()
    wrong = {"prune-0.7:1": 75, "prune-0.5:1": 9, "prune-0.25:1": 6, "prune-0.25:2": 4, "prune-0.25:3": 0}
    joined, ended = found(tmp_path, maker, monkeypatch, wrong)
    assert joined == ["prune-0.25:3"]
    assert [name for name in maker.made if not name.endswith(":0")] == [
        *("prune-0.5:1", "prune-0.7:1", "prune-0.25:1"),
        *("prune-0.25:2", "prune-0.25:3"),
    ]
    assert ended["prune-0.7"][0] == ended["prune-0.5"][0] == "over budget"
    assert "after 1 epoch of distillation accuracy drops by 75.00 points" in ended["prune-0.7"][1]
    assert ended["prune-0.5"][1].endswith("shapes with a smaller drop are trained further")


def test_what_is_slower_than_a_network_inside_the_budget_is_not_trained_further(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    maker = Maker()
    joined, ended = found(tmp_path, maker, monkeypatch, {"prune-0.25:1": 4, "prune-0.7:1": 4, "prune-0.7:2": 0})
    assert joined == ["prune-0.7:2", "prune-0.5:1"]
    assert "prune-0.25:2" not in maker.made
    assert ended["prune-0.25"][0] == "dominated"
    assert "prune-0.5 is predicted" in ended["prune-0.25"][1]


def test_where_nothing_learns_enough_each_shape_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    joined, ended = found(tmp_path, Maker(), monkeypatch, NOTHING_LEARNT)
    assert joined == []
    assert {fate for fate, _ in ended.values()} == {"over budget"}


@pytest.mark.parametrize("error", [ModelError("cannot prune tiny", "tied layers"), RuntimeError("all over\nthe place")])
def test_a_shape_that_fails_ends_alone_and_its_words_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    joined, ended = found(tmp_path, Maker(fails={"prune-0.7": error}), monkeypatch, {})
    assert joined == ["prune-0.5:1", "prune-0.25:1"]
    fate, why = ended["prune-0.7"]
    assert fate == "failed"
    assert str(error).split("\n")[0] in why
    assert "\n" not in why


def test_killed_anywhere_it_makes_nothing_twice_and_finds_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = {"prune-0.7:1": 9, "prune-0.7:2": 4, "prune-0.7:3": 0, "prune-0.25:1": 4, "prune-0.25:2": 3}
    undisturbed = Maker()
    expected = found(tmp_path / "undisturbed", undisturbed, monkeypatch, wrong)
    for kill_at in range(1, 9):
        run, made = tmp_path / f"killed at {kill_at}", []
        killed = Maker(kill_at=kill_at)
        with pytest.raises(KeyboardInterrupt):
            found(run, killed, monkeypatch, wrong)
        again = Maker()
        assert found(run, again, monkeypatch, wrong) == expected
        made = [*killed.made, *again.made]
        assert sorted(made) == sorted(undisturbed.made)
        measured = [json.loads(line) for line in (run / "measurements.jsonl").read_bytes().splitlines()]
        keys = [(entry["phase"], entry["subject"], entry["detail"]) for entry in measured]
        assert len(keys) == len(set(keys)), "nothing is measured twice"
        finished = Maker(kill_at=0)
        assert found(run, finished, monkeypatch, wrong) == expected, "what was found is read again, not made"


class Elsewhere:
    """Builds with a maker of its own, and keeps what was asked of it; at some point it builds nothing any more.

    Args:
        maker: that makes the bundles.
        waves: that it builds.
    """

    def __init__(self, maker: Maker, waves: int) -> None:
        self.asked: list[list[str]] = []
        self._maker = maker
        self._waves = waves

    @property
    def width(self) -> int:
        return 2 if len(self.asked) < self._waves else 0

    def build(self, recipes: Sequence[Recipe], work: Work, _: object) -> None:
        self.asked.append([str(recipe) for recipe in recipes])
        for recipe in recipes:
            list(self._maker.apply(recipe, work.bundle, work.dataset, work.store))

    def close(self) -> None: ...


@pytest.mark.parametrize("waves", [1, 2, 9])
def test_what_is_built_elsewhere_is_found_and_the_rest_is_made_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waves: int
) -> None:
    wrong = {"prune-0.7:1": 9, "prune-0.7:2": 4, "prune-0.7:3": 0, "prune-0.25:1": 4, "prune-0.25:2": 3}
    alone = Maker()
    expected = found(tmp_path / "alone", alone, monkeypatch, wrong)
    here, there = Maker(), Maker()
    elsewhere = Elsewhere(there, waves)
    assert found(tmp_path / "both", here, monkeypatch, wrong, builder=elsewhere) == expected
    assert sorted([*here.made, *there.made]) == sorted(alone.made)
    assert there.made, "all shapes at once, then a rung of all that are trained further"
    assert bool(here.made) == (waves < 4)


def test_without_time_nothing_is_begun_and_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    maker = Maker()
    joined, ended = found(tmp_path, maker, monkeypatch, {}, budget_s=100, spent_s=68)
    assert (joined, maker.made) == ([], [])
    assert ended == {"recipes": ("skipped", "no time left for recipes: the search needs the rest")}


def test_no_recipe_is_begun_in_less_time_than_any_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One shape was made, and a step of its training timed, for half of a budget of 40 s, and nothing was trained."""
    for budget_s in (40, 60):
        maker = Maker()
        joined, _ = found(tmp_path / f"{budget_s}", maker, monkeypatch, {}, budget_s=budget_s, least_s=30.0)
        assert bool(maker.made) == bool(joined) == (budget_s == 60)
    first = Maker()
    _, ended = found(tmp_path / "again", first, monkeypatch, {}, budget_s=40, least_s=30.0)
    assert ended == {"recipes": ("skipped", "no time left for recipes: the search needs the rest")}


def test_what_does_not_fit_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The 100 samples of the training part are answered at 0.7 a second."""
    monkeypatch.setitem(RATES, "tiny", 0.4)
    maker = Maker()
    joined, ended = found(tmp_path, maker, monkeypatch, {}, budget_s=40)
    assert (joined, maker.made) == ([], [])
    assert ended["recipes"][0] == "skipped"
    assert "the answers to 0.25 of the training part alone take 36 s" in ended["recipes"][1]
    assert "the search needs all but 29 s" in ended["recipes"][1]


def test_the_search_keeps_its_share_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An epoch takes six seconds, though it was expected to take one."""
    maker = Maker(seconds=1.0, epoch_s=6.0)
    wrong = {f"{shape.role}:{rung}": 20 for shape in (QUARTER, HALF, MOST) for rung in range(4)}
    joined, ended = found(tmp_path, maker, monkeypatch, wrong, budget_s=100)
    assert maker.clock.now() <= 0.55 * 100
    assert joined == []
    assert maker.epochs == [1, 1, 1, 2, 2]
    assert ended["prune-0.5"][0] == ended["prune-0.7"][0] == ended["prune-0.25"][0] == "over budget"
    assert sum(why.endswith("no time left to train it further") for _, why in ended.values()) == 1


def test_where_shapes_cannot_be_compared_the_most_promising_is_trained_as_long_as_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    maker = Maker(seconds=1.0, epoch_s=1.0)
    joined, ended = found(tmp_path, maker, monkeypatch, {"prune-0.5:1": 9}, budget_s=18)
    assert joined == ["prune-0.5:2"]
    assert maker.made == ["prune-0.5:0", "prune-0.5:1", "prune-0.5:2"]
    assert maker.epochs == [8, 2], "of 13 s the shape took one second, and each export is expected to take 0.6"
    assert maker.clock.now() <= 0.67 * 18
    assert {ended[role][0] for role in ("prune-0.7", "prune-0.25")} == {"skipped"}
    assert "no time left to compare shapes" in ended["prune-0.7"][1]


def test_what_is_outside_the_budget_when_the_time_is_up_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = {f"prune-0.5:{rung}": 9 for rung in range(1, 4)}
    joined, ended = found(tmp_path, Maker(seconds=1.0, epoch_s=1.0), monkeypatch, wrong, budget_s=18)
    assert joined == []
    fate, why = ended["prune-0.5"]
    assert fate == "over budget"
    assert why.startswith("after 11 epochs of distillation accuracy drops by 9.00 points")
    assert why.endswith("no time left to train it further")


def test_a_slower_shape_does_not_keep_the_next_from_being_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RATES, "prune-0.5", 900.0)
    maker = Maker(seconds=1.0, epoch_s=1.0)
    joined, ended = found(tmp_path, maker, monkeypatch, {}, budget_s=18)
    assert joined == ["prune-0.7:1"]
    assert ended["prune-0.5"][0] == "dominated"
    assert ended["prune-0.25"][0] == "skipped"


def test_a_resumed_run_trains_for_as_long_as_it_began_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has its whole budget again, in which longer rungs would fit."""
    wrong = {"prune-0.5:1": 9}
    undisturbed = Maker(seconds=3.5, epoch_s=1.0)
    expected = found(tmp_path / "undisturbed", undisturbed, monkeypatch, wrong, budget_s=18)
    assert undisturbed.epochs == [4, 2]
    for kill_at in range(1, 6):
        run = tmp_path / f"killed at {kill_at}"
        killed = Maker(seconds=3.5, epoch_s=1.0, kill_at=kill_at)
        with pytest.raises(KeyboardInterrupt):
            found(run, killed, monkeypatch, wrong, budget_s=18)
        again = Maker(seconds=3.5, epoch_s=1.0)
        assert found(run, again, monkeypatch, wrong, budget_s=18) == expected
        assert [*killed.made, *again.made] == undisturbed.made


# In a whole run.


@pytest.fixture
def quantised(monkeypatch: pytest.MonkeyPatch) -> None:
    """int8 children are tiny bundles too."""

    def children(bundle: Bundle, _: object, out: Path, **__: object) -> dict[str, Bundle]:
        lineage = (*bundle.manifest.lineage, Step("quantize"))
        return {"any": network(out, bundle.manifest.name, lineage, precision="int8")}

    monkeypatch.setattr(sys.modules["rushhour.tune.run"], "quantize_for_all", children)
    monkeypatch.setitem(RATES, "prune-0.25", 1000.0)
    for role, rate in {"prune-0.5": 3000.0, "prune-0.5-int8": 6000.0}.items():
        for engine, share in {"openvino": 1.0, "onnxruntime": 0.7}.items():
            monkeypatch.setitem(CAPACITY, f"{role}/{engine}", share * rate)
    monkeypatch.setitem(CAPACITY, "int8/openvino", 2000.0)


class Drawn(Load):
    """Load whose windows a report can draw."""

    def measure(self, *of: Any, **asked: Any) -> Measurement:
        return msgspec.structs.replace(super().measure(*of, **asked), latencies=pack_latencies(np.full(100, 0.005)))


def whole_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, maker: Maker, settings: TuneSettings | None = None
) -> Plan:
    with loaded_by(Drawn(), monkeypatch) as patch:
        faked(patch, maker, (QUARTER, HALF), {"prune-0.5:1": 9})
        return tune_run(
            tiny_bundle(tmp_path / "tiny"),
            own_answers(),
            Goal(SLO.parse("p99<50ms"), AccuracyBudget.parse("5%")),
            run=tmp_path / "run",
            training=TrainSettings(),
            settings=settings or TuneSettings(),
            progress=Silent(),
        )


@pytest.mark.usefixtures("quantised")
def test_a_smaller_network_joins_the_search_wins_and_the_ladder_shows_what_it_bought(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    maker = Maker()
    plan = whole_run(tmp_path, monkeypatch, maker)
    evidence = plan.evidence
    assert evidence is not None
    assert plan.feasible
    assert plan.variants[0].bundle == "bundles/prune-0.5-int8"
    assert Bundle.open(tmp_path / "run" / plan.variants[0].bundle).manifest.hash == plan.variants[0].bundle_hash
    assert plan.model == "tiny"
    assert 5500 < evidence.capacity_rps <= 6000
    steps = ["as it is", "compiled", "batched", "quantised", "pruned and distilled"]
    assert [step.step for step in evidence.ladder] == steps
    rates = [step.capacity_rps for step in evidence.ladder]
    assert rates[1] < rates[2] < rates[3] < rates[4]
    assert evidence.ladder[-1].name.startswith("prune-0.5 in int8 on OpenVINO")
    decisions = [decision.step for decision in evidence.decisions]
    assert decisions[: decisions.index("time")] == ["shape", "rung 1", "rung 2", "networks"]
    assert evidence.decisions[3].decided == "prune-0.5 join the search, with their int8"
    assert evidence.certificate is not None
    assert evidence.certificate.networks == 3
    text = write_report(tmp_path / "run").read_text("utf-8")
    assert "prune-0.5 in int8 on OpenVINO" in text
    assert "pruned and distilled" in text
    assert "the whole network removes less and is predicted" in text

    shutil.rmtree(tmp_path / "run" / ".recipes")
    assert whole_run(tmp_path, monkeypatch, Maker(kill_at=0)) == plan, "a complete run makes nothing again"


@pytest.mark.usefixtures("quantised")
def test_without_recipes_the_network_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    maker = Maker()
    plan = whole_run(tmp_path, monkeypatch, maker, TuneSettings(recipes="none"))
    assert maker.made == []
    assert plan.variants[0].bundle == "bundles/int8"
    assert "recipes" not in {trial.bundle for trial in trials_of(plan)}


def trials_of(plan: Plan) -> tuple[Trial, ...]:
    assert plan.evidence is not None
    return plan.evidence.trials


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (tiny_bundle, "has only its graph, and no torch module"),
        (foreign, "will not import the model 'my_networks:build'"),
    ],
)
def test_a_network_that_cannot_be_trained_is_tuned_without_recipes_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: Callable[[Path], Bundle], says: str
) -> None:
    monkeypatch.setattr(sys.modules["rushhour.tune.run"], "quantize_for_all", lambda *_, **__: {})
    plan = tuned(made(tmp_path / "mine"), tmp_path / "run", monkeypatch, answering({}))
    assert plan.feasible
    fate, why = fates(plan)["recipes/openvino/f32"]
    assert fate == "skipped"
    assert says in why


# Shapes.


def test_a_shape_is_a_recipe_and_has_a_name() -> None:
    shape = Shape(0.5, 0.1)
    assert shape.role == "prune-0.5-lowrank-0.1"
    assert str(shape.recipe((1, 2))) == "prune:0.5:epochs=0,lowrank:0.1,distil:1,distil:2"
    assert str(shape.recipe((0.25,))) == "prune:0.5:epochs=0,lowrank:0.1,distil:1:share=0.25"
    assert str(shape.recipe((0.25,), 3e-3)) == "prune:0.5:epochs=0,lowrank:0.1,distil:1:lr=0.003:share=0.25"
    assert (Shape(0.0, 0.1).role, Shape(0.5, 1.0).role) == ("lowrank-0.1", "prune-0.5")
    assert shape.recipe().steps == (Prune(ratio=0.5, epochs=0), LowRank(keep=0.1))
    assert Shape(0.25, 0.1).is_gentler_than(shape)
    assert not shape.is_gentler_than(shape)
    assert not Shape(0.25, 0.05).is_gentler_than(shape)


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (Step("train", {"lr": 2e-3}), 3e-3),
        (Step("train", {"lr": 1e-2}), 3e-3),
        (Step("train", {"lr": 1e-4, "optimizer": "adamw"}), 1.5e-4),
        (Step("train", {"lr": 0.1, "optimizer": "sgd"}), None),
        (Step("import"), None),
    ],
)
def test_where_time_is_short_the_learning_rate_follows_that_of_the_reference(
    tmp_path: Path, step: Step, rate: float | None
) -> None:
    assert short_lr(network(tmp_path / "reference", "tiny", (step,))) == (rate and pytest.approx(rate))


def by_size(engine: Engine, bundle: Bundle, *_: float) -> ServiceTimes:
    """The time of a batch goes with the parameters."""
    sizes = tuple(2**power for power in range(engine.config.max_batch.bit_length()))
    seconds = tuple((9 + size) * 1e-8 * bundle.manifest.parameters for size in sizes)
    rates = tuple(size * engine.config.streams / batch for size, batch in zip(sizes, seconds, strict=True))
    return ServiceTimes(sizes, seconds, rates)


@pytest.mark.slow
def test_real_shapes_of_a_real_network_are_trained_and_inside_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the time of a batch is a number. Two of the shapes are enough."""
    for module in ("engine_times", "speedometer"):
        monkeypatch.setattr(sys.modules[f"rushhour.tune.{module}"], "time_service", by_size)
    small_data(tmp_path / "small.npz")
    data = load(tmp_path / "small.npz")
    source = Source("rushhour.models:mlp", {"inputs": 144, "outputs": 4, "hidden": 64, "depth": 2})
    job = TrainingJob(source, TrainSettings(epochs=6, batch=32), tmp_path / "work")
    reference = train(data, job, out=tmp_path / "run" / "bundles" / "reference", progress=Silent(), name="quarters")
    assert why_untrainable(reference, ()) == ""
    shapes = shapes_of(reference, ())
    assert {shape.role for shape in shapes} >= {"prune-0.5-lowrank-0.1", "prune-0.5"}
    few = tuple(shape for shape in shapes if shape.role in ("prune-0.5", "lowrank-0.1"))
    monkeypatch.setattr(sys.modules["rushhour.tune.networks"], "shapes_of", lambda *_: few)
    bundles, trials = smaller_networks(
        reference,
        data,
        Goal(SLO.parse("p99<50ms"), AccuracyBudget.parse("20%")),
        run=tmp_path / "run",
        settings=TuneSettings(),
        budget=Budget(None, VirtualClock()),
        progress=Silent(),
    )
    assert bundles, [(trial.bundle, trial.fate, trial.why) for trial in trials]
    for bundle in bundles.values():
        assert bundle.manifest.parameters < reference.manifest.parameters
        assert bundle.manifest.lineage[-1].what == "distil"
        assert bundle.manifest.lineage[0].what == "train"
    again, same = smaller_networks(
        reference,
        data,
        Goal(SLO.parse("p99<50ms"), AccuracyBudget.parse("20%")),
        run=tmp_path / "run",
        settings=TuneSettings(),
        budget=Budget(None, VirtualClock()),
        progress=Silent(),
    )
    assert {role: bundle.manifest.hash for role, bundle in again.items()} == {
        role: bundle.manifest.hash for role, bundle in bundles.items()
    }
    assert same == trials


class Fragile(nn.Sequential):
    """Crashes once half of its channels are gone."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(144, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))

    def forward(self, x: Tensor) -> Tensor:
        first = self[1]
        if isinstance(first, nn.Linear) and len(first.weight) <= 32:
            raise RuntimeError("I need more than 32 channels")
        return super().forward(x)  # type: ignore[no-any-return]


@pytest.mark.slow
def test_a_network_that_crashes_when_it_is_pruned_is_tuned_in_its_other_shapes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("engine_times", "speedometer"):
        monkeypatch.setattr(sys.modules[f"rushhour.tune.{module}"], "time_service", by_size)
    small_data(tmp_path / "small.npz")
    data, trusted = load(tmp_path / "small.npz"), ("test_networks:Fragile",)
    job = TrainingJob(Source(*trusted), TrainSettings(epochs=4, batch=32), tmp_path / "work", trusted)
    reference = train(data, job, out=tmp_path / "run" / "bundles" / "reference", progress=Silent(), name="quarters")
    monkeypatch.setattr(
        sys.modules["rushhour.tune.networks"], "shapes_of", lambda *_: (Shape(0.5, 1.0), Shape(0.0, 0.3))
    )
    bundles, trials = smaller_networks(
        reference,
        data,
        Goal(SLO.parse("p99<50ms"), AccuracyBudget.parse("30%")),
        run=tmp_path / "run",
        settings=TuneSettings(),
        budget=Budget(None, VirtualClock()),
        progress=Silent(),
        trusted=trusted,
    )
    assert list(bundles) == ["lowrank-0.3"], [(trial.bundle, trial.fate, trial.why) for trial in trials]
    (crashed,) = trials
    assert (crashed.bundle, crashed.fate) == ("prune-0.5", "failed")
    assert "with fewer channels it fails" in crashed.why

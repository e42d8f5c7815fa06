"""A whole run on a small data set: real training, real servers, real load; killed, resumed, and reported."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from rushhour.bundle import Bundle, Preprocessing, Source
from rushhour.clock import VirtualClock
from rushhour.compress import Recipe, Store, apply
from rushhour.data.dataset import Dataset, Split
from rushhour.engines import Engine, EngineConfig
from rushhour.errors import LoadError, ModelError
from rushhour.goal import SLO, AccuracyBudget, Goal
from rushhour.load import Race
from rushhour.measurement import ClosedLoop, Measurement, Outcome, ServiceTimes
from rushhour.plan import Plan, Precision, Trial
from rushhour.progress import Silent
from rushhour.records.journal import Journal
from rushhour.serve import open_target
from rushhour.task import Task
from rushhour.testing.bundles import tiny_answers, tiny_bundle
from rushhour.train import TrainingJob, TrainSettings
from rushhour.tune import TuneSettings, tune_run
from rushhour.tune.search import tune
from rushhour.tune.server import cpu_seconds
from rushhour.tune.settings import Recipes
from rushhour.tune.space import Candidate

RUN = """
import sys
from pathlib import Path
from rushhour.data import load
from rushhour.goal import SLO, AccuracyBudget, Goal
from rushhour.models import source_for
from rushhour.progress import Silent
from rushhour.report import write_report
from rushhour.train import TrainSettings
from rushhour.tune import TuneSettings, tune_run

data, run = sys.argv[1:]
dataset = load(data)
tune_run(
    source_for("article", dataset.sample_shape, dataset.task),
    dataset,
    Goal(SLO.parse("p90<50ms"), AccuracyBudget.parse("10%")),
    run=Path(run),
    training=TrainSettings(epochs=1, batch=32),
    settings=TuneSettings(window_s=0.4, proof_s=2.0, resolution=0.5, race=1),
    progress=Silent(),
)
write_report(Path(run))
"""


def small_data(file: Path) -> None:
    """Four classes of 12x12 pictures: a bright quarter on noise."""
    random = np.random.default_rng(0)
    labels = np.arange(480, dtype=np.int64) % 4
    pictures = random.integers(0, 120, (480, 12, 12, 1), dtype=np.uint8)
    for picture, label in zip(pictures, labels, strict=True):
        row, column = divmod(int(label), 2)
        picture[6 * row : 6 * row + 6, 6 * column : 6 * column + 6] += 100
    np.savez(file, x=pictures, y=labels)


def lines(run: Path) -> list[bytes]:
    file = run / "measurements.jsonl"
    return file.read_bytes().splitlines(keepends=True) if file.exists() else []


@pytest.mark.alone
@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_killed_again_and_again_goes_on_and_ends_in_a_plan(tmp_path: Path) -> None:
    small_data(tmp_path / "small.npz")
    run = tmp_path / "run"
    command = [sys.executable, "-c", RUN, str(tmp_path / "small.npz"), str(run)]
    earlier: list[bytes] = []
    for stop_after in (1, 16, None):
        process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE)
        while process.poll() is None and (stop_after is None or len(lines(run)) < stop_after):
            time.sleep(0.02)
        if stop_after is not None:
            process.kill()
        _, errors = process.communicate()
        assert process.returncode == (0 if stop_after is None else -signal.SIGKILL), errors.decode()
        now = lines(run)
        assert now[: len(earlier)] == earlier, "nothing that was measured is lost"
        earlier = [line for line in now if line.endswith(b"\n")]

    keys = [(entry["phase"], entry["subject"], entry["detail"]) for entry in map(json.loads, earlier)]
    assert len(keys) == len(set(keys)), "nothing is measured twice"
    assert all(entry["machine"]["cpu"] for entry in map(json.loads, earlier))

    plan = Plan.load(run / "plan.json")
    evidence = plan.evidence
    assert plan.feasible
    assert evidence is not None
    assert evidence.capacity_rps > evidence.baseline_capacity_rps > 0
    assert evidence.accuracy > 0.8
    assert [rung.step for rung in evidence.ladder][:2] == ["as it is", "compiled"]
    assert {trial.fate for trial in evidence.trials} >= {"won", "baseline"}
    assert open_target(run).bundle.manifest.hash == plan.variants[0].bundle_hash
    assert len(Journal(run / "measurements.jsonl")) == len(earlier)
    windows = [entry for entry in map(json.loads, earlier) if entry["reading"]["kind"] == "load"]
    assert all(entry["reading"]["speeds"] for entry in windows)
    assert all(0 < entry["reading"]["server_cpu"] < 64 for entry in windows)
    assert (run / "report.html").stat().st_size < 2_000_000
    assert {path.name for path in run.iterdir() if not path.name.startswith(".")} == {
        "plan.json",
        "measurements.jsonl",
        "report.html",
        "run.json",
        "bundles",
        "training",
    }
    for role in ("reference", "int8"):
        assert not list((run / "bundles" / role).glob("*.pkl"))
        Bundle.open(run / "bundles" / role)

    # A run that is complete measures nothing more.
    subprocess.run(command, check=True)
    assert lines(run) == earlier


def test_the_cpu_time_of_a_server_is_that_of_all_its_processes() -> None:
    spin = "import time\nwhile time.process_time() < {}: pass\n"
    child = "subprocess.run([sys.executable, '-c', {!r}])\n"
    ended, alive = child.format(spin.format(0.2)), spin.format(0.1) + "print('done', flush=True)\ninput()"
    parent = f"import subprocess, sys\n{ended}{child.format(alive)}"
    with subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"done\n"
        before = cpu_seconds(process.pid)
        assert before is not None
        assert 0.27 <= before < 3
        assert cpu_seconds(process.pid) == pytest.approx(before, abs=0.05), "they all wait"
        process.communicate(b"\n")
    assert cpu_seconds(process.pid) is None


def test_training_fits_the_budget_and_is_as_long_when_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Trained(Exception):
        pass

    def train(_: object, job: TrainingJob, **__: object) -> None:
        raise Trained(job.settings.epochs)

    monkeypatch.setattr(sys.modules["rushhour.tune.run"], "train", train)
    parts = [Split(np.zeros((1280, 4, 4, 1), np.uint8), np.zeros(1280, np.int64))] * 3
    data = Dataset("few", Task("classification", outputs=4), *parts, Preprocessing(1 / 255), "sum")

    def epochs(
        folder: str, budget_s: float | None, *, step_s: float = 0.5, fit: bool = True, recipes: Recipes = "none"
    ) -> int:
        monkeypatch.setattr(sys.modules["rushhour.tune.training_time"], "step_seconds", lambda *_, **__: step_s)
        with pytest.raises(Trained) as found:
            tune_run(
                Source("rushhour.models:mlp", {"inputs": 16, "outputs": 4, "hidden": 4, "depth": 1}),
                data,
                Goal(SLO.parse("p99<50ms"), AccuracyBudget.parse("1%")),
                run=tmp_path / folder,
                training=TrainSettings(epochs=6, batch=128),
                settings=TuneSettings(budget_s=budget_s, recipes=recipes),
                progress=Silent(),
                fit_epochs=fit,
            )
        (said,) = found.value.args
        return int(said)

    assert epochs("none", None) == 6
    assert epochs("fixed", 60, fit=False) == 6
    assert epochs("long", 600) == 6, "10 steps of half a second are an epoch, and more than was asked for fits"
    assert epochs("short", 60) == 4, "0.4 of a minute"
    assert epochs("shared", 60, step_s=0.59, recipes="auto") == 3, "smaller networks are trained too"
    assert epochs("shorter", 5) == 2, "less teaches too little"
    assert epochs("short", 60, step_s=0.9) == 4, "how long a step took is on file"


@pytest.mark.parametrize(
    ("trained_s", "stretch_s", "search_s"),
    [(60.0, 150.0, 240.0), (215.0, 150.0, 210.0), (215.0, 0.0, 120.0), (215.0, 60.0, 145.0), (340.0, 150.0, 120.0)],
    ids=["in its share", "slow", "not asked for", "at most so much", "very slow"],
)
def test_a_budget_grows_by_what_training_took_beyond_its_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained_s: float, stretch_s: float, search_s: float
) -> None:
    class Searched(Exception):
        pass

    clock, module, said = VirtualClock(), sys.modules["rushhour.tune.run"], []

    class Told(Silent):
        def limit(self, seconds: float) -> None:
            said.append(round(seconds))

    def train(*_: object, **__: object) -> Bundle:
        clock.advance(trained_s)
        return tiny_bundle(tmp_path / "run" / "bundles" / "reference")

    def tune(*_: object, settings: TuneSettings, **__: object) -> Plan:
        raise Searched(settings.budget_s)

    monkeypatch.setattr(module, "train", train)
    monkeypatch.setattr(module, "tune", tune)
    monkeypatch.setattr(module, "is_plain", lambda _: False)
    monkeypatch.setattr(module, "smaller_networks", lambda *_, **__: ({}, ()))
    with pytest.raises(Searched) as found:
        tune_run(
            Source("rushhour.models:mlp", {"inputs": 16, "outputs": 4, "hidden": 4, "depth": 1}),
            own_answers(),
            Goal(SLO.parse("p99<50ms"), AccuracyBudget.parse("1%")),
            run=tmp_path / "run",
            training=TrainSettings(epochs=2, batch=2),
            settings=TuneSettings(budget_s=300, stretch_s=stretch_s),
            progress=Told(),
            clock=clock,
        )
    assert found.value.args == (pytest.approx(search_s),)
    grown_s = min(stretch_s, max(0.0, trained_s - 0.3 * 300))
    assert said == [300, *([round(300 + grown_s - trained_s)] if grown_s else [])], "and so is the time that is shown"


# The search alone: real engines give the answers, but times and load are numbers.

CAPACITY = {"reference/openvino": 1000.0, "reference/onnxruntime": 800.0, "int8/openvino": 3000.0,
            "int8/onnxruntime": 2000.0}  # fmt: skip
"""Requests per second that a candidate holds, on file by `BUNDLE/ENGINE`; a tenth of it one by one."""


def held(candidate: str) -> float:
    """By the name of a candidate: BUNDLE@HASH/ENGINE/PRECISION/sStTbB."""
    artefact, engine, *_ = candidate.split("/")
    return CAPACITY[f"{artefact.partition('@')[0]}/{engine}"] * (0.1 if candidate.endswith("b1") else 1.0)


class Load:
    """Stands in for servers and for the generator; is killed at every so manyth window."""

    def __init__(self, kill_every: int | None = None) -> None:
        self.windows = 0
        self.clock = VirtualClock()
        self._kill_every = kill_every

    @contextlib.contextmanager
    def served(self, candidate: Candidate, *_: Any) -> Iterator[tuple[str, int]]:
        yield str(candidate), os.getpid()

    def timed(self, engine: Engine, bundle: Bundle, _: float, __: float) -> ServiceTimes:
        return timed(engine, bundle, _, __)

    def measure(self, _: object, candidate: str, __: object, slo: SLO, **asked: Any) -> Measurement:
        self.windows += 1
        self.clock.advance(2.0)
        if self._kill_every is not None and self.windows % self._kill_every == 0:
            raise KeyboardInterrupt
        rate = asked["rate_rps"]
        holds = rate <= held(candidate)
        outcome, late = (Outcome.PASS, 0) if holds else (Outcome.FAIL, 500)
        interval = (9.0, 11.0) if holds else (90.0, 110.0)
        return Measurement(
            slo, rate, asked["seed"], 1.0, 1000, late, 0, 0, 5.0, sum(interval) / 2, interval, rate, 0.1, 0.1, outcome,
            "so it is", "",
        )  # fmt: skip

    def closed_window(self, _: object, candidate: str, __: object, *, concurrency: int, **asked: Any) -> ClosedLoop:
        self.windows += 1
        self.clock.advance(0.5)
        if self._kill_every is not None and self.windows % self._kill_every == 0:
            raise KeyboardInterrupt
        return ClosedLoop(concurrency, held(candidate), concurrency / held(candidate))


def timed(engine: Engine, bundle: Bundle, _: float, __: float) -> ServiceTimes:
    """Batches cost little more than one sample, as `CAPACITY` says."""
    role = "int8" if bundle.manifest.precision == "int8" else "reference"
    sizes = tuple(2**power for power in range(engine.config.max_batch.bit_length()))
    most = 2 * CAPACITY[f"{role}/{engine.config.engine}"]
    seconds = tuple((9 + size) / most * engine.config.streams for size in sizes)
    rates = tuple(size * engine.config.streams / batch for size, batch in zip(sizes, seconds, strict=True))
    return ServiceTimes(sizes, seconds, rates)


BOTH: dict[str, Precision] = {"reference": "f32", "int8": "int8"}


def own_answers() -> Dataset:
    """Data that the tiny bundle answers rightly by definition."""
    inputs = np.random.default_rng(1).integers(0, 256, (300, 4, 4, 1), dtype=np.uint8)
    labels = tiny_answers(inputs).argmax(1).astype(np.int64)
    parts = [Split(inputs[at], labels[at]) for at in (slice(0, 100), slice(100, 200), slice(200, None))]
    task = Task.classification(tuple(f"class {index}" for index in range(3)))
    return Dataset("own answers", task, *parts, Preprocessing(1 / 255), "sum")


class Opened:
    """Stands in for an engine, where answers are numbers too."""

    def __init__(self, _: Bundle, config: EngineConfig, **__: object) -> None:
        self.config = config

    def close(self) -> None:
        pass


def without_engines(patch: pytest.MonkeyPatch, outputs: Callable[..., Any]) -> None:
    """`outputs` stands in for engines, and what they carry is read off, not simulated: that takes seconds."""
    prediction = sys.modules["rushhour.tune.prediction"]
    for module in ("engine_times", "speedometer"):
        patch.setattr(sys.modules[f"rushhour.tune.{module}"], "open_engine", Opened)
    patch.setattr(sys.modules["rushhour.tune.accuracy"], "outputs_of", outputs)
    patch.setattr(
        prediction,
        "capacities",
        lambda scenarios, _: np.array(
            [each.profile.throughput(each.streams, each.max_batch) / 2 for each in scenarios]
        ),
    )


@contextlib.contextmanager
def loaded_by(load: Load, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Where a search is run, `load` stands in for servers and generator."""
    with monkeypatch.context() as patch:
        bench = sys.modules["rushhour.tune.bench"]
        patch.setattr(sys.modules["rushhour.tune.search"], "Generator", contextlib.nullcontext)
        for module in ("engine_times", "speedometer"):
            patch.setattr(sys.modules[f"rushhour.tune.{module}"], "time_service", load.timed)
        patch.setattr(bench, "served", load.served)
        patch.setattr(bench, "discover", lambda url: url)
        patch.setattr(bench, "payloads", lambda *_, **__: [])
        patch.setattr(bench, "measure", load.measure)
        patch.setattr(bench, "closed_window", load.closed_window)
        patch.setattr(bench, "null_throughput", lambda *_: None)
        yield patch


def searched(
    run: Path,
    load: Load,
    monkeypatch: pytest.MonkeyPatch,
    *,
    roles: dict[str, Precision] = BOTH,
    settings: TuneSettings | None = None,
    so_far: Callable[[Plan], None] = lambda plan: None,
    outputs: Callable[..., Any] | None = None,
    budget: str = "10%",
    ended: Sequence[Trial] = (),
) -> Plan:
    """Tune the tiny bundle, on data that it answers rightly by definition."""
    names = {role: "tiny" if role == "reference" else f"tiny-{role}" for role in roles}
    bundles = {
        role: tiny_bundle(run / "bundles" / role, name=names[role], precision=precision)
        for role, precision in roles.items()
    }
    with loaded_by(load, monkeypatch) as patch:
        if outputs is not None:
            without_engines(patch, outputs)
        goal = Goal(SLO.parse("p99<50ms"), AccuracyBudget.parse(budget))
        return tune(
            bundles,
            own_answers(),
            goal,
            run=run,
            settings=settings or TuneSettings(),
            progress=Silent(),
            ended=ended,
            clock=load.clock,
            so_far=so_far,
        )


def tuned(model: Bundle, run: Path, monkeypatch: pytest.MonkeyPatch, outputs: Callable[..., Any] | None = None) -> Plan:
    """A whole run of a bundle, its children made and timed as they are."""
    with loaded_by(Load(), monkeypatch) as patch:
        if outputs is not None:
            without_engines(patch, outputs)
        return tune_run(
            model,
            own_answers(),
            Goal(SLO.parse("p99<50ms"), AccuracyBudget.parse("10%")),
            run=run,
            training=TrainSettings(),
            settings=TuneSettings(time_s=0.005),
            progress=Silent(),
        )


def test_the_fastest_inside_the_budget_wins_and_the_ladder_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = searched(tmp_path, Load(), monkeypatch)
    evidence = plan.evidence
    assert plan.feasible
    assert evidence is not None
    assert (plan.variants[0].bundle, plan.variants[0].engine) == ("bundles/int8", "openvino")
    assert plan.model == "tiny", "that was asked for, whatever won"
    assert 3000 / 1.05 <= evidence.capacity_rps <= 3000 < (evidence.lowest_failing_rps or 0)
    assert evidence.baseline_capacity_rps <= 100
    assert (evidence.reference_accuracy, evidence.accuracy_drop) == (1.0, pytest.approx(0, abs=0.1))
    assert [rung.step for rung in evidence.ladder] == ["as it is", "compiled", "batched", "quantised"]
    capacities = [rung.capacity_rps for rung in evidence.ladder]
    assert evidence.service_times is not None
    assert evidence.service_times.batch_sizes[-1] >= plan.policy.max_batch
    assert evidence.service_times.seconds[0] == pytest.approx(10 / 6000 * plan.policy.cells * plan.policy.streams)
    assert max(capacities[:2]) <= 100, "without a torch module it is compiled as it is: the same twice"
    assert capacities[1] < capacities[2] < capacities[3]
    fates = {f"{trial.bundle}/{trial.engine}": trial.fate for trial in evidence.trials}
    assert fates["reference/onnxruntime"] == "dominated", "predicted far below the best, so not raced"
    assert [trial.fate for trial in evidence.trials].count("won") == 1
    pushed = [entry for entry in map(json.loads, lines(tmp_path)) if entry["phase"] == "push"]
    opened = {entry["subject"] for entry in pushed if entry["reading"]["kind"] == "load"}
    assert {subject.rpartition("/")[2].partition("b")[0] for subject in opened} == {
        entry["subject"].rpartition("/")[2].partition("b")[0] for entry in pushed
    }, "each layout has its overhead from an open loop too"


@pytest.mark.slow
def test_a_search_killed_again_and_again_asks_nothing_twice_and_finds_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = Load()
    expected = searched(tmp_path / "undisturbed", undisturbed, monkeypatch)
    earlier: list[bytes] = []
    plan, deaths = None, 0
    while plan is None:
        try:
            plan = searched(tmp_path / "killed", Load(kill_every=30), monkeypatch)
        except KeyboardInterrupt:
            deaths += 1
        now = lines(tmp_path / "killed")
        assert now[: len(earlier)] == earlier, "nothing that was measured is lost"
        earlier = now
    assert deaths == (undisturbed.windows - 1) // 29 > 1, "29 windows more each time"
    keys = [(entry["phase"], entry["subject"], entry["detail"]) for entry in map(json.loads, earlier)]
    assert len(keys) == len(set(keys)), "nothing is measured twice"
    assert len(keys) == len(lines(tmp_path / "undisturbed"))
    assert plan.evidence is not None
    assert expected.evidence is not None
    assert msgspec.structs.replace(plan, evidence=msgspec.structs.replace(plan.evidence, at="")) == (
        msgspec.structs.replace(expected, evidence=msgspec.structs.replace(expected.evidence, at=""))
    )


@pytest.mark.slow
def test_a_budget_leaves_out_what_decides_least_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, short = Load(), Load()
    answers: list[Plan] = []
    expected = searched(tmp_path / "whole", whole, monkeypatch)
    plan = searched(tmp_path / "short", short, monkeypatch, settings=TuneSettings(budget_s=22), so_far=answers.append)
    assert short.clock.now() < 0.6 * whole.clock.now()
    assert plan.feasible
    assert plan.evidence is not None
    assert plan.evidence.proven
    assert plan.evidence.capacity_rps > 2400
    assert expected.evidence is not None
    assert len(plan.evidence.ladder) < len(expected.evidence.ladder)
    fates = {trial.fate for trial in plan.evidence.trials}
    assert "skipped" in fates
    assert "skipped" not in {trial.fate for trial in expected.evidence.trials}
    assert "the time was up" in " ".join(decision.seen for decision in plan.evidence.decisions)
    # the best plan so far could be served long before the end, and the last one had its proof
    assert answers[0].evidence is None
    assert answers[-1].evidence is not None
    assert answers[-1].evidence.capacity_rps == plan.evidence.capacity_rps
    assert answers[-1].variants == plan.variants
    assert {answer.model for answer in answers} == {"tiny"}


@pytest.mark.slow
def test_a_bundle_that_is_quantised_already_can_be_tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ended in "nothing can be served": the reference was asked to run in f32."""
    plan = searched(tmp_path, Load(), monkeypatch, roles={"reference": "int8"})
    assert plan.feasible
    assert plan.variants[0].precision == "int8"
    assert plan.evidence is not None
    assert plan.evidence.accuracy_drop == 0


@pytest.mark.slow
def test_who_carries_less_in_the_race_is_beaten_and_who_carries_as_much_ties(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = searched(tmp_path, Load(), monkeypatch)
    assert plan.evidence is not None
    trials = {(trial.bundle, trial.engine, trial.policy): trial
              for trial in plan.evidence.trials if trial.policy.max_batch > 1}  # fmt: skip
    raced = [trial for trial in trials.values() if trial.fate in ("won", "tied", "beaten")]
    assert [trial.fate for trial in raced].count("won") == 1
    tied = [trial for trial in raced if trial.fate == "tied"]
    assert tied
    assert {(trial.bundle, trial.engine) for trial in tied} == {("int8", "openvino")}
    assert all("1.00x" in trial.why for trial in tied)


@pytest.mark.slow
def test_after_a_tie_the_one_that_looked_better_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that looked 11% better, and was 40% better, was left out: the pairs were used up before that was sure."""

    def undecided(incumbent: Callable[[int], float], rival: Callable[[int], float], **_: object) -> Race:
        ratio = rival(0) / incumbent(0)
        return Race("tie", ratio, (0.9 * ratio, 1.1 * ratio), 54, (incumbent(1), rival(1)))

    class Uneven(Load):
        def closed_window(self, _: object, candidate: str, __: object, **asked: Any) -> ClosedLoop:
            found = super().closed_window(_, candidate, __, **asked)
            by = 1.1 if "/s2t1" in candidate and asked["seconds"] < 0.5 else 1.0  # in a race, and not before
            return msgspec.structs.replace(found, throughput_rps=found.throughput_rps * by)

    monkeypatch.setattr(sys.modules["rushhour.tune.load_tests"], "race", undecided)
    plan = searched(tmp_path, Uneven(), monkeypatch)
    assert plan.evidence is not None
    trials = [trial for trial in plan.evidence.trials if trial.fate in ("won", "tied")]
    assert (plan.policy.streams, plan.policy.threads) == (2, 1)
    assert any("2 streams, which has the higher estimate: 1.10x" in trial.why for trial in trials), "it led no race"


class Watched(Load):
    """Load on servers of which it is known which are up; stopped when a third candidate races.

    Two streams carry more than is predicted, so that the first to race is beaten before that.
    """

    def __init__(self) -> None:
        super().__init__()
        self.up: list[str] = []
        self.raced: set[str] = set()

    @contextlib.contextmanager
    def served(self, candidate: Candidate, *_: Any) -> Iterator[tuple[str, int]]:
        self.up.append(str(candidate))
        try:
            yield str(candidate), os.getpid()
        finally:
            self.up.remove(str(candidate))

    def closed_window(self, _: object, candidate: str, __: object, *, concurrency: int, **asked: Any) -> ClosedLoop:
        found = super().closed_window(_, candidate, __, concurrency=concurrency, **asked)
        if len(self.up) == 2:
            self.raced |= set(self.up)
        if len(self.raced) == 3:
            raise KeyboardInterrupt
        return msgspec.structs.replace(
            found, throughput_rps=found.throughput_rps * (1.3 if "/s2t1" in candidate else 1)
        )


@pytest.mark.slow
def test_a_race_that_is_broken_off_leaves_no_server_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server of a rival that had won a race stayed up."""
    load = Watched()
    with pytest.raises(KeyboardInterrupt) as stopped:
        searched(tmp_path, load, monkeypatch)
    assert any("/s2t1" in candidate for candidate in load.raced)
    assert load.up == []
    assert stopped.tb is not None, "its frames are held until here: nothing was closed by chance"


class Waves(Load):
    """Load on a host whose speed comes in waves: what holds is seldom proven.

    Args:
        first_only: only the candidate that is loaded first, of those that batch, cannot be proven.
    """

    def __init__(self, *, first_only: bool = False) -> None:
        super().__init__()
        self._first_only = first_only
        self.first = ""

    def measure(self, _: object, candidate: str, __: object, slo: SLO, **asked: Any) -> Measurement:
        window = super().measure(_, candidate, __, slo, **asked)
        if not candidate.endswith("b1"):
            self.first = self.first or candidate
        if window.outcome is Outcome.PASS and (candidate == self.first or not self._first_only):
            return msgspec.structs.replace(window, outcome=Outcome.INCONCLUSIVE, needs_s=30.0)
        return window


@pytest.mark.slow
def test_where_nothing_can_be_proven_the_answer_is_an_estimate_and_not_zero(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ended in "nothing met the goal", 0/s, and exit code 2, though no window had refuted thousands a second."""
    plan = searched(tmp_path, Waves(), monkeypatch)
    evidence = plan.evidence
    assert evidence is not None
    assert plan.feasible
    assert not evidence.proven
    assert (plan.variants[0].bundle, plan.variants[0].engine) == ("bundles/int8", "openvino")
    assert 2700 < evidence.capacity_rps < 3200
    assert evidence.capacity_interval_rps is not None
    low, high = evidence.capacity_interval_rps
    assert low <= evidence.capacity_rps <= high
    assert 0 < evidence.baseline_capacity_rps <= 110
    (won,) = [trial for trial in evidence.trials if trial.fate == "won"]
    assert "estimated, not proven" in won.why


class Tight(Load):
    """Load on servers that hold their capacity, but windows within 8% of it prove nothing."""

    def measure(self, _: object, candidate: str, __: object, slo: SLO, **asked: Any) -> Measurement:
        window = super().measure(_, candidate, __, slo, **asked)
        self.clock.advance(asked.get("window_s", 0.0))
        if window.outcome is Outcome.PASS and window.rate_rps > 0.92 * held(candidate):
            return msgspec.structs.replace(window, outcome=Outcome.INCONCLUSIVE, needs_s=120.0)
        return window


@pytest.mark.slow
@pytest.mark.parametrize("budget_s", [85, pytest.param(100, marks=pytest.mark.slow)])
def test_the_last_proof_that_the_time_has_room_for_is_tried_where_it_is_sure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget_s: float
) -> None:
    """At the lower end of the capacity's estimate it proved nothing, and the time was up."""
    plan = searched(tmp_path, Tight(), monkeypatch, settings=TuneSettings(budget_s=budget_s))
    assert plan.evidence is not None
    assert plan.evidence.proven
    assert 0.85 < plan.evidence.capacity_rps / CAPACITY["int8/openvino"] <= 0.92


@pytest.mark.slow
def test_a_winner_that_cannot_be_confirmed_gives_way_to_the_runner_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = Waves(first_only=True)
    plan = searched(tmp_path, load, monkeypatch)
    assert plan.evidence is not None
    assert plan.evidence.proven
    assert 2700 <= plan.evidence.capacity_rps <= 3000
    fates = {trial.candidate: (trial.fate, trial.why) for trial in plan.evidence.trials}
    assert fates[load.first][0] == "beaten"
    assert "could not be confirmed" in fates[load.first][1]
    (won,) = [candidate for candidate, (fate, _) in fates.items() if fate == "won"]
    assert won != load.first
    (decision,) = [decision for decision in plan.evidence.decisions if decision.step == "runner-up"]
    assert "could not be proven, int8 on OpenVINO" in decision.seen


@pytest.mark.slow
def test_a_search_in_waves_asks_nothing_twice_when_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = searched(tmp_path, Waves(), monkeypatch)
    again = Waves()
    second = searched(tmp_path, again, monkeypatch)
    assert again.windows == 0
    assert first.evidence is not None
    assert second.evidence is not None
    assert first.evidence.capacity_rps == second.evidence.capacity_rps


# What ends one candidate ends that candidate.


def fates(plan: Plan) -> dict[str, tuple[str, str]]:
    """Bundle, engine and precision -> how they ended, and why."""
    assert plan.evidence is not None
    return {f"{trial.bundle}/{trial.engine}/{trial.precision}": (trial.fate, trial.why)
            for trial in plan.evidence.trials}  # fmt: skip


@pytest.mark.parametrize(
    "error", [ModelError("answers of it are no numbers"), RuntimeError("all over\nthe place"), MemoryError("no room")]
)
def test_a_candidate_whose_answers_are_no_numbers_ends_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """It ended the whole run: only what an engine raises was caught."""

    def outputs(bundle: Bundle, config: EngineConfig, *rest: Any, **more: Any) -> Any:
        if config.engine == "onnxruntime":
            raise error
        return answering({})(bundle, config, *rest, **more)

    plan = searched(tmp_path, Load(), monkeypatch, outputs=outputs)
    assert plan.feasible
    said = fates(plan)
    assert plan.variants[0].engine == "openvino"
    for what in ("reference/onnxruntime/f32", "int8/onnxruntime/int8"):
        assert said[what][0] == "failed"
        assert str(error).split("\n")[0] in said[what][1]
        assert "\n" not in said[what][1]


class Broken(Load):
    """Load on servers of which one kind cannot be loaded, from some window on."""

    def __init__(self, kind: str, after: int) -> None:
        super().__init__()
        self._kind, self._left = kind, after

    def _break(self, candidate: str) -> None:
        if self._kind in candidate:
            self._left -= 1
            if self._left < 0:
                raise LoadError("cannot connect to it", "the server is gone")

    def closed_window(self, _: object, candidate: str, __: object, *, concurrency: int, **asked: Any) -> ClosedLoop:
        self._break(candidate)
        return super().closed_window(_, candidate, __, concurrency=concurrency, **asked)

    def measure(self, _: object, candidate: str, __: object, slo: SLO, **asked: Any) -> Measurement:
        self._break(candidate)
        return super().measure(_, candidate, __, slo, **asked)


@pytest.mark.parametrize("after", [0, 2, 8, 200])
def test_a_server_that_breaks_down_under_load_ends_its_candidate_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    plan = searched(tmp_path, Broken("int8@", after), monkeypatch, outputs=answering({}))
    assert plan.evidence is not None
    if after < 9:
        assert plan.feasible
        assert plan.variants[0].bundle == "bundles/reference"
        assert any(fate == "failed" and "the server is gone" in why for fate, why in fates(plan).values())
    assert plan.evidence.capacity_rps > 0


def test_a_child_that_cannot_be_made_is_left_out_and_its_words_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tuning of an LSTM ended at once: its int8 could not be made."""

    def fails(*_: object, max_drop: float | None = None, **__: object) -> None:
        assert max_drop == 0.1, "accuracy control has the budget of the run"
        raise ModelError("cannot quantise tiny", "RuntimeError: einsum")

    monkeypatch.setattr(sys.modules["rushhour.tune.run"], "quantize_for_all", fails)
    plan = tuned(tiny_bundle(tmp_path / "tiny"), tmp_path / "run", monkeypatch, answering({}))
    assert plan.feasible
    assert fates(plan)["int8/openvino/int8"] == ("failed", "cannot quantise tiny: RuntimeError: einsum")


@pytest.mark.slow
def test_everything_that_compress_makes_can_be_tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 was a KeyError; what is stored in fewer bits was quantised again, and refused."""
    plain = tiny_bundle(tmp_path / "plain", shape=(4, 4, 1))
    monkeypatch.setattr(sys.modules["rushhour.compress.weights"], "_SMALL", 1)
    monkeypatch.setattr(sys.modules["rushhour.tune.run"], "quantize_for_all", lambda *_, **__: {})
    for form in ("bf16", "f16"):
        (made,) = apply(Recipe.parse(form), plain, own_answers(), Store(tmp_path / "store"), progress=Silent())
        plan = tuned(made, tmp_path / f"run-{form}", monkeypatch, answering({}))
        assert plan.feasible, form
        assert open_target(tmp_path / f"run-{form}").bundle.manifest.hash == made.manifest.hash
    plan = tuned(tiny_bundle(tmp_path / "int8", precision="int8"), tmp_path / "run-int8", monkeypatch, answering({}))
    assert plan.feasible
    assert plan.variants[0].precision == "int8"


def foreign(path: Path) -> Bundle:
    """A bundle of a factory that nobody has said may be imported."""
    from safetensors.numpy import save_file

    plain = tiny_bundle(path)
    manifest = msgspec.structs.replace(plain.manifest, source=Source("my_networks:build"), files={})
    return Bundle.create(
        path,
        manifest,
        lambda file: file.write_bytes(plain.model.read_bytes()) and None,
        lambda file: save_file({"weight": np.zeros(3, np.float32)}, file),
        plain.samples(),
    )


@pytest.mark.slow
def test_a_bundle_of_an_own_factory_is_tuned_without_its_torch_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It died after the race: the torch baseline would have imported the user's code, and nothing caught that."""
    monkeypatch.setattr(sys.modules["rushhour.tune.run"], "quantize_for_all", lambda *_, **__: {})
    plan = tuned(foreign(tmp_path / "mine"), tmp_path / "run", monkeypatch)
    assert plan.feasible
    assert plan.evidence is not None
    assert plan.evidence.baseline_capacity_rps > 0, "compiled, one sample at a time"
    fate, why = fates(plan)["reference/torch/f32"]
    assert fate == "failed"
    assert "will not import the model 'my_networks:build'" in why
    (base,) = [trial for trial in plan.evidence.trials if trial.fate == "baseline"]
    assert base.engine == "openvino"


# The accuracy budget.


def answering(wrong: dict[str, dict[str, int]]) -> Callable[..., Any]:
    """Stands in for engines: so many of the answers of a bundle to a part of the data are wrong."""
    data = own_answers()

    def outputs(bundle: Bundle, config: EngineConfig, split: Split, **_: Any) -> Any:
        part = next(name for name in ("validation", "test") if getattr(data, name).inputs[0].tobytes()
                    == split.inputs[0].tobytes())  # fmt: skip
        answers = np.eye(3, dtype=np.float32)[split.targets]
        lost = wrong.get(bundle.manifest.name, {}).get(part, 0)
        answers[:lost] = np.roll(answers[:lost], 1, axis=1)
        if bundle.manifest.name != "tiny":
            answers *= 0.9
        return answers

    return outputs


@pytest.mark.parametrize(
    ("wrong", "wins", "says"),
    [
        ({}, "int8", ""),
        ({"validation": 3}, "reference", "drops by 3.00 points on 100 samples of the validation part"),
        ({"test": 6}, "reference", "drops by 6.00 points on 100 samples of the test part"),
    ],
)
def test_an_artefact_has_to_be_shown_inside_the_budget_on_both_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: dict[str, int], wins: str, says: str
) -> None:
    """On the validation part the drop alone counted; a miss on the test part left nothing but a nearest miss."""
    plan = searched(tmp_path, Load(), monkeypatch, outputs=answering({"tiny-int8": wrong}), budget="5%")
    assert plan.feasible
    assert plan.variants[0].bundle == f"bundles/{wins}"
    fate, why = fates(plan)["int8/openvino/int8"]
    assert says in why
    assert (fate == "over budget") == bool(says)


def test_the_test_part_is_asked_gentlest_first_and_not_after_a_miss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs, asked = answering({"tiny-int8": {"test": 50}, "tiny-other": {"validation": 1}}), []

    def noted(bundle: Bundle, config: EngineConfig, split: Split, **rest: Any) -> Any:
        if split.inputs[0].tobytes() == own_answers().test.inputs[0].tobytes():
            asked.append(f"{bundle.manifest.name}/{config.engine}")
        return outputs(bundle, config, split, **rest)

    roles: dict[str, Precision] = {"reference": "f32", "int8": "int8", "other": "int8"}
    plan = searched(tmp_path, Load(), monkeypatch, roles=roles, outputs=noted, budget="8%")
    assert plan.variants[0].bundle == "bundles/reference"
    assert [name for name in asked if "int8" in name or "other" in name] == ["tiny-int8/openvino"]
    assert "has a smaller accuracy drop and misses the budget there" in fates(plan)["other/openvino/int8"][1]


def test_too_few_samples_for_the_budget_leave_the_reference_and_say_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = searched(tmp_path, Load(), monkeypatch, outputs=answering({}), budget="1%")
    assert plan.feasible
    assert plan.variants[0].bundle == "bundles/reference"
    assert "about 194 samples in that part would show it, or a budget of 2%" in fates(plan)["int8/openvino/int8"][1]


def test_all_windows_of_a_confirmation_together_err_no_more_than_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six windows at 5% each prove a rate that does not hold up to 26 times in a hundred."""

    class Spent(Waves):
        spent: list[float] = []  # noqa: RUF012

        def measure(self, _: object, candidate: str, __: object, slo: SLO, **asked: Any) -> Measurement:
            if "error" in asked:
                self.spent.append(asked["error"])
            return super().measure(_, candidate, __, slo, **asked)

    load = Spent()
    searched(tmp_path, load, monkeypatch, outputs=answering({}))
    assert len(load.spent) >= 6
    assert load.spent[0] == pytest.approx(0.02)
    assert sum(load.spent) <= 0.05 + 1e-9

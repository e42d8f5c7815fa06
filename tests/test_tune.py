"""A whole run on a small data set: real training, real servers, real load; killed, resumed, and reported."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from rushhour.bundle import Bundle, Preprocessing, Source
from rushhour.clock import VirtualClock
from rushhour.data.dataset import Dataset, Split
from rushhour.engines import Engine
from rushhour.goal import SLO, AccuracyBudget, Goal
from rushhour.journal import Journal
from rushhour.load import Race
from rushhour.measurement import Measurement, Outcome, Rung, ServiceTimes
from rushhour.plan import Plan, Precision
from rushhour.progress import Silent
from rushhour.serve import open_target
from rushhour.task import Task
from rushhour.testing.bundles import tiny_answers, tiny_bundle
from rushhour.train import TrainSettings
from rushhour.tune import TuneSettings, tune_run
from rushhour.tune.space import Candidate
from rushhour.tune.trial import cpu_seconds
from rushhour.tune.tune import tune

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


@pytest.mark.slow
@pytest.mark.timeout(420)
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

    def train(_: object, __: object, settings: TrainSettings, **___: object) -> None:
        raise Trained(settings.epochs)

    run = sys.modules["rushhour.tune.run"]
    monkeypatch.setattr(run, "train", train)
    parts = [Split(np.zeros((1280, 4, 4, 1), np.uint8), np.zeros(1280, np.int64))] * 3
    data = Dataset("few", Task("classification", outputs=4), *parts, Preprocessing(1 / 255), "sum")

    def epochs(folder: str, budget_s: float | None, *, step_s: float = 0.5, fit: bool = True) -> int:
        monkeypatch.setattr(run, "step_seconds", lambda *_, **__: step_s)
        with pytest.raises(Trained) as found:
            tune_run(
                Source("rushhour.models:mlp", {"inputs": 16, "outputs": 4, "hidden": 4, "depth": 1}),
                data,
                Goal(SLO.parse("p99<50ms"), AccuracyBudget.parse("1%")),
                run=tmp_path / folder,
                training=TrainSettings(epochs=6, batch=128),
                settings=TuneSettings(budget_s=budget_s),
                progress=Silent(),
                fit_epochs=fit,
            )
        (said,) = found.value.args
        return int(said)

    assert epochs("none", None) == 6
    assert epochs("fixed", 60, fit=False) == 6
    assert epochs("long", 600) == 6, "10 steps of half a second are an epoch, and more than was asked for fits"
    assert epochs("short", 60) == 4, "0.4 of a minute"
    assert epochs("shorter", 5) == 2, "less teaches too little"
    assert epochs("short", 60, step_s=0.9) == 4, "how long a step took is on file"


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

    def closed_window(self, _: object, candidate: str, __: object, *, concurrency: int, **asked: Any) -> Rung:
        self.windows += 1
        self.clock.advance(0.5)
        if self._kill_every is not None and self.windows % self._kill_every == 0:
            raise KeyboardInterrupt
        return Rung(concurrency, held(candidate), concurrency / held(candidate))


def timed(engine: Engine, bundle: Bundle, _: float, __: float) -> ServiceTimes:
    """Batches cost little more than one sample, as `CAPACITY` says."""
    role = "int8" if bundle.manifest.precision == "int8" else "reference"
    sizes = tuple(2**power for power in range(engine.config.max_batch.bit_length()))
    most = 2 * CAPACITY[f"{role}/{engine.config.engine}"]
    seconds = tuple((9 + size) / most * engine.config.streams for size in sizes)
    rates = tuple(size * engine.config.streams / batch for size, batch in zip(sizes, seconds, strict=True))
    return ServiceTimes(sizes, seconds, rates)


BOTH: dict[str, Precision] = {"reference": "f32", "int8": "int8"}


def searched(
    run: Path,
    load: Load,
    monkeypatch: pytest.MonkeyPatch,
    *,
    roles: dict[str, Precision] = BOTH,
    settings: TuneSettings | None = None,
    so_far: Callable[[Plan], None] = lambda plan: None,
) -> Plan:
    """Tune the tiny bundle, on data that it answers rightly by definition."""
    names = {role: "tiny" if role == "reference" else f"tiny-{role}" for role in roles}
    bundles = {
        role: tiny_bundle(run / "bundles" / role, name=names[role], precision=precision)
        for role, precision in roles.items()
    }
    inputs = np.random.default_rng(1).integers(0, 256, (300, 4, 4, 1), dtype=np.uint8)
    labels = tiny_answers(inputs).argmax(1).astype(np.int64)
    parts = [Split(inputs[at], labels[at]) for at in (slice(0, 100), slice(100, 200), slice(200, None))]
    data = Dataset("own answers", bundles["reference"].manifest.task, *parts, Preprocessing(1 / 255), "sum")
    with monkeypatch.context() as patch:
        tuner, trial = (sys.modules[f"rushhour.tune.{name}"] for name in ("tune", "trial"))
        patch.setattr(tuner, "Generator", contextlib.nullcontext)
        patch.setattr(tuner, "time_service", timed)
        patch.setattr(trial, "served", load.served)
        patch.setattr(trial, "discover", lambda url: url)
        patch.setattr(trial, "payloads", lambda *_, **__: [])
        patch.setattr(trial, "measure", load.measure)
        patch.setattr(trial, "closed_window", load.closed_window)
        patch.setattr(trial, "null_throughput", lambda *_: None)
        goal = Goal(SLO.parse("p99<50ms"), AccuracyBudget.parse("10%"))
        return tune(
            bundles,
            data,
            goal,
            run=run,
            settings=settings or TuneSettings(),
            progress=Silent(),
            clock=load.clock,
            so_far=so_far,
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
    assert max(capacities[:2]) <= 100, "without a torch module it is compiled as it is: the same twice"
    assert capacities[1] < capacities[2] < capacities[3]
    fates = {f"{trial.bundle}/{trial.engine}": trial.fate for trial in evidence.trials}
    assert fates["reference/onnxruntime"] == "dominated", "predicted far below the best, so never loaded"
    assert [trial.fate for trial in evidence.trials].count("won") == 1


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
    # the best plan so far could be served long before the end, and the last one had its proof
    assert answers[0].evidence is None
    assert answers[-1].evidence is not None
    assert answers[-1].evidence.capacity_rps == plan.evidence.capacity_rps
    assert answers[-1].variants == plan.variants
    assert {answer.model for answer in answers} == {"tiny"}


def test_a_bundle_that_is_quantised_already_can_be_tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ended in "nothing can be served": the reference was asked to run in f32."""
    plan = searched(tmp_path, Load(), monkeypatch, roles={"reference": "int8"})
    assert plan.feasible
    assert plan.variants[0].precision == "int8"
    assert plan.evidence is not None
    assert plan.evidence.accuracy_drop == 0


def test_who_carries_less_in_the_race_is_beaten_and_who_carries_as_much_ties(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = searched(tmp_path, Load(), monkeypatch)
    assert plan.evidence is not None
    trials = {(trial.bundle, trial.engine, trial.policy.cells, trial.policy.streams): trial
              for trial in plan.evidence.trials if trial.policy.max_batch > 1}  # fmt: skip
    raced = [trial for trial in trials.values() if trial.fate in ("won", "tied", "beaten")]
    assert [trial.fate for trial in raced].count("won") == 1
    tied = [trial for trial in raced if trial.fate == "tied"]
    assert tied
    assert {(trial.bundle, trial.engine) for trial in tied} == {("int8", "openvino")}
    assert all("1.00x" in trial.why for trial in tied)


def test_after_a_tie_the_one_that_looked_better_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that looked 11% better, and was 40% better, was left out: the pairs were used up before that was sure."""

    def undecided(incumbent: Callable[[int], float], rival: Callable[[int], float], **_: object) -> Race:
        ratio = rival(0) / incumbent(0)
        return Race("tie", ratio, (0.9 * ratio, 1.1 * ratio), 54, (incumbent(1), rival(1)))

    class Uneven(Load):
        def closed_window(self, _: object, candidate: str, __: object, **asked: Any) -> Rung:
            found = super().closed_window(_, candidate, __, **asked)
            by = 1.1 if "/s2t1" in candidate else 1.0
            return msgspec.structs.replace(found, throughput_rps=found.throughput_rps * by)

    monkeypatch.setattr(sys.modules["rushhour.tune.track"], "race", undecided)
    plan = searched(tmp_path, Uneven(), monkeypatch)
    assert plan.evidence is not None
    trials = [trial for trial in plan.evidence.trials if trial.fate in ("won", "tied")]
    assert (plan.policy.streams, plan.policy.threads) == (2, 1)
    assert any("2 streams carries 1.10x" in trial.why for trial in trials), "it led no race"


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

    def closed_window(self, _: object, candidate: str, __: object, *, concurrency: int, **asked: Any) -> Rung:
        found = super().closed_window(_, candidate, __, concurrency=concurrency, **asked)
        if len(self.up) == 2:
            self.raced |= set(self.up)
        if len(self.raced) == 3:
            raise KeyboardInterrupt
        return msgspec.structs.replace(
            found, throughput_rps=found.throughput_rps * (1.3 if "/s2t1" in candidate else 1)
        )


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


@pytest.mark.parametrize("budget_s", [85, pytest.param(100, marks=pytest.mark.slow)])
def test_the_last_proof_that_the_time_has_room_for_is_tried_where_it_is_sure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget_s: float
) -> None:
    """At the lower end of the capacity's estimate it proved nothing, and the time was up."""
    plan = searched(tmp_path, Tight(), monkeypatch, settings=TuneSettings(budget_s=budget_s))
    assert plan.evidence is not None
    assert plan.evidence.proven
    assert 0.85 < plan.evidence.capacity_rps / CAPACITY["int8/openvino"] <= 0.92


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


@pytest.mark.slow
def test_a_search_in_waves_asks_nothing_twice_when_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = searched(tmp_path, Waves(), monkeypatch)
    again = Waves()
    second = searched(tmp_path, again, monkeypatch)
    assert again.windows == 0
    assert first.evidence is not None
    assert second.evidence is not None
    assert first.evidence.capacity_rps == second.evidence.capacity_rps

"""The benchmark of tuning, at a small scale."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import render  # noqa: E402
from bench.record import Record  # noqa: E402
from tune_hard import small_data  # noqa: E402
from tune_replays import at_random, best_so_far, by_tpe, inside, on_grid  # noqa: E402
from tune_space import around  # noqa: E402

from rushhour.goal import SLO, AccuracyBudget, Goal  # noqa: E402
from rushhour.measurement import Measurement, Outcome  # noqa: E402
from rushhour.system.machine import cores  # noqa: E402
from rushhour.testing.measured import MeasuredSpace, OpenWindow, invented_space, measurement  # noqa: E402

GOAL = Goal(SLO.parse("p99<50ms"), AccuracyBudget.parse("2%"))


def measured(tmp_path: Path, parts: str, *options: str, timeout: float | None = None) -> Record:
    """Some parts in a process of their own, as `make bench-tune` runs them."""
    out = tmp_path / "tune.json"
    command = [sys.executable, str(BENCHMARKS / "tune.py"), "--only", parts, "--out", str(out)]
    command += ["--space", str(tmp_path / "space.json"), "--work", str(tmp_path / "work"), *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=timeout)
    assert done.returncode == 0, done.stderr[-4000:]
    found = Record.load(out)
    assert render.render([("tune", found)])
    assert all(check.why for check in found.checks if not check.holds)
    return found


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_searches_are_replayed_and_compared_and_killed(tmp_path: Path) -> None:
    invented_space(cores(), GOAL).save(tmp_path / "space.json")
    options = ["--replays", "2", "--kills", "2", "--policies", "60", "--learnt", "4"]
    found = measured(tmp_path, "3r,4,7", *options)
    checks = {check.id: check for check in found.checks}
    assert {"3.found", "3.tests", "3.certificate", "4.error", "4.rank", "4.policies.Poisson"} <= set(checks)
    assert checks["3.found"].n == 2
    assert checks["4.rank"].holds, "the invented space is what the predictor assumes"
    assert checks["7.plan"].holds
    assert checks["7.plan"].n == 2
    assert checks["7.twice"].holds
    assert checks["7.same"].holds
    titles = [table["title"] for table in found.data["tables"]]
    assert "Searches within 5% of the true optimum, share" in titles


@pytest.mark.slow
def test_other_searches_test_as_many_plans_as_they_may() -> None:
    space = invented_space(cores(), GOAL)
    plans = list(inside(space).values())
    truth = {plan.name: plan.capacity_rps for plan in plans}
    for search in (at_random, on_grid, by_tpe):
        tested = search(plans, truth.__getitem__, 20, 3)
        assert len(tested) == 20
        assert set(tested) <= set(truth)
    shares = best_so_far(tested, [truth[name] for name in tested], truth)
    assert shares == sorted(shares)
    assert shares[-1] == max(truth[name] for name in tested)


@pytest.mark.slow
def test_only_plans_inside_the_accuracy_budget_count() -> None:
    strict = invented_space(cores(), Goal(GOAL.slo, AccuracyBudget.parse("0.5%")))
    assert {plan.bundle for plan in inside(strict).values()} == {"reference", "int8"}


@pytest.mark.parametrize("start", [0.5, 0.9, 1.3])
def test_windows_of_a_plan_lie_around_its_capacity(start: float) -> None:
    def probe(rate_rps: float, seed: int) -> Measurement:
        holds = rate_rps <= 1000
        outcome = Outcome.INCONCLUSIVE if holds else Outcome.FAIL
        late = 0 if holds else 400
        return measurement(GOAL.slo, rate_rps, seed, 1200, late, outcome, OpenWindow(rate_rps, 1200, late, outcome))

    rates = [window.rate_rps for window in around(probe, start * 1000, 10, 0)]
    assert max(rate for rate in rates if rate <= 1000) > 1000 / 1.06
    assert min(rate for rate in rates if rate > 1000) < 1000 * 1.06


@pytest.mark.slow
def test_a_part_that_needs_another_says_so(tmp_path: Path) -> None:
    for part, word in (("3r", "--only 3"), ("5", "--only 1")):
        command = [sys.executable, str(BENCHMARKS / "tune.py"), "--only", part, "--work", str(tmp_path)]
        command += ["--space", str(tmp_path / "none.json"), "--out", str(tmp_path / "tune.json")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 1
        assert word in done.stderr


SMALL = ["--network", "mlp", "--networks", "mlp", "--epochs", "1", "--rounds", "1", "--data"]


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_small_space_is_measured_and_equal_plans_are_raced(tmp_path: Path) -> None:
    small_data(tmp_path / "small.npz")
    options = [*SMALL, str(tmp_path / "small.npz"), *["--plans", "3", "--windows", "2", "--every", "2", "--races", "1"]]
    found = measured(tmp_path, "3,6", *options)
    space = MeasuredSpace.load(tmp_path / "space.json")
    assert len(space.plans) == 3
    assert all(plan.closed and plan.windows for plan in space.plans)
    assert all(plan.speed > 0 for plan in space.plans)
    assert len({plan.speed for plan in space.plans}) > 1, "the host's speed is read beside each"
    assert set(space.speeds) == set(space.service)
    assert len(space.about["canary"]["measured"]) == 3
    assert set(space.precisions) == {"reference", "int8"}
    assert {"3.plans", "3.minutes", "6.equal"} == {check.id for check in found.checks}


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_is_compared_and_its_plan_served_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # so FastAPI cannot be installed, which is said
    small_data(tmp_path / "small.npz")
    options = [*SMALL, str(tmp_path / "small.npz"), *["--budget", "30s", "--repeats", "2", "--seconds", "2"]]
    found = measured(tmp_path, "1,5", *options)
    checks = {check.id: check for check in found.checks}
    assert {"1.untouched", "1.today", "1.exit", "1.tests", "1.drop", "1.minutes", "5.repeats"} == set(checks)
    assert checks["1.untouched"].value is not None
    assert "cannot be installed" in (checks["1.today"].why or "")
    assert checks["5.repeats"].n in (0, 2), "none where this machine is too busy for any capacity"


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_other_networks_are_tuned_and_bad_input_is_refused(tmp_path: Path) -> None:
    small_data(tmp_path / "small.npz")
    options = [*SMALL, str(tmp_path / "small.npz"), *["--kinds", "onnx", "--others", "30", "--bad", "20s"]]
    found = measured(tmp_path, "8,9", *options)
    checks = {check.id: check for check in found.checks}
    assert {"8.onnx.int8", "8.onnx.said", "9.slo", "9.zero", "9.short", "9.unlabelled", "9.fidelity", "9.crash"} == set(
        checks
    )
    assert all(checks[id].holds for id in ("8.onnx.said", "9.zero", "9.unlabelled"))

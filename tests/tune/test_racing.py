"""Who races: the best by prediction, and forced tests, so that a wrong model is found out; the larger space."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from test_prediction import Timed
from test_tune import Load, answering, held, lines, searched

from rushhour.goal import SLO
from rushhour.measurement import ClosedLoop, Measurement
from rushhour.plan import Policy, Trial
from rushhour.records.journal import Journal
from rushhour.tune import TuneSettings
from rushhour.tune.forced import DEFAULT, NEIGHBOUR, RANDOM, forced_tests, most_forced, neighbours
from rushhour.tune.space import LARGEST_BATCH, Candidate, other_layouts
from rushhour.tune.state import CandidateState

SLO_ = SLO.parse("p99<50ms")


def candidate(bundle: str = "int8", layout: tuple[int, int, int] = (1, 2, 1), batch: int = 8) -> Candidate:
    return Candidate(bundle, "0", "openvino", "int8" if bundle == "int8" else "f32", Policy(*layout, max_batch=batch))


# The space.


@pytest.mark.parametrize("cores", [1, 2, 3, 4, 16])
def test_all_layouts_fit_the_cores_and_few_engines_are_timed(cores: int) -> None:
    basic = candidate(layout=(1, cores, 1))
    found = other_layouts(basic, cores)
    layouts = [each.layout for each in found]
    assert len(layouts) == len(set(layouts))
    assert not {(1, 1, cores), (1, cores, 1), (cores, 1, 1)} & set(layouts)
    assert all(cells * streams * threads <= cores for cells, streams, threads in layouts)
    assert all(each.policy.max_batch == LARGEST_BATCH for each in found)
    engines = {each.compiled for each in found}
    assert len(engines) <= 2 + 2 * cores.bit_length()
    expected = {1: 0, 2: 1, 3: 3, 4: 6}
    assert len(found) == expected.get(cores, len(found))
    if cores == 16:
        assert {(4, 4, 1), (2, 8, 1), (2, 1, 8), (3, 4, 1), (2, 4, 2)} <= set(layouts)


def test_all_policies_are_simulated_at_once(tmp_path: Path) -> None:
    predictor = Timed(Journal(tmp_path / "journal.jsonl"), {}, SLO_, 0.05, ())
    layouts = [candidate(name, (1, 1, 32)) for name in ("int8", "reference")]
    states = [CandidateState(each) for basic in layouts for each in other_layouts(basic, 32)]
    predictor.choose_batches(states)
    assert predictor.policies == 5 * len(states) == 390
    assert all(state.predicted for state in states)


# Forced tests.


def forced(tmp_path: Path, leader: CandidateState, rivals: list[CandidateState], seed: int = 0) -> dict[str, str]:
    predictor = Timed(Journal(tmp_path / "journal.jsonl"), {}, SLO_, 0.05, ())
    for state in (leader, *rivals):
        state.predicted = predictor.capacity(state.candidate)
    found = forced_tests(leader, [leader], [leader, *rivals], predictor, cores=2, seed=seed)
    return {rule: str(state.candidate).partition("/int8/")[2] or str(state.candidate) for rule, state in found}


def test_the_default_a_neighbour_and_one_at_random_are_forced(tmp_path: Path) -> None:
    leader = CandidateState(candidate())
    rivals = [
        CandidateState(candidate(name, layout), fate="dominated")
        for name in ("int8", "reference")
        for layout in ((1, 1, 2), (2, 1, 1), (1, 1, 1))
    ]
    found = forced(tmp_path, leader, rivals)
    assert list(found) == [DEFAULT, NEIGHBOUR, RANDOM]
    assert found[DEFAULT] == "s1t2b8"
    assert found[NEIGHBOUR] in ("s2t1b4", "s2t1b16", "c2s1t1b8")
    drawn = {forced(tmp_path, leader, rivals, seed)[RANDOM] for seed in range(5)}
    assert len(drawn) >= 2
    assert not drawn & {found[DEFAULT], found[NEIGHBOUR]}
    assert forced(tmp_path, leader, rivals) == found, "the same seed draws the same"


def test_the_leaders_own_layout_is_not_forced_and_what_is_over_the_budget_never(tmp_path: Path) -> None:
    leader = CandidateState(candidate(layout=(1, 1, 2)))
    over = [CandidateState(candidate("reference", (1, 1, 2)), fate=fate) for fate in ("over budget", "failed")]
    found = forced(tmp_path, leader, over)
    assert list(found) == [NEIGHBOUR]
    assert found[NEIGHBOUR] in ("s1t2b4", "s1t2b16")


def test_neighbours_are_one_step_away(tmp_path: Path) -> None:
    predictor = Timed(Journal(tmp_path / "journal.jsonl"), {}, SLO_, 0.05, ())
    near = {str(each).rpartition("/")[2] for each in neighbours(candidate(layout=(2, 2, 1), batch=16), predictor)}
    assert near == {"c2s2t1b8", "s4t1b16", "c4s1t1b16"}
    near = {str(each).rpartition("/")[2] for each in neighbours(candidate(layout=(1, 1, 2), batch=1), predictor)}
    assert near == {"s1t2b2"}


def test_a_short_search_has_one_forced_test_at_most() -> None:
    assert (most_forced(300), most_forced(1800), most_forced(float("inf"))) == (1, 3, 3)


class Underestimated(Load):
    """Load on servers of which those of f32 in some layouts carry more than five times what is predicted.

    Servers that are started are counted: each is a load test.
    """

    def __init__(self, which: str, kill_every: int | None = None) -> None:
        super().__init__(kill_every)
        self._which = which
        self.started = 0

    def served(self, candidate: Candidate, *rest: Any) -> Any:
        self.started += 1
        return super().served(candidate, *rest)

    def _more(self, candidate: str) -> float:
        is_meant = self._which in candidate and candidate.startswith("reference@") and not candidate.endswith("b1")
        return 5000.0 / held(candidate) if is_meant else 1.0

    def closed_window(self, _: object, candidate: str, __: object, **asked: Any) -> ClosedLoop:
        found = super().closed_window(_, candidate, __, **asked)
        return msgspec.structs.replace(found, throughput_rps=self._more(candidate) * found.throughput_rps)

    def measure(self, _: object, candidate: str, __: object, slo: SLO, **asked: Any) -> Measurement:
        rate = asked.pop("rate_rps")
        found = super().measure(_, candidate, __, slo, rate_rps=rate / self._more(candidate), **asked)
        return msgspec.structs.replace(found, rate_rps=rate)


def trials(run: Path, load: Load, monkeypatch: pytest.MonkeyPatch, settings: TuneSettings) -> dict[str, Trial]:
    plan = searched(run, load, monkeypatch, settings=settings, outputs=answering({}))
    assert plan.evidence is not None
    return {trial.candidate: trial for trial in plan.evidence.trials if trial.rule or trial.fate == "won"}


def test_a_search_has_forced_tests_and_few_load_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = Underestimated("nothing")
    found = trials(tmp_path, load, monkeypatch, TuneSettings())
    assert load.started <= 40
    rules = [trial.rule for trial in found.values() if trial.rule]
    assert NEIGHBOUR in rules
    assert RANDOM in rules
    assert len(rules) <= 3
    assert all(trial.fate in ("beaten", "tied", "won") for trial in found.values())


def test_a_candidate_that_the_model_ruled_out_can_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(8):
        settings, run = TuneSettings(seed=seed), tmp_path / str(seed)
        found = trials(run, Underestimated("/openvino/f32/"), monkeypatch, settings)
        if any(trial.fate == "won" and trial.rule == RANDOM for trial in found.values()):
            break
    (won,) = [trial for trial in found.values() if trial.fate == "won"]
    assert won.rule == RANDOM
    assert won.bundle == "reference"
    assert won.capacity_rps == pytest.approx(5000, rel=0.06)
    # killed again and again, the same search comes to the same
    again = tmp_path / "killed"
    while True:
        try:
            same = trials(again, Underestimated("/openvino/f32/", kill_every=45), monkeypatch, settings)
            break
        except KeyboardInterrupt:
            continue
    assert {name: (trial.fate, trial.rule) for name, trial in same.items()} == {
        name: (trial.fate, trial.rule) for name, trial in found.items()
    }
    keys = [(entry["phase"], entry["subject"], entry["detail"]) for entry in map(json.loads, lines(again))]
    assert len(keys) == len(set(keys)) == len(lines(run))


def test_a_short_search_forces_nothing_that_would_cost_its_proof(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = searched(tmp_path, Load(), monkeypatch, settings=TuneSettings(budget_s=60), outputs=answering({}))
    assert plan.evidence is not None
    assert plan.evidence.proven
    assert sum(bool(trial.rule) for trial in plan.evidence.trials) <= 1
    assert np.isfinite(plan.evidence.capacity_rps)

"""Parts 3r and 4 of bench-tune, on the small space that part 3 measured: no load, no servers.

Part 3r: our search is replayed a hundred times (`rushhour.testing.replay`), each time with other resampled windows. Its
plan is compared with the true optimum: the plan inside the accuracy budget with the highest capacity by all windows of
the record. Random search, Optuna's TPE and a grid get as many load tests; one test of theirs is a whole search for the
capacity of one plan, and they know for nothing which plans are inside the accuracy budget.

Part 4: capacities that the tuner's predictor gives for plans it was not fitted on, against the measured ones.
"""

from __future__ import annotations

import functools
import statistics
import tempfile
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np
from bench.parts import Part, say
from bench.record import Check, Table, rank_correlation, verdict

from load import proportion
from rushhour.compress import why_outside
from rushhour.load import find_capacity
from rushhour.measurement import ClosedLoop, Measurement
from rushhour.plan import Plan
from rushhour.progress import Silent
from rushhour.records.journal import JOURNAL, Entry, Journal
from rushhour.system.machine import cores
from rushhour.testing.measured import MeasuredPlan, MeasuredSpace, name_of
from rushhour.testing.replay import ReplayBench, bundles_of, replay
from rushhour.tune import TuneSettings
from rushhour.tune.bench import Bench
from rushhour.tune.engine_times import EngineTimes
from rushhour.tune.load_tests import LoadTests
from rushhour.tune.prediction import Predictor
from rushhour.tune.settings import Budget
from rushhour.tune.space import Candidate, candidates
from rushhour.tune.state import CandidateState

NEAR = 0.95
"""Of the true optimum: what a search has to find."""
_STOPS = (5, 10, 15, 20, 25, 30, 35, 40)
"""Load tests at which the curves have points."""
_DRAWS = 20
"""Different measurements of each plan that the other searches see."""
_START = 0.75
_WORST = 10
"""Plans that are shown with their predictions."""
_STARTUPS = 10
"""Random trials with which TPE begins: its default."""


class Replayed(msgspec.Struct, frozen=True):
    """One replayed search.

    Attributes:
        seed: of the replay.
        plan: that it chose.
        share: of the true optimum, by the record.
        tests: load tests; several windows of one candidate for one purpose are one test.
        windows: of load, in all.
        minutes: that the run would have taken, training and compression apart.
        curve: load tests, and the share of the optimum of the best plan at that time.
        bound: whether the certificate's bound holds; None where the plan has none.
        regret_bound: the bound itself.
    """

    seed: int
    plan: str
    share: float
    tests: int
    windows: int
    minutes: float
    curve: tuple[tuple[int, float], ...]
    bound: bool | None
    regret_bound: float | None = None


def inside(space: MeasuredSpace) -> dict[str, MeasuredPlan]:
    """The plans inside the accuracy budget, by name."""
    good = {
        artefact
        for artefact, parts in space.accuracy.items()
        if not any(why_outside(part, space.goal.budget) for part in parts)
    }
    return {plan.name: plan for plan in space.plans if plan.artefact in good}


def load_tests(journal: Sequence[Entry]) -> int:
    """Pairs of a phase and a candidate with any window of load."""
    return len({(each.phase, each.subject) for each in journal if isinstance(each.reading, Measurement | ClosedLoop)})


def counted_tests(plan: Plan, run: Path) -> int:
    """The load tests of a run, by its certificate; by its journal where it has none."""
    certificate = plan.evidence.certificate if plan.evidence is not None else None
    return load_tests(list(Journal(run / JOURNAL))) if certificate is None else certificate.load_tests


def plan_name(plan: Plan) -> str:
    """The name in a `MeasuredSpace` of what a plan serves."""
    variant, policy = plan.variants[0], plan.policy
    role = Path(variant.bundle).name
    layout = f"c{policy.cells}s{policy.streams}t{policy.threads}b{policy.max_batch}"
    return f"{role}/{variant.engine}/{variant.precision}/{layout}"


def replayed(file: Path, seed: int) -> Replayed:
    """Our search on the record in `file`."""
    space = MeasuredSpace.load(file)
    best = max(plan.capacity_rps for plan in inside(space).values())
    curve: list[tuple[int, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)

        def share_of(plan: Plan) -> float:
            return space.by_name[plan_name(plan)].capacity_rps / best

        def so_far(plan: Plan) -> None:
            curve.append((load_tests(list(Journal(run / JOURNAL))), share_of(plan)))

        plan = replay(space, run, seed=seed, so_far=so_far)
        journal = list(Journal(run / JOURNAL))
        tests = counted_tests(plan, run)
    windows = [each.reading for each in journal if isinstance(each.reading, Measurement | ClosedLoop)]
    seconds = sum(each.duration_s + 1 if isinstance(each, Measurement) else 0.5 for each in windows)
    curve.append((tests, share_of(plan)))
    return Replayed(
        seed,
        plan_name(plan),
        share_of(plan),
        tests,
        len(windows),
        seconds / 60,
        tuple(curve),
        bound_holds(plan, share_of(plan)),
        _bound(plan),
    )


def _bound(plan: Plan) -> float | None:
    certificate = plan.evidence.certificate if plan.evidence is not None else None
    return None if certificate is None else certificate.regret_bound


def bound_holds(plan: Plan, share: float) -> bool | None:
    """Whether the certificate's bound holds; None where the plan has no bound.

    Args:
        plan: of a search.
        share: of the true optimum that it has.
    """
    bound = _bound(plan)
    return None if bound is None else share > 0 and 1 / share - 1 <= bound


# The other searches.


class Search(Protocol):
    """A search among plans: the names of those tested, in order."""

    def __call__(self, plans: Sequence[MeasuredPlan], measured: Callable[[str], float], n: int, seed: int) -> list[str]:
        """Test `n` of the plans; `measured` gives the capacity of one, another one each time."""
        ...


def at_random(plans: Sequence[MeasuredPlan], measured: Callable[[str], float], n: int, seed: int) -> list[str]:
    """Different plans, in random order."""
    order = np.random.default_rng([seed, 1]).permutation(len(plans))
    return [plans[at].name for at in order[:n].tolist()]


def on_grid(plans: Sequence[MeasuredPlan], measured: Callable[[str], float], n: int, seed: int) -> list[str]:
    """Every so manyth plan, in their order by bundle, engine, precision, layout and batch bound, from a random one."""
    ordered = sorted(plans, key=lambda plan: (plan.compiled, plan.max_batch))
    step = len(ordered) / min(n, len(ordered))
    first = int(np.random.default_rng([seed, 2]).integers(max(1, int(step))))
    chosen = [ordered[int(first + at * step) % len(ordered)].name for at in range(min(n, len(ordered)))]
    shuffled = np.random.default_rng([seed, 3]).permutation(len(chosen))
    return [chosen[at] for at in shuffled.tolist()]


def by_tpe(plans: Sequence[MeasuredPlan], measured: Callable[[str], float], n: int, seed: int) -> list[str]:
    """Optuna's tree-structured Parzen estimator: bundle, engine with precision, layout and batch bound are categories.

    A combination that is not in the space counts as a capacity of 0, and as no test.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    by_choice: dict[tuple[Any, ...], str] = {
        (p.bundle, f"{p.engine}/{p.precision}", str(p.layout), p.max_batch): p.name for p in plans
    }
    axes = [sorted({choice[axis] for choice in by_choice}, key=str) for axis in range(4)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=_STARTUPS, multivariate=True)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    tested: list[str] = []
    for _ in range(20 * n):
        if len(tested) == n:
            break
        trial = study.ask()
        choice = tuple(trial.suggest_categorical(f"axis {axis}", axes[axis]) for axis in range(4))
        name = by_choice.get(choice)
        if name is not None:
            tested.append(name)
        study.tell(trial, 0.0 if name is None else measured(name))
    return tested


OTHERS: dict[str, Search] = {"random search": at_random, "Optuna's TPE": by_tpe, "grid": on_grid}


def drawn(file: Path, draw: int) -> dict[str, float]:
    """A measured capacity of every plan inside the budget: a short search for it, on resampled windows."""
    space = MeasuredSpace.load(file)
    bench = ReplayBench(space, 1_000_000 + draw)
    found: dict[str, float] = {}
    wanted = inside(space)
    slo = space.goal.slo
    with tempfile.TemporaryDirectory() as folder:
        for candidate in _all(space, Path(folder)):
            plan = wanted.get(name_of(candidate))
            if plan is None:
                continue
            with bench.serve(candidate, "drawn") as server:

                def probe(rate_rps: float, seed: int, server: Any = server) -> Measurement:
                    n = max(500, round(1.5 * rate_rps))
                    window: Measurement = server.open_window(
                        f"{rate_rps:g} {seed}", slo, rate_rps=rate_rps, seed=seed, n=n
                    )
                    return window

                start = _START * statistics.median(rate for _, rate in plan.closed)
                search = find_capacity(probe, start_rps=max(1.0, start), slo=slo, resolution=1.1, prove=False)
            found[plan.name] = search.capacity_rps
    return found


def _all(space: MeasuredSpace, folder: Path) -> list[Candidate]:
    bundles = bundles_of(space, folder)
    return [
        each.with_batch(bound)
        for each in candidates(bundles, cores())
        for bound in sorted({plan.max_batch for plan in space.plans})
        if name_of(each.with_batch(bound)) in space.by_name
    ]


def best_so_far(tested: Sequence[str], measured: Sequence[float], truth: dict[str, float]) -> list[float]:
    """After each test, the true capacity of the plan that measured best until then."""
    found: list[float] = []
    best = -1.0
    for name, value in zip(tested, measured, strict=True):
        if value > best:
            best, chosen = value, name
        found.append(truth[chosen])
    return found


def raced_others(space: MeasuredSpace, draws: Sequence[dict[str, float]], replays: int, tests: int) -> dict[str, Any]:
    """The curves of the other searches: name -> for each replay the share of the optimum after each test."""
    plans = list(inside(space).values())
    truth = {plan.name: plan.capacity_rps for plan in plans}
    best = max(truth.values())
    curves: dict[str, list[list[float]]] = {}
    for name, search in OTHERS.items():
        for seed in range(replays):
            random = np.random.default_rng([seed, 4])
            values: list[float] = []

            def measured(plan: str, random: Any = random, values: list[float] = values) -> float:
                values.append(draws[int(random.integers(len(draws)))][plan])
                return values[-1]

            tested = search(plans, measured, tests, seed)
            if not values:
                values.extend(draws[int(random.integers(len(draws)))][plan] for plan in tested)
            shares = [value / best for value in best_so_far(tested, values, truth)]
            curves.setdefault(name, []).append(shares)
        say(f"3r {name}")
    return curves


def replays_part(file: Path, replays: int, tests: int) -> Part:
    """Part 3r.

    Args:
        file: of the space.
        replays: of each search.
        tests: load tests that a search may make.
    """
    space = MeasuredSpace.load(file)
    with ProcessPoolExecutor(cores()) as pool:
        ours = list(pool.map(functools.partial(replayed, file), range(replays)))
        draws = list(pool.map(functools.partial(drawn, file), range(min(_DRAWS, replays))))
    curves = raced_others(space, draws, replays, tests)
    curves["ours"] = [_steps(each.curve, tests) for each in ours]
    measured = {
        "replays": msgspec.to_builtins(ours),
        "others": {name: _at_stops(each) for name, each in curves.items()},
    }
    return Part(tuple(_checks(ours, tests)), _tables(space, ours, curves), measured)


def _steps(curve: Sequence[tuple[int, float]], tests: int) -> list[float]:
    """The share after each test: 0 before the first plan."""
    return [next((share for at, share in reversed(curve) if at <= test), 0.0) for test in range(1, tests + 1)]


def _at_stops(curves: Sequence[Sequence[float]]) -> list[tuple[int, float, float]]:
    """At each number of tests: the median share of the optimum, and how many searches have found a near one."""
    found = []
    for stop in _STOPS:
        values = [curve[min(stop, len(curve)) - 1] for curve in curves]
        found.append((stop, statistics.median(values), sum(value >= NEAR for value in values) / len(values)))
    return found


def _checks(ours: Sequence[Replayed], tests: int) -> list[Check]:
    n = len(ours)
    good = sum(each.share >= NEAR and each.tests <= tests for each in ours)
    most = max(each.tests for each in ours)
    low, high = proportion(good, n)
    bounds = [each.bound for each in ours if each.bound is not None]
    checks = [
        verdict(
            "3.found",
            f"replayed searches that end within 5% of the true optimum in at most {tests} load tests, share",
            ">= 0.9",
            good / n,
            None,
            n,
            unit="",
            why=f"the value is judged; {low:.2f} to {high:.2f} is its 95% interval",
        ),
        verdict("3.tests", "load tests of a replayed search, the most", f"<= {tests}", float(most), None, n, unit=""),
    ]
    what = "replayed searches whose certificate holds: the true optimum is within its bound, share"
    if bounds:
        held = sum(bounds) / len(bounds)
        middle = statistics.median(each.regret_bound for each in ours if each.regret_bound is not None)
        why = f"{len(bounds)} of {n} plans have a bound; its median is {middle:.0%}"
        checks.append(verdict("3.certificate", what, ">= 0.95", held, None, len(bounds), unit="", why=why))
    else:
        checks.append(Check("3.certificate", what, "", ">= 0.95", None, None, 0, False, "no plan has a bound"))
    return checks


def _tables(space: MeasuredSpace, ours: Sequence[Replayed], curves: dict[str, list[list[float]]]) -> tuple[Table, ...]:
    stops = {name: _at_stops(each) for name, each in curves.items()}
    names = ["ours", *OTHERS]
    rows = tuple((float(stop), *(stops[name][at][2] for name in names)) for at, stop in enumerate(_STOPS))
    medians = tuple((float(stop), *(stops[name][at][1] for name in names)) for at, stop in enumerate(_STOPS))
    note = (
        f"{len(ours)} replays of each search on the {len(space.plans)} plans of the small space "
        f"({space.about.get('date', 'invented')}). A load test of the others is a search for the capacity of one plan."
    )
    summary = (
        *(float(len(ours)), statistics.median(each.tests for each in ours), statistics.median(e.windows for e in ours)),
        *(statistics.median(each.minutes for each in ours), min(each.share for each in ours)),
    )
    columns = (
        "replays",
        "load tests, median",
        "windows, median",
        "minutes of load, median",
        "least share of the optimum",
    )
    return (
        Table("Our search, replayed", columns, (summary,)),
        Table("Searches within 5% of the true optimum, share", ("load tests", *names), rows, note),
        Table("Share of the true optimum, median", ("load tests", *names), medians, note),
    )


# Part 4.


def predicted_part(file: Path, seed: int, learnt: int) -> Part:
    """Part 4: the predictor against the measured capacities.

    Args:
        file: of the space.
        seed: of the choice of the plans that residuals are learnt from.
        learnt: plans that residuals are learnt from, as many as a search measures.
    """
    space = MeasuredSpace.load(file)
    found = predictions(space, seed, learnt)
    measured = np.array([each["measured"] for each in found])
    values = {key: np.array([each[key] for each in found]) for key in ("engine_alone", "predicted", "corrected")}
    errors = {key: float(np.median(np.abs(value / measured - 1))) for key, value in values.items()}
    ranks = {key: rank_correlation(value, measured) for key, value in values.items()}
    n = len(found)
    checks = (
        verdict("4.plans", "plans predicted that the predictor was not fitted on", ">= 20", float(n), None, n, unit=""),
        verdict("4.error", "their predicted against their measured capacity, median error", "<= 0.1",
                errors["corrected"], None, n, unit=""),
        verdict("4.rank", "the same, rank correlation", ">= 0.9", ranks["corrected"], None, n, unit=""),
    )  # fmt: skip
    names = {
        "engine_alone": "service times alone",
        "predicted": "with the overhead of serving",
        "corrected": f"with the residuals of {learnt} other plans",
    }
    rows = tuple((names[key], errors[key], ranks[key]) for key in names)
    plans = tuple(
        (each["plan"], each["engine_alone"], each["predicted"], each["corrected"], each["measured"])
        for each in sorted(found, key=lambda each: -abs(each["corrected"] / each["measured"] - 1))[:_WORST]
    )
    columns = ("plan", "alone, /s", "predicted, /s", "corrected, /s", "measured, /s")
    tables = (
        Table("Predicted and measured capacities of the small space", ("prediction", "median error", "rank"), rows),
        Table("The plans with the largest errors", columns, plans),
    )
    return Part(checks, tables, found)


def predictions(space: MeasuredSpace, seed: int, learnt: int) -> list[dict[str, Any]]:
    """What the tuner predicts for the plans of the space. The overhead of serving comes from the best plan of each
    layout and a slow one, residuals from `learnt` others; none of these is in the answer. All are for the host's speed
    beside the measurement."""
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        bundles, replaying = bundles_of(space, run), ReplayBench(space, seed)
        journal = Journal(run / JOURNAL)
        bench = Bench(journal, replaying, space.goal, run, ())
        budget = Budget(None, replaying.clock)
        times = EngineTimes(journal, bundles, space.goal.slo, TuneSettings().time_s, (), replaying)
        settings = TuneSettings(seed=seed)
        tests = LoadTests(bench, bundles, space.goal, settings, Silent(), budget, host_speed=times.speed_beside)
        predictor = Predictor(times)
        states = [CandidateState(each) for each in candidates(bundles, cores()) if _has(space, each)]
        for state in states:
            predictor.choose_batch(state)
        states.sort(key=lambda state: -(state.predicted or 0.0))
        fitted = predictor.learn_overheads(states, functools.partial(tests.measure_throughput, in_open_loop=True))
        used = {name_of(state.candidate) for state in fitted}
        rest = [each for each in _all(space, run) if name_of(each) not in used and _capacity(space, each)]
        order = np.random.default_rng(seed).permutation(len(rest)).tolist()
        alone = Predictor(times)
        before = {name_of(each): predictor.capacity(each) / predictor.speed for each in rest}
        for at in order[:learnt]:
            plan = space.by_name[name_of(rest[at])]
            predictor.learn_residual(CandidateState(rest[at], capacity=plan.capacity_rps, speed=plan.speed))
        for at in order[learnt:]:
            candidate = rest[at]
            speed = space.by_name[name_of(candidate)].speed
            found.append(
                {
                    "plan": name_of(candidate),
                    "engine_alone": alone.capacity(candidate) * speed,
                    "predicted": before[name_of(candidate)] * speed,
                    "corrected": predictor.capacity(candidate) / predictor.speed * speed,
                    "measured": _capacity(space, candidate),
                }
            )
    return found


def _has(space: MeasuredSpace, candidate: Candidate) -> bool:
    return any(name_of(candidate.with_batch(plan.max_batch)) in space.by_name for plan in space.plans)


def _capacity(space: MeasuredSpace, candidate: Candidate) -> float:
    return space.by_name[name_of(candidate)].capacity_rps

"""Load tests of candidates: throughput, which of two is faster, the capacity inside the limit, and its proof."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping

from rushhour.bundle import Bundle
from rushhour.goal import Goal
from rushhour.load import Estimate, Probe, Race, estimate, find_capacity, race, rounded
from rushhour.measurement import Measurement, Outcome
from rushhour.progress import Progress
from rushhour.tune.bench import Bench, ServedCandidate
from rushhour.tune.decisions import Decisions
from rushhour.tune.settings import Budget, TuneSettings
from rushhour.tune.space import Candidate
from rushhour.tune.state import CandidateState, failure_reason

_THROUGHPUT_S, _THROUGHPUT_WINDOWS, _SIMILAR = 0.6, 4, 1.3
"""The closed loops that measure a throughput: length, largest number, and the tolerated factor of their users."""
_OPEN_S, _NEAR, _OPEN_SEED = 1.0, 0.9, 20_000
"""The window of open-loop load beside them: length, share of the throughput, distance of its seed from the run's."""
_RACE_S, _LEAST_LIMITS = 0.35, 8.0
"""Length of the windows of a race, and their least length in multiples of the limit."""
_USERS, _MOST_USERS = 0.4, 512
_TURNS = 1_000
_START = 0.75
"""Of the throughput in time: where the search for the capacity starts."""
_PROOFS = 6
"""Windows of one confirmation, at most."""
_ERROR = 0.05
"""How often a confirmation may prove a rate that does not hold: all its windows together."""
_LEAST_SEARCH_S = 3.0
"""With less an estimate would end after its first window, and with 0/s where that window missed."""
_SHORTEST_PROOF_S = 2.0
"""Windows that are shorter prove nothing of a queue."""
_LONGEST_PROOF = 3.0
"""The longest window of a confirmation, in multiples of `TuneSettings.proof_s`."""
_DOWN, _MOST_DOWN, _BY_FAR = 0.95, 0.8, 0.1
"""After a window without a proof the rate is lowered to between the second and the first of these; to the second where
this share of the requests was late."""
_INVALID = (Outcome.VOID, Outcome.GENERATOR_LIMITED)
_LOWER = 0.85
"""Of an estimate: a proof starts at this rate or above, however uncertain the estimate."""
_EASY, _ATTEMPTS = 0.9, 2.5
"""Where fewer windows than the second of these fit into the remaining time and nothing is proven yet, the rate is at
most this share of the first one: near the capacity a window of 20 s seldom proves anything."""
_ROUGH = 2.0
"""By this factor searches are coarser and shorter that only show what a step bought."""
_OUTCOMES = {
    Outcome.PASS: "holds",
    Outcome.FAIL: "does not hold",
    Outcome.INCONCLUSIVE: "inconclusive",
    Outcome.UNSTABLE: "the server fell behind",
    Outcome.GENERATOR_LIMITED: "the load generator was at its limit",
    Outcome.VOID: "the machine was disturbed",
}


class LoadTests:
    """Puts candidates under load, within a budget.

    Args:
        bench: serves them.
        bundles: role -> bundle.
        goal: the limits.
        settings: of the search.
        progress: receives each step.
        budget: of the search; the less is left, the less is measured.
        decisions: receives each decision, and the number of load tests.
        host_speed: reads the host's speed before and after a load test of a candidate, with the name of the reading.

    Attributes:
        decisions: the same.
        races: the two candidates of each race, incumbent first, with the result.
    """

    def __init__(
        self,
        bench: Bench,
        bundles: Mapping[str, Bundle],
        goal: Goal,
        settings: TuneSettings,
        progress: Progress,
        budget: Budget,
        decisions: Decisions | None = None,
        *,
        host_speed: Callable[[Candidate, str], float] = lambda candidate, when: 1.0,
    ) -> None:
        self._bench = bench
        self._bundles = bundles
        self._goal = goal
        self._settings = settings
        self._progress = progress
        self._budget = budget
        self._host_speed = host_speed
        self.decisions = decisions or Decisions()
        self.races: list[tuple[CandidateState, CandidateState, Race]] = []

    def serve(self, state: CandidateState, phase: str) -> contextlib.AbstractContextManager[ServedCandidate]:
        """A candidate on its server, as a context."""
        return self._bench.serve(state.candidate, self._bundles[state.candidate.bundle], phase, state.sent)

    def measure_throughput(self, state: CandidateState, *, in_open_loop: bool = False) -> bool:
        """Measure the throughput of answers in time; false if the candidate does not run, and has failed.

        Args:
            state: of the candidate.
            in_open_loop: add a window of open-loop load somewhat below that throughput to its windows: it shows what
                requests cost that come one by one, and how the host's speed varies.
        """
        users = self._users(state.predicted or 100.0)
        self.decisions.load_test()
        self._progress.start(f"{state.candidate.name}: throughput", _THROUGHPUT_WINDOWS)
        try:
            with self._at_speed(state, "push"), self.serve(state, "push") as served:  # the phase's name in the journal
                for turn in range(_THROUGHPUT_WINDOWS):
                    window = served.closed_window(users, self._window_s(_THROUGHPUT_S), turn)
                    state.throughput = max(window.throughput_rps, 1.0)
                    self._progress.advance()
                    wanted = self._users(state.throughput)
                    if turn and 1 / _SIMILAR <= wanted / users <= _SIMILAR:
                        break
                    users = wanted
                if in_open_loop:
                    rate = rounded(_NEAR * (state.throughput or 1.0))
                    state.windows.append(served.search_windows(_OPEN_S)(rate, self._settings.seed + _OPEN_SEED))
        except Exception as error:  # of an engine, a server or the load on it: only this candidate fails
            state.end("failed", failure_reason(error))
            self.decisions.ended("throughput", state)
            self._progress.done(state.why, good=False)
            return False
        self._progress.done(f"about {state.throughput:,.0f} requests/s")
        return True

    @contextlib.contextmanager
    def _at_speed(self, state: CandidateState, phase: str) -> Iterator[None]:
        """A load test, as a context, and the host's speed beside it."""
        before = self._host_speed(state.candidate, phase)
        yield
        state.speed = math.sqrt(before * self._host_speed(state.candidate, f"{phase}, after"))

    def _users(self, rate_rps: float) -> int:
        """Users that are answered at this rate after 0.4 of the limit (Little's law)."""
        return max(1, min(_MOST_USERS, round(_USERS * rate_rps * self._goal.slo.limit_s)))

    def _window_s(self, seconds: float) -> float:
        """Length of a closed loop: `seconds`, at least eight times the limit."""
        return float(f"{max(seconds, _LEAST_LIMITS * self._goal.slo.limit_s):.3g}")

    def race(
        self,
        incumbent: CandidateState,
        served: ServedCandidate,
        rival: CandidateState,
        rival_served: ServedCandidate,
        *,
        rivals: int = 1,
        again: int = 0,
    ) -> Race | None:
        """Measure which of two has the higher throughput. None where one of them does not run, and has failed.

        The one that leads has no fate afterwards.

        Args:
            incumbent: the one to beat, with its throughput measured.
            served: on its server.
            rival: the other one.
            rival_served: on its server.
            rivals: number of rivals that race this incumbent in total.
            again: number of the race among those of the same two; one in the journal is not run again.
        """
        users = self._users(incumbent.throughput or 1.0)
        seconds = self._window_s(_RACE_S)
        self.decisions.load_test()
        self._progress.start(f"{rival.candidate.name} against {incumbent.candidate.name}")

        running = incumbent

        def measures(on: ServedCandidate, of: CandidateState, other: CandidateState) -> Callable[[int], float]:
            def throughput(turn: int) -> float:
                nonlocal running
                running = of
                self._progress.advance()
                return on.closed_window(users, seconds, _TURNS * again + turn, str(other.candidate)).throughput_rps

            return throughput

        try:
            for running in (incumbent, rival):  # a warm-up of servers that have just started
                on = served if running is incumbent else rival_served
                on.closed_window(users, self._window_s(_THROUGHPUT_S), 0)
            result = race(
                measures(served, incumbent, rival),
                measures(rival_served, rival, incumbent),
                rivals=rivals,
                is_over=lambda: self._budget.left < Budget.FOR_PROOF,
            )
        except Exception as error:  # as in `measure_throughput`
            running.end("failed", failure_reason(error))
            self.decisions.ended("race", running)
            self._progress.done(running.why, good=False)
            return None
        self.races.append((incumbent, rival, result))
        self.decisions.raced(incumbent, rival, result)
        incumbent.throughput, rival.throughput = result.throughput_rps
        if result.order == "faster":
            incumbent.end("beaten", f"{rival.candidate.name} has a higher throughput: {result}")
        elif result.order == "slower":
            rival.end("beaten", f"lower throughput than {incumbent.candidate.name}: {result}")
        elif result.rival_leads:
            better = f"{rival.candidate.name}, which has the higher estimate"
            incumbent.end("tied", f"no significant difference to {better}: {result}")
        else:
            rival.end("tied", f"no significant difference to {incumbent.candidate.name}: {result}")
        tie = "a tie with the higher estimate" if result.rival_leads else "a tie"
        note = {"faster": "higher throughput", "slower": "lower throughput", "tie": tie}[result.order]
        self._progress.done(f"{note}: {result}", good=result.rival_leads)
        return result

    def estimate_capacity(self, state: CandidateState, *, rough: bool = False) -> None:
        """Set the capacity of a candidate, estimated; `rough` where it only shows what a step bought."""
        step = _ROUGH if rough else 1.0
        self.decisions.load_test()
        self._progress.start(f"{state.candidate.name}: capacity inside {self._goal.slo}")
        try:
            with self._at_speed(state, "search"), self.serve(state, "search") as served:
                search = find_capacity(
                    self._recorded(state, served.search_windows(self._settings.window_s / step)),
                    start_rps=_START * (state.throughput or 100.0),
                    slo=self._goal.slo,
                    resolution=1 + step * self._settings.resolution,
                    seed=self._settings.seed,
                    prove=False,
                    budget_s=self._for_search_s / step,
                )
        except Exception as error:  # as in `measure_throughput`
            state.end("failed", failure_reason(error))
            self.decisions.ended("capacity", state)
            self._progress.done(state.why, good=False)
            return
        state.capacity = search.capacity_rps
        self.decisions.estimated(state)
        note = f"about {search.capacity_rps:,.0f} requests/s" if search.capacity_rps else "it holds at no rate"
        self._progress.done(note, good=search.capacity_rps > 0)

    def _recorded(self, state: CandidateState, probe: Probe) -> Probe:
        def recorded(rate: float, seed: int) -> Measurement:
            window = probe(rate, seed)
            state.windows.append(window)
            self._progress.advance(note=f"{rate:,.0f}/s: {_OUTCOMES[window.outcome]}")
            return window

        return recorded

    def confirm(self, state: CandidateState, share: float = 1.0) -> Measurement | None:
        """Prove a candidate's capacity on fresh seeds. Where no window is a proof, it keeps the estimate.

        The first rate is the lower end of the estimate from all windows of this candidate; for the last window that
        fits into the budget it is somewhat lower. A proof raises the rate half way to what was not proven; any other
        window lowers it to the lower end of the new estimate, and the next window is longer, up to what the last one
        needed.

        Several windows are several chances of a false proof. So each may spend half of what is left of the error, and
        all of them together no more than one window alone would.

        Args:
            state: of the candidate.
            share: of the error that this confirmation may spend, where others are tried for the same claim.
        """
        found = self.estimate(state)
        if found is None:
            return None
        self.decisions.load_test()
        self._progress.start(f"{state.candidate.name}: proof on fresh seeds", _PROOFS)
        failure = ""
        proven: list[Measurement] = []
        try:
            self._prove(state, found, share * _ERROR, proven)
        except Exception as error:  # as in `measure_throughput`; earlier proofs stay
            failure = failure_reason(error)
        if proven:
            state.capacity, state.p99_ms = proven[-1].rate_rps, proven[-1].p99_ms
            self.decisions.confirmed(state, proven=True)
            self._progress.done(f"{proven[-1].rate_rps:,.0f} requests/s")
            return proven[-1]
        found = self.estimate(state)
        state.capacity = found.rate_rps if found else 0.0
        state.why = f"{found} keep {self._goal.slo}" if found else "no rate could be confirmed"
        if failure:
            state.end("failed", failure)
        self.decisions.confirmed(state, proven=False)
        self._progress.done(state.why, good=False)
        return None

    def _prove(self, state: CandidateState, found: Estimate, error: float, proven: list[Measurement]) -> None:
        """The windows of a confirmation; each proof is added to `proven`, at a higher rate than the one before."""
        last: Outcome | None = None
        if self._budget.seconds_left < _SHORTEST_PROOF_S:  # the estimate has to do
            return
        ceiling = found.interval_rps[1]
        window_s = min(self._settings.proof_s, max(_SHORTEST_PROOF_S, self._for_proof_s))
        rate = max(found.interval_rps[0], _LOWER * found.rate_rps)
        easy = _EASY * rate
        with self.serve(state, "confirm") as served:
            for attempt in range(_PROOFS):
                if attempt and self._budget.left < Budget.FOR_STEPS and self._is_unrefuted(state):
                    break
                if not proven and self._budget.seconds_left < _ATTEMPTS * window_s:
                    rate = min(rate, easy)
                rate = rounded(rate)
                probe = self._recorded(state, served.proof_windows(float(f"{window_s:.3g}"), error / 2))
                window = probe(rate, self._settings.seed + 10_000 + attempt)
                if window.outcome not in _INVALID:  # an invalid window could not have passed, and spends no error
                    error /= 2
                if window.outcome is Outcome.PASS:
                    proven.append(window)
                elif window.outcome not in _INVALID:
                    ceiling = min(ceiling, rate)
                    needed_s = window.duration_s + (window.needs_s or 0.0)
                    window_s = min(_LONGEST_PROOF * self._settings.proof_s, max(window_s, needed_s))
                if proven:
                    if ceiling <= proven[-1].rate_rps * (1 + self._settings.resolution):
                        break
                    rate = math.sqrt(proven[-1].rate_rps * ceiling)
                elif window.outcome in _INVALID and window.outcome is not last:
                    last = window.outcome  # repeat this rate once
                else:
                    last = None
                    now = self.estimate(state)
                    least = now.interval_rps[0] if now is not None else 0.9 * rate
                    rate = max(min(_DOWN * rate, least), _MOST_DOWN * rate)
                    if window.outcome.refutes and window.late > _BY_FAR * window.n:
                        rate = _MOST_DOWN * rate  # the host has become slower, and each window costs time

    @property
    def _for_search_s(self) -> float:
        """Seconds of the estimate of one capacity: its share of what is left, and a few windows in any case."""
        left_s = min(Budget.FOR_SEARCH * self._budget.seconds, self._budget.seconds_left)
        return max(_LEAST_SEARCH_S, left_s)

    @property
    def _for_proof_s(self) -> float:
        """Seconds that are left for a proof: the baseline and what each step bought have theirs."""
        return (self._budget.left - Budget.FOR_STEPS) * self._budget.seconds

    def _is_unrefuted(self, state: CandidateState) -> bool:
        """Whether its windows give a capacity that none of them refuted: it can be the answer."""
        found = self.estimate(state)
        return found is not None and not self.refuted(state, found.rate_rps)

    def estimate(self, state: CandidateState) -> Estimate | None:
        """The capacity from all windows of a candidate."""
        return estimate(state.windows, self._goal.slo, seed=self._settings.seed)

    def refuted(self, state: CandidateState, rate_rps: float) -> bool:
        """Whether a window proved that this rate does not hold."""
        return any(window.outcome.refutes and window.rate_rps <= rate_rps for window in state.windows)

"""Candidates under load: how much at most, which of two carries more, how much inside the limit, and its proof."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping

from rushhour.bundle import Bundle
from rushhour.errors import RushhourError, StorageError
from rushhour.goal import Goal
from rushhour.load import Estimate, Probe, Race, estimate, find_capacity, race, rounded
from rushhour.measurement import Accuracy, Measurement, Outcome
from rushhour.plan import Fate
from rushhour.progress import Progress
from rushhour.tune.settings import Budget, TuneSettings
from rushhour.tune.space import Candidate
from rushhour.tune.trial import Bench, Loaded

_PUSH_S, _PUSHES, _ALIKE = 0.6, 4, 1.3
"""A closed loop that shows how much a candidate answers at most: seconds, tries, and how far off its users may be."""
_RACE_S, _MOMENT_LIMITS = 0.35, 8.0
"""A race's windows are so long, and at least so many times the limit."""
_USERS, _MOST_USERS = 0.4, 512
_TURNS = 1_000
_START = 0.75
"""Of what is answered in time at most: where the search for the capacity begins."""
_PROOFS = 6
"""Windows of one confirmation, at most."""
_ERROR = 0.05
"""How often a confirmation may prove a rate that does not hold: all its windows together."""
_LONGEST_PROOF = 3.0
"""Times `TuneSettings.proof_s`, at most, that a window of a confirmation grows to."""
_DOWN, _AT_ONCE, _BY_FAR = 0.95, 0.8, 0.1
"""A window that is no proof lowers the rate at least to so much and at most to so much; to the latter where so many of
its requests were late."""
_SAY_NOTHING = (Outcome.VOID, Outcome.GENERATOR_LIMITED)
_LOWER = 0.85
"""Of an estimate: a proof begins no lower, however uncertain the estimate."""
_SURE, _TRIES = 0.9, 2.5
"""Where fewer windows of a proof fit into the time that is left, and nothing is proven yet, the next one is taken at so
much of that rate at most: near the capacity a window of 20 s seldom proves anything."""
_ROUGH = 2.0
"""How much coarser and shorter the searches are that only show what a step bought."""
_IN_WORDS = {
    Outcome.PASS: "holds",
    Outcome.FAIL: "does not hold",
    Outcome.INCONCLUSIVE: "not clear yet",
    Outcome.UNSTABLE: "the server fell behind",
    Outcome.GENERATOR_LIMITED: "the load generator was at its limit",
    Outcome.VOID: "the machine was disturbed",
}


def words(error: Exception) -> str:
    """What a candidate said that failed: one line, whatever it was.

    Raises:
        StorageError: if it is no candidate's fault: without a journal nothing can go on.
    """
    if isinstance(error, StorageError):
        raise error
    return str(error) if isinstance(error, RushhourError) else " ".join(f"{type(error).__name__}: {error}".split())


@dataclasses.dataclass
class Contender:
    """A candidate and what is known of it so far."""

    candidate: Candidate
    accuracy: Accuracy | None = None
    predicted: float | None = None
    throughput: float | None = None
    """Answers in time a second, of users that ask again as soon as they are answered."""
    capacity: float | None = None
    p99_ms: float | None = None
    windows: list[Measurement] = dataclasses.field(default_factory=list)
    """Of load, in the order asked. Not those on file: a search that goes on must ask what it asked before."""
    fate: Fate | None = None
    why: str = ""

    def end(self, fate: Fate, why: str) -> None:
        """It goes no further."""
        self.fate, self.why = fate, why


class Track:
    """Where contenders are put under load, within a budget.

    Args:
        bench: gives their servers.
        bundles: role -> bundle.
        goal: the limits.
        settings: of the search.
        progress: hears of every step.
        budget: what is left of it decides how much is asked.
    """

    def __init__(
        self,
        bench: Bench,
        bundles: Mapping[str, Bundle],
        goal: Goal,
        settings: TuneSettings,
        progress: Progress,
        budget: Budget,
    ) -> None:
        self._bench = bench
        self._bundles = bundles
        self._goal = goal
        self._settings = settings
        self._progress = progress
        self._budget = budget

    def loaded(self, contender: Contender, phase: str) -> contextlib.AbstractContextManager[Loaded]:
        """Its server, as a context, for windows of load."""
        return self._bench.load(contender.candidate, self._bundles[contender.candidate.bundle], phase)

    def push(self, contender: Contender) -> bool:
        """See how much it answers in time at most; whether it runs at all."""
        users = self._users(contender.predicted or 100.0)
        self._progress.start(f"{contender.candidate.name}: how much at most?", _PUSHES)
        try:
            with self.loaded(contender, "push") as loaded:
                for turn in range(_PUSHES):
                    seen = loaded.crowd(users, self._moment_s(_PUSH_S), turn)
                    contender.throughput = max(seen.throughput_rps, 1.0)
                    self._progress.advance()
                    wanted = self._users(contender.throughput)
                    if turn and 1 / _ALIKE <= wanted / users <= _ALIKE:
                        break
                    users = wanted
        except Exception as error:  # an engine, a server or the load on it: of one candidate, and so it ends alone
            contender.end("failed", words(error))
            self._progress.done(contender.why, good=False)
            return False
        self._progress.done(f"about {contender.throughput:,.0f} requests/s")
        return True

    def _users(self, rate_rps: float) -> int:
        """So many that are answered at this rate after 0.4 of the limit (Little's law)."""
        return max(1, min(_MOST_USERS, round(_USERS * rate_rps * self._goal.slo.limit_s)))

    def _moment_s(self, seconds: float) -> float:
        """How long a closed loop takes to tell something: `seconds`, and eight times the limit."""
        return float(f"{max(seconds, _MOMENT_LIMITS * self._goal.slo.limit_s):.3g}")

    def duel(
        self, incumbent: Contender, ours: Loaded, rival: Contender, theirs: Loaded, *, rivals: int = 1, again: int = 0
    ) -> Race | None:
        """Which of two carries more? None where one of them does not run, which has failed then.

        Whoever leads has no fate afterwards.

        Args:
            incumbent: the one to beat, after its `push`.
            ours: its server.
            rival: the other one.
            theirs: its server.
            rivals: that race this incumbent, all in all.
            again: which race of these two; one that was run is not run again.
        """
        users = self._users(incumbent.throughput or 1.0)
        seconds = self._moment_s(_RACE_S)
        self._progress.start(f"{rival.candidate.name} against {incumbent.candidate.name}")

        asked = incumbent

        def ask(loaded: Loaded, of: Contender, other: Contender) -> Callable[[int], float]:
            def taken(turn: int) -> float:
                nonlocal asked
                asked = of
                self._progress.advance()
                return loaded.crowd(users, seconds, _TURNS * again + turn, str(other.candidate)).throughput_rps

            return taken

        try:
            for asked in (incumbent, rival):  # a server just started
                (ours if asked is incumbent else theirs).crowd(users, self._moment_s(_PUSH_S), 0)
            ended = race(
                ask(ours, incumbent, rival),
                ask(theirs, rival, incumbent),
                rivals=rivals,
                is_over=lambda: self._budget.left < Budget.FOR_PROOF,
            )
        except Exception as error:  # as in `push`
            asked.end("failed", words(error))
            self._progress.done(asked.why, good=False)
            return None
        incumbent.throughput, rival.throughput = ended.throughput_rps
        if ended.order == "faster":
            incumbent.end("beaten", f"{rival.candidate.name} carries {ended}")
        elif ended.order == "slower":
            rival.end("beaten", f"it carries {ended} of what {incumbent.candidate.name} does")
        elif ended.rival_leads:
            incumbent.end("tied", f"{rival.candidate.name} carries {ended}")
        else:
            rival.end("tied", f"it carries {ended} of what {incumbent.candidate.name} does")
        tie = "a tie, it looks better" if ended.rival_leads else "a tie"
        said = {"faster": "it carries more", "slower": "it carries less", "tie": tie}[ended.order]
        self._progress.done(f"{said}: {ended}", good=ended.rival_leads)
        return ended

    def approach(self, contender: Contender, *, rough: bool = False) -> None:
        """Its capacity, estimated; `rough` for a step on the ladder, which decides nothing."""
        step = _ROUGH if rough else 1.0
        self._progress.start(f"{contender.candidate.name}: how much inside {self._goal.slo}?")
        try:
            with self.loaded(contender, "search") as loaded:
                search = find_capacity(
                    self._noted(contender, loaded.glances(self._settings.window_s / step)),
                    start_rps=_START * (contender.throughput or 100.0),
                    slo=self._goal.slo,
                    resolution=1 + step * self._settings.resolution,
                    seed=self._settings.seed,
                    prove=False,
                    budget_s=Budget.FOR_WAY / step * self._budget.seconds,
                )
        except Exception as error:  # as in `push`
            contender.end("failed", words(error))
            self._progress.done(contender.why, good=False)
            return
        contender.capacity = search.capacity_rps
        said = f"about {search.capacity_rps:,.0f} requests/s" if search.capacity_rps else "nothing: too slow"
        self._progress.done(said, good=search.capacity_rps > 0)

    def _noted(self, contender: Contender, probe: Probe) -> Probe:
        def noted(rate: float, seed: int) -> Measurement:
            result = probe(rate, seed)
            contender.windows.append(result)
            self._progress.advance(note=f"{rate:,.0f}/s: {_IN_WORDS[result.outcome]}")
            return result

        return noted

    def confirm(self, contender: Contender, share: float = 1.0) -> Measurement | None:
        """A proof of a candidate's capacity, on fresh seeds.

        It begins at the lower end of what all windows of this candidate tell by then; the last window that there is
        time for is taken somewhat below. A proof raises the rate, half way to what was not proven; any other window
        lowers it to the lower end of the estimate as it is then, and the next one is longer, as far as the last one
        asks for it. Where none is a proof, the candidate keeps the estimate.

        Several windows are several chances to be lucky. So each may spend half of what is left of the error, and all
        of them together no more than one window alone would.

        Args:
            share: of the error that this confirmation may spend, where others are tried for the same claim.
        """
        found = self.estimate(contender)
        if found is None:
            return None
        self._progress.start(f"{contender.candidate.name}: proof on fresh seeds", _PROOFS)
        failure = ""
        proven: list[Measurement] = []
        try:
            self._prove(contender, found, share * _ERROR, proven)
        except Exception as error:  # as in `push`; what it proved before stays
            failure = words(error)
        if proven:
            contender.capacity, contender.p99_ms = proven[-1].rate_rps, proven[-1].p99_ms
            self._progress.done(f"{proven[-1].rate_rps:,.0f} requests/s")
            return proven[-1]
        found = self.estimate(contender)
        contender.capacity = found.rate_rps if found else 0.0
        contender.why = f"{found} keep {self._goal.slo}" if found else "nothing could be confirmed"
        if failure:
            contender.end("failed", failure)
        self._progress.done(contender.why, good=False)
        return None

    def _prove(self, contender: Contender, found: Estimate, error: float, proven: list[Measurement]) -> None:
        """The windows of a confirmation; each proof is added to `proven`, at a higher rate than the one before."""
        last: Outcome | None = None
        ceiling, window_s = found.interval_rps[1], self._settings.proof_s
        rate = max(found.interval_rps[0], _LOWER * found.rate_rps)
        sure = _SURE * rate
        with self.loaded(contender, "confirm") as loaded:
            for attempt in range(_PROOFS):
                if attempt and self._budget.left < Budget.FOR_RUNGS and self._stands(contender):
                    break
                if not proven and self._budget.left * self._budget.seconds < _TRIES * window_s:
                    rate = min(rate, sure)
                rate = rounded(rate)
                probe = self._noted(contender, loaded.windows(float(f"{window_s:.3g}"), error / 2))
                result = probe(rate, self._settings.seed + 10_000 + attempt)
                if result.outcome not in _SAY_NOTHING:  # which could not have passed
                    error /= 2
                if result.outcome is Outcome.PASS:
                    proven.append(result)
                elif result.outcome not in _SAY_NOTHING:
                    ceiling = min(ceiling, rate)
                    asked_s = result.duration_s + (result.needs_s or 0.0)
                    window_s = min(_LONGEST_PROOF * self._settings.proof_s, max(window_s, asked_s))
                if proven:
                    if ceiling <= proven[-1].rate_rps * (1 + self._settings.resolution):
                        break
                    rate = math.sqrt(proven[-1].rate_rps * ceiling)
                elif result.outcome in _SAY_NOTHING and result.outcome is not last:
                    last = result.outcome  # once more at this rate
                else:
                    last = None
                    now = self.estimate(contender)
                    least = now.interval_rps[0] if now is not None else 0.9 * rate
                    rate = max(min(_DOWN * rate, least), _AT_ONCE * rate)
                    if result.outcome.refutes and result.late > _BY_FAR * result.n:
                        rate = _AT_ONCE * rate  # the host is another one now, and each window costs time

    def _stands(self, contender: Contender) -> bool:
        """Whether its windows tell a capacity that none of them refuted: it can be the answer."""
        found = self.estimate(contender)
        return found is not None and not self.refuted(contender, found.rate_rps)

    def estimate(self, contender: Contender) -> Estimate | None:
        """What all windows of a candidate tell."""
        return estimate(contender.windows, self._goal.slo, seed=self._settings.seed)

    def refuted(self, contender: Contender, rate_rps: float) -> bool:
        """Whether a window proved that it does not hold this rate."""
        return any(window.outcome.refutes and window.rate_rps <= rate_rps for window in contender.windows)

"""The decision: does the SLO hold at this rate, how sure is that, and can this window tell?

Pure functions of samples. The questions in order; the first answer wins:

1. Are there enough samples for any proof? If not: inconclusive, "insufficient samples".
2. Is there a steady state, and what do the late requests prove? Where the machine was disturbed or the generator late,
   the server gets the benefit of the doubt: the delays of the canary and of the generator at their 99th percentiles are
   subtracted from every latency first. A server that is unstable or fails even so is unstable or fails: an overloaded
   server on shared cores disturbs the canary itself. It fails only if the late requests prove that the SLO does not
   hold; what is proven neither way is inconclusive.
3. Was the generator the bottleneck (its CPU, its bound on connections, its throughput against a null server)? Then
   generator_limited: the server was not tested at this rate.
4. Was the machine disturbed? Then void. It comes before the send delay, which a disturbed machine causes too.
5. Was the generator late? Then generator_limited.
6. Otherwise pass, or inconclusive. So a pass needs valid conditions; no disturbance ever turns into a pass.

What the late requests prove is in `evidence.py`, what a growing window may spend at each analysis in `interim.py`. How
often a queue at its limit passes, and one 10% inside it, is simulated by `benchmarks/load.py`.

The speed of an ordinary host varies over seconds, and no statistic of a window shows what lies outside it. So a window
that may grow passes after 12 s at the earliest, a step in the queue is not taken for a slope, and the tail is judged
from near its end too, where the autocorrelation matters less. `benchmarks/noise_verdict.py` simulates the effect. A
window that is short as a whole is judged by its own samples: its 5% hold for a host whose speed lasts longer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rushhour.goal import SLO
from rushhour.load.generator.samples import Samples, Status, joined
from rushhour.load.significance import needed_n, passes, percentile_ranks
from rushhour.load.verdict.autocorrelation import late_by_block, long_variance_inflation
from rushhour.load.verdict.evidence import Evidence
from rushhour.load.verdict.interim import InterimAnalysis
from rushhour.load.verdict.steadiness import reached, why_unstable, why_unsteady
from rushhour.load.verdict.validity import quantile, threats_to
from rushhour.measurement import Interval, Measurement, Outcome, pack_latencies

_EARLIEST_PASS_S = 12.0
"""A window that may grow does not pass before: the host may be fast for seconds, and nothing in the window shows it."""
_HOPELESS = 0.01
_REFUTED = 0.01
"""How often a rate that holds may be called failing, at most."""


def judge(
    samples: Samples | Sequence[Samples],
    slo: SLO,
    *,
    rate_rps: float,
    seed: int,
    interim: InterimAnalysis | None = None,
    null_rps: float | None = None,
) -> Measurement:
    """The verdict on one window of open-loop load.

    Args:
        samples: of the whole run; those of its warm-up are left out here. Several runs at the same rate, each with a
            warm-up and a seed of its own, are one window.
        slo: the SLO.
        rate_rps: of the schedule.
        seed: of the schedule, of the first run where there are several.
        interim: where the window may still grow, which analysis this is; None where it is complete.
        null_rps: the generator's throughput against the null server, where it is known.

    Returns:
        The measurement. Where it is not `decided`, a longer window may decide it.
    """
    runs = [samples] if isinstance(samples, Samples) else list(samples)
    window = joined(runs)
    n = len(window)
    duration = max(sum(_duration(run) for run in runs), 1e-9)
    latencies = window.latencies()
    late = latencies > slo.limit_s
    outcome, reason = decide(runs, slo, rate_rps=rate_rps, interim=interim, null_rps=null_rps)
    needs_s = None
    if outcome is Outcome.INCONCLUSIVE and n >= needed_n(slo):
        shed, errors = window.count(Status.SHED), window.count(Status.ERROR) + window.count(Status.LOST)
        needs_s = Evidence(latencies, slo, shed, errors).needs_s(duration, (interim or InterimAnalysis()).error)
    p99, interval = (None, None) if outcome is Outcome.UNSTABLE else _p99(latencies, window.timeout_s)
    answered = latencies[np.isfinite(latencies)]
    send_delay = quantile(window.sent - window.scheduled, 0.99)
    return Measurement(
        slo=slo,
        rate_rps=rate_rps,
        seed=seed,
        duration_s=duration,
        n=n,
        late=int(late.sum()),
        errors=window.count(Status.ERROR) + window.count(Status.LOST),
        shed=window.count(Status.SHED),
        p50_ms=float(np.median(answered)) * 1e3 if len(answered) else None,
        p99_ms=p99,
        p99_interval_ms=interval,
        goodput_rps=(n - int(late.sum())) / duration,
        generator_cpu=window.generator_cpu,
        send_delay_p99_ms=send_delay * 1e3,
        outcome=outcome or Outcome.INCONCLUSIVE,
        reason=reason,
        latencies=pack_latencies(answered),
        error_kinds=dict(window.error_kinds),
        decided=outcome is not None,
        looks=len(runs),
        needs_s=needs_s,
        blocks=late_by_block(late),
    )


def _duration(run: Samples) -> float:
    return float(run.scheduled[-1]) - (float(run.scheduled[run.warmup - 1]) if run.warmup else 0.0)


def decide(
    runs: Sequence[Samples],
    slo: SLO,
    *,
    rate_rps: float,
    interim: InterimAnalysis | None = None,
    null_rps: float | None = None,
) -> tuple[Outcome | None, str]:
    """What `judge` concludes, without the figures: the outcome, None where the window has to grow; and the reason."""
    interim, window = interim or InterimAnalysis(), joined(runs)
    n = len(window)
    fewest = needed_n(slo)
    grows = interim.share < 1
    if n < fewest:
        reason = f"insufficient samples: {n:,} requests, {slo} needs at least {fewest:,}{_failures(window)}"
        return None if grows else Outcome.INCONCLUSIVE, reason
    threats = threats_to(window, slo, rate_rps, null_rps)
    benefit_s = 0.0
    latencies = window.latencies()
    if threats:
        benefit_s = window.canary_p99_s + quantile(window.taken - window.scheduled, 0.99)
        # From the sending on: the wait for one of the generator's connections is not the server's.
        latencies = np.where(window.status == Status.OK, window.done - window.sent - benefit_s, np.inf)
        latencies = latencies[reached(window, slo)]
        on_time = int((latencies <= slo.limit_s).sum())
        if len(latencies) < fewest and not passes(len(latencies), on_time, 1 - slo.allowed_miss_rate, _HOPELESS):
            sent = f"it sent {len(latencies):,} of {n:,} requests in time"
            return Outcome.GENERATOR_LIMITED, f"{threats.generator}; {sent}"
    late = latencies > slo.limit_s
    unstable = why_unstable(runs, slo, rate_rps, benefit_s)
    if unstable:
        return Outcome.UNSTABLE, unstable + _failures(window)
    shed, errors = window.count(Status.SHED), window.count(Status.ERROR) + window.count(Status.LOST)
    evidence = Evidence(latencies, slo, shed, errors)
    if evidence.refutes(_REFUTED * interim.spent):
        return Outcome.FAIL, f"{evidence.summary}, and {evidence.allowed}{_failures(window)}"
    unsteady = why_unsteady(late)
    duration_s = sum(_duration(run) for run in runs)
    too_short = grows and duration_s < _EARLIEST_PASS_S
    if unsteady or too_short or not evidence.proves(interim.significance):
        hopeless = evidence.hopeless(interim.share) if grows else ""
        if grows and not hopeless and not threats:
            return None, unsteady or evidence.lacking()
        if not threats:
            reason = unsteady or hopeless or evidence.lacking(evidence.needs_s(duration_s, interim.error))
            return Outcome.INCONCLUSIVE, reason + _failures(window)
    if threats.generator:
        return Outcome.GENERATOR_LIMITED, threats.generator
    if threats.noise:
        return Outcome.VOID, threats.noise
    if threats.delay:
        return Outcome.GENERATOR_LIMITED, threats.delay
    return Outcome.PASS, evidence.summary + _failures(window)


def _p99(latencies: NDArray[np.float64], timeout_s: float) -> tuple[float | None, Interval | None]:
    """The 99th percentile and its interval in milliseconds, None where they are not known.

    An upper end among the unanswered is given as the time-out: it is at least that.
    """
    n = len(latencies)
    if n < needed_n(SLO(percentile=99, limit_s=1)):
        return None, None
    ordered = np.sort(latencies)
    p99 = float(ordered[math.ceil(0.99 * n) - 1])
    if math.isinf(p99):
        return None, None
    low, high = percentile_ranks(n, 99, long_variance_inflation(latencies > p99))
    upper = float(ordered[high - 1])
    return p99 * 1e3, (float(ordered[low - 1]) * 1e3, (max(p99, timeout_s) if math.isinf(upper) else upper) * 1e3)


def _failures(measured: Samples) -> str:
    """Shed requests and errors, for people; empty where there are none."""
    errors, shed = measured.count(Status.ERROR) + measured.count(Status.LOST), measured.count(Status.SHED)
    text = f"; {shed:,} shed" if shed else ""
    return text + (f"; {errors:,} errors, the first: {measured.first_error}" if errors else "")

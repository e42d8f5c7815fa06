"""The answer of a search: trials, steps and operating points, as a plan holds them."""

from __future__ import annotations

from rushhour.measurement import Measurement
from rushhour.plan import LadderStep, OperatingPoint, Policy, Trial
from rushhour.tune.state import CandidateState


def trial_of(state: CandidateState) -> Trial:
    """A candidate and how far it got."""
    accuracy = state.accuracy
    return Trial(
        candidate=str(state.candidate),
        bundle=state.candidate.bundle,
        engine=state.candidate.engine,
        precision=state.candidate.precision,
        policy=state.candidate.policy,
        accuracy=accuracy.value if accuracy else None,
        accuracy_drop=accuracy.drop if accuracy else None,
        accuracy_drop_interval=accuracy.drop_interval if accuracy else None,
        predicted_rps=state.predicted,
        capacity_rps=state.capacity,
        p99_ms=state.p99_ms,
        fate=state.fate or "failed",
        why=state.why,
        name=state.candidate.name,
    )


def failed_bundle(role: str, why: str) -> Trial:
    """A bundle that could not be made: a candidate that failed before the search."""
    return Trial(
        candidate=role,
        bundle=role,
        engine="openvino",
        precision="int8",
        policy=Policy(),
        accuracy=None,
        accuracy_drop=None,
        accuracy_drop_interval=None,
        predicted_rps=None,
        capacity_rps=None,
        p99_ms=None,
        fate="failed",
        why=why,
        name=f"{role}, which could not be made",
    )


def steps_of(
    base: CandidateState, steps: list[tuple[str, CandidateState]], winner: CandidateState
) -> tuple[LadderStep, ...]:
    """What each step bought, from the baseline to the winner (`Evidence.ladder`).

    Args:
        base: the baseline.
        steps: names and candidates between the two, in order.
        winner: of the search.
    """
    last = "quantised" if winner.candidate.precision == "int8" else f"in {winner.candidate.precision}"
    if not any(step == "batched" for step, _ in steps):
        last = "batched"
    return tuple(
        LadderStep(
            step=step,
            candidate=str(state.candidate),
            capacity_rps=state.capacity or 0.0,
            p99_ms=state.p99_ms,
            accuracy=state.accuracy.value if state.accuracy else None,
            name=state.candidate.name,
        )
        for step, state in [("as it is", base), *steps, (last, winner)]
    )


def lowest_failing(state: CandidateState) -> float | None:
    """The lowest rate above its capacity that a window refuted; None where there is none."""
    capacity = state.capacity or 0.0
    failing = [window.rate_rps for window in state.windows if window.outcome.refutes and window.rate_rps > capacity]
    return min(failing, default=None)


def operating_points(windows: list[Measurement]) -> tuple[OperatingPoint, ...]:
    """The windows as operating points, in the order of their rates."""
    ordered = sorted(windows, key=lambda window: window.rate_rps)
    return tuple(
        OperatingPoint(window.rate_rps, window.p50_ms, window.p99_ms, window.outcome.value) for window in ordered
    )

"""The answer of a search: trials, steps and operating points, as a plan holds them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from rushhour.bundle import Bundle
from rushhour.measurement import Measurement
from rushhour.plan import Fate, LadderStep, OperatingPoint, Policy, Precision, Trial
from rushhour.tune.state import CandidateState

NO_NETWORKS: Final = "recipes"
"""Role of the trial that says why smaller networks were not searched."""
_WORDS: Final = {"prune": "pruned", "lowrank": "split", "distil": "distilled"}
"""A step of a lineage, and what it did to the network."""


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
        rule=state.rule,
    )


def failed_bundle(role: str, why: str) -> Trial:
    """A bundle that could not be made: a candidate that failed before the search."""
    return unmeasured(role, "failed", why, precision="int8", name=f"{role}, which could not be made")


def unmeasured(role: str, fate: Fate, why: str, *, precision: Precision = "f32", name: str = "") -> Trial:
    """A candidate that ended before any measurement.

    Args:
        role: of its bundle.
        fate: how it ended.
        why: in words.
        precision: that it would have had.
        name: for people; by default the role.
    """
    return Trial(
        candidate=role,
        bundle=role,
        engine="openvino",
        precision=precision,
        policy=Policy(),
        accuracy=None,
        accuracy_drop=None,
        accuracy_drop_interval=None,
        predicted_rps=None,
        capacity_rps=None,
        p99_ms=None,
        fate=fate,
        why=why,
        name=name or role,
    )


def recipe_words(bundle: Bundle, reference: Bundle) -> list[str]:
    """What was done to the network since the reference, in words: pruned, split, distilled. Quantisation is not one."""
    done = bundle.manifest.lineage[len(reference.manifest.lineage) :]
    return list(dict.fromkeys(_WORDS[step.what] for step in done if step.what in _WORDS))


def steps_of(
    base: CandidateState,
    steps: list[tuple[str, CandidateState]],
    winner: CandidateState,
    recipe: Sequence[str] = (),
) -> tuple[LadderStep, ...]:
    """What each step bought, from the baseline to the winner (`Evidence.ladder`).

    Args:
        base: the baseline.
        steps: names and candidates between the two, in order.
        winner: of the search.
        recipe: what was done to its network (`recipe_words`).
    """
    return tuple(
        LadderStep(
            step=step,
            candidate=str(state.candidate),
            capacity_rps=state.capacity or 0.0,
            p99_ms=state.p99_ms,
            accuracy=state.accuracy.value if state.accuracy else None,
            name=state.candidate.name,
        )
        for step, state in [("as it is", base), *steps, (_last_step(steps, winner, recipe), winner)]
    )


def _last_step(steps: Sequence[tuple[str, CandidateState]], winner: CandidateState, recipe: Sequence[str]) -> str:
    """All that the winner has and the step before has not."""
    named, precision = {step for step, _ in steps}, winner.candidate.precision
    reduced = {"int8": "quantised", "bf16": "in bf16", "f32": "in f32"}[precision]
    if not recipe:
        return reduced if "batched" in named else "batched"
    parts = [
        *([] if named & {"batched", "quantised"} else ["batched"]),
        *recipe,
        *([] if precision == "f32" or reduced in named else [reduced]),
    ]
    return f"{', '.join(parts[:-1])} and {parts[-1]}" if len(parts) > 1 else parts[0]


def lowest_failing(state: CandidateState) -> float | None:
    """The lowest rate above its capacity that a window refuted; None where there is none."""
    capacity = state.capacity or 0.0
    failing = [window.rate_rps for window in state.windows if window.outcome.refutes and window.rate_rps > capacity]
    return min(failing, default=None)


def operating_points(windows: list[Measurement], variant: str) -> tuple[OperatingPoint, ...]:
    """The windows of a variant as operating points, in the order of their rates."""
    ordered = sorted(windows, key=lambda window: window.rate_rps)
    return tuple(
        OperatingPoint(window.rate_rps, window.p50_ms, window.p99_ms, window.outcome.value, variant)
        for window in ordered
    )

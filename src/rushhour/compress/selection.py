"""Which bundle a compression answers with: chosen by the validation part, confirmed by the test part, and why."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, Literal

import msgspec

from rushhour.compress.judge import why_outside
from rushhour.records.compression import Attempt, Compression, Confirmation, Factor, Stage

_ALIKE: Final = 0.05
"""Of the bundles within this share of the fastest one's throughput, the smallest is preferred."""
_SMALLER: Final = 0.9
"""A bundle of at most this share of the reference's size on disk is smaller."""

Place = tuple[int, int]
"""A stage: its recipe and step, as places in the attempts and their stages."""


def decided(found: Compression, confirm: Callable[[Place, Compression], Confirmation], short: str) -> Compression:
    """A compression with its verdict.

    Args:
        found: with all attempts.
        confirm: judges a stage on the test part.
        short: what to say of data that cannot show the budget; else empty.
    """
    every = [(at, index) for at, attempt in enumerate(found.attempts) for index in range(len(attempt.stages))]
    budget = found.budget
    if not every:
        return _unchanged(found, "no recipe could be applied")
    inside = [place for place in every if not why_outside(found.stage(place).accuracy, budget)]
    if not inside:
        nearest = min(every, key=lambda place: (_largest_drop(found.stage(place)), -_speed(found.stage(place))))
        why = short or why_outside(found.stage(nearest).accuracy, budget)
        return _missed(found, nearest, confirm(nearest, found), f"nothing is inside the budget of {budget}: {why}")
    good = [place for place in inside if not found.stage(place).slower]
    if not good:
        return _unchanged(found, "all bundles inside the budget are slower than the bundle that they were made from")
    gains = [place for place in good if _gain(found.stage(place), found.reference)]
    if not gains:
        nearest = max(good, key=lambda place: _speed(found.stage(place)))
        near = found.stage(nearest)
        return _unchanged(
            found, f"no gain is shown: the best is {_called(found, nearest)}, {_times(near.throughput)} the throughput"
        )
    best = _preferred(found, gains)
    confirmations: list[Confirmation] = []
    for place in _sequence(found, gains, best):
        confirmations.append(confirm(place, found))
        if confirmations[-1].why and confirmations[-1].accuracy is not None:  # it was judged
            break
    found = msgspec.structs.replace(found, confirmations=tuple(confirmations))
    confirmed = [confirmation for confirmation in confirmations if not confirmation.why]
    if not confirmed:
        first = confirmations[0]
        but = f"{_called(found, first.stage)} is inside the budget on the validation part, but on the test part "
        return _missed(found, first.stage, first, f"{but}{short or first.why}")
    last = confirmed[-1]
    assert last.accuracy is not None
    sentence = f"{_called(found, last.stage)}: {_gained(found.stage(last.stage), found.reference)}"
    if last.stage != best:
        missed = next(each for each in reversed(confirmations) if each.why)
        better = _called(found, missed.stage)
        sentence += f"; {better} is better on the validation part, but on the test part {missed.why}"
    return msgspec.structs.replace(
        found,
        best=last.stage,
        verdict="best",
        summary=sentence,
        test=last.accuracy,
        also=_counterpart(found.attempts, last.stage),
    )


def _unchanged(found: Compression, why: str) -> Compression:
    return msgspec.structs.replace(found, verdict="no gain", summary=f"{why}: the bundle is unchanged")


def _missed(found: Compression, place: Place, tested: Confirmation, why: str) -> Compression:
    return msgspec.structs.replace(
        found,
        best=place,
        verdict="nearest miss",
        summary=f"{why}; this is the nearest miss",
        test=tested.accuracy or found.test,
        confirmations=found.confirmations or (tested,),
        also=_counterpart(found.attempts, place),
    )


def _preferred(found: Compression, places: Sequence[Place]) -> Place:
    fastest = max(_speed(found.stage(place)) for place in places)
    return min(
        (place for place in places if _speed(found.stage(place)) >= (1 - _ALIKE) * fastest),
        # of the same network in int8 the one that is correct on any machine, if both are inside the budget
        key=lambda place: (found.stage(place).needs, found.stage(place).bytes, -_speed(found.stage(place))),
    )


def _sequence(found: Compression, places: Sequence[Place], best: Place) -> list[Place]:
    """Stages that would be the answer without `best`, the smallest drop first, and `best` at the end."""
    sequence: list[Place] = []
    for place in sorted(places, key=lambda place: (_largest_drop(found.stage(place)), place)):
        if place == best:
            break
        if not sequence or _preferred(found, [*sequence, place]) == place:
            sequence.append(place)
    return [*sequence, best]


def _largest_drop(stage: Stage) -> float:
    """The upper end of the interval of the accuracy drop."""
    return stage.accuracy.drop_interval[1]


def _speed(stage: Stage) -> float:
    return stage.throughput.value if stage.throughput is not None else 0.0


def _gain(stage: Stage, reference: Stage) -> Literal["", "faster", "smaller"]:
    """What is shown to be better than the reference: a gain that is not shown is none."""
    if stage.throughput is None:
        return ""
    if stage.throughput.interval[0] > 1:
        return "faster"
    is_smaller = stage.bytes <= _SMALLER * reference.bytes
    return "smaller" if is_smaller and stage.throughput.interval[0] >= 1 - _ALIKE else ""


def _gained(stage: Stage, reference: Stage) -> str:
    size = f"{reference.bytes / stage.bytes:.1f}x smaller on disk"
    if _gain(stage, reference) == "faster":
        smaller = f", {size}" if stage.bytes <= _SMALLER * reference.bytes else ""
        return f"{_times(stage.throughput)} the throughput{smaller}"
    return f"{size} and no slower, {_times(stage.throughput)} the throughput"


def _times(factor: Factor | None) -> str:
    assert factor is not None
    return f"{factor.value:.2f}x ({factor.interval[0]:.2f} to {factor.interval[1]:.2f})"


def _called(found: Compression, place: Place) -> str:
    """The recipe, and its last step where the stage is not at its end."""
    attempt, stages = found.attempts[place[0]], found.attempts[place[0]].stages[: place[1] + 1]
    is_whole = ",".join(stage.step for stage in stages) == attempt.recipe
    return attempt.recipe if is_whole else f"{attempt.recipe}, up to its step {stages[-1].step}"


def _counterpart(attempts: Sequence[Attempt], best: Place) -> Place | None:
    """The int8 that was made beside the answer for other machines; the two are attempts next to each other."""
    at, index = best
    here = attempts[at].stages[index]
    step = 1 if not here.needs else -1
    if here.precision != "int8" or not 0 <= at + step < len(attempts):
        return None
    other = attempts[at + step].stages
    paired = len(other) == index + 1 == len(attempts[at].stages) and other[index].needs != here.needs
    same = paired and [stage.hash for stage in other[:index]] == [stage.hash for stage in attempts[at].stages[:index]]
    return (at + step, index) if same else None

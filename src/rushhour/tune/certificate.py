"""The certificate of a search: how far the best plan may be above the one that was chosen.

Most plans are never loaded. What is known of their capacity is the prediction, and how wrong predictions were where the
same run measured, too. So the capacities of all plans have one joint distribution:

    log capacity = log prediction + an error common to the run + one common to the layout + one of the candidate itself

all normal. Measured capacities and the ratios of races are observations of it, with their own error. Samples of it,
given the observations (drawn first, then corrected: pathwise conditioning, Wilson et al. 2020), have a best plan each,
and by what share that exceeds the winner is the regret: its mean is expected, its 95% quantile is the bound.

The scale of the errors is learnt from the residuals of the run, and sampled with its own uncertainty; with fewer than
four residuals it is the one of earlier runs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

CONFIDENCE: Final = 0.95
_COMMON: Final = 0.3
"""Standard deviation of the error that all predictions of a run share: it was -0.28, -0.24 and -0.29 on the three
networks of `make bench-noise`, part 5."""
_SIGMA: Final = 0.2
"""Standard deviation of the errors within a run, where it has too few residuals: of the same 15 plans, within their
networks. Half of the variance is the layout's."""
_FEWEST: Final = 4
_LEAST: Final = 0.02
"""Simulated capacities are no more precise, whatever the residuals say."""
_OWN_OF_A_BOUND: Final = 0.25
"""Of that standard deviation: plans that differ in the batch bound alone are simulated on the same service times, so
they share their errors but for this. An assumption, not measured."""
_SCALES: Final = 40
"""Different standard deviations among the samples."""


@dataclasses.dataclass(frozen=True)
class Option:
    """A candidate that could have been chosen, with all its batch bounds.

    Attributes:
        name: of the candidate.
        layout: of the cores; equal for candidates that share an error.
        predicted: its capacity as simulated, not corrected by any measured capacity.
        others: the same with its other batch bounds; those where nothing holds are left out.
        capacity: measured; None where it was not.
        spread: standard deviation of the logarithm of `capacity`.
        eligible: whether it could have been chosen; else it only shows how wrong predictions are.
    """

    name: str
    layout: Hashable
    predicted: float
    others: tuple[float, ...] = ()
    capacity: float | None = None
    spread: float = 0.0
    eligible: bool = True


@dataclasses.dataclass(frozen=True)
class Ratio:
    """The capacity of one option over that of another, as a race measured it.

    Attributes:
        spread: standard deviation of the logarithm of `ratio`.
    """

    of: str
    over: str
    ratio: float
    spread: float


@dataclasses.dataclass(frozen=True)
class Regret:
    """By what share the best option may exceed the winner.

    Attributes:
        expected: the mean.
        bound: it is no larger with probability `CONFIDENCE`.
        sigma: standard deviation of the errors within the run, the median of the samples.
        residuals: that it was learnt from; 0 where it was not.
    """

    expected: float
    bound: float
    sigma: float
    residuals: int


def regret_of(
    options: Sequence[Option], ratios: Sequence[Ratio], winner: str, *, draws: int = 10_000, seed: int = 0
) -> Regret:
    """The regret of a winner. Equal arguments give equal numbers.

    Args:
        options: with the winner, whose capacity was measured; all predictions above 0.
        ratios: between options.
        winner: its name.
        draws: samples.
        seed: of the samples.

    Raises:
        ValueError: if the winner is not among the options, or was not measured.
    """
    names = [option.name for option in options]
    if winner not in names or options[names.index(winner)].capacity is None:
        raise ValueError(f"{winner} must be among the options and measured, but the options are {', '.join(names)}")
    eligible = [option.eligible or option.name == winner for option in options]
    random = np.random.default_rng(seed)
    scales, learnt = _scales(*_residuals(options, ratios), random)
    best: list[NDArray[np.float64]] = []
    for sigma in scales:
        logs = _samples(options, ratios, float(sigma), -(-draws // _SCALES), random)
        above = logs + _best_bounds(options, float(sigma), len(logs), random)
        best.append(np.expm1(above[:, eligible].max(axis=1) - logs[:, names.index(winner)]))
    regrets = np.concatenate(best)
    quantile = float(np.quantile(regrets, CONFIDENCE))
    return Regret(float(regrets.mean()), quantile, float(np.median(scales)), learnt)


def _residuals(options: Sequence[Option], ratios: Sequence[Ratio]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Log of measured over predicted capacity, of every option that was measured or raced one that was, shape `(n,)`;
    and which of these share a layout, shape `(n, n)`."""
    known = {option.name: math.log(option.capacity) for option in options if option.capacity}
    left = list(ratios)
    while linked := [each for each in left if (each.of in known) != (each.over in known)]:
        each = linked[0]
        if each.of in known:
            known[each.over] = known[each.of] - math.log(each.ratio)
        else:
            known[each.of] = known[each.over] + math.log(each.ratio)
        left.remove(each)
    seen = [option for option in options if option.name in known]
    residuals = np.array([known[option.name] - math.log(option.predicted) for option in seen])
    return residuals, np.array([[one.layout == other.layout for other in seen] for one in seen])


def _scales(
    residuals: NDArray[np.float64], is_shared: NDArray[np.bool_], random: np.random.Generator
) -> tuple[NDArray[np.float64], int]:
    """Standard deviations of the errors within the run, equally likely, all the same where they are not learnt; and
    the residuals that they were learnt from."""
    n = len(residuals)
    if n < _FEWEST:
        return np.full(_SCALES, _SIGMA), 0
    inverse = np.linalg.inv((is_shared + np.eye(n)) / 2)  # generalised least squares: of one layout they are alike
    apart = residuals - (inverse @ residuals).sum() / inverse.sum()
    squares = max(float(apart @ inverse @ apart), (n - 1) * _LEAST**2)
    likely = np.quantile(random.chisquare(n - 1, 10_000), (np.arange(_SCALES) + 0.5) / _SCALES)
    return np.maximum(np.sqrt(squares / likely), _LEAST), n


def _samples(
    options: Sequence[Option], ratios: Sequence[Ratio], sigma: float, draws: int, random: np.random.Generator
) -> NDArray[np.float64]:
    """Log capacities given all observations, shape `(draws, options)`."""
    n, place = len(options), {option.name: at for at, option in enumerate(options)}
    layouts = {layout: at for at, layout in enumerate(dict.fromkeys(option.layout for option in options))}
    where = np.array([layouts[option.layout] for option in options])
    part = sigma / math.sqrt(2)
    logs = np.log([option.predicted for option in options]) + _COMMON * random.standard_normal((draws, 1))
    logs += part * random.standard_normal((draws, len(layouts)))[:, where] + part * random.standard_normal((draws, n))
    covariance = _COMMON**2 + part**2 * ((where[:, None] == where) + np.eye(n))

    measured = [option for option in options if option.capacity]
    observed = np.zeros((len(measured) + len(ratios), n))
    for row, option in enumerate(measured):
        observed[row, place[option.name]] = 1
    for row, each in enumerate(ratios, len(measured)):
        observed[row, place[each.of]], observed[row, place[each.over]] = 1, -1
    values = np.log([*(option.capacity or 1.0 for option in measured), *(each.ratio for each in ratios)])
    spreads = np.array([*(option.spread for option in measured), *(each.spread for each in ratios)])
    spreads = np.maximum(spreads, 1e-3)
    gain = np.linalg.solve(observed @ covariance @ observed.T + np.diag(spreads**2), observed @ covariance)
    missing = values + spreads * random.standard_normal((draws, len(values))) - logs @ observed.T
    corrected: NDArray[np.float64] = logs + missing @ gain
    return corrected


def _best_bounds(
    options: Sequence[Option], sigma: float, draws: int, random: np.random.Generator
) -> NDArray[np.float64]:
    """How far the best batch bound of each option is above its own in log capacity, shape `(draws, options)`."""
    most = max(len(option.others) for option in options)
    above = np.full((len(options), most + 1), -np.inf)
    above[:, most] = 0.0  # its own
    for row, option in enumerate(options):
        above[row, : len(option.others)] = np.log(np.array(option.others) / option.predicted)
    spread = max(_LEAST, _OWN_OF_A_BOUND * sigma) * random.standard_normal((draws, len(options), most + 1))
    spread[:, :, most] = 0.0
    best: NDArray[np.float64] = (above + spread).max(axis=2)
    return best

"""`make bench-adapt`: a server that divides work, and that spends accuracy only in a rush.

1       a day in a minute: a ladder against the best single variant, and against its own simulation (adapt_ladder.py)
2       cascades: capacity over that of the best single plan, on Fashion-MNIST (adapt_cascade.py)
2.plain the same of the network as it is, with a linear classifier as the small one
2.text  the same of film reviews, with a linear classifier of words as the small one
3       a photograph of 12 megapixels through a 224x224 model, alone and many beside single samples (adapt_tiles.py)
4       sentences of mixed lengths in buckets, against padding to the largest length (adapt_lengths.py)
5       random loads in virtual time: the account holds, nothing oscillates
6       a worker is killed at a switch, the model is reloaded in a spike, a variant cannot be opened
7       CPU per request with one variant, against a commit before there were ladders
7b      CPU that Server-Timing adds to an answer
9       full batches wait in the engine: answers per second, against a commit before (adapt_ahead.py)

Each part stays in the record with the commit that it was measured at; `--only 1` measures it anew.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
from adapt_ahead import ahead_part
from adapt_cascade import fashion_part, plain_part, text_part
from adapt_ladder import cost_part, day_part, traces_part, trouble_part
from adapt_lengths import lengths_part
from adapt_tiles import tiles_part, timing_part
from bench.parts import Part, run_parts, scale_of, scale_options

RESULTS = Path(__file__).parent / "results" / "adapt.json"
BENCH = Path(__file__).resolve().parent.parent / ".bench"
SEED = 0
BEFORE = "2786661"
"""The last commit before a cell had several variants."""
NOT_AHEAD = "bdcaef3"
"""The last commit before full batches waited in the engine."""


class Scale(msgspec.Struct, frozen=True):
    """The size of each part.

    Attributes:
        networks: of the day, separated by commas; `day_epochs` of their training.
        overloads: of each variant, that tell what it carries.
        days: of each contestant.
        network: of part 2, trained for `epochs` on `data`, which is named as on the command line.
        budget: of each tuning run of part 2, in seconds.
        rounds: capacities of each contestant of part 2.
        resamples: on which thresholds are chosen on one half and tried on the other.
        photo: width and height of the photograph of part 3.
        photo_rounds: of its comparisons.
        photos: that are sent together.
        small: single samples that are sent beside them.
        sentences: of part 4; `text_limit_ms` of their 99th percentile, `text_rounds` of both capacities, and
            `text_window` seconds of a window of load.
        traces: of random load.
        troubles: of each kind.
        blocks: rounds of the comparison of CPU per request.
        answers: timed in each round of part 7b.
        windows: of each server in part 9.
    """

    networks: str = "residual,article-int8,mlp"
    day_epochs: int = 6
    overloads: int = 3
    days: int = 4
    network: str = "article"
    data: str = "fashion-mnist"
    epochs: int = 2
    budget: float = 1500.0
    rounds: int = 6
    resamples: int = 20
    photo: str = "4000x3000"
    photo_rounds: int = 12
    photos: int = 20
    small: int = 1000
    sentences: int = 2000
    text_limit_ms: float = 150.0
    text_rounds: int = 8
    text_window: float = 5.0
    traces: int = 1000
    troubles: int = 5
    blocks: int = 64
    answers: int = 80_000
    windows: int = 10


def _sides(photo: str) -> tuple[int, int]:
    width, height = photo.split("x")
    return int(width), int(height)


def main(given: list[str] | None = None) -> int:
    """Measure what is missing, and write the record after each part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="parts, measured anew")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the record")
    parser.add_argument("--work", type=Path, default=BENCH, help="where networks and runs are kept")
    parser.add_argument("--before", default=BEFORE, help="the commit that part 7 compares with")
    scale_options(parser, Scale())
    arguments = parser.parse_args(given)
    scale, work = scale_of(arguments, Scale), arguments.work
    parts: dict[str, Callable[[], Part]] = {
        "1": lambda: day_part(
            *(scale.networks, scale.day_epochs, scale.overloads, scale.days, work),
        ),
        "2": lambda: fashion_part(
            *(scale.network, scale.data, scale.epochs, scale.budget, scale.rounds, scale.resamples, work),
        ),
        "2.plain": lambda: plain_part(
            *(scale.network, scale.data, scale.epochs, scale.budget, scale.rounds, scale.resamples, work),
        ),
        "2.text": lambda: text_part(scale.budget, scale.rounds, scale.resamples, work),
        "3": lambda: tiles_part(_sides(scale.photo), scale.photo_rounds, scale.photos, scale.small, work),
        "4": lambda: lengths_part(
            *(scale.sentences, scale.text_limit_ms, scale.text_rounds, scale.text_window, work, SEED),
        ),
        "5": lambda: traces_part(scale.traces),
        "6": lambda: trouble_part(scale.troubles, work),
        "7": lambda: cost_part(arguments.before, scale.blocks),
        "7b": lambda: timing_part(scale.blocks, scale.answers),
        "9": lambda: ahead_part(NOT_AHEAD, scale.windows, work),
    }
    only = {name for name in arguments.only.split(",") if name}
    timed = set(parts) - {"5"}
    return run_parts(parts, arguments.out, kept=True, only=only, timed=timed, seeds={"first": SEED})


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)

"""Whether a smaller bundle is also a faster one: compiled, and measured on the engine in turns with its parent.

Parent and children are all open at once and take turns in blocks, forwards and backwards (P A B, B A P), so that a
drift of the machine affects all alike. Each block gives one ratio for each child; the logarithms of the ratios give an
interval by Student's t. Nothing queues here: `tune` measures the latency under load.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Callable, Mapping, Sequence

import msgspec

from rushhour.bundle import Bundle
from rushhour.engines import Engine, EngineConfig, fill, keep_busy, open_engine, time_service
from rushhour.engines.openvino import HEAVY, layer_times
from rushhour.errors import GoalError
from rushhour.load import t_quantile
from rushhour.measurement import Interval

_FEWEST_BLOCKS = 2
_LIMIT_S = 1.0
"""Once a batch takes this long, no larger one is tried."""

Artefact = tuple[Bundle, EngineConfig]
"""A bundle, and how it is compiled."""

Open = Callable[[Bundle, EngineConfig], Engine]
"""Opens an engine; a seam for tests, and for callers that trust factories."""


class Ratio(msgspec.Struct, frozen=True):
    """A child's figure over its parent's: the geometric mean over the blocks, and its 95% interval.

    Attributes:
        n: blocks.
    """

    value: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, child: Sequence[float], parent: Sequence[float]) -> Ratio:
        """The ratio of figures that were taken in the same blocks.

        Args:
            child: one positive figure for each block, of two or more.
            parent: likewise.
        """
        logs = [math.log(after / before) for after, before in zip(child, parent, strict=True)]
        mean = statistics.fmean(logs)
        half = t_quantile(0.975, len(logs) - 1) * statistics.stdev(logs) / math.sqrt(len(logs))
        return cls(math.exp(mean), math.exp(mean - half), math.exp(mean + half), len(logs))

    @property
    def interval(self) -> Interval:
        """`low` and `high`."""
        return self.low, self.high


class Speed(msgspec.Struct, frozen=True):
    """How fast one child is, and its parent in the same blocks.

    Attributes:
        throughput: samples per second over the parent's, all streams busy, each at its own best batch; higher is
            better.
        latency: seconds for one sample on an idle engine over the parent's; lower is better.
        batch: the child's best batch.
        parent_batch: the parent's.
        samples_per_s: the child's median over the blocks, at its best batch.
        parent_samples_per_s: the parent's.
        latency_s: the child's median over the blocks, for one sample.
        parent_latency_s: the parent's.
    """

    throughput: Ratio
    latency: Ratio
    batch: int
    parent_batch: int
    samples_per_s: float
    parent_samples_per_s: float
    latency_s: float
    parent_latency_s: float


Bench = Callable[[Artefact, Mapping[str, Artefact]], dict[str, Speed]]
"""Times children beside their parent: name -> figures; a seam for tests."""


def compare_speed(
    parent: Artefact, child: Artefact, *, blocks: int = 8, seconds: float = 0.4, opened: Open = open_engine
) -> Ratio:
    """The throughput of `child` over that of `parent`; above 1 the child is faster. See `bench_artefacts`."""
    return bench_artefacts(parent, {"child": child}, blocks=blocks, seconds=seconds, opened=opened)["child"].throughput


def bench_artefacts(
    parent: Artefact,
    children: Mapping[str, Artefact],
    *,
    blocks: int = 8,
    seconds: float = 0.4,
    opened: Open = open_engine,
) -> dict[str, Speed]:
    """Throughput and latency of compiled artefacts against their parent, in interleaved blocks of one run.

    Args:
        parent: what the children were made from, and how it is compiled. Batches up to its batch bound are tried; the
            one of the highest throughput is measured.
        children: name -> artefact.
        blocks: two or more; an even number gives every order the same weight.
        seconds: of each artefact's throughput in each block; its latency takes a quarter of that on top.
        opened: see `Open`.

    Raises:
        GoalError: if there are too few blocks for an interval.
        EngineError: if an engine cannot do exactly what its configuration says.
    """
    if blocks < _FEWEST_BLOCKS:
        raise GoalError(
            f"cannot compare speed in {blocks} blocks",
            f"an interval takes {_FEWEST_BLOCKS} or more",
            "use 8, or any even number",
        )
    artefacts = [parent, *children.values()]
    batches = [_best_batch(artefact, opened) for artefact in artefacts]
    throughput: list[list[float]] = [[] for _ in artefacts]
    latency: list[list[float]] = [[] for _ in artefacts]
    with contextlib.ExitStack() as stack:
        engines = []
        for (bundle, config), batch in zip(artefacts, batches, strict=True):
            engine = opened(bundle, msgspec.structs.replace(config, max_batch=batch))
            stack.callback(engine.close)
            fill(engine, bundle)
            engines.append(engine)
        for block in range(blocks):
            for index in range(len(engines)) if block % 2 == 0 else reversed(range(len(engines))):
                engine, batch = engines[index], batches[index]
                keep_busy(engine.slots, batch, 0.0)  # warm-up: the other engine has filled the caches
                times, wall = keep_busy(engine.slots, batch, seconds)
                throughput[index].append(len(times) * batch / wall)
                times, _ = keep_busy(engine.slots[:1], 1, seconds / 4)
                latency[index].append(statistics.median(times))
    return {
        name: Speed(
            throughput=Ratio.of(throughput[index], throughput[0]),
            latency=Ratio.of(latency[index], latency[0]),
            batch=batches[index],
            parent_batch=batches[0],
            samples_per_s=statistics.median(throughput[index]),
            parent_samples_per_s=statistics.median(throughput[0]),
            latency_s=statistics.median(latency[index]),
            parent_latency_s=statistics.median(latency[0]),
        )
        for index, name in enumerate(children, start=1)
    }


def _best_batch(artefact: Artefact, opened: Open) -> int:
    """The batch of the highest throughput, among 1, 2, 3, 4, 6 ... up to the configuration's bound."""
    bundle, config = artefact
    if config.max_batch == 1:
        return 1
    engine = opened(bundle, config)
    try:
        times = time_service(engine, bundle, _LIMIT_S)
    finally:
        engine.close()
    return max(zip(times.throughput, times.batch_sizes, strict=True))[1]


def reason(parent: Artefact, child: Artefact) -> str:
    """Where the time of a batch goes in both, in a sentence: why a child is not faster.

    Only OpenVINO times its layers; for another engine, OpenVINO's times are taken, and the sentence says so.

    Raises:
        EngineError: if OpenVINO is not installed or cannot run one of them.
    """
    before, after = (
        layer_times(bundle, msgspec.structs.replace(config, engine="openvino", streams=1))
        for bundle, config in (parent, child)
    )
    heavy = sorted(kind for kind in HEAVY if any(name.startswith(kind) for name in before))

    def multiplies(layer: str) -> bool:
        return any(layer.startswith(kind) for kind in heavy)

    multiplied, still = (sum(times[layer] for layer in filter(multiplies, times)) for times in (before, after))
    rest = {layer: seconds for layer, seconds in after.items() if not multiplies(layer)}
    largest = max(rest, key=lambda kind: rest[kind], default="")
    asked = {parent[1].engine, child[1].engine}
    return (
        f"{'by the layers of openvino, ' if asked != {'openvino'} else ''}one batch of {parent[1].max_batch} spends "
        f"{multiplied * 1e3:.3g} of {sum(before.values()) * 1e3:.3g} ms in {' and '.join(heavy) or 'no layer'} "
        f"that int8 makes faster; its child {still * 1e3:.3g} of {sum(after.values()) * 1e3:.3g} ms"
        + (f", and {rest[largest] * 1e3:.3g} ms in {largest}, the largest of the others" if rest else "")
    )

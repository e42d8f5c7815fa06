"""What a target names becomes engines, and these the stage that answers requests."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import cast

from rushhour.bundle import Bundle, Decoding, TensorSpec, Text
from rushhour.cascade import CascadeRule
from rushhour.clock import Clock
from rushhour.engines import Engine, EngineConfig, batch_cost, open_engine, run_sizes, time_service, usual_sizes
from rushhour.errors import BundleError, EngineError, ModelError, RushhourError
from rushhour.measurement import BatchCost, ServiceTimes
from rushhour.plan import Policy
from rushhour.serve.limits import Limits
from rushhour.serve.memory.budget import Budget
from rushhour.serve.node import Fit, seconds_per_size
from rushhour.serve.observability import log
from rushhour.serve.observability.explanation import Explanation
from rushhour.serve.scheduling.admission import Profile
from rushhour.serve.scheduling.buckets import buckets_of
from rushhour.serve.scheduling.cascade import Cascade
from rushhour.serve.scheduling.cell import Cell
from rushhour.serve.scheduling.decoding import Decoder
from rushhour.serve.scheduling.ladder import Ladder
from rushhour.serve.scheduling.lanes import Lanes
from rushhour.serve.scheduling.placing import Placing, places_of
from rushhour.serve.scheduling.stage import Stage
from rushhour.serve.scheduling.tabulating import Tabulator
from rushhour.serve.scheduling.tiles import Tiles
from rushhour.serve.scheduling.tokenising import Tokeniser
from rushhour.serve.scheduling.variant import Variant
from rushhour.serve.target import ServedVariant, Target
from rushhour.system.machine import cores
from rushhour.wire import Codec

_PROFILE_SECONDS = 0.03
_LONGEST_BATCH_S = 1.0

Opener = Callable[[Bundle, EngineConfig], Engine]
"""Opens an engine; benchmarks and tests replace it."""


def opener(trusted: tuple[str, ...]) -> Opener:
    """Opens the engine that the plan names, with the factories that the user trusts."""

    def open_trusted(bundle: Bundle, config: EngineConfig) -> Engine:
        return open_engine(bundle, config, trusted=trusted)

    return open_trusted


@dataclasses.dataclass(frozen=True)
class Opened:
    """An engine with its service times.

    Attributes:
        times: of the engine, before the first request.
        cost: CPU time of its batches.
        was_alone: whether no other engine of this process computed while they were measured.
    """

    variant: ServedVariant
    engine: Engine
    times: ServiceTimes
    cost: BatchCost
    was_alone: bool

    @property
    def served(self) -> Variant:
        """As a cell takes it."""
        return Variant(
            self.engine,
            Profile(self.times, is_sure=self.was_alone),
            name=self.variant.name,
            cost=self.cost,
            max_batch=self.variant.config.max_batch,
            is_sure=self.was_alone,
        )


class Opening:
    """Opens what a target names, and times it. Used by one thread at a time.

    Args:
        opener: opens engines.
        exact: open what the plan says or fail; else what runs correctly on this machine.
        fit: how this machine differs from that of the target's plan; None where it does not.
        computing: batches of other engines in flight, and those started until now.
        known: what is served already: times that were measured alone are used again.
    """

    def __init__(
        self,
        opener: Opener,
        *,
        exact: bool,
        fit: Fit | None,
        computing: Callable[[], tuple[int, int]],
        known: Sequence[Opened] = (),
    ) -> None:
        self._opener = opener
        self._exact = exact
        self._fit = fit
        self._computing = computing
        self._known = known

    def open(self, target: Target) -> tuple[Opened, ...]:
        """The engines that answer requests, in the order of the plan's ladder or cascade; without, the one that is
        served.

        A variant of a ladder that cannot be opened is left out. Where one of a cascade cannot be, its last one is
        served alone.

        Raises:
            RushhourError: if nothing can be opened; where this is exact, also if not all can.
        """
        if target.plan.cascade is not None:
            return self._open_cascade(target)
        return self._open_ladder(target) if target.plan.ladder else (self._open_first(target),)

    def _open_first(self, target: Target) -> Opened:
        """The plan's first variant, or the best alternative that runs correctly on this machine."""
        refused: RushhourError | None = None
        for variant in [target.first] if self._exact else target.variants(cores()):
            try:
                opened = self._open(variant, target.plan.policy)
            except (EngineError, ModelError) as error:
                refused = refused or error
                continue
            if refused is not None:
                log.event(logging.WARNING, "not served as planned", why=str(refused), instead=str(variant))
            return opened
        assert refused is not None
        raise refused

    def _open_cascade(self, target: Target) -> tuple[Opened, ...]:
        opened: list[Opened] = []
        try:
            for variant in target.cascaded(None if self._exact else cores()):
                opened.append(self._open(variant, target.plan.policy))
        except BaseException as error:
            for each in opened:
                each.engine.close()
            if self._exact or not isinstance(error, BundleError | EngineError | ModelError):
                raise
            log.event(logging.WARNING, "the cascade is not served", why=str(error))
            return (self._open_first(target),)
        return tuple(opened)

    def _open_ladder(self, target: Target) -> tuple[Opened, ...]:
        opened: list[Opened] = []
        refused: RushhourError | None = None
        try:
            for point in target.plan.ladder:
                try:
                    rung = target.rung(point, None if self._exact else cores())
                    opened.append(self._open(rung, target.plan.policy))
                except (BundleError, EngineError, ModelError) as error:
                    if self._exact:
                        raise
                    refused, name = error, point.variant
                    log.event(logging.WARNING, "a variant of the ladder is not served", variant=name, why=str(error))
            if not opened:
                assert refused is not None
                raise refused
        except BaseException:
            for each in opened:
                each.engine.close()
            raise
        return tuple(opened)

    def _open(self, variant: ServedVariant, policy: Policy) -> Opened:
        engine, bundle = self._opener(variant.bundle, variant.config), variant.bundle
        try:
            opened = Opened(variant, engine, *self._timed(engine, variant))
            if engine.signature.dimensions:
                buckets = buckets_of(engine.signature, policy, opened.times)
                run_sizes(engine, bundle, buckets.batches(usual_sizes(bundle), variant.config.max_batch))
            return opened
        except BaseException:
            engine.close()
            raise

    def _timed(self, engine: Engine, variant: ServedVariant) -> tuple[ServiceTimes, BatchCost, bool]:
        """Service times and CPU costs of its batches; and whether no other engine computed meanwhile."""
        for old in self._known:
            if old.was_alone and old.variant.is_same(variant):
                return old.times, old.cost, True
        running, started = self._computing()
        seconds = _PROFILE_SECONDS if self._fit is None else seconds_per_size(variant.config.max_batch)
        times = time_service(engine, variant.bundle, _LONGEST_BATCH_S, seconds)
        cost = batch_cost(engine, variant.bundle, times.batch_sizes[-1])
        return times, cost, not running and self._computing() == (0, started)


def decoder_of(opened: Opened, limits: Limits) -> Decoder | Tabulator | Tokeniser | None:
    """Decodes the pictures that the model takes, tokenises its texts, or reads its rows; None where it takes none."""
    bundle = opened.variant.bundle
    spec: TensorSpec | None = opened.engine.signature.picture
    if spec is not None:
        how = bundle.manifest.preprocessing.decoding
        decoding = how if isinstance(how, Decoding) else None
        return Decoder(spec, max_pixels=limits.picture_pixels, threads=cores(), decoding=decoding)
    if bundle.manifest.table is not None:
        return Tabulator(bundle, threads=cores())
    return Tokeniser(bundle, threads=cores()) if isinstance(bundle.manifest.text, Text) else None


def stage_of(
    target: Target,
    opened: Sequence[Opened],
    codec: Codec,
    policy: Policy,
    clock: Clock,
    decoder: Decoder | Tabulator | Tokeniser | None,
    before: Stage | None,
    explanation: Explanation | None,
    budget: Budget,
    lanes: Lanes,
) -> Stage:
    """What answers the requests of a target.

    Args:
        target: as it is served.
        opened: its engines, as `Opening.open` gives them.
        codec: of the model.
        policy: of the plan, bounded for this machine.
        clock: of requests.
        decoder: of pictures, of texts, or of rows; None where the model takes none.
        before: what is served until now; None where nothing is.
        explanation: what answers say about themselves; None where they do not.
        budget: of large requests.
        lanes: the batches of this model.
    """
    if target.plan.cascade is not None and len(opened) > 1:
        return _cascade_of(target.plan.cascade, opened, codec, policy, clock, decoder, explanation, lanes)
    # What waits in an engine would compute beside the batches of another one.
    spare = opened[0].engine.spare() if len(opened) == 1 and lanes.cores is None else ()
    cell = Cell([each.served for each in opened], codec, policy, clock, decoder, explanation, lanes, spare)
    if target.plan.ladder:
        old = before.cell if isinstance(before, Tiles | Placing) else before
        cell.ladder = Ladder(cell, target.plan, old.ladder if isinstance(old, Cell) else None)
    tiles = opened[0].variant.bundle.manifest.tiles
    if tiles is not None:
        return cast(Stage, Tiles(cell, tiles, clock, budget, explanation))
    if isinstance(decoder, Decoder) and places_of(opened[0].engine.signature):
        return cast(Stage, Placing(cell, clock, budget, explanation))
    return cell


def _cascade_of(
    rule: CascadeRule,
    opened: Sequence[Opened],
    codec: Codec,
    policy: Policy,
    clock: Clock,
    decoder: Decoder | Tabulator | Tokeniser | None,
    explanation: Explanation | None,
    lanes: Lanes,
) -> Stage:
    """Cells of one variant each, one behind the other. Pictures are decoded once, for the first."""
    cells = [
        Cell([each.served], codec, policy, clock, decoder if at == 0 else None, explanation, lanes)
        for at, each in enumerate(opened)
    ]
    stage: Stage = cells[-1]
    for step in range(len(cells) - 2, -1, -1):
        stage = Cascade(cells[step], stage, rule, step, clock, explanation)
    return stage

"""`Service`: one model that is served, and its replacement while requests arrive.

A reload opens the new version beside the old one, sends new requests to it in one step, lets the old one finish its
requests, and closes it. A request belongs to one cell, so every answer comes from exactly one version.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import msgspec

from rushhour.bundle import Signature
from rushhour.bundle.tiling import sides_of
from rushhour.clock import WallClock
from rushhour.engines import Engine
from rushhour.errors import EngineError, ServeError
from rushhour.plan import Plan, Policy
from rushhour.serve.hosting import check_memory
from rushhour.serve.limits import Limits
from rushhour.serve.memory import allocator
from rushhour.serve.memory.budget import Budget
from rushhour.serve.node import Fit
from rushhour.serve.observability import log
from rushhour.serve.observability.explanation import Explanation
from rushhour.serve.observability.statistics import ModelState, Totals, newest_versions, sum_by_version
from rushhour.serve.opening import Opened, Opener, Opening, decoder_of, stage_of
from rushhour.serve.scheduling.cores import Cores
from rushhour.serve.scheduling.decoding import Decoder
from rushhour.serve.scheduling.lanes import Lanes
from rushhour.serve.scheduling.placing import declared_maps
from rushhour.serve.scheduling.stage import Stage
from rushhour.serve.scheduling.tabulating import Tabulator
from rushhour.serve.scheduling.tokenising import Tokeniser
from rushhour.serve.target import ServedVariant, Target, open_planned, open_target
from rushhour.system.machine import cores
from rushhour.wire import ROWS, Codec, Regions

_STUCK_S, _STUCK_BATCHES = 30.0, 10.0
"""A cell that drains is abandoned if it ends no request for so long, or for so many of its largest batches."""
_POLL_S, _LONGEST_POLL_S = 0.005, 0.05


class Loaded:
    """One version of the model, ready: the target, the variant that is served, its engine, and the stage that answers.

    Attributes:
        opened: all engines, the most accurate of a ladder first.
        plan_share: its capacity on this machine, as a share of the Plan's; None on the Plan's machine.
    """

    def __init__(
        self, target: Target, variant: ServedVariant, engine: Engine, cell: Stage, opened: tuple[Opened, ...] = ()
    ) -> None:
        self.target = target
        self.variant = variant
        self.engine = engine
        self.cell = cell
        self.opened = opened
        self.plan_share: float | None = None

    @property
    def version(self) -> str:
        """For clients: the same for the same bundle, a new number for one that was not served before."""
        return self.cell.codec.version

    @property
    def engines(self) -> list[Engine]:
        """All of them."""
        return [each.engine for each in self.opened] or [self.engine]

    @property
    def was_alone(self) -> bool:
        """Whether nothing else computed while its engines were timed."""
        return all(each.was_alone for each in self.opened)

    @property
    def missing(self) -> tuple[str, ...]:
        """Variants of the ladder that could not be opened."""
        opened = {each.variant.name for each in self.opened}
        return tuple(point.variant for point in self.target.plan.ladder if point.variant not in opened)

    @property
    def way(self) -> str:
        """What is served and how, in words."""
        planned, count = len(self.target.plan.ladder), len(self.opened)
        if self.target.plan.cascade is not None and count > 1:
            return f"a cascade: {', then '.join(str(each.variant) for each in self.opened)}"
        if not planned:
            return str(self.variant)
        left = f"{count} of the ladder's {planned} variants" if self.missing else f"a ladder of {planned} variants"
        return f"{left}, the most accurate of them {self.variant}"

    def state(self) -> ModelState:
        """What is known of it now."""
        state = ModelState(plan_share=self.plan_share, missing=self.missing)
        self.cell.describe(state)
        return state

    def close(self) -> None:
        """Close all engines, whichever of them fails; waits for their batches."""
        with contextlib.ExitStack() as stack:
            for engine in self.engines:
                stack.callback(engine.close)


class Shared:
    """What the models of a process share. Must be created on the running event loop.

    Args:
        limits: what one client may use.
        explanation: what answers say about themselves; None where they do not.
        cores: that the models share; None where there is only one.
        models: how many divide what requests may hold in memory.

    Attributes:
        budget: of all large requests in this process.
        cores, explanation, models: the same.
        opening: one thread opens all models, one after another: several would each keep their stack and their heap.
        services: of the models.
    """

    def __init__(
        self,
        limits: Limits = Limits(),  # noqa: B008 - frozen
        explanation: Explanation | None = None,
        cores: Cores | None = None,
        models: int = 1,
    ) -> None:
        self.budget = Budget(limits.held_bytes)
        self.explanation = explanation
        self.cores = cores
        self.models = models
        self.opening = ThreadPoolExecutor(1, thread_name_prefix="models")
        self.services: list[Service] = []

    def check_room(self, name: str, target: Target) -> None:
        """Refuse a model that memory cannot hold beside those that are loaded.

        Raises:
            ServeError: saying how much they need.
        """
        if self.cores is not None:
            loaded = {each.name: each.loaded.target for each in self.services if each.loaded is not None}
            check_memory(loaded | {name: target}, 1)


class Service:
    """One model under one name; loads, reloads and unloads it.

    Args:
        target: what is served first; a reload opens the same path again.
        name: for clients; None takes the target's.
        opener: opens engines.
        versions: of bundles that were served before, by their hashes.
        regions: the shared memory that requests may use; None where it is switched off.
        limits: what one request may use.
        exact: serve the plan's first variant or fail; else the best variant that runs correctly on this machine.
        reopen: opens what is at the path by then, for a reload; as it was opened first by default.
        fit: how this machine differs from that of the target's plan; None where it does not.
        fixed: a ladder of the plan is not used: its first variant is served, whatever the load.
        shared: what it shares with other models of the process; nothing is shared by default.
        weight: of the model, where it shares cores.

    Attributes:
        loaded: what answers requests now.
        versions: of the bundles that were served, by their hashes. A version belongs to a bundle: reloading the same
            bundle keeps the version, and a bundle that is loaded again gets its old version.
        shared, weight: the same.
        changed: called when other requests are answered from now on, or none.

    Raises:
        ServeError: if the name cannot be a part of a URL.
    """

    def __init__(
        self,
        target: Target,
        name: str | None,
        opener: Opener,
        versions: Mapping[str, int] | None = None,
        regions: Regions | None = None,
        limits: Limits = Limits(),  # noqa: B008 - frozen
        exact: bool = True,
        reopen: Callable[[], Target] | None = None,
        fit: Fit | None = None,
        *,
        fixed: bool = False,
        shared: Shared | None = None,
        weight: float = 1.0,
    ) -> None:
        self._fixed = fixed
        self._fit, self._fitted = fit, target.plan.evidence
        self.shared = shared or Shared(limits)
        self.weight = weight
        self.changed: Callable[[], None] = _nothing
        self._exact = exact
        self.name = name or target.name
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", self.name):
            raise ServeError(
                f"cannot serve a model under the name {self.name!r}",
                "a name consists of letters, digits, '.', '_' and '-'",
                "give another with --model-name",
            )
        self.loaded: Loaded | None = None
        self._path = target.path
        self._first: Target | None = target
        self._reopen = reopen or partial(open_target, target.path)
        self._prepared: tuple[Loaded, dict[str, int]] | None = None
        self._opener = opener
        self._regions = regions
        self._limits = limits
        self.versions = dict(versions or {})
        self._retiring: list[Stage] = []
        self._past: dict[str, Totals] = {}
        self._changing = asyncio.Lock()
        self._opening = self.shared.opening
        self.shared.services.append(self)

    @property
    def way(self) -> str:
        """What is served and how, in words; of one model of several with its name and its share of the cores."""
        loaded, cores = self.loaded, self.shared.cores
        way = "no model: it is unloaded" if loaded is None else loaded.way
        if cores is None:
            return way
        if loaded is None:
            return f"{self.name}: not loaded, weight {self.weight:g}"
        least = f"at least {cores.least(self.weight):.3g} of {cores.size} cores"
        return f"{self.name}: weight {self.weight:g}, {least}; {way}"

    def paths(self) -> list[bytes]:
        """Where inference requests of this model are answered; none while it is not loaded."""
        loaded = self.loaded
        if loaded is None:
            return []
        base = f"/v2/models/{self.name}"
        paths = [f"{base}/infer", f"{base}/versions/{loaded.version}/infer"]
        if loaded.cell.codec.takes_rows:
            paths += [f"{base}/{ROWS}", f"{base}/versions/{loaded.version}/{ROWS}"]
        return [path.encode() for path in paths]

    def totals(self) -> dict[str, Totals]:
        """The counters of each version up to now, also of retired ones. Copies."""
        return sum_by_version([self._past, *({cell.codec.version: cell.totals()} for cell in self.cells)])

    @property
    def cells(self) -> list[Stage]:
        """What computes: the version that is served, and those before it that finish their requests."""
        return [*self._retiring, *([self.loaded.cell] if self.loaded is not None else [])]

    async def load(self) -> None:
        """Open what is at the path now, and serve it from the next request on. The old version drains and ends.

        Raises:
            RushhourError: if it cannot be opened; then the old version is served on.
        """
        async with self._changing:
            target, self._first = self._first, None
            loaded = await self._create(target)
            old = self.serve(loaded)
        await self._retire_replaced(loaded, old)

    async def prepare(self, versions: Mapping[str, int], plan: Plan, folder: Path) -> None:
        """Open what a plan names, beside what is served. What was prepared before is closed.

        Args:
            versions: of bundles that other worker processes have served, by their hashes.
            plan: that the supervisor has read: all worker processes open the same.
            folder: that the plan's bundles are in.

        Raises:
            RushhourError: if it cannot be opened, or is not what the plan was made for.
        """
        await self.abandon()
        async with self._changing:
            self.versions |= versions
            known = dict(self.versions)
            loop = asyncio.get_running_loop()
            target = await loop.run_in_executor(self._opening, open_planned, self._path, plan, folder)
            self._prepared = await self._create(target), known

    async def commit(self) -> None:
        """Serve what was prepared, from the next request on.

        Raises:
            ServeError: if nothing was prepared.
        """
        async with self._changing:
            prepared, self._prepared = self._prepared, None
            if prepared is None:
                raise ServeError("cannot serve another version", "none was prepared", "load the model again")
            self._first = None
            loaded, _ = prepared
            old = self.serve(loaded)
        await self._retire_replaced(loaded, old)

    async def abandon(self) -> None:
        """Close what was prepared, if anything was; its version number becomes free."""
        async with self._changing:
            prepared, self._prepared = self._prepared, None
            if prepared is not None:
                loaded, self.versions = prepared
                await self._close(loaded)

    async def _create(self, target: Target | None) -> Loaded:
        """A new version, not served yet; of what is at the path now if there is no target."""
        loop = asyncio.get_running_loop()
        if target is None:
            target = await loop.run_in_executor(self._opening, self._reopen)
        if self._fixed:
            target = target.without_ladder()
        self.shared.check_room(self.name, target)
        opened, decoder = await loop.run_in_executor(self._opening, self._open, target)
        first = opened[0]
        variant, engine = first.variant, first.engine
        tiles = variant.bundle.manifest.tiles
        pictures = self._most_pictures(engine.signature) if isinstance(decoder, Decoder) else 0
        sized = declared_maps(engine.signature) if isinstance(decoder, Decoder) else {}
        codec = Codec(
            self.name,
            engine.signature if tiles is None else tiles.taken(engine.signature),
            version=str(self._version_of(_content_of(target, opened))),
            labels=variant.bundle.manifest.task.classes,
            regions=self._regions,
            pictures=pictures if not sized and (tiles is None or tiles.is_fixed) else min(1, pictures),
            texts=self._most_pictures(engine.signature) if isinstance(decoder, Tokeniser) else 0,
            declared=sized if tiles is None else tiles.declared(engine.signature),
            rows=self._most_pictures(engine.signature) if isinstance(decoder, Tabulator) else 0,
            kind=variant.bundle.manifest.task.kind,
            targets=decoder.reader.table.targets if isinstance(decoder, Tabulator) else (),
            usual=() if tiles is None else sides_of(engine.signature),
        )
        policy = self._bounded(target.plan.policy, engine.signature)
        before = None if self.loaded is None else self.loaded.cell
        lanes = Lanes(self.shared.cores, self.weight)
        explanation, budget = self.shared.explanation, self.shared.budget
        stage = stage_of(target, opened, codec, policy, WallClock(), decoder, before, explanation, budget, lanes)
        loaded = Loaded(target, variant, engine, stage, opened)
        planned = next((each for each in opened if each.variant.name == target.plan.variants[0].name), first)
        if self._fit is not None and target.plan.evidence == self._fitted:
            config = planned.variant.config
            used = msgspec.structs.replace(policy, streams=config.streams, threads=config.threads)
            share = partial(self._fit.share, planned.times, used, cores())
            loaded.plan_share = await loop.run_in_executor(self._opening, share)
        return loaded

    def serve(self, loaded: Loaded) -> Loaded | None:
        """Send new requests to it; returns what was served until now."""
        old, self.loaded = self.loaded, loaded
        self.changed()
        bundle = loaded.variant.bundle.manifest.hash
        log.event(logging.INFO, "loaded", model=self.name, version=loaded.version, bundle=bundle)
        return old

    async def _retire_replaced(self, loaded: Loaded, old: Loaded | None) -> None:
        """Retire what was served before."""
        if old is None:
            return
        await self._retire(old)
        if not loaded.was_alone:
            loaded.cell.distrust()  # it was measured while the old engine computed

    async def unload(self, within_s: float | None = None) -> None:
        """Accept no more requests; finish those in flight.

        Args:
            within_s: how long that may take; None has no limit while there is progress.
        """
        async with self._changing:
            old, self.loaded = self.loaded, None
            self._first = None
            self.changed()
        if old is not None:
            log.event(logging.INFO, "unloaded", model=self.name, version=old.version)
            await self._retire(old, within_s)

    def _version_of(self, content_hash: str) -> int:
        """The version of a bundle: the one that it had, or the next."""
        if content_hash not in self.versions:
            self.versions[content_hash] = max(self.versions.values(), default=0) + 1
            self.versions = newest_versions(self.versions)
        return self.versions[content_hash]

    async def _retire(self, old: Loaded, within_s: float | None = None) -> None:
        """Let it finish its requests, close it, and keep its counters."""
        self._retiring.append(old.cell)
        ended = await self._drained(old.cell, within_s)
        if not ended:
            left, (batches, _) = old.cell.waiting, old.cell.running
            log.event(logging.ERROR, "given up", model=self.name, version=old.version, waiting=left, batches=batches)
            old.cell.abandon(EngineError("the engine does not finish its batches", "", "load the model again"))
        self._retiring.remove(old.cell)
        self._past = sum_by_version([self._past, {old.version: old.cell.totals()}])
        await self._close(old, ended=ended)

    async def _close(self, old: Loaded, *, ended: bool = True) -> None:
        old.cell.close()
        if not ended:
            # Closing waits for the batches: nothing else may wait for that, not even the end of this process.
            for engine in old.engines:
                atexit.unregister(engine.close)
            threading.Thread(target=old.close, name="given up", daemon=True).start()
            return
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self._opening, old.close)
        except Exception as error:  # the new version is served all the same
            log.event(logging.ERROR, "an engine does not close", version=old.version, error=repr(error))
        await loop.run_in_executor(self._opening, allocator.collect_and_trim)

    async def _drained(self, cell: Stage, within_s: float | None) -> bool:
        """Wait until a cell is idle; False if the time is over, or the cell makes no progress for too long."""
        loop = asyncio.get_running_loop()
        began = last = loop.time()
        progress, still_s = cell.progress, 0.0
        stuck_s = max(_STUCK_S, _STUCK_BATCHES * cell.longest_batch_s)
        while not cell.idle:
            await asyncio.sleep(_POLL_S)
            now = loop.time()
            still_s += min(now - last, _LONGEST_POLL_S)  # a pause of the whole machine is not the engine's fault
            last = now
            if cell.progress != progress:
                progress, still_s = cell.progress, 0.0
            if still_s > stuck_s or (within_s is not None and now - began > within_s):
                return False
        return True

    def _open(self, target: Target) -> tuple[tuple[Opened, ...], Decoder | Tabulator | Tokeniser | None]:
        known = () if self.loaded is None else self.loaded.opened
        opening = Opening(self._opener, exact=self._exact, fit=self._fit, computing=self._computing, known=known)
        opened = opening.open(target)
        try:
            return opened, decoder_of(opened[0], self._limits)
        except BaseException:
            for each in opened:
                each.engine.close()
            raise

    def _computing(self) -> tuple[int, int]:
        """Batches of other engines in flight, and those started until now."""
        cells = [cell for service in self.shared.services for cell in service.cells]
        return sum(cell.running[0] for cell in cells), sum(cell.batches for cell in cells)

    def _bounded(self, policy: Policy, signature: Signature) -> Policy:
        """The policy with a queue that holds no more bytes than the model's part of what the process may hold."""
        held = self._limits.held_bytes // self.shared.models
        samples = max(1, held // sum(spec.row_bytes for spec in signature.inputs))
        return msgspec.structs.replace(policy, queue_bound=min(policy.queue_bound, samples))

    def _most_pictures(self, signature: Signature) -> int:
        """Pictures in one request: decoded, they may be as large as a request with tensors."""
        return max(1, self._limits.body_bytes // signature.inputs[0].row_bytes)


def _nothing() -> None:
    """Nobody wants to know of changes."""


def _content_of(target: Target, opened: Sequence[Opened]) -> str:
    """The hash of what answers requests: a version belongs to it."""
    if target.plan.cascade is not None and len(opened) > 1:
        return target.cascade_hash()
    return target.ladder_hash or opened[0].variant.bundle.manifest.hash

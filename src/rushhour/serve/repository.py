"""The model that is served, and how it is replaced while requests come.

A reload opens the new version beside the old one, sends new requests to it in one step, lets the old one finish what
it has, and closes it. A request belongs to the cell that took it, so every answer comes from exactly one version.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import msgspec

from rushhour.bundle import Bundle, Signature
from rushhour.clock import WallClock
from rushhour.engines import Engine, EngineConfig, batch_cost, open_engine, time_service
from rushhour.errors import EngineError, ModelError, RushhourError, ServeError
from rushhour.machine import cores
from rushhour.measurement import BatchCost
from rushhour.plan import Policy
from rushhour.serve import log, memory
from rushhour.serve.admission import Profile
from rushhour.serve.cell import Cell
from rushhour.serve.guard import Budget, Limits
from rushhour.serve.pictures import Decoder
from rushhour.serve.statistics import Totals, together
from rushhour.serve.target import Target, Way, open_target
from rushhour.wire import Codec, Regions

_PROFILE_SECONDS = 0.03
_LONGEST_BATCH_S = 1.0

Opener = Callable[[Bundle, EngineConfig], Engine]
"""Opens an engine; a seam for benchmarks and tests."""


class Loaded:
    """One version of the model, ready: what was opened, in which way it is served, and the cell in front of it."""

    def __init__(self, target: Target, way: Way, engine: Engine, cell: Cell) -> None:
        self.target = target
        self.way = way
        self.engine = engine
        self.cell = cell

    @property
    def version(self) -> str:
        """As clients see it: `1` at the start, one more with each reload."""
        return self.cell.codec.version


class Repository:
    """Holds one model under one name; loads, reloads and unloads it.

    Args:
        target: what is served first; a reload opens the same path again.
        name: on the wire; None takes the bundle's.
        opener: opens engines.
        version: that the first load gets; each further one gets one more.
        regions: the shared memory that requests may use; None where it is switched off.
        limits: what one request may cost.
        exact: serve as the plan's first variant says or not at all; else the best way that is right on this machine.

    Attributes:
        loaded: what answers requests now.
        budget: of all large requests in this process.

    Raises:
        ServeError: if the name cannot be a part of a URL.
    """

    def __init__(
        self,
        target: Target,
        name: str | None,
        opener: Opener,
        version: int = 1,
        regions: Regions | None = None,
        limits: Limits = Limits(),  # noqa: B008 - frozen
        exact: bool = True,
    ) -> None:
        self._exact = exact
        self.name = name or target.bundle.manifest.name
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", self.name):
            raise ServeError(
                f"cannot serve a model under the name {self.name!r}",
                "a name is made of letters, digits, '.', '_' and '-'",
                "give another with --model-name",
            )
        self.loaded: Loaded | None = None
        self._path = target.path
        self._first: Target | None = target
        self._opener = opener
        self._regions = regions
        self._limits = limits
        self.budget = Budget(limits.held_bytes)
        self._version = version - 1
        self._retiring: list[Cell] = []
        self._past: dict[str, Totals] = {}
        self._changing = asyncio.Lock()
        # One thread for all models, one after another: each that had opened one would keep its stack and its leftovers.
        self._opening = ThreadPoolExecutor(1, thread_name_prefix="models")
        self._infer_paths: frozenset[bytes] = frozenset()

    def cell_of(self, path: bytes) -> Cell | None:
        """The cell that answers inference requests at this exact path."""
        return self.loaded.cell if self.loaded is not None and path in self._infer_paths else None

    def totals(self) -> dict[str, Totals]:
        """What each version has done up to now, those that are gone too. Copies."""
        cells = [*self._retiring, *([self.loaded.cell] if self.loaded is not None else [])]
        return together([self._past, *({cell.codec.version: cell.totals()} for cell in cells)])

    async def load(self, version: int | None = None) -> None:
        """Open what lies at the path now, and serve it from the next request on. The old version drains and ends.

        Args:
            version: that it gets; one more than the last by default.

        Raises:
            RushhourError: if it cannot be opened; then the old version goes on.
        """
        async with self._changing:
            loop = asyncio.get_running_loop()
            target, self._first = self._first, None
            if target is None:
                target = await loop.run_in_executor(self._opening, open_target, self._path)
            way, engine, profile, decoder, cost = await loop.run_in_executor(self._opening, self._open, target)
            self._version = self._version + 1 if version is None else version
            codec = Codec(
                self.name,
                engine.signature,
                version=str(self._version),
                labels=way.bundle.manifest.task.classes,
                regions=self._regions,
                pictures=self._most_pictures(engine.signature) if decoder else 0,
            )
            policy = self._bounded(target.plan.policy, engine.signature)
            cell = Cell(engine, codec, policy, profile, WallClock(), decoder, cost)
            old, self.loaded = self.loaded, Loaded(target, way, engine, cell)
            base = f"/v2/models/{self.name}"
            self._infer_paths = frozenset(
                path.encode() for path in (f"{base}/infer", f"{base}/versions/{self._version}/infer")
            )
        log.event(logging.INFO, "loaded", model=self.name, version=codec.version, bundle=way.bundle.manifest.hash)
        if old is not None:
            await self._retire(old)

    async def unload(self) -> None:
        """Take no more requests; finish those that were taken."""
        async with self._changing:
            old, self.loaded, self._infer_paths = self.loaded, None, frozenset()
            self._first = None
        if old is not None:
            log.event(logging.INFO, "unloaded", model=self.name, version=old.version)
            await self._retire(old)

    async def _retire(self, old: Loaded) -> None:
        """Let it finish what it took, and keep what it has counted."""
        self._retiring.append(old.cell)
        while not old.cell.idle:
            await asyncio.sleep(0.005)
        self._retiring.remove(old.cell)
        self._past = together([self._past, {old.version: old.cell.totals()}])
        if old.cell.decoder is not None:
            old.cell.decoder.close()
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._opening, old.engine.close)
        await loop.run_in_executor(self._opening, memory.give_back)

    def _open(self, target: Target) -> tuple[Way, Engine, Profile, Decoder | None, BatchCost]:
        refused: RushhourError | None = None
        for way in [Way(target.bundle, target.engine_config)] if self._exact else target.ways(cores()):
            try:
                opened = self._opened(way)
            except (EngineError, ModelError) as error:
                refused = refused or error
                continue
            if refused is not None:
                log.event(logging.WARNING, "not served as planned", why=str(refused), instead=str(way))
            return way, *opened
        assert refused is not None
        raise refused

    def _opened(self, way: Way) -> tuple[Engine, Profile, Decoder | None, BatchCost]:
        engine = self._opener(way.bundle, way.config)
        try:
            times = time_service(engine, way.bundle, _LONGEST_BATCH_S, _PROFILE_SECONDS)
            cost = batch_cost(engine, way.bundle, times.batch_sizes[-1])
            spec, decoder = engine.signature.picture, None
            if spec is not None:
                decoder = Decoder(spec, max_pixels=self._limits.picture_pixels, threads=cores())
            return engine, Profile(times), decoder, cost
        except RushhourError:
            engine.close()
            raise

    def _bounded(self, policy: Policy, signature: Signature) -> Policy:
        """The policy with a queue that takes no more bytes than the process may hold."""
        samples = max(1, self._limits.held_bytes // sum(spec.row_bytes for spec in signature.inputs))
        return msgspec.structs.replace(policy, queue_bound=min(policy.queue_bound, samples))

    def _most_pictures(self, signature: Signature) -> int:
        """In one request: decoded, they may be as large as a request with tensors."""
        return max(1, self._limits.body_bytes // signature.inputs[0].row_bytes)


def opener(trusted: tuple[str, ...]) -> Opener:
    """The usual way to open engines: what the plan names, with the factories that the user trusts."""

    def open_trusted(bundle: Bundle, config: EngineConfig) -> Engine:
        return open_engine(bundle, config, trusted=trusted)

    return open_trusted

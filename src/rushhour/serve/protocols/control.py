"""All but inference: what the server says of itself and its model, and the commands it takes.

The same for both faces: answers are plain values under the protocol's names, and what cannot be done is a `WireError`
with its HTTP status. Rare, so clarity counts more than speed.

Sources: kserve/open-inference-protocol, specification/protocol; triton-inference-server/server, docs/protocol.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any, Literal

import msgspec

from rushhour.bundle import TensorSpec
from rushhour.errors import WireError
from rushhour.serve.observability import log, metrics
from rushhour.serve.observability.statistics import Report, Totals
from rushhour.serve.processes.commands import Duties
from rushhour.serve.processes.messages import Count, Do, Load, Log, LogLevel, Register, Speed, Unload, Unregister, done
from rushhour.serve.protocols.limits import Asker, user_of
from rushhour.serve.protocols.shared_memory import Access, SharedMemory
from rushhour.serve.repository import Loaded, Repository
from rushhour.system.machine import describe
from rushhour.wire import datatype_of, model_metadata

_LOG_FIXED = {"log_file": "", "log_format": "default"}


class Control:
    """Answers about one repository.

    Args:
        repository: what is served.
        draining: whether the server is about to stop.
        admin: whether clients may load and unload, and set what is logged.
        regions: the shared memory of its clients; None where it is switched off.
        do: does work where it is to be done: in all cells where there are several; here by default.
        settings: how the server was started, for `/config`.
        tracing: the settings of tracing.
    """

    def __init__(
        self,
        repository: Repository,
        draining: Callable[[], bool],
        *,
        admin: bool = True,
        regions: SharedMemory | None = None,
        do: Do | None = None,
        settings: Mapping[str, Any] | None = None,
        tracing: Mapping[str, Any] | None = None,
    ) -> None:
        self._repository = repository
        self._draining = draining
        self._admin = admin
        self._regions = regions
        self._do = do or Duties(repository, regions).do
        self._settings = settings or {}
        self._tracing = tracing or {"trace_level": ["OFF"]}

    @property
    def keyed(self) -> bool:
        """Whether clients must send an API key."""
        return bool(self._settings.get("api_keys"))

    def ready(self) -> bool:
        """Whether requests are welcome."""
        return not self._draining() and self._repository.loaded is not None

    def model_ready(self, name: str, version: str = "") -> bool:
        """Whether requests for this model are; an empty version is the one that is served."""
        loaded = self._repository.loaded
        return self.ready() and loaded is not None and name == self._repository.name and version in ("", loaded.version)

    def server(self) -> dict[str, Any]:
        """Its name, version, and which of the protocol's extensions it has."""
        extensions = [
            "binary_tensor_data",
            "classification",
            "model_configuration",
            "model_repository",
            "schedule_policy",
            "speed",
            "statistics",
        ]
        if self._regions is not None:
            extensions.append("system_shared_memory")
        return {"name": "rushhour", "version": describe().versions.get("rushhour", ""), "extensions": extensions}

    def metadata(self, name: str, version: str = "") -> dict[str, Any]:
        """The model's inputs and outputs.

        Raises:
            WireError: if it is not served, as in all that is asked of a model.
        """
        loaded = self._loaded(name, version)
        shown: dict[str, Any] = msgspec.json.decode(model_metadata(loaded.cell.codec, _platform(loaded)))
        return shown

    def config(self, name: str, version: str = "") -> dict[str, Any]:
        """The model's configuration, in the words of Triton's `ModelConfig`."""
        loaded = self._loaded(name, version)
        config, codec = loaded.engine.config, loaded.cell.codec
        enough, patience_s = loaded.cell.waits_for

        def tensors(specs: tuple[TensorSpec, ...]) -> list[dict[str, Any]]:
            return [
                {"name": spec.name, "data_type": f"TYPE_{datatype_of(spec)}", "dims": list(spec.shape)}
                for spec in specs
            ]

        return {
            "name": codec.model,
            "platform": _platform(loaded),
            "backend": config.engine,
            "max_batch_size": config.max_batch,
            "input": tensors(codec.signature.inputs),
            "output": tensors(codec.signature.outputs),
            "instance_group": [{"name": codec.model, "kind": "KIND_CPU", "count": config.streams}],
            "dynamic_batching": {
                "preferred_batch_size": [enough] if patience_s else [],
                "max_queue_delay_microseconds": round(1e6 * patience_s),
                "preserve_ordering": False,
                "priority_levels": 8,
                "default_priority_level": 4,
            },
            "model_transaction_policy": {"decoupled": False},
            "response_cache": {"enable": False},
        }

    async def statistics(self, name: str = "", version: str = "") -> dict[str, Any]:
        """How many requests, and where their time went; of all models if neither name nor version is given."""
        if version and not name:
            raise WireError(
                "a version is one of a model", "the request names no model", "name the model, too", status=404
            )
        loaded = self._loaded(name, version) if name else self._repository.loaded
        if loaded is None:
            return {"model_stats": []}
        totals = (await self.report()).versions.get(loaded.version, Totals())
        return {"model_stats": [totals.shown(self._repository.name, loaded.version)]}

    async def speed(self, name: str, version: str = "") -> dict[str, Any]:
        """How long batches took in the last minutes, by all cells, against their profile. Not of the protocol."""
        loaded = self._loaded(name, version)
        return ((await done(self._do, Speed())).speeds or loaded.cell.speeds()).shown()

    async def report(self) -> Report:
        """What all cells have done, and how they are."""
        report = (await done(self._do, Count())).report
        assert report is not None
        return report

    async def metrics(self, accept: str) -> tuple[str, bytes]:
        """The same for Prometheus: content type and text, in the newest form that `accept` names."""
        return metrics.render(await self.report(), accept)

    def effective(self) -> dict[str, Any]:
        """What is in force, as the engine itself reports it. Not of the protocol."""
        loaded = self._loaded(self._repository.name)
        engine, profile = loaded.engine, loaded.cell.profile
        enough, patience_s = loaded.cell.waits_for
        return {
            "model": self._repository.name,
            "version": loaded.version,
            "bundle_hash": loaded.way.bundle.manifest.hash,
            "policy": loaded.cell.policy,
            "engine": engine.config,
            "effective": dict(engine.effective),
            "pictures": None if loaded.cell.decoder is None else loaded.cell.decoder.settings,
            "waits_for_samples": enough,
            "waits_ms": round(1e3 * patience_s, 3),
            "service_ms": {str(n): round(1e3 * profile.seconds(n), 3) for n in (1, engine.config.max_batch)},
            "server": {**self._settings, "log_level": logging.getLevelName(log.level()).lower()},
        }

    async def counters(self) -> dict[str, int]:
        """What was done since the server started, by all cells and versions, in numbers. Not of the protocol."""
        report = await self.report()
        total = report.total
        counted = ("answered", "failed", "invalid", "shed_queue", "shed_deadline", "cancelled", "batches")
        return {name: getattr(total, name) for name in counted} | {
            "rows": total.samples,
            "waiting": sum(state.waiting for state in report.cells.values()),
            "cells": len(report.cells),
        }

    def index(self, *, ready_only: bool = False) -> list[dict[str, str]]:
        """The models there are, and whether they are loaded."""
        loaded = self._repository.loaded
        if loaded is not None:
            return [{"name": self._repository.name, "version": loaded.version, "state": "READY", "reason": ""}]
        unloaded = {"name": self._repository.name, "version": "", "state": "UNAVAILABLE", "reason": "unloaded"}
        return [] if ready_only else [unloaded]

    async def change(self, change: Literal["load", "unload"], name: str, parameters: Mapping[str, Any]) -> None:
        """Load or unload the model.

        Args:
            parameters: of the request; a configuration or files of the client's own are not taken.

        Raises:
            WireError: if it fails; after a load that fails the old version goes on.
        """
        self._permit("loading and unloading")
        self._known(name)
        for parameter in parameters:
            if parameter == "config" or parameter.startswith("file:"):
                raise WireError(
                    f"will not {change} with {parameter[:100]!r}",
                    "the model is served as its plan says",
                    "make another plan with `rushhour tune`",
                    status=501,
                )
        await done(self._do, Load() if change == "load" else Unload())

    async def register(
        self, name: str, key: str, offset: int, byte_size: int, access: Access | None, asker: Asker
    ) -> None:
        """Open a region of shared memory; see `SharedMemory.register`.

        Args:
            access: what for. The protocol does not say, so that None is for writing, too, where the client runs under
                the server's own user. One of another user never is written for: it could have the server overwrite
                what it may not write itself.
            asker: the client.

        Raises:
            WireError: if that cannot be, or shared memory is switched off.
        """
        if access != "read" and asker.peer is not None and asker.here is not None:
            user = await asyncio.to_thread(user_of, asker.peer, asker.here)
            if user not in (None, os.geteuid()):
                if access == "write":
                    who = "the client runs under another user than the server"
                    raise WireError("will not write into shared memory for others", who, "", status=403)
                access = "read"
        await done(self._do, Register(name, key, offset, byte_size, access or "write"))

    def region_status(self, name: str | None) -> list[dict[str, Any]]:
        """The regions that clients have registered; none where shared memory is switched off."""
        if self._regions is None and name is not None:
            raise WireError("shared memory is switched off on this server", "", "send the tensors", status=501)
        return [] if self._regions is None else self._regions.status(name)

    async def unregister(self, name: str | None) -> None:
        """Forget a region, or with None all. One that is not there is forgotten."""
        if self._regions is not None:
            await done(self._do, Unregister(name))

    def refuse_cuda(self) -> None:
        """There is no CUDA memory here.

        Raises:
            WireError: always.
        """
        raise WireError("this server opens no CUDA memory", "it runs on the CPU", "send the tensors", status=501)

    def tracing(self, asked: Mapping[str, Any], model: str = "") -> dict[str, Any]:
        """The settings of tracing, made at the start; asking for anything else is an error."""
        if model:
            self._known(model)
        if asked:
            self._permit("setting what is traced")
        return _fixed("tracing", self._tracing, asked)

    async def logging(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of logging, of which the level can be changed; asking for anything else is an error."""
        if asked:
            self._permit("setting what is logged")
            _fixed("logging", _LOG_FIXED, {name: value for name, value in asked.items() if name not in _log_shown()})
            await done(self._do, Log(_log_level(asked)))
        return _LOG_FIXED | _log_shown()

    def _permit(self, what: str) -> None:
        if not self._admin:
            port = "another port of this server takes it" if self._settings.get("admin_address") else ""
            raise WireError(f"{what} is switched off here", port, status=403)

    def _known(self, name: str) -> None:
        if name != self._repository.name:
            raise WireError(
                f"there is no model {name[:100]!r}", "", f"the model is {self._repository.name}", status=404
            )

    def _loaded(self, name: str, version: str = "") -> Loaded:
        self._known(name)
        loaded = self._repository.loaded
        if loaded is None:
            raise WireError(f"the model {name} is not loaded", "", "load it first", status=404)
        if version not in ("", loaded.version):
            raise WireError(
                f"there is no version {version[:40]!r} of the model {name}",
                f"version {loaded.version} is served",
                "leave the version out",
                status=404,
            )
        return loaded


def _platform(loaded: Loaded) -> str:
    return f"rushhour_{loaded.engine.config.engine}"


def _log_shown() -> dict[str, Any]:
    level = log.level()
    return {
        "log_info": level <= logging.INFO,
        "log_warning": level <= logging.WARNING,
        "log_error": level <= logging.ERROR,
        "log_verbose_level": int(level <= logging.DEBUG),
    }


def _log_level(asked: Mapping[str, Any]) -> LogLevel:
    """The level that these switches make of the one in force.

    One that is switched on takes the more serious along, one that is switched off the less serious.

    Raises:
        WireError: if they contradict each other, or are no switches.
    """
    usual = {"log_verbose_level": 0, "log_info": True, "log_warning": True, "log_error": True}
    levels: tuple[LogLevel, ...] = ("debug", "info", "warning", "error", "critical")
    on, off = len(levels), -1
    for position, (name, default) in enumerate(usual.items()):
        value = default if asked.get(name) is None else asked[name]
        if type(value) is not type(default):
            raise WireError(f"{name} cannot be {str(value)[:100]!r}", f"it is a {type(default).__name__}")
        if name in asked and value:
            on = min(on, position)
        elif name in asked:
            off = max(off, position)
    if on < off:
        raise WireError("cannot log what is less serious without what is more serious", "", "switch both on or off")
    return levels[min(on, max(off + 1, [level.upper() for level in levels].index(logging.getLevelName(log.level()))))]


def _fixed(what: str, settings: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    for name, value in asked.items():
        # None asks for the default, which is all there is.
        if value is not None and value != settings.get(name):
            raise WireError(f"cannot set {name[:100]} to {str(value)[:100]}", f"{what} is fixed here", status=501)
    return dict(settings)

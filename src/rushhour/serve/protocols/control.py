"""`Control`: all requests other than inference: metadata, statistics, and commands.

The same for HTTP and gRPC: answers are plain values under the protocol's names, and an error is a `WireError` with its
HTTP status. These requests are rare, so clarity counts more than speed.

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
from rushhour.serve.access.origin import Client
from rushhour.serve.access.peer import user_of
from rushhour.serve.memory.shared_memory import Access, Register, SharedMemory
from rushhour.serve.observability import log, metrics
from rushhour.serve.observability.log import LogLevel
from rushhour.serve.observability.statistics import Report, Totals
from rushhour.serve.processes.commands import Commands
from rushhour.serve.processes.messages import Count, Execute, Load, Log, Speed, Unload, Unregister, executed
from rushhour.serve.repository import Repository
from rushhour.serve.scheduling.decoding import Decoder
from rushhour.serve.scheduling.tabulating import Tabulator
from rushhour.serve.scheduling.tokenising import Tokeniser
from rushhour.serve.service import Loaded
from rushhour.system.machine import describe
from rushhour.wire import datatype_of, embeds, model_metadata

_LOG_FIXED = {"log_file": "", "log_format": "default"}


class Control:
    """Answers about one repository.

    Args:
        repository: the models.
        draining: whether the server is about to stop.
        admin: whether clients may load and unload, and set what is logged.
        regions: the shared memory of clients; None where it is switched off.
        execute: executes commands, in all worker processes if there are several; in this one by default.
        settings: of the server, for `/config`.
        tracing: the settings of tracing.
    """

    def __init__(
        self,
        repository: Repository,
        draining: Callable[[], bool],
        *,
        admin: bool = True,
        regions: SharedMemory | None = None,
        execute: Execute | None = None,
        settings: Mapping[str, Any] | None = None,
        tracing: Mapping[str, Any] | None = None,
    ) -> None:
        self._repository = repository
        self._draining = draining
        self._admin = admin
        self._regions = regions
        self._execute = execute or Commands(repository, regions).execute
        self._settings = settings or {}
        self._tracing = tracing or {"trace_level": ["OFF"]}

    @property
    def keyed(self) -> bool:
        """Whether clients must send an API key."""
        return bool(self._settings.get("api_keys"))

    def ready(self) -> bool:
        """Whether requests are accepted."""
        return not self._draining() and self._repository.is_ready

    def model_ready(self, name: str, version: str = "") -> bool:
        """Whether requests for this model are accepted; an empty version is the one that is served."""
        service = self._repository.services.get(name)
        loaded = None if service is None else service.loaded
        return not self._draining() and loaded is not None and version in ("", loaded.version)

    def server(self) -> dict[str, Any]:
        """The server's name and version, and the protocol's extensions that it supports."""
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
            WireError: if it is not served, as in all methods about a model.
        """
        loaded = self._loaded(name, version)
        shown: dict[str, Any] = msgspec.json.decode(model_metadata(loaded.cell.codec, _platform(loaded)))
        return shown

    def bounds(self, name: str) -> dict[str, Any]:
        """What metadata does not say: under the key `bounds` the smallest and the largest size of each dimension of one
        sample, by input; under `texts` and `rows` whether texts, or rows of named values, are taken too; under `embeds`
        whether `/v1/embeddings` answers."""
        codec = self._loaded(name).cell.codec
        signature = codec.signature
        smallest = tuple(dimension.smallest for dimension in signature.dimensions)
        pairs = {
            spec.name: list(zip(signature.shape(spec, smallest), spec.shape, strict=True)) for spec in signature.inputs
        }
        embedding = embeds(codec, self._loaded(name).variant.bundle.manifest.task.kind)
        return {"bounds": pairs, "texts": codec.takes_texts, "embeds": embedding, "rows": codec.takes_rows}

    def rows(self, name: str, version: str = "") -> dict[str, Any]:
        """The columns of a row, and a few real rows.

        Raises:
            WireError: if the model takes no rows.
        """
        loaded = self._loaded(name, version)
        decoder = loaded.cell.decoder
        if not isinstance(decoder, Tabulator):
            why = "its bundle has no table"
            raise WireError(f"{name} takes no rows", why, f"see GET v2/models/{name} for its inputs", status=404)
        columns = [
            {"name": column.name, "kind": column.kind, "optional": column.optional}
            | ({"categories": len(column.categories)} if column.kind == "category" else {})
            for column in decoder.reader.table.columns
        ]
        return {"columns": columns, "rows": decoder.examples}

    def config(self, name: str, version: str = "") -> dict[str, Any]:
        """The model's configuration, under the names of Triton's `ModelConfig`."""
        loaded = self._loaded(name, version)
        config, codec = loaded.engine.config, loaded.cell.codec
        target_batch, wait_s = loaded.cell.waits_for

        def tensors(specs: tuple[TensorSpec, ...]) -> list[dict[str, Any]]:
            return [
                {"name": spec.name, "data_type": f"TYPE_{datatype_of(spec)}", "dims": codec.declared(spec)}
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
                "preferred_batch_size": [target_batch] if wait_s else [],
                "max_queue_delay_microseconds": round(1e6 * wait_s),
                "preserve_ordering": False,
                "priority_levels": 8,
                "default_priority_level": 4,
            },
            "model_transaction_policy": {"decoupled": False},
            "response_cache": {"enable": False},
        }

    async def statistics(self, name: str = "", version: str = "") -> dict[str, Any]:
        """Numbers of requests and the times of their stages; of all models if neither name nor version is given."""
        if version and not name:
            raise WireError(
                "the request has a version but no model", "a version belongs to a model", "add the model", status=404
            )
        if name:
            wanted = {name: self._loaded(name, version)}
        else:
            services = self._repository.services
            wanted = {name: loaded for name, each in services.items() if (loaded := each.loaded) is not None}
        if not wanted:
            return {"model_stats": []}
        models = (await self.report()).models
        shown = []
        for model, loaded in wanted.items():
            versions = models[model].versions if model in models else {}
            shown.append(versions.get(loaded.version, Totals()).shown(model, loaded.version))
        return {"model_stats": shown}

    async def speed(self, name: str, version: str = "") -> dict[str, Any]:
        """The expected and the measured times of batches in the last minutes. Not part of the protocol."""
        loaded = self._loaded(name, version)
        return ((await executed(self._execute, Speed(name))).speeds or loaded.cell.speeds()).shown()

    async def report(self) -> Report:
        """Counters and state of all worker processes."""
        report = (await executed(self._execute, Count())).report
        assert report is not None
        return report

    async def metrics(self, accept: str) -> tuple[str, bytes]:
        """The same for Prometheus: content type and text, in the newest format that `accept` names."""
        return metrics.render(await self.report(), accept)

    def effective(self) -> dict[str, Any]:
        """The settings in force, as the engines themselves report them. Not part of the protocol.

        Of several models each has its own, by its name, under `models`.
        """
        server = {**self._settings, "log_level": logging.getLevelName(log.level()).lower()}
        only = self._repository.only
        if only is not None:
            return {**self._effective(only.name), "server": server}
        services = self._repository.services
        loaded = [name for name, service in services.items() if service.loaded is not None]
        models = {name: {**self._effective(name), "weight": services[name].weight} for name in loaded}
        return {"models": models, "server": server}

    def _effective(self, name: str) -> dict[str, Any]:
        """The settings of one model."""
        loaded = self._loaded(name)
        engine, profile, codec, decoder = loaded.engine, loaded.cell.profile, loaded.cell.codec, loaded.cell.decoder
        target_batch, wait_s = loaded.cell.waits_for
        return {
            "model": name,
            "version": loaded.version,
            "bundle_hash": loaded.variant.bundle.manifest.hash,
            "policy": loaded.cell.policy,
            "engine": engine.config,
            "effective": dict(engine.effective),
            "open_dimensions": codec.signature.dimensions,
            "pictures": decoder.settings if isinstance(decoder, Decoder) else None,
            "texts": decoder.settings if isinstance(decoder, Tokeniser) else None,
            "rows": decoder.settings if isinstance(decoder, Tabulator) else None,
            **loaded.cell.shown(),
            "waits_for_samples": target_batch,
            "waits_ms": round(1e3 * wait_s, 3),
            "service_ms": {str(n): round(1e3 * profile.seconds(n), 3) for n in (1, engine.config.max_batch)},
        }

    async def counters(self) -> dict[str, int]:
        """Counters since the server started, of all worker processes and versions. Not part of the protocol."""
        report = await self.report()
        total = report.total
        counted = ("answered", "failed", "invalid", "shed_queue", "shed_deadline", "cancelled", "batches")
        return {name: getattr(total, name) for name in counted} | {
            "rows": total.samples,
            **({"positions": total.positions, "padding": total.padding} if total.positions else {}),
            "waiting": sum(state.waiting for cell in report.cells.values() for state in cell.models.values()),
            "cells": len(report.cells),
        }

    @property
    def names(self) -> list[str]:
        """Of all models, loaded or not."""
        return self._repository.names()

    @property
    def said(self) -> str:
        """The names of the models, in words."""
        return self._repository.said

    def index(self, *, ready_only: bool = False) -> list[dict[str, str]]:
        """The models, and whether they are loaded."""
        services, entries = self._repository.services, []
        for name in self._repository.names():
            loaded = services[name].loaded if name in services else None
            if loaded is not None:
                missing = ", ".join(loaded.missing)
                reason = f"not all variants of the ladder could be opened: without {missing}" if missing else ""
                entries.append({"name": name, "version": loaded.version, "state": "READY", "reason": reason})
            elif not ready_only:
                entries.append({"name": name, "version": "", "state": "UNAVAILABLE", "reason": "unloaded"})
        return entries

    async def change(self, change: Literal["load", "unload"], name: str, parameters: Mapping[str, Any]) -> None:
        """Load or unload a model.

        Args:
            parameters: of the request; a configuration or files of the client are refused.

        Raises:
            WireError: if it fails; after a load that fails the old version is served on.
        """
        self._permit("loading and unloading")
        self._known(name)
        for parameter in parameters:
            if parameter == "config" or parameter.startswith("file:"):
                raise WireError(
                    f"cannot {change} with {parameter[:100]!r}",
                    "the model is served as its plan says",
                    "make another plan with `rushhour tune`",
                    status=501,
                )
        await executed(self._execute, Load(name) if change == "load" else Unload(name))

    async def register(
        self, name: str, key: str, offset: int, byte_size: int, access: Access | None, client: Client
    ) -> None:
        """Open a region of shared memory; see `SharedMemory.register`.

        Args:
            access: what for. The protocol does not define it, so None includes writing where the client runs under the
                server's own user. The server never writes for a client of another user, which could have it overwrite
                what that user may not write.
            client: the sender of the request.

        Raises:
            WireError: if that is not possible, or shared memory is switched off.
        """
        if access != "read" and client.peer is not None and client.here is not None:
            user = await asyncio.to_thread(user_of, client.peer, client.here)
            if user not in (None, os.geteuid()):
                if access == "write":
                    why = "the client runs under another user than the server"
                    raise WireError("cannot write into shared memory for this client", why, "", status=403)
                access = "read"
        await executed(self._execute, Register(name, key, offset, byte_size, access or "write"))

    def region_status(self, name: str | None) -> list[dict[str, Any]]:
        """The regions that clients have registered; none where shared memory is switched off."""
        if self._regions is None and name is not None:
            raise WireError("shared memory is switched off on this server", "", "send the tensors", status=501)
        return [] if self._regions is None else self._regions.status(name)

    async def unregister(self, name: str | None) -> None:
        """Remove a region, or with None all. An unknown name is no error."""
        if self._regions is not None:
            await executed(self._execute, Unregister(name))

    def refuse_cuda(self) -> None:
        """CUDA memory is not supported.

        Raises:
            WireError: always.
        """
        raise WireError(
            "this server does not support CUDA memory", "it runs on the CPU", "send the tensors", status=501
        )

    def tracing(self, changes: Mapping[str, Any], model: str = "", version: str = "") -> dict[str, Any]:
        """The settings of tracing, which are fixed at the start; any other value in `changes` is an error."""
        if version:
            self._loaded(model, version)
        elif model:
            self._known(model)
        if changes:
            self._permit("setting what is traced")
        return _fixed("tracing", self._tracing, changes)

    async def logging(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of logging, of which only the level can be changed; any other change is an error."""
        if changes:
            self._permit("setting what is logged")
            _fixed("logging", _LOG_FIXED, {name: value for name, value in changes.items() if name not in _log_shown()})
            await executed(self._execute, Log(_log_level(changes)))
        return _LOG_FIXED | _log_shown()

    def _permit(self, what: str) -> None:
        if not self._admin:
            port = "use the administration port of this server" if self._settings.get("admin_address") else ""
            raise WireError(f"{what} is switched off on this port", port, status=403)

    def _known(self, name: str) -> None:
        if name not in self._repository.names():
            raise WireError(f"there is no model {name[:100]!r}", "", self._repository.said, status=404)

    def _loaded(self, name: str, version: str = "") -> Loaded:
        self._known(name)
        service = self._repository.services.get(name)
        loaded = None if service is None else service.loaded
        if loaded is None:
            raise WireError(f"the model {name} is not loaded", "", "load it first", status=404)
        if version not in ("", loaded.version):
            raise WireError(
                f"there is no version {version[:40]!r} of the model {name}",
                f"version {loaded.version} is served",
                "omit the version",
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


def _log_level(changes: Mapping[str, Any]) -> LogLevel:
    """The level that results from switching levels on and off.

    Switching a level on includes the more serious ones, switching it off the less serious ones.

    Raises:
        WireError: if the switches contradict each other, or have another type.
    """
    usual = {"log_verbose_level": 0, "log_info": True, "log_warning": True, "log_error": True}
    levels: tuple[LogLevel, ...] = ("debug", "info", "warning", "error", "critical")
    on, off = len(levels), -1
    for position, (name, default) in enumerate(usual.items()):
        value = default if changes.get(name) is None else changes[name]
        if type(value) is not type(default):
            raise WireError(f"{name} cannot be {str(value)[:100]!r}", f"it is a {type(default).__name__}")
        if name in changes and value:
            on = min(on, position)
        elif name in changes:
            off = max(off, position)
    if on < off:
        raise WireError("a level cannot be logged without the more serious levels", "", "switch both on or off")
    return levels[min(on, max(off + 1, [level.upper() for level in levels].index(logging.getLevelName(log.level()))))]


def _fixed(what: str, settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    for name, value in changes.items():
        # None means the default, which is in force.
        if value is not None and value != settings.get(name):
            raise WireError(
                f"cannot set {name[:100]} to {str(value)[:100]}", f"the settings of {what} are fixed", status=501
            )
    return dict(settings)

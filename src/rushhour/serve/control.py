"""All but inference: what the server says of itself and its model, and the commands it takes.

The same for both faces: answers are plain values under the protocol's names, and what cannot be done is a `WireError`
with its HTTP status. Rare, so clarity counts more than speed.

Sources: kserve/open-inference-protocol, specification/protocol; triton-inference-server/server, docs/protocol.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from rushhour.bundle import TensorSpec
from rushhour.errors import WireError
from rushhour.machine import describe
from rushhour.serve.repository import Loaded, Repository
from rushhour.serve.shared_memory import SharedMemory
from rushhour.serve.supervisor import Change
from rushhour.wire import datatype_of, model_metadata

_TRACING = {"trace_level": ["OFF"]}
_LOGGING = {
    "log_file": "",
    "log_info": False,
    "log_warning": True,
    "log_error": True,
    "log_verbose_level": 0,
    "log_format": "default",
}


class Control:
    """Answers about one repository.

    Args:
        repository: what is served.
        draining: whether the server is about to stop.
        admin: whether clients may load and unload.
        regions: the shared memory of its clients; None where it is switched off.
    """

    def __init__(
        self,
        repository: Repository,
        draining: Callable[[], bool],
        *,
        admin: bool = True,
        regions: SharedMemory | None = None,
    ) -> None:
        self._repository = repository
        self._draining = draining
        self._admin = admin
        self._regions = regions

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
                "preferred_batch_size": [],
                "max_queue_delay_microseconds": 0,
                "preserve_ordering": False,
                "priority_levels": 8,
                "default_priority_level": 4,
            },
            "model_transaction_policy": {"decoupled": False},
            "response_cache": {"enable": False},
        }

    def statistics(self, name: str = "", version: str = "") -> dict[str, Any]:
        """How many requests, and where their time went; of all models if no name is given."""
        loaded = self._loaded(name, version) if name else self._repository.loaded
        if loaded is None:
            return {"model_stats": []}
        return {"model_stats": [loaded.cell.statistics.shown(self._repository.name, loaded.version)]}

    def effective(self) -> dict[str, Any]:
        """What is in force, as the engine itself reports it. Not of the protocol."""
        loaded = self._loaded(self._repository.name)
        engine, profile = loaded.engine, loaded.cell.profile
        return {
            "model": self._repository.name,
            "version": loaded.version,
            "bundle_hash": loaded.target.bundle.manifest.hash,
            "policy": loaded.target.plan.policy,
            "engine": engine.config,
            "effective": dict(engine.effective),
            "pictures": None if loaded.cell.decoder is None else loaded.cell.decoder.settings,
            "service_ms": {str(n): round(1e3 * profile.seconds(n), 3) for n in (1, engine.config.max_batch)},
        }

    def counters(self) -> dict[str, int]:
        """What the cell has done, in numbers. Not of the protocol."""
        cell = self._loaded(self._repository.name).cell
        return {name: getattr(cell.counters, name) for name in cell.counters.__slots__} | {"waiting": cell.waiting}

    def index(self, *, ready_only: bool = False) -> list[dict[str, str]]:
        """The models there are, and whether they are loaded."""
        loaded = self._repository.loaded
        if loaded is not None:
            return [{"name": self._repository.name, "version": loaded.version, "state": "READY", "reason": ""}]
        unloaded = {"name": self._repository.name, "version": "", "state": "UNAVAILABLE", "reason": "unloaded"}
        return [] if ready_only else [unloaded]

    async def change(self, change: Change, name: str, parameters: Mapping[str, Any]) -> None:
        """Load or unload the model.

        Args:
            parameters: of the request; a configuration or files of the client's own are not taken.

        Raises:
            WireError: if it fails; after a load that fails the old version goes on.
        """
        if not self._admin:
            raise WireError("loading and unloading is switched off on this server", status=403)
        self._known(name)
        for parameter in parameters:
            if parameter == "config" or parameter.startswith("file:"):
                raise WireError(
                    f"will not {change} with {parameter[:100]!r}",
                    "the model is served as its plan says",
                    "make another plan with `rushhour tune`",
                    status=501,
                )
        wrong = await self._repository.request(change)
        if wrong:
            raise WireError(wrong)

    @property
    def regions(self) -> SharedMemory:
        """The shared memory of its clients.

        Raises:
            WireError: if it is switched off.
        """
        if self._regions is None:
            raise WireError("shared memory is switched off on this server", "", "send the tensors", status=501)
        return self._regions

    def region_status(self, name: str | None) -> list[dict[str, Any]]:
        """The regions that clients have registered; none where shared memory is switched off."""
        return [] if self._regions is None and name is None else self.regions.status(name)

    def unregister(self, name: str | None) -> None:
        """Forget a region, or with None all. One that is not there is forgotten."""
        if self._regions is not None:
            self._regions.unregister(name)

    def refuse_cuda(self) -> None:
        """There is no CUDA memory here.

        Raises:
            WireError: always.
        """
        raise WireError("this server opens no CUDA memory", "it runs on the CPU", "send the tensors", status=501)

    def tracing(self, asked: Mapping[str, Any], model: str = "") -> dict[str, Any]:
        """The settings of tracing, which is not done; asking for anything else is an error."""
        if model:
            self._known(model)
        return _fixed("tracing", _TRACING, asked)

    def logging(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of logging, which cannot be changed; asking for anything else is an error."""
        return _fixed("logging", _LOGGING, asked)

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


def _fixed(what: str, settings: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    for name, value in asked.items():
        # None asks for the default, which is all there is.
        if value is not None and value != settings.get(name):
            raise WireError(f"cannot set {name[:100]} to {str(value)[:100]}", f"{what} is fixed here", status=501)
    return dict(settings)

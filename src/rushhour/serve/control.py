"""Everything over HTTP that is not inference: health, metadata, configuration, statistics, the repository.

Rare, so clarity counts more than speed. Paths and bodies are those of the Open Inference Protocol and its model
repository extension.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from rushhour.machine import describe
from rushhour.serve.repository import Loaded, Repository
from rushhour.serve.supervisor import Change
from rushhour.wire import model_metadata

Answer = tuple[int, bytes]
"""A status and a JSON body."""


class Control:
    """Answers control requests about one repository.

    Args:
        repository: what is served.
        draining: whether the server is about to stop.
        admin: whether clients may load and unload.
    """

    def __init__(self, repository: Repository, draining: Callable[[], bool], *, admin: bool = True) -> None:
        self._admin = admin
        self._repository = repository
        self._draining = draining
        name = repository.name
        self._fixed: dict[str, tuple[str, Callable[[bytes], Answer | Awaitable[Answer]]]] = {
            "/v2": ("GET", lambda body: _json(self._server())),
            "/v2/health/live": ("GET", lambda body: _json({"live": True})),
            "/v2/health/ready": ("GET", lambda body: self._ready()),
            "/v2/repository/index": ("POST", lambda body: _json(self._index())),
            f"/v2/repository/models/{name}/load": ("POST", self._load),
            f"/v2/repository/models/{name}/unload": ("POST", self._unload),
            "/config": ("GET", lambda body: self._of_model(self._config)),
            "/stats": ("GET", lambda body: self._of_model(self._stats)),
        }

    def answer(self, method: bytes, path: bytes, body: bytes) -> Answer | Awaitable[Answer]:
        """The answer to a request; awaitable where it takes time."""
        shown = path.decode("latin-1")
        route = shown.rstrip("/") or "/"
        found = self._fixed.get(route) or self._model_routes().get(route)
        if found is None:
            return _error(404, f"there is nothing at {shown[:200]}: the model is {self._repository.name}; see GET /v2")
        wanted, answer = found
        if method.decode("latin-1") != wanted:
            return _error(405, f"the method is {method.decode('latin-1')}: this path takes {wanted}")
        return answer(body)

    def _model_routes(self) -> dict[str, tuple[str, Callable[[bytes], Answer]]]:
        loaded = self._repository.loaded
        base = f"/v2/models/{self._repository.name}"
        routes: dict[str, tuple[str, Callable[[bytes], Answer]]] = {}
        for prefix in (base, f"{base}/versions/{loaded.version}") if loaded else (base,):
            routes[prefix] = ("GET", lambda body: self._of_model(self._metadata))
            routes[f"{prefix}/ready"] = ("GET", lambda body: self._ready())
        return routes

    def _of_model(self, show: Callable[[Loaded], Any]) -> Answer:
        loaded = self._repository.loaded
        if loaded is None:
            return _error(404, f"the model {self._repository.name} is not loaded: load it first")
        return _json(show(loaded))

    def _ready(self) -> Answer:
        ready = not self._draining() and self._repository.loaded is not None
        return _json({"ready": ready}, 200 if ready else 503)

    def _server(self) -> dict[str, Any]:
        version = describe().versions.get("rushhour", "")
        return {"name": "rushhour", "version": version, "extensions": ["binary_tensor_data", "model_repository"]}

    def _index(self) -> list[dict[str, str]]:
        loaded = self._repository.loaded
        state = {"version": loaded.version, "state": "READY"} if loaded else {"version": "", "state": "UNAVAILABLE"}
        return [{"name": self._repository.name, **state, "reason": "" if loaded else "unloaded"}]

    async def _load(self, body: bytes) -> Answer:
        return await self._change("load")

    async def _unload(self, body: bytes) -> Answer:
        return await self._change("unload")

    async def _change(self, change: Change) -> Answer:
        if not self._admin:
            return _error(403, "loading and unloading is switched off on this server")
        wrong = await self._repository.request(change)
        return _error(400, wrong) if wrong else _json({})

    @staticmethod
    def _metadata(loaded: Loaded) -> msgspec.Raw:
        return msgspec.Raw(model_metadata(loaded.cell.codec, platform=f"rushhour_{loaded.engine.config.engine}"))

    @staticmethod
    def _config(loaded: Loaded) -> dict[str, Any]:
        engine, profile = loaded.engine, loaded.cell.profile
        return {
            "model": loaded.cell.codec.model,
            "version": loaded.version,
            "bundle_hash": loaded.target.bundle.manifest.hash,
            "policy": loaded.target.plan.policy,
            "engine": engine.config,
            "effective": dict(engine.effective),
            "service_ms": {str(n): round(1e3 * profile.seconds(n), 3) for n in (1, engine.config.max_batch)},
        }

    @staticmethod
    def _stats(loaded: Loaded) -> dict[str, int]:
        counters = loaded.cell.counters
        return {name: getattr(counters, name) for name in counters.__slots__} | {"waiting": loaded.cell.waiting}


def _json(content: Any, status: int = 200) -> Answer:
    return status, msgspec.json.encode(content)


def _error(status: int, text: str) -> Answer:
    return _json({"error": text}, status)

"""`HttpEndpoint`: what the connections of one address share, for inference or for administration."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from email.utils import formatdate
from typing import Protocol

from rushhour.serve.access.keys import Keys
from rushhour.serve.access.origin import Client, OriginCheck
from rushhour.serve.protocols.control import Control
from rushhour.serve.protocols.http.routes import Answer, Routes
from rushhour.serve.protocols.http.turns import Turns
from rushhour.serve.repository import Repository
from rushhour.serve.scheduling.stage import Stage
from rushhour.serve.settings import ServeSettings
from rushhour.wire import EMBEDDINGS, Body

_EMBEDDINGS = EMBEDDINGS.encode()


class OpenConnection(Protocol):
    """What the server does with a connection from outside."""

    def expire(self, now: float) -> None:
        """Close it if its request or its idle time took too long."""
        ...

    def close_if_idle(self) -> None:
        """Close it if no request is in flight."""
        ...

    def abort(self) -> None:
        """Close it at once."""
        ...

    def forget(self) -> None:
        """Check the API key of its next request again."""
        ...


class HttpEndpoint:
    """What the connections of one address share.

    Args:
        repository: the models.
        control: answers all requests other than inference.
        settings: of the server.
        keys: API keys; those of the settings by default.
        infers: whether inference requests are answered here.

    Attributes:
        connections: that are open.
        on_lost: called when one has ended.
        draining: whether each answer is the last of its connection.
        stages: what answers inference requests at each exact path.
        budget: of large requests.
        turns: in which their bodies are read.
        explanation: what the answer that is being written says about itself; None where answers do not.
        date: the header field `date` of answers, with its line end.
    """

    def __init__(
        self,
        repository: Repository,
        control: Control,
        settings: ServeSettings,
        keys: Keys | None = None,
        *,
        infers: bool = True,
    ) -> None:
        self.connections: set[OpenConnection] = set()
        self.on_lost: Callable[[], None] | None = None
        self.draining = False
        self.limits = settings.limits
        self.keys = Keys(settings.api_keys) if keys is None else keys
        self.stages: Mapping[bytes, Stage] = repository.stages if infers else {}
        self.budget = repository.budget
        self.turns = Turns()
        self.explanation = repository.explanation
        self.date = b""
        self._repository = repository
        self._infers = infers
        self._routes = Routes(control, infers=infers, refused=self.refused)
        self._origins = OriginCheck(settings.host if infers else settings.administration_host, settings.known_as)
        self.update_date()

    def lost(self, connection: OpenConnection) -> None:
        """A connection has ended."""
        self.connections.discard(connection)
        if self.on_lost is not None:
            self.on_lost()

    def update_date(self) -> None:
        """Call once a second."""
        self.date = f"date: {formatdate(usegmt=True)}\r\n".encode()

    def embedder(self, body: Body, cell: Stage) -> Stage:
        """The cell that answers a request for embeddings; `cell` where no other model is named."""
        return self._repository.embedder(body, cell)

    def refused(self, path: bytes, status: int, seconds: float = 0.0) -> None:
        """Count an answer with an error that no cell has counted."""
        infer = self._infers and (
            (path.startswith(b"/v2/models/") and path.endswith((b"/infer", b"/rows"))) or path == _EMBEDDINGS
        )
        name = path.split(b"/", 4)[3].decode("latin-1") if infer and path != _EMBEDDINGS else ""
        self._repository.refuse(status, seconds, infer=infer, model=name)

    def control(
        self, method: bytes, path: bytes, body: bytes, accept: bytes, client: Client
    ) -> Answer | Awaitable[Answer]:
        """The answer to any other request. Web pages do not know API keys: without keys the origin is checked."""
        return self._routes.answer(method, path, body, accept, client, None if self.keys else self._origins)

    def check_origin(self, client: Client) -> None:
        """Raise a `WireError` if a web page asks for what only programs on this machine may do."""
        if not self.keys:
            self._origins.check_origin(client)

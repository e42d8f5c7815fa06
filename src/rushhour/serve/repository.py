"""`Repository`: the models of a server by their names, and which of them answers a request."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from pathlib import Path

from rushhour.errors import WireError
from rushhour.serve.hosting import Folder, open_served
from rushhour.serve.observability.statistics import add_counts, reason_of
from rushhour.serve.scheduling.stage import Stage
from rushhour.serve.service import Service, Shared
from rushhour.serve.settings import Served
from rushhour.serve.target import Target
from rushhour.wire import EMBEDDINGS, Body, embeds, wanted_embedder

_EMBEDDINGS = EMBEDDINGS.encode()
_SHOWN = 20


class Repository:
    """The models of a server. Used on the event loop's thread.

    Args:
        services: of the models.
        shared: what they share.
        folder: where models are found that the server does not have yet; None where its models are fixed.
        join: makes the service of such a model, of what was read of it.

    Attributes:
        services: by their names.
        stages: what answers inference requests at each exact path.
        errors: answers with an error that belong to no version of a model, by reason.
        budget: of all large requests in this process.
        explanation: what answers say about themselves; None where they do not.
    """

    def __init__(
        self,
        services: Iterable[Service],
        shared: Shared,
        folder: Folder | None = None,
        join: Callable[[Served, Target], Service] | None = None,
    ) -> None:
        self.services = {service.name: service for service in services}
        self.errors: dict[str, int] = {}
        self.budget = shared.budget
        self.explanation = shared.explanation
        self._shared = shared
        self._folder = folder
        self._join = join
        self.stages: dict[bytes, Stage] = {}
        self._embedders: dict[str, Stage] = {}
        for service in self.services.values():
            service.changed = self._sort
        self._sort()

    @property
    def is_ready(self) -> bool:
        """Whether any model is loaded."""
        return any(service.loaded is not None for service in self.services.values())

    @property
    def only(self) -> Service | None:
        """The one model of the server; None where there are several, or may be."""
        return next(iter(self.services.values())) if len(self.services) == 1 and self._folder is None else None

    def names(self) -> list[str]:
        """Of the models, loaded or not, also of those in the folder that were never loaded."""
        found = [] if self._folder is None else self._folder.names()
        return [*self.services, *(name for name in found if name not in self.services)]

    def embedder(self, body: Body, cell: Stage) -> Stage:
        """The cell that answers a request for embeddings: several models have one path.

        Args:
            body: of the request, which names the model.
            cell: of one of them; where no other is named.
        """
        return cell if len(self._embedders) < 2 else self._embedders.get(wanted_embedder(body), cell)

    def named(self, name: str) -> Service:
        """The service of a model.

        Raises:
            WireError: if there is none of this name.
        """
        service = self.services.get(name)
        if service is None:
            raise WireError(f"there is no model {name[:100]!r}", "", self.said, status=404)
        return service

    @property
    def said(self) -> str:
        """The names of the models, in words."""
        names = self.names()
        if len(names) == 1:
            return f"the model is {names[0]}"
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        return f"the models are {', '.join(names[:_SHOWN])}{more}" if names else "this server has no model"

    async def load(self, name: str) -> None:
        """Open what is at the path of a model now, and serve it; of a repository also one that it did not have.

        Raises:
            RushhourError: if there is none of this name, or it cannot be opened; then the old version is served on.
        """
        if name not in self.services and self._folder is not None and name in self._folder.names():
            loop = asyncio.get_running_loop()
            self._add(*await loop.run_in_executor(self._shared.opening, self._folder.find, name))
        service = self.named(name)
        try:
            await service.load()
        finally:
            self._forget(service)

    async def prepare(self, served: Served) -> None:
        """Open what a plan names, beside what is served; the model may be new.

        Raises:
            RushhourError: if it cannot be opened, or is not what the plan was made for.
        """
        if served.name not in self.services and self._folder is not None:
            loop = asyncio.get_running_loop()
            self._add(served, await loop.run_in_executor(self._shared.opening, open_served, served))
        assert served.plan is not None
        await self.named(served.name).prepare(served.versions, served.plan, Path(served.folder))

    async def abandon(self, name: str) -> None:
        """Close what was prepared of a model, if anything was."""
        if name in self.services:
            service = self.services[name]
            await service.abandon()
            self._forget(service)

    def _add(self, served: Served, target: Target) -> None:
        """Have a model of the folder, unless another client has loaded it while it was read."""
        assert self._join is not None
        if served.name not in self.services:
            service = self.services[served.name] = self._join(served, target)
            service.changed = self._sort

    def _forget(self, service: Service) -> None:
        """A new model that could not be loaded is none of this server's."""
        is_new = service.loaded is None and not service.versions and self._folder is not None
        if is_new and self.services.get(service.name) is service:
            del self.services[service.name]
            self._shared.services.remove(service)

    def refuse(self, status: int, seconds: float, *, infer: bool, model: str = "") -> None:
        """Count an answer with an error that no cell has counted.

        Args:
            status: of HTTP.
            seconds: from the request to this answer.
            infer: whether it was an inference request: counted with the version of its model that is served; where
                there is only one model, with that, whatever it names.
            model: that it names.
        """
        service = (self.only or self.services.get(model)) if infer else None
        if service is not None and service.loaded is not None:
            service.loaded.cell.refuse(status, seconds)
        else:
            add_counts(self.errors, {reason_of(status): 1})

    def _sort(self) -> None:
        """A model answers from now on, or not any more."""
        loaded = {name: service.loaded for name, service in self.services.items() if service.loaded is not None}
        self.stages.clear()
        self.stages.update((path, each.cell) for name, each in loaded.items() for path in self.services[name].paths())
        self._embedders = {
            name: each.cell
            for name, each in loaded.items()
            if embeds(each.cell.codec, each.variant.bundle.manifest.task.kind)
        }
        if self._embedders:
            self.stages[_EMBEDDINGS] = next(iter(self._embedders.values()))

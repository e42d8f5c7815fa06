"""A cell as one followed request sees it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from rushhour.serve.observability.requests import FollowedRequest
from rushhour.serve.scheduling.job import Job, Reply, Shed, ShedError
from rushhour.serve.scheduling.stage import Stage
from rushhour.wire import InferRequest


def followed_cell(cell: Stage, followed: FollowedRequest) -> Stage:
    """The cell for this one request, which reports to `followed`."""
    followed.begin(cell.codec.model, cell.codec.version)
    return cast(Stage, _FollowedCell(cell, followed))


class _FollowedCell:
    def __init__(self, cell: Stage, followed: FollowedRequest) -> None:
        self._cell = cell
        self._followed = followed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cell, name)

    def submit(self, request: InferRequest, reply: Reply) -> Job | Shed:
        self._followed.queued(request)

        def answered(result: Sequence[memoryview] | Exception) -> int | None:
            if isinstance(result, ShedError):
                self._followed.shed = "deadline"
            else:
                self._followed.computed(self._cell.answering)
            return reply(result)

        submitted = self._cell.submit(request, answered)
        if isinstance(submitted, Shed):
            self._followed.shed = submitted.reason
        return submitted

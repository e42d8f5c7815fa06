"""`python noop.py PLAN SETTINGS`: Rushhour's own server in front of an engine that computes nothing.

What is left is what the server itself costs. The engine is a real one in all but the computing: buffers that each
request is copied into, and answers that come from a thread of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from rushhour.bundle import Bundle, Signature
from rushhour.engines import EngineConfig, Slot
from rushhour.engines.stream import Stream
from rushhour.serve import ServeSettings, open_target, serve


class NoopEngine:
    """Answers zeros at once."""

    def __init__(self, bundle: Bundle, config: EngineConfig) -> None:
        self._signature = bundle.manifest.signature
        self._config = config
        self._slots = [_NoopSlot(self._signature, config.max_batch, f"noop-{at}") for at in range(config.streams)]

    @property
    def signature(self) -> Signature:
        """What goes in and comes out."""
        return self._signature

    @property
    def config(self) -> EngineConfig:
        """What was asked for."""
        return self._config

    @property
    def effective(self) -> Mapping[str, str]:
        """That it is none."""
        return {"engine": "noop"}

    @property
    def slots(self) -> Sequence[Slot]:
        """One per stream."""
        return self._slots

    def close(self) -> None:
        """End the threads."""
        for slot in self._slots:
            slot.close()


class _NoopSlot(Stream):
    def _finish(self, rows: int) -> None:
        pass


if __name__ == "__main__":
    serve(
        open_target(Path(sys.argv[1])),
        msgspec.json.decode(sys.argv[2], type=ServeSettings),
        ready=print,
        open_with=NoopEngine,
    )

"""`python noop.py PLAN SETTINGS [FIXED EACH [STALL AT]]`: Rushhour's own server before an engine that computes nothing.

A batch of n takes FIXED + n EACH seconds, asleep; nothing by default. The batch with the AT-th sample takes STALL more.

What is left is what the server itself costs. The engine is a real one in all but the computing: buffers that each
request is copied into, and answers that come from a thread of its own.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from rushhour.bundle import Bundle, Signature
from rushhour.engines import EngineConfig, Slot
from rushhour.engines.stream import Line, Stream
from rushhour.serve import ServeSettings, open_target, serve


class NoopEngine:
    """Answers zeros at once."""

    def __init__(self, bundle: Bundle, config: EngineConfig) -> None:
        self._signature = bundle.manifest.signature
        self._config = config
        self._slots = [_NoopSlot(self._signature, config.max_batch, Line(f"noop-{at}")) for at in range(config.streams)]

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

    def spare(self) -> Sequence[Slot]:
        """None: each stream has a thread of its own."""
        return ()

    def close(self) -> None:
        """End the threads."""
        for slot in self._slots:
            slot.close()


class _NoopSlot(Stream):
    _fixed_s, _each_s, _stall_s, _stall_at = itertools.islice((*map(float, sys.argv[3:]), 0.0, 0.0, 0.0, 0.0), 4)
    _seen = 0

    def _finish(self, rows: int) -> None:
        seconds = self._fixed_s + rows * self._each_s
        if self._seen < self._stall_at <= self._seen + rows:
            seconds += self._stall_s
        self._seen += rows
        if seconds:
            time.sleep(seconds)


if __name__ == "__main__":
    serve(
        open_target(Path(sys.argv[1])),
        msgspec.json.decode(sys.argv[2], type=ServeSettings),
        ready=print,
        open_with=NoopEngine,
    )

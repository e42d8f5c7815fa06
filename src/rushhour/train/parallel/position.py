"""The step, and if asked for the layer, that each worker is at, in a mapped file that outlives the worker.

A worker that dies of a signal cannot report anything; the process that started it reads here what it did last.
"""

from __future__ import annotations

import contextlib
import mmap
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

_STEP = struct.Struct("q")
_LAYER_BYTES = 248
_SLOT_BYTES = _STEP.size + _LAYER_BYTES
_UNKNOWN = -1

_own: Position | None = None


class Position:
    """One worker's slot in the file.

    Args:
        file: of all workers, from `position_file`.
        rank: the worker's.
        layers: whether it records layers too, which takes some microseconds for each.
    """

    def __init__(self, file: Path, rank: int, *, layers: bool = False) -> None:
        self.layers = layers
        self._at = rank * _SLOT_BYTES
        with file.open("r+b") as stream:
            self._map = mmap.mmap(stream.fileno(), 0)

    def at_step(self, step: int) -> None:
        """The worker begins optimizer step `step`, from 1; 0 is everything before the first."""
        _STEP.pack_into(self._map, self._at, step)
        self.at_layer("")

    def at_layer(self, layer: str) -> None:
        """The worker begins this layer, in words."""
        text = layer.encode()[:_LAYER_BYTES]
        begin = self._at + _STEP.size
        self._map[begin : begin + _LAYER_BYTES] = text.ljust(_LAYER_BYTES, b"\0")

    def read(self) -> tuple[int | None, str]:
        """The step, None if none was recorded, and the layer, empty if it is not known."""
        (step,) = _STEP.unpack_from(self._map, self._at)
        begin = self._at + _STEP.size
        layer = self._map[begin : begin + _LAYER_BYTES].rstrip(b"\0").decode(errors="ignore")
        return (None if step == _UNKNOWN else step), layer


@contextlib.contextmanager
def position_file(workers: int) -> Iterator[Path]:
    """A file for so many workers, deleted afterwards."""
    with tempfile.NamedTemporaryFile(prefix="rushhour-positions-") as file:
        path = Path(file.name)
        reset_positions(path, workers)
        yield path


def reset_positions(file: Path, workers: int) -> None:
    """Mark the step and layer of all workers as unknown."""
    with file.open("r+b") as stream:
        stream.write((_STEP.pack(_UNKNOWN) + bytes(_LAYER_BYTES)) * workers)


def record_in(position: Position | None) -> None:
    """Record in this slot, from now on, the steps and layers of this process; None: nowhere."""
    global _own
    _own = position


def record_step(step: int) -> None:
    """This process begins an optimizer step, from 1; 0 for everything before. No effect without `record_in`."""
    if _own is not None:
        _own.at_step(step)


def record_layers(network: nn.Module) -> None:
    """Record which layer of the network is computed, forward and backward, if the slot asks for layers.

    Results stay the same, bit for bit.
    """
    position = _own
    if position is None or not position.layers:
        return

    def add_hooks(module: nn.Module, name: str) -> None:
        def before(module: nn.Module, inputs: Any) -> None:
            position.at_layer(f"{name}, forward")

        def after(module: nn.Module, inputs: Any, output: Any) -> None:
            # not a backward hook of the module: that one forbids layers that work in place
            if isinstance(output, Tensor) and output.requires_grad:
                output.register_hook(lambda _: position.at_layer(f"{name}, backward"))  # type: ignore[no-untyped-call]

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)

    for name, module in network.named_modules():
        if not any(True for _ in module.children()):
            add_hooks(module, f"{type(module).__name__} {name!r}")

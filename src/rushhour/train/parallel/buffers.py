"""Buffers that a network changes while it trains: which have changed, and their mean over the workers of a stage."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from rushhour.train.parallel.collectives import Group

_COMPARED = 1_000_000
"""Numbers of the largest buffer that is compared with a copy; of larger ones torch's version counter is."""

Owners = Mapping[str, tuple[dict[str, Tensor | None], str]]
"""Name of a buffer in the network -> the buffers of its module, and its name among them."""


class Buffers:
    """The buffers that this worker holds.

    Args:
        tensors: name in the network -> tensor that is held here; a buffer that gets another shape is replaced in it.
        owners: where the network's modules keep each buffer.
    """

    def __init__(self, tensors: dict[str, Tensor], owners: Owners) -> None:
        self._tensors = tensors
        self._owners = owners
        self._seen = {name: _mark(tensors[name]) for name in owners}

    def collect(self) -> set[str]:
        """Take over the tensors that modules have assigned in place of their buffers; the names of changed buffers."""
        changed = set()
        with torch.no_grad():
            for name, (buffers, key) in self._owners.items():
                held, current = self._tensors[name], buffers[key]
                if current is not None and current is not held:
                    if current.shape == held.shape and current.dtype == held.dtype:
                        held.copy_(current)
                        buffers[key] = held
                    else:
                        self._tensors[name] = held = current.detach()
                if _differs(held, self._seen[name]):
                    changed.add(name)
                    self._seen[name] = _mark(held)
        return changed

    def floating_point(self) -> dict[str, Tensor]:
        """Name -> buffer, of those with floating-point numbers; not copied."""
        return {name: self._tensors[name] for name in self._owners if self._tensors[name].is_floating_point()}

    @contextlib.contextmanager
    def averaged(self, names: Sequence[str], weight: float, group: Group) -> Iterator[None]:
        """Replace buffers by their weighted mean over a group, while the block runs.

        Args:
            names: of the buffers, floating-point; the same on all workers of the group.
            weight: of this worker: its share of the rows.
            group: of the workers.
        """
        own = [self._tensors[name] for name in names]
        flat = torch.cat([tensor.detach().reshape(-1).double() for tensor in own]) * weight
        work = dist.all_reduce(flat, group=group, async_op=True)
        yield
        assert work is not None
        work.wait()
        with torch.no_grad():
            for tensor, part in zip(own, flat.split([one.numel() for one in own]), strict=True):  # type: ignore[no-untyped-call]
                tensor.copy_(part.view(tensor.shape))
        held = {id(tensor) for tensor in own}
        self._seen |= {name: _mark(self._tensors[name]) for name in self._owners if id(self._tensors[name]) in held}


def _mark(buffer: Tensor) -> Tensor | int:
    """What shows later whether a buffer has changed: torch's version counter does not count running statistics."""
    return buffer.detach().clone() if buffer.numel() <= _COMPARED else buffer._version


def _differs(buffer: Tensor, mark: Tensor | int) -> bool:
    if isinstance(mark, int):
        return buffer._version != mark
    return buffer.shape != mark.shape or not torch.equal(buffer, mark)

"""The checkpoint of a training: after a kill, the training is resumed from it with the same results, bit for bit.

One safetensors file, replaced atomically, with a line of JSON in its header; never a pickle. Tensors have the names and
shapes of the whole network, however many workers hold its parts, so that any number of workers can resume.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from rushhour.system.storage import explained, write_whole

_HEADER = "rushhour"
_COUNT = "step"
"""Adam's name for the number of steps of a parameter, beside the moments."""
COUNTS = "counts"
"""In the notes: name of a parameter -> that number."""


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """The state of a training after a step.

    Attributes:
        step: optimizer steps done, which is also the position in the data: the order follows from seed and epoch.
        notes: all that is not a tensor, as JSON values.
        tensors: `network.NAME`, `moment.MOMENT.NAME` of the optimizer, `generator`, and others that the training needs.
        facts: the fingerprint of the training by name; set by `Checkpoint`.
    """

    step: int
    notes: dict[str, Any]
    tensors: dict[str, Tensor]
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin with `prefix.`, by the rest of their names."""
        return {
            name.removeprefix(f"{prefix}."): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(f"{prefix}.")
        }

    @property
    def moments(self) -> dict[str, dict[str, Tensor]]:
        """The optimizer's moments: moment -> name of the parameter -> tensor."""
        found: dict[str, dict[str, Tensor]] = {}
        for name, tensor in self.part("moment").items():
            moment, _, parameter = name.partition(".")
            found.setdefault(moment, {})[parameter] = tensor
        return found


class _State(msgspec.Struct, frozen=True):
    fingerprint: str
    step: int
    notes: dict[str, Any]
    facts: dict[str, Any] = {}


class Unfinished(NamedTuple):
    """A training that is not finished: its checkpoint, the steps done, and the facts of its fingerprint."""

    path: Path
    step: int
    facts: dict[str, Any]


class Checkpoint:
    """The checkpoint of one training.

    Args:
        folder: of the file; it may hold checkpoints of many trainings.
        fingerprint: of the training, as hex.
        facts: the fingerprint by name, as JSON values, to be compared with another training.
    """

    def __init__(self, folder: Path, fingerprint: str, facts: Mapping[str, Any] | None = None) -> None:
        self.fingerprint = fingerprint
        self._facts = dict(facts or {})
        self._writer: threading.Thread | None = None
        self._error: Exception | None = None
        self.path = folder / f"train-{fingerprint[:16]}.safetensors"

    def write(self, snapshot: Snapshot) -> None:
        """Replace the file, on a thread: the training continues. Waits for the write before.

        Args:
            snapshot: its tensors must not share memory with each other, or with tensors that change.

        Raises:
            StorageError: if the write before failed.
        """
        self.wait()

        def work() -> None:
            state = _State(self.fingerprint, snapshot.step, snapshot.notes, self._facts)
            try:
                write_whole(self.path, save(snapshot.tensors, {_HEADER: msgspec.json.encode(state).decode()}))
            except Exception as error:  # raised where the training waits: in a thread it would be printed, and lost
                self._error = error

        self._writer = threading.Thread(target=work, name="checkpoint")
        self._writer.start()

    def wait(self) -> None:
        """Return when the last write is on disk.

        Raises:
            StorageError: if it failed; the older file stays.
        """
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        if (error := self._error) is not None:
            self._error = None
            raise error

    def read(self) -> Snapshot | None:
        """The snapshot on disk; None if there is none, or it is damaged, or of another training.

        Raises:
            StorageError: if the file exists but cannot be read.
        """
        if not self.path.is_file():
            return None
        try:
            with explained(f"read {self.path}"), safe_open(self.path, framework="pt") as file:
                state = msgspec.json.decode((file.metadata() or {}).get(_HEADER, ""), type=_State)
                tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, msgspec.DecodeError):
            return None
        if state.fingerprint != self.fingerprint or COUNTS not in state.notes:  # without counts: an earlier version
            return None
        return Snapshot(state.step, state.notes, tensors, state.facts)

    def notes(self) -> dict[str, Any]:
        """The notes on disk, without reading the tensors; empty where `read` returns None.

        Raises:
            StorageError: if the file exists but cannot be read.
        """
        state = _state_in(self.path)
        return state.notes if state is not None and state.fingerprint == self.fingerprint else {}

    def unfinished(self) -> Unfinished | None:
        """The training as it is on disk, without its tensors; None where `read` returns None.

        Raises:
            StorageError: if the file exists but cannot be read.
        """
        state = _state_in(self.path)
        if state is None or state.fingerprint != self.fingerprint:
            return None
        return Unfinished(self.path, state.step, state.facts)

    def others(self) -> list[Unfinished]:
        """Trainings with other fingerprints whose checkpoints are in the same folder.

        Raises:
            StorageError: if one cannot be read.
        """
        found = []
        for path in sorted(self.path.parent.glob("train-*.safetensors")):
            if path != self.path and (state := _state_in(path)) is not None:
                found.append(Unfinished(path, state.step, state.facts))
        return found

    def save(
        self,
        step: int,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: LRScheduler,
        *,
        notes: Mapping[str, Any] | None = None,
        more: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write the state of a network on one worker after `step` optimizer steps, with torch's generator for dropout.

        It is on disk when this returns, and replaces the older file.

        Args:
            step: optimizer steps done.
            network: whose parameters the optimizer has.
            optimizer: with one group of parameters.
            schedule: of its learning rate.
            notes: more notes.
            more: more tensors, contiguous.

        Raises:
            StorageError: if the disk does not take it; the older file stays.
        """
        self.write(snapshot(step, network, optimizer, schedule, notes=notes, more=more))
        self.wait()

    def restore(self, network: nn.Module, optimizer: torch.optim.Optimizer, schedule: LRScheduler) -> int:
        """Restore the state, torch's generator too, and return the steps done: 0, and nothing changed, without a file.

        A file that is damaged, of another training, or with other shapes is ignored.

        Raises:
            StorageError: if the file exists but cannot be read.
        """
        found = self.read()
        if found is None or shapes(found.part("network")) != shapes(network.state_dict()):
            return 0
        restore_snapshot(found, network, optimizer, schedule)
        return found.step

    def remove(self) -> None:
        """Delete the file, and the temporary files of killed writes.

        Raises:
            StorageError: if the disk does not allow it.
        """
        self.wait()
        with explained(f"delete {self.path}"):
            for left in (self.path, *self.path.parent.glob(f".{self.path.name}.*")):
                left.unlink(missing_ok=True)


def _state_in(path: Path) -> _State | None:
    """The header of the file; None where there is none, or it is damaged."""
    if not path.is_file():
        return None
    try:
        with explained(f"read {path}"), safe_open(path, framework="pt") as file:
            return msgspec.json.decode((file.metadata() or {}).get(_HEADER, ""), type=_State)
    except (SafetensorError, msgspec.DecodeError):
        return None


def snapshot(
    step: int,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: LRScheduler,
    *,
    notes: Mapping[str, Any] | None = None,
    more: Mapping[str, Tensor] | None = None,
) -> Snapshot:
    """The state of a network on one worker, as copies; `more` is taken as it is."""
    tensors = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
    for name, parameter in _named(network, optimizer).items():
        tensors |= {f"moment.{moment}.{name}": value for moment, value in moments_of(optimizer, parameter).items()}
    tensors["generator"] = torch.get_rng_state()
    # contiguous copies, which share no memory where weights are tied: safetensors needs both
    copied = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    counts = counts_of(optimizer, _named(network, optimizer))
    notes = {**progress_notes(optimizer, schedule), **(notes or {}), COUNTS: counts}
    return Snapshot(step, notes, {**copied, **(more or {})})


def restore_snapshot(
    found: Snapshot, network: nn.Module, optimizer: torch.optim.Optimizer, schedule: LRScheduler
) -> None:
    """Restore a network on one worker, whose shapes fit, with optimizer, schedule and torch's generator."""
    network.load_state_dict(found.part("network"))
    moments = found.moments
    for name, parameter in _named(network, optimizer).items():
        # the fused optimizer walks parameter and moments in the order of memory: they need the same strides
        values = {
            moment: torch.empty_like(parameter).copy_(named[name]) for moment, named in moments.items() if name in named
        }
        set_moments(optimizer, parameter, values, found.notes[COUNTS].get(name))
    restore_progress(found, optimizer, schedule)
    if "generator" in found.tensors:
        torch.set_rng_state(found.tensors["generator"])


def progress_notes(optimizer: torch.optim.Optimizer, schedule: LRScheduler) -> dict[str, Any]:
    """The state of optimizer and schedule without tensors of parameters' shapes, for a snapshot's notes."""
    (group,) = optimizer.param_groups
    return {
        "group": {name: value for name, value in group.items() if name != "params"},
        "schedule": schedule.state_dict(),
    }


def restore_progress(found: Snapshot, optimizer: torch.optim.Optimizer, schedule: LRScheduler) -> None:
    """The reverse of `progress_notes`."""
    optimizer.param_groups[0].update(found.notes["group"])
    schedule.load_state_dict(found.notes["schedule"])


def moments_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """The moments that the optimizer keeps for a parameter: name -> tensor of the parameter's shape."""
    kept = optimizer.state.get(parameter, {})
    return {name: value for name, value in kept.items() if isinstance(value, Tensor) and name != _COUNT}


def counts_of(optimizer: torch.optim.Optimizer, named: Mapping[str, Tensor]) -> dict[str, float]:
    """Steps that Adam counts for each parameter: fewer for one that takes part in some steps only."""
    kept = {name: optimizer.state.get(parameter, {}) for name, parameter in named.items()}
    return {name: one[_COUNT].item() for name, one in kept.items() if _COUNT in one}


def set_moments(
    optimizer: torch.optim.Optimizer, parameter: Tensor, moments: Mapping[str, Tensor], count: float | None
) -> None:
    """Set the optimizer's state of a parameter: its moments, and the steps that it counted."""
    if moments:
        counted = {} if count is None else {_COUNT: torch.tensor(count, dtype=torch.float32)}
        optimizer.state[parameter] = {**counted, **moments}


def shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Name -> shape."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _named(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's parameters by their names in the network, or else by their index."""
    names = {parameter: name for name, parameter in network.named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {names.get(parameter, str(index)): parameter for index, parameter in enumerate(parameters)}

"""Where a training stands, on disk: enough to go on after a kill as if nothing had happened, bit for bit.

One safetensors file, replaced as a whole, with a line of JSON in its header; never a pickle.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from rushhour.storage import explained, write_whole

_HEADER = "rushhour"


class _State(msgspec.Struct, frozen=True):
    """All that is not a tensor.

    Attributes:
        fingerprint: of the training; a checkpoint of another one is not used.
        step: optimizer steps done, which is also the place in the data: the order follows from seed and epoch.
    """

    fingerprint: str
    step: int
    groups: list[dict[str, Any]]
    schedule: dict[str, Any]


class Checkpoint:
    """The checkpoint of one training.

    Args:
        folder: where it lies; one folder may hold those of many trainings.
        fingerprint: what the training is made of, as hex.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self._fingerprint = fingerprint
        self.path = folder / f"train-{fingerprint[:16]}.safetensors"

    def save(self, step: int, network: nn.Module, optimizer: torch.optim.Optimizer, schedule: LRScheduler) -> None:
        """Write the state after `step` optimizer steps, with torch's generator for dropout; replaces the older one.

        Raises:
            StorageError: if the disk does not take it; the older one stays.
        """
        state = _State(
            fingerprint=self._fingerprint,
            step=step,
            groups=optimizer.state_dict()["param_groups"],
            schedule=schedule.state_dict(),
        )
        tensors = {
            # clones, because safetensors refuses tensors that share their memory (tied weights)
            name: tensor.detach().clone(memory_format=torch.contiguous_format)
            for name, tensor in _tensors(network, optimizer).items()
        }
        write_whole(self.path, save(tensors, {_HEADER: msgspec.json.encode(state).decode()}))

    def restore(self, network: nn.Module, optimizer: torch.optim.Optimizer, schedule: LRScheduler) -> int:
        """Put the state back, torch's generator too, and return the steps done: 0, and nothing touched, without one.

        A checkpoint that is damaged, or of another training, counts as none.

        Raises:
            StorageError: if it is there but cannot be read.
        """
        if not self.path.is_file():
            return 0
        try:
            with explained(f"read {self.path}"), safe_open(self.path, framework="pt") as file:
                state = msgspec.json.decode((file.metadata() or {}).get(_HEADER, ""), type=_State)
                tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, msgspec.DecodeError):
            return 0
        weights = {name.removeprefix("network."): tensors[name] for name in tensors if name.startswith("network.")}
        current = network.state_dict()
        if state.fingerprint != self._fingerprint or _shapes(weights) != _shapes(current):
            return 0
        network.load_state_dict(weights)
        moments: dict[int, dict[str, Tensor]] = {}
        for index, parameter in enumerate(_parameters(optimizer)):
            prefix = f"optimizer.{index}."
            moments[index] = {
                # the fused optimizer walks parameter and moments side by side, so they must lie alike in memory
                name.removeprefix(prefix): torch.empty_like(parameter).copy_(tensor)
                if tensor.shape == parameter.shape
                else tensor
                for name, tensor in tensors.items()
                if name.startswith(prefix)
            }
        optimizer.load_state_dict({"state": moments, "param_groups": state.groups})
        schedule.load_state_dict(state.schedule)
        torch.set_rng_state(tensors["generator"])
        return state.step

    def remove(self) -> None:
        """Delete it, with what killed writes left beside it; nothing happens if there is none.

        Raises:
            StorageError: if the disk does not allow it.
        """
        with explained(f"delete {self.path}"):
            for left in (self.path, *self.path.parent.glob(f".{self.path.name}.*")):
                left.unlink(missing_ok=True)


def _tensors(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in moments.items()}
    tensors["generator"] = torch.get_rng_state()
    return tensors


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}

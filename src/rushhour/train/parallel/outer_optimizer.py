"""The outer optimizer of relaxed workers: every few steps it makes one step along the mean change of their weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rushhour.train.parallel.collectives import Group
from rushhour.train.parallel.settings import Relaxed

_OUTER = "rushhour.outer."
_MOMENTUM = "rushhour.momentum."


class OuterOptimizer:
    """SGD, with Nesterov's momentum where it has any, on copies of the weights; see `Relaxed`.

    Args:
        relaxed: how.
        learned: name in the network -> this worker's parameter.
    """

    def __init__(self, relaxed: Relaxed, learned: Mapping[str, nn.Parameter]) -> None:
        self._learned = learned
        self._outer = {name: nn.Parameter(tensor.detach().clone()) for name, tensor in learned.items()}
        self._optimizer = torch.optim.SGD(
            list(self._outer.values()),
            relaxed.outer_lr,
            momentum=relaxed.outer_momentum,
            nesterov=relaxed.outer_momentum > 0,
        )

    def step(self, buffers: Iterable[Tensor], world: Group) -> None:
        """Synchronise all workers: step along their mean change, and take the mean of the buffers.

        Args:
            buffers: of this worker, floating-point.
            world: all workers.
        """
        workers = world.size()
        with torch.no_grad():
            for name, outer in self._outer.items():
                change = outer.detach() - self._learned[name]
                dist.all_reduce(change, group=world)
                outer.grad = change / workers
            self._optimizer.step()
            for name, outer in self._outer.items():
                self._learned[name].copy_(outer)
            for buffer in buffers:
                dist.all_reduce(buffer, group=world)
                buffer /= workers

    def reset(self) -> None:
        """Begin again at the weights that the worker has now."""
        with torch.no_grad():
            for name, outer in self._outer.items():
                outer.copy_(self._learned[name])

    def state(self) -> dict[str, Tensor]:
        """All that must be kept to resume exactly; not copied."""
        state: dict[str, Tensor] = {}
        for name, outer in self._outer.items():
            state[_OUTER + name] = outer.detach()
            momentum = self._optimizer.state.get(outer, {}).get("momentum_buffer")
            if momentum is not None:
                state[_MOMENTUM + name] = momentum
        return state

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Resume from a `state`, which may hold other tensors too."""
        with torch.no_grad():
            for name, outer in self._outer.items():
                outer.copy_(state[_OUTER + name])
                if _MOMENTUM + name in state:
                    self._optimizer.state[outer]["momentum_buffer"] = state[_MOMENTUM + name].clone()

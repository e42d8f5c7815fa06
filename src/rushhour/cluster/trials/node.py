"""One node of the cluster, as the head of a search sees it."""

from __future__ import annotations

import contextlib
from typing import Any, Final

from rushhour.cluster.trials.packing import Order
from rushhour.cluster.trials.worker import TrialWorker

_CLEAN_S: Final = 5.0


class TrialNode:
    """A node with a worker that builds one recipe at a time, on all of the node's CPUs.

    Args:
        ray: the module.
        facts: of the node, as `ray.nodes()` has them.

    Attributes:
        id: that Ray gives it.
        name: of its machine, for the user.
        losses: of its worker, one after another without a recipe between them.
    """

    def __init__(self, ray: Any, facts: dict[str, Any]) -> None:
        self._ray = ray
        self.id: str = facts["NodeID"]
        self.name = f"{facts['NodeManagerHostname']} ({self.id[:6]})"
        self.losses = 0
        self._cpus = float(facts["Resources"]["CPU"])
        self._taken: tuple[Any, ...] | None = None
        self._worker: Any = self._started()

    def _started(self) -> Any:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        there = NodeAffinitySchedulingStrategy(self.id, soft=False)
        remote = self._ray.remote(TrialWorker)
        return remote.options(num_cpus=self._cpus, max_restarts=0, scheduling_strategy=there).remote()

    def facts(self) -> Any:
        """A reference to its worker's `Facts`."""
        return self._worker.facts.remote()

    def take(self, *data: Any) -> Any:
        """Have its worker take the data set; a reference to what it answers. A worker in its place does so, too."""
        self._taken = data
        return self._worker.take.remote(*data)

    def build(self, order: Order, reference: Any, known: list[Any]) -> Any:
        """A reference to what its worker makes of an order.

        Args:
            order: the recipe.
            reference: to the packed reference bundle.
            known: references to the packed bundles of the recipe's first steps.
        """
        return self._worker.build.remote(order, reference, *known)

    def lost(self) -> Any:
        """Start a worker in place of the one that was lost; a reference to what it answers once it can build."""
        self.losses += 1
        self.end(clean=False)
        self._worker = self._started()
        assert self._taken is not None, "without the data it was given nothing to build"
        return self.take(*self._taken)

    def end(self, *, clean: bool) -> None:
        """End its worker, if it has one.

        Args:
            clean: let it remove its files before; else the next worker on its machine does.
        """
        worker, self._worker = self._worker, None
        if worker is None:
            return
        with contextlib.suppress(Exception):  # it is gone, and with it perhaps the cluster
            if clean:
                self._ray.wait([worker.clean.remote()], timeout=_CLEAN_S)
            self._ray.kill(worker)

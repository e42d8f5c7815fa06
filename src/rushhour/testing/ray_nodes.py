"""A Ray cluster of several nodes on this machine, each of which may be killed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Final

_STORE_BYTES: Final = 80 * 2**20


class Nodes:
    """Nodes of a cluster, and a head without CPUs, to which this machine's programs connect.

    Args:
        cluster: of `ray.cluster_utils`.
        count: of the nodes, each with a CPU.

    Attributes:
        address: of the cluster.
    """

    def __init__(self, cluster: Any, count: int) -> None:
        self.address: str = cluster.address
        self._nodes = [cluster.add_node(num_cpus=1, object_store_memory=_STORE_BYTES) for _ in range(count)]

    def kill(self, number: int) -> None:
        """SIGKILL to what a node consists of. Its workers end with it."""
        for processes in self._nodes[number].all_processes.values():
            for each in processes:
                each.process.kill()

    def kill_one_but(self, line: str) -> None:
        """SIGKILL to a node whose id, shortened to six digits, is not in this line."""
        self.kill(next(number for number, node in enumerate(self._nodes) if f"({node._node_id[:6]})" not in line))


@contextlib.contextmanager
def ray_nodes(count: int) -> Iterator[Nodes]:
    """A cluster while the block runs.

    Raises:
        ImportError: if Ray is not installed.
    """
    import ray
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": _STORE_BYTES}
    cluster = Cluster(initialize_head=True, head_node_args=head)  # ends with this process, however that ends
    try:
        yield Nodes(cluster, count)
    finally:
        ray.shutdown()
        cluster.shutdown()

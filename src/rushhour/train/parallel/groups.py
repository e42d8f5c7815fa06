"""The place of a worker in the mesh, and the process groups that it belongs to."""

from __future__ import annotations

import torch.distributed as dist

from rushhour.train.parallel.collectives import Group
from rushhour.train.parallel.cost import Mesh


class WorkerGroups:
    """One worker's place and groups; all workers make theirs at the same time.

    Attributes:
        world: all workers; None where there is one.
        rank: of this worker.
        stage: of this worker in the pipeline, from 0.
        inner: its number in the stage.
        replica: of the stage that it belongs to.
        tensor: its number in the replica.
        stage_group: the workers of its stage; None where it is alone, as for all groups below.
        tensor_group: the workers of its replica.
        stage_sums: the workers of its stage, to sum gradients in: used for nothing else.
        data_sums: the workers of its stage with the same number in their replicas, to sum gradients in.
    """

    def __init__(self, mesh: Mesh, world: Group | None) -> None:
        size = 1 if world is None else world.size()
        self.world = world if size > 1 else None
        self.rank = 0 if world is None else dist.get_rank(world)
        self.stage, self.inner = divmod(self.rank, mesh.inner)
        self.replica, self.tensor = divmod(self.inner, mesh.tensor)
        self.stage_group: Group | None = None
        self.tensor_group: Group | None = None
        self.stage_sums: Group | None = None
        self.data_sums: Group | None = None
        if self.world is None:
            return
        ranks = dist.get_process_group_ranks(self.world)

        def group(members: list[int]) -> Group | None:
            # all workers must create all groups, also those that they do not belong to
            created = dist.new_group([ranks[member] for member in members]) if len(members) > 1 else None
            return created if self.rank in members else None

        for stage in range(mesh.pipeline):
            first = stage * mesh.inner
            inner = list(range(first, first + mesh.inner))
            self.stage_group = group(inner) or self.stage_group
            self.stage_sums = group(inner) or self.stage_sums
            for replica in range(mesh.data):
                members = inner[replica * mesh.tensor : (replica + 1) * mesh.tensor]
                self.tensor_group = group(members) or self.tensor_group
            for column in range(mesh.tensor):
                self.data_sums = group(inner[column :: mesh.tensor]) or self.data_sums

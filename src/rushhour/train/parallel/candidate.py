"""A plan that the planner considers, and its price."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from rushhour.train.parallel.cost import Constants, Cost, Layer, Layout, Mesh, boundary_cost, layer_cost, move_cost
from rushhour.train.parallel.plan import LayerPlan, Prediction, TablePlan
from rushhour.train.parallel.settings import Mode


class Place(NamedTuple):
    """How one layer lies, and which of its embedding tables are divided."""

    layout: Layout
    divided: tuple[str, ...] = ()

    def of(self, layer: Layer, stage: int, mesh: Mesh, batch: int, microbatches: int) -> LayerPlan:
        """The same as a part of a plan, whose tables are described."""
        samples = batch / mesh.inner / microbatches
        tables = tuple(
            TablePlan(
                table.name,
                table.rows,
                table.width,
                microbatches * table.touched_by(samples),
                table.name in self.divided,
                bool(table.touched),
            )
            for table in (layer.tables if self.layout == "tables" else ())
        )
        return LayerPlan(layer.name, self.layout, stage, tables)


class Candidate(msgspec.Struct, frozen=True):
    """One plan, with its predicted time, the costs of the busiest worker, and the memory that it needs."""

    mode: Mode
    mesh: Mesh
    microbatches: int
    layers: tuple[LayerPlan, ...]
    step_s: float
    busiest: Cost
    memory_bytes: float = 0.0

    def prediction(self) -> Prediction:
        """What it costs."""
        return Prediction(self.step_s, self.busiest.sent_bytes, self.busiest.state_bytes, self.memory_bytes)

    def priced(self, table: tuple[Layer, ...], batch: int, constants: Constants) -> Candidate:
        """The same with its predicted time, bytes and memory."""
        stages = [Cost() for _ in range(self.mesh.pipeline)]
        args = (self.mesh, batch, self.microbatches, constants)
        features = False
        for index, (layer, planned) in enumerate(zip(table, self.layers, strict=True)):
            stage = planned.stage
            divided = [one.name for one in planned.tables if one.divided]
            cost = layer_cost(layer, planned.layout, *args, divided)
            wants = planned.layout == "row"
            if features != wants and layer.kind != "elementwise":
                cost += move_cost(layer.inputs, *args)
            features = planned.layout == "column" or (features and layer.kind == "elementwise")
            last = index + 1 == len(table) or self.layers[index + 1].stage != stage
            if last and features:
                cost += move_cost(layer.outputs, *args)
                features = False
            stages[stage] += cost
            if last and index + 1 < len(table):
                boundary = boundary_cost(layer.outputs, *args)
                stages[stage] += boundary
                stages[stage + 1] += boundary
        p, m = self.mesh.pipeline, self.microbatches
        slowest = max(cost.seconds for cost in stages)
        # a pipeline fills and drains; where workers share cores, the others' waiting time goes to the one that computes
        path = slowest * (m + p - 1) / m / (constants.solo if p > 1 else 1.0)
        all_work = sum(cost.seconds for cost in stages) / p
        memory = max(cost.state_bytes + cost.working_bytes * min(m, p - stage) for stage, cost in enumerate(stages))
        busiest = Cost(
            max(cost.compute_s for cost in stages),
            max(cost.send_s for cost in stages),
            max(cost.sent_bytes for cost in stages),
            max(cost.state_bytes for cost in stages),
            max(cost.working_bytes for cost in stages),
        )
        return msgspec.structs.replace(self, step_s=max(path, all_work), busiest=busiest, memory_bytes=memory)

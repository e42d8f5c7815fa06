"""The parallel plan: which layout each layer has on which workers, what that costs, and what other plans would cost."""

from __future__ import annotations

import math
from typing import Any

import msgspec

from rushhour.train.parallel.cost import Layout, Mesh
from rushhour.train.parallel.settings import Backend, Mode


class TablePlan(msgspec.Struct, frozen=True):
    """Where one embedding table of a layer lies.

    Attributes:
        name: of its module in the layer; empty for the layer itself.
        rows: of the whole table.
        width: numbers in a row.
        touched: rows that one worker looks up in a step, by prediction.
        divided: whether each worker has a part of the rows; else it is replicated.
        measured: whether `touched` is of the data; else it is the most that is likely, from the number of lookups.
    """

    name: str
    rows: int
    width: int
    touched: float
    divided: bool
    measured: bool = False


class LayerPlan(msgspec.Struct, frozen=True):
    """Where one layer lies.

    Attributes:
        name: of its module.
        layout: inside its stage.
        stage: from 0.
        tables: its embedding tables, where the layout is `tables`.
    """

    name: str
    layout: Layout
    stage: int = 0
    tables: tuple[TablePlan, ...] = ()


class Prediction(msgspec.Struct, frozen=True):
    """What a plan costs by prediction: of a step, and of the busiest worker.

    Attributes:
        step_s: seconds.
        sent_bytes: sent to other workers.
        state_bytes: parameters, gradients, the optimizer's moments.
        memory_bytes: the state and all else that a step needs.
    """

    step_s: float
    sent_bytes: float
    state_bytes: float
    memory_bytes: float


class Alternative(msgspec.Struct, frozen=True):
    """The best plan of one mode, or why it has none; with the median seconds of its trial steps, if there were any."""

    mode: Mode
    mesh: Mesh | None = None
    predicted: Prediction | None = None
    why_not: str = ""
    measured_s: float | None = None


class ParallelPlan(msgspec.Struct, frozen=True):
    """How a network is trained by several workers. JSON; `parallelise` applies it.

    Attributes:
        mode: the family it belongs to; never `auto`.
        batch: samples in a step, over all workers.
        microbatches: into which each worker divides its samples.
        layers: all layers, in order.
        alternatives: the best of each family, itself among them.
        notes: for the user.
        simulated: the constants were not measured with so many workers.
    """

    workers: int
    mode: Mode
    mesh: Mesh
    batch: int
    microbatches: int
    layers: tuple[LayerPlan, ...]
    predicted: Prediction
    backend: Backend = "gloo"
    alternatives: tuple[Alternative, ...] = ()
    notes: tuple[str, ...] = ()
    simulated: bool = False
    schema: int = 1

    def explain(self) -> str:
        """This plan, and what the plans of other modes cost; a few lines of text."""
        if self.workers == 1:
            return "\n".join(["one worker: nothing is divided", *self.notes])
        lines = [
            f"{self.workers} workers, {self.mode}: {_arranged(self.mesh)}"
            + (f", {self.microbatches} microbatches" if self.microbatches > 1 else ""),
            *_runs(self.layers, self.mesh.inner),
        ]
        word = "simulated" if self.simulated else "predicted"
        others = sorted(
            self.alternatives,
            key=lambda one: (
                one.measured_s is None,
                one.measured_s or (one.predicted.step_s if one.predicted else math.inf),
            ),
        )
        for one in others:
            if one.predicted is None:
                lines.append(f"  {one.mode}: not possible: {one.why_not}")
                continue
            sign = "*" if (one.mode, one.mesh) == (self.mode, self.mesh) else " "
            limit = f"; {one.why_not}" if one.why_not else ""
            took = f"{word} {1e3 * one.predicted.step_s:,.1f} ms a step"
            if one.measured_s is not None:
                took = f"measured {1e3 * one.measured_s:,.1f} ms a step ({took.removesuffix(' a step')})"
            lines.append(
                f"{sign} {one.mode} ({one.mesh}): {took}, "
                f"{one.predicted.sent_bytes / 1e6:,.1f} MB sent and {one.predicted.memory_bytes / 1e6:,.0f} MB kept by "
                f"the busiest worker{limit}"
            )
        return "\n".join([*lines, *self.notes])


def _arranged(mesh: Mesh) -> str:
    parts = [
        f"{count} {word}"
        for count, word in ((mesh.data, "replicas"), (mesh.tensor, "workers a replica"), (mesh.pipeline, "stages"))
        if count > 1
    ]
    return ", ".join(parts)


_WORDS: dict[Layout, str] = {
    "data": "replicated",
    "sharded": "sharded, gathered when used",
    "column": "cut along its outputs",
    "row": "cut along its inputs",
    "tables": "replicated, but for the rows of embedding tables",
}
_SHOWN = 8
"""Tables of a layer that the explanation names, at most."""


def _runs(layers: tuple[LayerPlan, ...], workers: int) -> list[str]:
    """One line for each run of layers of the same layout and stage, and for their tables; `workers` of a stage."""
    lines: list[str] = []
    before: tuple[Any, ...] = ()
    for layer in (one for one in layers if one.layout != "local"):
        if (layer.layout, layer.stage) == before:
            lines[-1] = f"{lines[-1].partition(':')[0].partition(' to ')[0]} to {layer.name}: {_WORDS[layer.layout]}"
        else:
            stage = f"stage {layer.stage + 1}, " if layers[-1].stage else ""
            lines.append(f"  {stage}layer {layer.name or 'network'}: {_WORDS[layer.layout]}")
        before = (layer.layout, layer.stage)
        if layer.tables:
            before = ()
            lines += [f"    {_said(table, workers)}" for table in layer.tables[:_SHOWN]]
            if len(layer.tables) > _SHOWN:
                divided = sum(table.divided for table in layer.tables[_SHOWN:])
                lines.append(f"    and {len(layer.tables) - _SHOWN} tables more, {divided} of them divided")
    return lines


def _said(table: TablePlan, workers: int) -> str:
    size = f"table {table.name or 'itself'}, {table.rows:,} rows of {table.width}"
    asks = f"{'about' if table.measured else 'at most'} {table.touched:,.0f} rows in a step"
    if table.divided:
        return f"{size}: 1/{workers} of them on each worker, which looks up and sends {asks}"
    return f"{size}: replicated: a worker looks up {asks}, and summing the whole gradient takes no longer"

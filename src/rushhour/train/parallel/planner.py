"""The planner: finds the fastest parallel plan of each mode, by prediction.

For each arrangement of the workers (data x tensor x pipeline) the cheapest layouts are found by dynamic programming
along the chain of layers, whose state is whether activations are divided by rows or by features (Viterbi; compare
OptCNN, Jia et al. 2018). A second dynamic program cuts the chain into the stages of a pipeline so that the slowest
stage is as fast as possible. Where a plan does not fit in memory, memory gets a price, which is raised until one fits.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

from rushhour.bundle import Source, TensorSpec
from rushhour.errors import PlanError
from rushhour.system import machine
from rushhour.train.parallel.calibration import calibrate
from rushhour.train.parallel.candidate import Candidate, Place
from rushhour.train.parallel.cost import (
    Constants,
    Cost,
    Layer,
    Layout,
    Mesh,
    boundary_cost,
    dividable,
    layer_cost,
    move_cost,
    worth_dividing,
)
from rushhour.train.parallel.layer_table import layer_table
from rushhour.train.parallel.plan import Alternative, LayerPlan, ParallelPlan
from rushhour.train.parallel.settings import Backend, Mode

_MEMORY_SHARE = 0.85
"""Of the machine's memory that the workers may use."""


def plan_for(
    source: Source,
    sample: tuple[TensorSpec, ...],
    outputs: int,
    *,
    workers: int,
    batch: int,
    mode: Mode = "auto",
    memory_bytes: int | None = None,
    constants: Constants | None = None,
    microbatches: int | None = None,
    backend: Backend = "gloo",
    trusted: tuple[str, ...] = (),
) -> ParallelPlan:
    """The fastest plan, by prediction, of those that fit in memory and belong to `mode`.

    Args:
        source: the network.
        sample: one sample, each input; a single tensor named `image` of `(height, width, channels)` reaches the network
            as channels first.
        outputs: length of one answer.
        workers: how many there are.
        batch: samples in a step, over all workers.
        mode: data: replicas. sharded: replicas that share the state (ZeRO-3). tables: replicas, but the rows of large
            embedding tables are divided. model: dense layers are cut, the rest is replicated. pipeline: stages.
            hybrid: at least two kinds at once. auto: whichever is fastest.
        memory_bytes: that each worker may use; by default its share of this machine's.
        constants: of the machine; measured with so many workers where not given, which takes some seconds.
        microbatches: of a pipeline; found where not given.
        backend: of torch.distributed.
        trusted: factories that may be imported besides those of `rushhour.models`.

    Raises:
        ModelError: if the network cannot be built or run on such a sample.
        PlanError: if no plan of this mode exists, or none fits in memory.
    """
    layers = layer_table(source, sample, outputs, trusted)
    if constants is None:
        constants = calibrate(workers, backend)
    return plan_layers(
        layers,
        workers=workers,
        batch=batch,
        mode=mode,
        memory_bytes=memory_bytes,
        constants=constants,
        microbatches=microbatches,
        backend=backend,
    )


def plan_layers(
    layers: tuple[Layer, ...],
    *,
    workers: int,
    batch: int,
    constants: Constants,
    mode: Mode = "auto",
    memory_bytes: int | None = None,
    microbatches: int | None = None,
    backend: Backend = "gloo",
) -> ParallelPlan:
    """As `plan_for`, for a layer table that was made before."""
    return ranked_plans(
        layers,
        workers=workers,
        batch=batch,
        constants=constants,
        mode=mode,
        memory_bytes=memory_bytes,
        microbatches=microbatches,
        backend=backend,
    )[0]


def ranked_plans(
    layers: tuple[Layer, ...],
    *,
    workers: int,
    batch: int,
    constants: Constants,
    mode: Mode = "auto",
    memory_bytes: int | None = None,
    microbatches: int | None = None,
    backend: Backend = "gloo",
) -> list[ParallelPlan]:
    """The best plan of each mode that `mode` allows and that fits in memory, the fastest by prediction first."""
    if workers < 1 or batch < 1:
        raise PlanError(
            f"cannot plan for {workers} workers and batches of {batch}", "both are at least 1", "change that setting"
        )
    if microbatches is not None and microbatches < 1:
        raise PlanError(f"cannot divide a batch by {microbatches}", "microbatches are at least 1", "use 1 or more")
    limit = memory_bytes or worker_memory(workers)
    notes = []
    if workers > machine.cores():
        notes.append(
            f"warning: {workers} workers share {machine.cores()} cores; more workers than cores help only where the "
            "network does not fit in the memory of fewer workers"
        )
    if workers == 1:
        only = Candidate("data", Mesh(1, 1, 1), microbatches or 1, _whole(layers), 0.0, Cost())
        candidates: dict[Mode, Candidate | str] = {"data": only.priced(layers, batch, constants)}
    else:
        search = _Search(layers, workers, batch, limit, constants, microbatches)
        modes: tuple[Mode, ...] = ("data", "sharded", "tables", "model", "pipeline", "hybrid")
        candidates = {one: search.best(one) for one in modes}
    possible = [
        one
        for name, one in candidates.items()
        if not isinstance(one, str) and (mode == "auto" or name == mode or workers == 1)
    ]
    if not possible:
        why = candidates[mode]
        assert isinstance(why, str)
        raise PlanError(f"there is no {mode} plan for {workers} workers", why, "use --parallel auto, or other workers")
    fitting = [one for one in possible if one.memory_bytes <= limit]
    if not fitting:
        least = min(one.memory_bytes for one in possible)
        raise PlanError(
            "no plan fits in memory" if mode == "auto" else f"no {mode} plan fits in memory",
            f"the smallest needs {least / 1e9:,.2f} GB for each of {workers} workers, and each may use "
            f"{limit / 1e9:,.2f} GB",
            "use more machines, a smaller batch or a smaller network"
            + ("" if mode == "auto" else ", or --parallel auto"),
        )
    alternatives = []
    for name, one in candidates.items():
        if isinstance(one, str):
            alternatives.append(Alternative(name, why_not=one))
        else:
            over = one.memory_bytes > limit
            alternatives.append(
                Alternative(name, one.mesh, one.prediction(), f"more than the {limit / 1e6:,.0f} MB" if over else "")
            )
    return [
        ParallelPlan(
            workers=workers,
            mode=one.mode,
            mesh=one.mesh,
            batch=batch,
            microbatches=one.microbatches,
            layers=one.layers,
            predicted=one.prediction(),
            backend=backend,
            alternatives=tuple(alternatives),
            notes=tuple(notes),
            simulated=constants.workers != workers,
        )
        for one in sorted(fitting, key=lambda one: one.step_s)
    ]


def worker_memory(workers: int) -> int:
    """Bytes that each of so many workers may use on this machine."""
    return int(_MEMORY_SHARE * machine.describe().memory_gb * 2**30 / workers)


def _whole(layers: tuple[Layer, ...]) -> tuple[LayerPlan, ...]:
    return tuple(LayerPlan(layer.name, "data" if layer.parameters else "local") for layer in layers)


class _Search:
    """The best plan of each mode."""

    def __init__(
        self,
        layers: tuple[Layer, ...],
        workers: int,
        batch: int,
        limit: int,
        constants: Constants,
        microbatches: int | None,
    ) -> None:
        self._layers = layers
        self._workers = workers
        self._batch = batch
        self._limit = limit
        self._constants = constants
        self._microbatches = microbatches

    def best(self, mode: Mode) -> Candidate | str:
        """The fastest plan that fits, else the smallest; or why there is none."""
        if self._batch < self._workers and mode != "pipeline":
            return f"a batch of {self._batch} does not give each of {self._workers} workers a sample"
        n = self._workers
        allowed: tuple[Layout, ...] = ("data",)
        meshes = [Mesh(n, 1, 1)]
        if mode == "sharded":
            if not any(layer.parameters for layer in self._layers):
                return "there are no parameters"
            allowed = ("sharded",)
        elif mode == "tables":
            if not any(dividable(layer, meshes[0]) for layer in self._layers):
                return f"no nn.Embedding that is looked up in, and used in no other way, has {n} or more rows"
            allowed = ("data", "tables")
        elif mode == "model":
            if not any(self._cuttable(layer, n) for layer in self._layers):
                return f"no dense layer has {n} or more inputs and outputs, each a layer of its own in a Sequential"
            meshes, allowed = [Mesh(1, n, 1)], ("data", "column", "row")
        elif mode == "pipeline":
            if len(self._layers) < n:
                return f"it has {len(self._layers)} layers in sequence, fewer than {n} stages"
            learning = sum(layer.parameters > 0 for layer in self._layers)
            if learning < n:
                return f"it has {learning} layers that learn, fewer than {n} stages"
            meshes = [Mesh(1, 1, n)]
        elif mode == "hybrid":
            meshes = [mesh for mesh in _meshes(n) if mesh.data != n and mesh.pipeline != n]
            allowed = ("data", "sharded", "column", "row", "tables")
        found: list[Candidate] = []
        for mesh in meshes:
            if mesh.pipeline > len(self._layers) or self._batch < mesh.inner:
                continue
            for m in self._divisions(mesh):
                found += self._with_price(mode, mesh, m, allowed)
        if mode == "hybrid":
            found = [one for one in found if _kinds(one) > 1]
        if not found:
            return (
                "no plan combines two kinds of parallelism"
                if mode == "hybrid"
                else "no arrangement of the workers fits the layers"
            )
        fitting = [one for one in found if one.memory_bytes <= self._limit]
        if fitting:
            return min(fitting, key=lambda one: one.step_s)
        return min(found, key=lambda one: one.memory_bytes)

    def _divisions(self, mesh: Mesh) -> list[int]:
        most = self._batch // mesh.inner
        if self._microbatches is not None:
            return [min(self._microbatches, most)]
        if mesh.pipeline == 1:
            return [1]
        if any(layer.norms for layer in self._layers):
            return [1]  # the statistics of a batch need all of it
        return sorted({min(most, mesh.pipeline * times) for times in (1, 2, 4, 8)})

    def _with_price(self, mode: Mode, mesh: Mesh, m: int, allowed: tuple[Layout, ...]) -> list[Candidate]:
        """The fastest plan; where it does not fit, also the smaller plans that a price on memory gives."""
        found: list[Candidate] = []
        price = 0.0
        for _ in range(24):
            stages = self._stages(mode, mesh, m, allowed, price)
            if stages is None:
                return found
            layers = tuple(
                place.of(layer, stage, mesh, self._batch, m)
                for layer, (place, stage) in zip(self._layers, stages, strict=True)
            )
            one = Candidate(mode, mesh, m, layers, 0.0, Cost()).priced(self._layers, self._batch, self._constants)
            if not found or one.layers != found[-1].layers:
                found.append(one)
            if one.memory_bytes <= self._limit or len(allowed) == 1:
                break
            price = price * 4 if price else 1e-14  # seconds for a byte
        return found

    def _stages(
        self, mode: Mode, mesh: Mesh, m: int, allowed: tuple[Layout, ...], price: float
    ) -> list[tuple[Place, int]] | None:
        """Place and stage of each layer, so that the slowest stage is fastest; each stage has something to learn."""
        count, p = len(self._layers), mesh.pipeline
        if p == 1:
            paths = self._paths(0, mode, mesh, m, allowed, price)
            end = paths.get(count)
            return None if end is None else [(place, 0) for place in end[1]]
        costs: dict[tuple[int, int], tuple[float, list[Place]]] = {}
        for start in range(count):
            for end_at, path in self._paths(start, mode, mesh, m, allowed, price).items():
                costs[start, end_at] = path
        args = (mesh, self._batch, m, self._constants)
        ends = [0.0, *(boundary_cost(layer.outputs, *args).seconds for layer in self._layers)]
        learnt = [0, *itertools.accumulate(layer.parameters for layer in self._layers)]
        best: dict[tuple[int, int], tuple[float, int]] = {(0, 0): (0.0, 0)}
        for stage in range(1, p + 1):
            for end_at in range(stage, count + 1):
                options = [
                    (
                        max(
                            best[stage - 1, start][0],
                            costs[start, end_at][0]
                            + (ends[start] if start else 0.0)
                            + (ends[end_at] if end_at < count else 0.0),
                        ),
                        start,
                    )
                    for start in range(stage - 1, end_at)
                    if (stage - 1, start) in best and (start, end_at) in costs and learnt[start] < learnt[end_at]
                ]
                if options:
                    best[stage, end_at] = min(options)
        if (p, count) not in best:
            return None
        parts: list[tuple[Place, int]] = []
        at = count
        for stage in range(p, 0, -1):
            start = best[stage, at][1]
            parts = [(place, stage - 1) for place in costs[start, at][1]] + parts
            at = start
        return parts

    def _paths(
        self, start: int, mode: Mode, mesh: Mesh, m: int, allowed: tuple[Layout, ...], price: float
    ) -> dict[int, tuple[float, list[Place]]]:
        """The cheapest places of the layers from `start` up to each end, with rows at both ends."""
        args = (mesh, self._batch, m, self._constants)

        def weight(cost: Cost) -> float:
            return cost.seconds + price * (cost.state_bytes + cost.working_bytes)

        ends: dict[int, tuple[float, list[Place]]] = {}
        # state: activations are divided by features
        states: dict[bool, tuple[float, list[Place]]] = {False: (0.0, [])}
        for index in range(start, len(self._layers)):
            layer = self._layers[index]
            after: dict[bool, tuple[float, list[Place]]] = {}
            places = self._places(layer, mode, mesh, m, allowed, weight)
            for features, (spent, path) in states.items():
                for place in places:
                    layout = place.layout
                    cost = layer_cost(layer, layout, *args, place.divided)
                    if layer.kind == "elementwise":
                        then = features
                    else:
                        if features != (layout == "row"):
                            cost += move_cost(layer.inputs, *args)
                        then = layout == "column"
                    total = spent + weight(cost)
                    if then not in after or total < after[then][0]:
                        after[then] = total, [*path, place]
            states = after
            closed = [
                (spent + (weight(move_cost(layer.outputs, *args)) if features else 0.0), path)
                for features, (spent, path) in states.items()
            ]
            ends[index + 1] = min(closed, key=lambda one: one[0])
        return ends

    def _places(
        self,
        layer: Layer,
        mode: Mode,
        mesh: Mesh,
        m: int,
        allowed: tuple[Layout, ...],
        weight: Callable[[Cost], float],
    ) -> list[Place]:
        """What may become of a layer."""
        if not layer.parameters:
            return [Place("local")]
        cut = mesh.tensor > 1 and self._cuttable(layer, mesh.tensor)
        if mode == "model" and cut:
            return [Place("column"), Place("row")]
        divided: tuple[str, ...] = ()
        if "tables" in allowed:
            divided = worth_dividing(layer, mesh, self._batch, m, self._constants, weight)
            if mode == "tables":
                return [
                    Place("tables", divided or self._largest(layer, mesh)) if dividable(layer, mesh) else Place("data")
                ]
        return [
            Place(layout, divided if layout == "tables" else ())
            for layout in allowed
            if (layout in ("column", "row") and cut)
            or layout == "data"
            or (layout == "sharded" and mesh.inner > 1)
            or (layout == "tables" and divided)
        ]

    def _largest(self, layer: Layer, mesh: Mesh) -> tuple[str, ...]:
        """The layer's largest table, if it is that of the network: where a plan must divide one, it is this."""
        sizes = [table.parameters for one in self._layers for table in dividable(one, mesh)]
        return tuple(table.name for table in dividable(layer, mesh) if table.parameters == max(sizes))[:1]

    @staticmethod
    def _cuttable(layer: Layer, parts: int) -> bool:
        return layer.kind == "dense" and min(layer.in_width, layer.out_width) >= parts


def _meshes(workers: int) -> list[Mesh]:
    return [
        Mesh(data, tensor, workers // data // tensor)
        for data in range(1, workers + 1)
        if workers % data == 0
        for tensor in range(1, workers // data + 1)
        if workers // data % tensor == 0
    ]


def _kinds(one: Candidate) -> int:
    """How many kinds of parallelism a plan mixes: replicas, shared state, cut layers, stages."""
    layouts = {layer.layout for layer in one.layers}
    return (
        (one.mesh.pipeline > 1)
        + ("sharded" in layouts)
        + bool({"column", "row"} & layouts)
        + (bool({"data", "tables"} & layouts) and one.mesh.inner > 1)
    )

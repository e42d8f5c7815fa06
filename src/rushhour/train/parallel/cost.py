"""What a layer costs under each layout: computing, sending and memory, from the constants of a machine.

Time is predicted by a roofline (Williams et al. 2009) for computing and by alpha-beta (Hockney 1994) for sending.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Literal

import msgspec

Layout = Literal["local", "data", "sharded", "column", "row", "tables"]
"""How a layer lies on the workers of its stage.

local: it has no parameters. data: each worker has them all. sharded: each keeps an equal part, and all of them only
while it computes the layer (ZeRO-3). column, row: a dense layer, cut along its outputs or its inputs. tables: as data,
but the rows of some of its embedding tables are divided over the workers.
"""

Kind = Literal["dense", "convolution", "elementwise", "other"]

FLOAT = 4
STATE = 4
"""Numbers kept for each parameter: itself, its gradient, and Adam's two moments."""
_ID = 4
"""Bytes of an id that is sent."""
_SORTED = 400
"""Bytes of memory that could be moved in the time in which one id is sorted among thousands."""
BUCKET_BYTES = 25 * 2**20
"""Gradients that are reduced together; the same as DDP's (Li et al., VLDB 2020)."""


class Link(msgspec.Struct, frozen=True):
    """Seconds for a message: `latency_s + bytes * byte_s`, with all workers sending at once."""

    latency_s: float
    byte_s: float


class Constants(msgspec.Struct, frozen=True):
    """What one worker can do while all others do the same.

    Attributes:
        workers: that shared the machine when it was measured.
        dense_flops: per second in matrix products.
        convolution_flops: per second in 3x3 convolutions.
        bandwidth: bytes of memory per second.
        operation_s: fixed time of one operation, forward or backward.
        solo: how many times faster one worker computes while the others wait; 1 where each has cores of its own.
        reduce: a message of a ring all-reduce; in shared memory, its equivalent.
        exchange: a message of an all-to-all.
        send: a message from one stage to the next.
    """

    workers: int
    dense_flops: float
    convolution_flops: float
    bandwidth: float
    operation_s: float
    solo: float
    reduce: Link
    exchange: Link
    send: Link


class EmbeddingTable(msgspec.Struct, frozen=True):
    """An embedding table whose rows could be divided.

    Attributes:
        name: of its module in the layer; empty for the layer itself.
        rows: how many it has.
        width: numbers in a row.
        lookups: of one sample.
        follows: whether it is asked for the same ids as the table before.
        touched: rows that the first 1, 2, 4, ... samples of the data look up; empty where that was not measured.
    """

    name: str
    rows: int
    width: int
    lookups: float
    follows: bool = False
    touched: tuple[int, ...] = ()

    @property
    def parameters(self) -> int:
        """How many numbers it learns."""
        return self.rows * self.width

    def touched_by(self, samples: float) -> float:
        """Rows that so many samples look up: as measured, else as many as if all rows were equally frequent.

        Other frequencies have fewer different rows in as many lookups.
        """
        if len(self.touched) > 1:
            at = max(0.0, math.log2(max(samples, 1e-9)))
            low = min(int(at), len(self.touched) - 2)
            few, many = max(self.touched[low], 1), max(self.touched[low + 1], 1)
            return min(float(self.rows), few * math.pow(many / few, at - low))
        if self.rows < 2:
            return float(self.rows)
        return -self.rows * math.expm1(self.lookups * samples * math.log1p(-1 / self.rows))


class Layer(msgspec.Struct, frozen=True):
    """One row of the layer table; all sizes are for one sample.

    Attributes:
        name: of the module in the network; empty for the network itself.
        kind: dense is exactly `nn.Linear`; elementwise works on any part of the features alone.
        flops: of the forward pass; the backward pass takes twice as many.
        parameters: how many numbers it learns.
        inputs: numbers that go in.
        outputs: numbers that come out.
        in_width: last dimension of the input: the features of a dense layer.
        out_width: last dimension of the output.
        saved: numbers kept for the backward pass, without parameters.
        operations: in it.
        norms: batch normalisations in it, which couple the samples of a batch.
        tables: embedding tables in it.
    """

    name: str
    kind: Kind
    flops: float
    parameters: int
    inputs: int
    outputs: int
    in_width: int
    out_width: int
    saved: int
    operations: int
    norms: int
    tables: tuple[EmbeddingTable, ...] = ()


class Mesh(msgspec.Struct, frozen=True):
    """How the workers are arranged.

    Worker `(stage * data + i) * tensor + j` is the j-th of the i-th replica of a stage.

    Attributes:
        data: replicas, each with its own rows.
        tensor: workers that share a replica: they divide its rows where a layer is whole, its features where it is cut.
        pipeline: stages.
    """

    data: int
    tensor: int
    pipeline: int

    @property
    def inner(self) -> int:
        """Workers in a stage."""
        return self.data * self.tensor

    def __str__(self) -> str:
        return f"{self.data} x {self.tensor} x {self.pipeline}"


class Cost(msgspec.Struct, frozen=True):
    """Of one worker, for one step.

    Attributes:
        compute_s: forward, backward and the optimizer.
        send_s: communication inside the stage.
        sent_bytes: to other workers.
        state_bytes: parameters, gradients and the optimizer's moments, for as long as the training lasts.
        working_bytes: what is kept for the backward pass of one microbatch, and weights gathered for a while.
    """

    compute_s: float = 0.0
    send_s: float = 0.0
    sent_bytes: float = 0.0
    state_bytes: float = 0.0
    working_bytes: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.compute_s + other.compute_s,
            self.send_s + other.send_s,
            self.sent_bytes + other.sent_bytes,
            self.state_bytes + other.state_bytes,
            self.working_bytes + other.working_bytes,
        )

    @property
    def seconds(self) -> float:
        """Computing and sending, one after the other: on processors both take the same cores."""
        return self.compute_s + self.send_s


def layer_cost(
    layer: Layer,
    layout: Layout,
    mesh: Mesh,
    batch: int,
    microbatches: int,
    constants: Constants,
    divided: Collection[str] = (),
) -> Cost:
    """What one worker spends on a layer in a step; moves between rows and features come on top (`move_cost`).

    Args:
        batch: samples in the step, over all workers.
        microbatches: into which each worker's samples are divided.
        divided: names of the embedding tables whose rows are divided, where the layout is `tables`.
    """
    n, t, d = mesh.inner, mesh.tensor, mesh.data
    rows = batch / n
    cut = layout in ("column", "row")
    parted = [table for table in layer.tables if layout == "tables" and table.name in divided]
    in_tables = sum(table.parameters for table in parted)
    parameters = layer.parameters / t if cut else float(layer.parameters - in_tables)
    kept = layer.parameters / n if layout == "sharded" else parameters + in_tables / n
    rate = constants.convolution_flops if layer.kind == "convolution" else constants.dense_flops
    flops = 3 * layer.flops * rows  # a cut layer computes t times the rows with a t-th of the weights
    traffic = FLOAT * (3 * rows * (layer.inputs + layer.outputs) + 3 * microbatches * parameters)
    optimizer = FLOAT * 7 * kept
    operations = 3 * layer.operations * microbatches
    compute = (
        max(flops / rate, traffic / constants.bandwidth)
        + optimizer / constants.bandwidth
        + operations * constants.operation_s
    )
    reduced = exchanged = messages = 0.0
    working = FLOAT * layer.saved * rows / microbatches
    for table in parted:
        touched = microbatches * table.touched_by(rows / microbatches)
        asked = 0 if table.follows else _ID
        exchanged += (n - 1) / n * touched * (asked + 2 * FLOAT * table.width)
        messages += (2 if table.follows else 4) * (n - 1) * microbatches
        working += (FLOAT * table.width * touched + 8 * table.lookups * rows) / microbatches
        compute += 16 * FLOAT * table.width * touched / constants.bandwidth
        compute += 0.0 if table.follows else _SORTED * table.lookups * rows / constants.bandwidth
        compute += 8 * microbatches * constants.operation_s
    if layout in ("data", "tables") and n > 1:
        reduced = 2 * (n - 1) / n * FLOAT * parameters
    elif layout == "sharded" and n > 1:
        # a lookup needs no weights in the backward pass: they are not gathered again where there is nothing else
        times = 2 if sum(table.parameters for table in layer.tables) == layer.parameters else 3
        exchanged = times * (n - 1) / n * FLOAT * parameters * microbatches
        messages += times * (n - 1) * microbatches
        working += FLOAT * parameters
        compute += 6 * FLOAT * parameters * microbatches / constants.bandwidth  # packed and unpacked
    elif cut:
        width = layer.inputs if layout == "column" else layer.outputs
        exchanged = 2 * rows * width * (t - 1) * FLOAT
        messages += 2 * (t - 1) * microbatches
        working += FLOAT * rows * t * width / microbatches
        compute += 2 * FLOAT * rows * width * t / constants.bandwidth
        reduced = 2 * (d - 1) / d * FLOAT * parameters
    if layer.norms and n > 1:
        exchanged += 4 * layer.norms * (layer.out_width + 1) * FLOAT * (n - 1) * microbatches
        messages += 2 * (n - 1) * layer.norms * microbatches
    group = n if layout in ("data", "tables") else d
    send = (
        exchanged * constants.exchange.byte_s
        + messages * constants.exchange.latency_s
        + reduced * constants.reduce.byte_s
        + reduced / BUCKET_BYTES * 2 * (group - 1) * constants.reduce.latency_s
    )
    return Cost(compute, send, exchanged + reduced, STATE * FLOAT * kept, working)


def worth_dividing(
    layer: Layer, mesh: Mesh, batch: int, microbatches: int, constants: Constants, weight: Callable[[Cost], float]
) -> tuple[str, ...]:
    """Names of the embedding tables whose division over the workers of a stage makes a step cheaper.

    Args:
        weight: what a cost is worth.
    """
    args = (mesh, batch, microbatches, constants)
    whole = weight(layer_cost(layer, "tables", *args))
    return tuple(
        table.name
        for table in dividable(layer, mesh)
        if weight(layer_cost(layer, "tables", *args, (table.name,))) < whole
    )


def dividable(layer: Layer, mesh: Mesh) -> tuple[EmbeddingTable, ...]:
    """The embedding tables that have a row for each worker of a stage."""
    return tuple(table for table in layer.tables if table.rows >= mesh.inner > 1)


def move_cost(width: int, mesh: Mesh, batch: int, microbatches: int, constants: Constants) -> Cost:
    """Rows to features or back, forward and backward, for `width` numbers a sample."""
    t = mesh.tensor
    rows = batch / mesh.inner
    sent = 2 * rows * width * (t - 1) / t * FLOAT
    seconds = sent * constants.exchange.byte_s + 2 * (t - 1) * microbatches * constants.exchange.latency_s
    copies = 4 * FLOAT * rows * width * 2 / constants.bandwidth
    return Cost(copies, seconds, sent, 0.0, FLOAT * rows * width / microbatches)


def boundary_cost(width: int, mesh: Mesh, batch: int, microbatches: int, constants: Constants) -> Cost:
    """What a stage sends to the next (activations) or to the one before (gradients): `width` numbers a sample."""
    sent = batch / mesh.inner * width * FLOAT
    return Cost(0.0, sent * constants.send.byte_s + microbatches * constants.send.latency_s, sent, 0.0, 0.0)


def state_bytes(layers: tuple[Layer, ...]) -> int:
    """What the parameters, gradients and Adam's moments of the whole network take in float32."""
    return FLOAT * STATE * sum(layer.parameters for layer in layers)

"""The Plan: the frozen answer of a tuning run, and the only noun that crosses from `tune` to `serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec

from rushhour.errors import GoalError, PlanError
from rushhour.goal import Goal
from rushhour.measurement import Interval, Number, Rate, Time
from rushhour.system.machine import Machine
from rushhour.system.storage import explained, write_whole

SCHEMA = 1
PLAN = "plan.json"
"""In a run's folder: the answer."""
SO_FAR = "plan-so-far.json"
"""In a run's folder while its search goes on, or where it was broken off: the best plan until then."""

EngineName = Literal["openvino", "onnxruntime", "torch"]
Precision = Literal["f32", "bf16", "int8"]

LARGEST_BATCH = 4096
"""Samples in one batch, at most: an engine runs the largest once before it serves."""

_Cells = Annotated[int, msgspec.Meta(ge=1, le=256)]
_Lanes = Annotated[int, msgspec.Meta(ge=1, le=1024)]
_Batch = Annotated[int, msgspec.Meta(ge=1, le=LARGEST_BATCH)]
_Bound = Annotated[int, msgspec.Meta(ge=1, le=10_000_000)]
_Schema = Annotated[int, msgspec.Meta(ge=1)]
_Ms = Annotated[float, msgspec.Meta(gt=0, le=86_400_000)]
_Count = Annotated[int, msgspec.Meta(ge=0, le=10**15)]


class Variant(msgspec.Struct, frozen=True):
    """One thing that can answer requests: a bundle on an engine at a precision.

    Attributes:
        name: unique within a plan; people read it.
        bundle: the bundle's folder, relative to the plan's.
        bundle_hash: what that bundle's content hash must be.
        precision: what the engine computes in. `int8` means that the bundle is quantised.
    """

    name: str
    bundle: str
    bundle_hash: str
    engine: EngineName
    precision: Precision


class Policy(msgspec.Struct, frozen=True):
    """How requests are put on the engine.

    Attributes:
        cells: processes behind one port, each with the streams and threads below and its share of the cores.
        streams: batches that run at the same time.
        threads: CPU threads of each stream.
        max_batch: samples in one batch, at most.
        queue_bound: samples that may wait, at most; further requests are shed.
        deadline_ms: a request that cannot be answered within this is shed at its arrival; None sheds for a full queue
            only. A request's own `timeout` counts whatever this says.
    """

    cells: _Cells = 1
    streams: _Lanes = 1
    threads: _Lanes = 1
    max_batch: _Batch = 1
    queue_bound: _Bound = 1024
    deadline_ms: _Ms | None = None


class OperatingPoint(msgspec.Struct, frozen=True):
    """One measured point: at this rate, this latency."""

    rate_rps: Rate
    p50_ms: Time | None
    p99_ms: Time | None
    outcome: str


Fate = Literal["won", "baseline", "beaten", "tied", "dominated", "over budget", "failed", "skipped"]


class Trial(msgspec.Struct, frozen=True):
    """One candidate, how far it got, and why it went no further.

    Attributes:
        candidate: names it in `measurements.jsonl` (`Entry.subject`): `int8/openvino/int8/s2t1b32`.
        bundle: which bundle it serves: `reference`, `int8`.
        accuracy: on the validation part, of the compiled artefact; None where it never came to that.
        predicted_rps: from its service times alone, by simulation, before any load.
        capacity_rps: under real load; None where it was dropped before its capacity was searched.
        fate: `won`; `baseline` (the untouched model); `beaten` under load; `tied` with the winner under load;
            `dominated` by prediction; `over budget`; `failed` (its engine cannot run it); `skipped` (the time was up).
        why: in words, with the numbers.
        name: for people: `int8 on OpenVINO, 2 streams`.
    """

    candidate: str
    bundle: str
    engine: EngineName
    precision: Precision
    policy: Policy
    accuracy: Number | None
    accuracy_drop: Number | None
    accuracy_drop_interval: Interval | None
    predicted_rps: Rate | None
    capacity_rps: Rate | None
    p99_ms: Time | None
    fate: Fate
    why: str
    name: str = ""


class Step(msgspec.Struct, frozen=True):
    """What one more step bought: the capacity with all steps up to this one, measured under load.

    Attributes:
        step: `as it is`, `compiled`, `batched`, `quantised`: in words for people.
        candidate: what was measured, as in `Trial`.
        name: the same for people.
    """

    step: str
    candidate: str
    capacity_rps: Rate
    p99_ms: Time | None
    accuracy: Number | None
    name: str = ""


class Evidence(msgspec.Struct, frozen=True):
    """What was measured, in the numbers people ask for. The measurements themselves lie in `measurements.jsonl`.

    Attributes:
        capacity_rps: the highest rate whose verdict was a confirmed pass on fresh seeds; where none was, the estimate
            from all windows. 0 only where the SLO held at no rate.
        lowest_failing_rps: the lowest rate that was proven not to hold, if one was.
        p99_ms: at `capacity_rps`.
        accuracy: of the compiled artefact on the untouched test set.
        accuracy_drop: reference minus plan, paired on the same samples.
        accuracy_interval: 95%, as every interval here.
        baseline_capacity_rps: of the untouched baseline (torch eager, one sample at a time), in the same run.
        model_bytes: size on disk of the graph that is served.
        at: when the plan was made, ISO 8601.
        trials: every candidate and its fate.
        ladder: what each step bought, in order.
        proven: whether `capacity_rps` is a proof, or an estimate.
        alone_rps: predicted: the capacity without the load generator on the same machine.
        capacity_interval_rps: the estimate's 95% interval, from all windows of the winner; None where it held at none.
    """

    capacity_rps: Rate
    lowest_failing_rps: Rate | None
    p99_ms: Time | None
    p99_interval_ms: Interval | None
    metric: str
    accuracy: Number
    accuracy_interval: Interval
    accuracy_drop: Number
    accuracy_drop_interval: Interval
    reference_accuracy: Number
    reference_accuracy_interval: Interval
    baseline_capacity_rps: Rate
    baseline_p99_ms: Time | None
    parameters: _Count
    model_bytes: _Count
    reference_parameters: _Count
    reference_model_bytes: _Count
    machine: Machine
    at: str
    trials: tuple[Trial, ...] = ()
    ladder: tuple[Step, ...] = ()
    proven: bool = True
    capacity_interval_rps: Interval | None = None
    alone_rps: Rate | None = None


class Plan(msgspec.Struct, frozen=True):
    """How to serve: variants, policy and operating points that meet the goal, with the evidence.

    Attributes:
        model: the name of the model that was tuned, under which it is served whichever variant won; empty in plans of
            older versions, which are served under the name of the run's reference.
    """

    goal: Goal
    variants: Annotated[tuple[Variant, ...], msgspec.Meta(min_length=1)]
    policy: Policy
    operating_points: tuple[OperatingPoint, ...] = ()
    evidence: Evidence | None = None
    feasible: bool = True
    """False for the nearest miss: nothing met the goal, and this came closest."""
    model: str = ""
    schema: _Schema = SCHEMA

    def save(self, path: Path) -> None:
        """Write the plan as JSON, whole or not at all.

        Raises:
            StorageError: if the disk does not take it.
        """
        write_whole(path, msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n")

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Read a plan and check every field.

        Raises:
            PlanError: if it is missing, damaged, or of a newer schema than this program knows.
        """
        with explained(f"read {path}"):
            is_there = path.is_file()
        if not is_there:
            raise PlanError(
                f"there is no plan at {path}",
                "the file does not exist",
                "make one with `rushhour tune` or `rushhour demo`",
            )
        with explained(f"read {path}"):
            content = path.read_bytes()
        try:
            schema = msgspec.json.decode(content, type=_SchemaOnly).schema
            if schema > SCHEMA:
                raise PlanError(
                    f"the plan {path} has schema {schema}",
                    f"this Rushhour reads schemas up to {SCHEMA}",
                    "upgrade Rushhour, or make the plan anew with `rushhour tune`",
                )
            return msgspec.json.decode(content, type=cls)
        except (msgspec.DecodeError, GoalError, RecursionError) as error:
            raise PlanError(
                f"the plan {path} cannot be read",
                str(error),
                "restore it, or make it anew with `rushhour tune`",
            ) from error


class _SchemaOnly(msgspec.Struct):
    schema: _Schema

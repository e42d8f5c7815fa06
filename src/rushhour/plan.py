"""The Plan: the result of a tuning run, and the only thing that `serve` takes from `tune`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from rushhour.cascade import CascadeRule
from rushhour.errors import GoalError, PlanError
from rushhour.goal import Goal
from rushhour.ladder import WINDOW, Batch, LadderPoint, Window, check_ladder
from rushhour.measurement import Interval, Number, Rate, ServiceTimes, Time
from rushhour.system.machine import Machine
from rushhour.system.storage import explained, write_whole

SCHEMA = 2
PLAN = "plan.json"
"""The Plan's file in a run's folder."""
SO_FAR = "plan-so-far.json"
"""The best plan so far, in the folder of a run that is not finished."""

EngineName = Literal["openvino", "onnxruntime", "torch"]
Precision = Literal["f32", "bf16", "int8"]

_Cells = Annotated[int, msgspec.Meta(ge=1, le=256)]
_Lanes = Annotated[int, msgspec.Meta(ge=1, le=1024)]
_Bound = Annotated[int, msgspec.Meta(ge=1, le=10_000_000)]
_Bucket = Annotated[int, msgspec.Meta(ge=1, le=2**31)]
_Schema = Annotated[int, msgspec.Meta(ge=1)]
_Ms = Annotated[float, msgspec.Meta(gt=0, le=86_400_000)]
_Count = Annotated[int, msgspec.Meta(ge=0, le=10**15)]


Change = Literal["limit", "accuracy", "cores"]
"""What a relaxation changes: the latency limit, the accuracy budget, the number of cores."""


class Variant(msgspec.Struct, frozen=True):
    """One thing that can answer requests: a bundle on an engine at a precision.

    Attributes:
        name: unique within a plan; shown to users.
        bundle: the bundle's folder, relative to the plan's.
        bundle_hash: what that bundle's content hash must be.
        precision: what the engine computes in; `int8` where the bundle is quantised.
    """

    name: str
    bundle: str
    bundle_hash: str
    engine: EngineName
    precision: Precision


class Policy(msgspec.Struct, frozen=True):
    """How requests are scheduled on the engine.

    Attributes:
        cells: server processes that share the port; each has the streams and threads below.
        streams: batches that run at the same time.
        threads: CPU threads of each stream.
        max_batch: the batch bound: most samples in one batch.
        queue_bound: most samples that may wait; further requests are shed.
        deadline_ms: a request that cannot be answered within this is shed on arrival; None sheds only when the queue
            is full. A request's own `timeout` always applies.
        buckets: of a model with an open dimension, the sizes to which shorter samples are padded, ascending; unset
            takes the usual ones (`rushhour.capacity.usual_bounds`).
    """

    cells: _Cells = 1
    streams: _Lanes = 1
    threads: _Lanes = 1
    max_batch: Batch = 1
    queue_bound: _Bound = 1024
    deadline_ms: _Ms | None = None
    buckets: Annotated[tuple[_Bucket, ...], msgspec.Meta(max_length=64)] | msgspec.UnsetType = msgspec.UNSET


class OperatingPoint(msgspec.Struct, frozen=True):
    """The latency measured at a rate.

    Attributes:
        variant: that answered; empty in plans of schema 1, where it is the first.
    """

    rate_rps: Rate
    p50_ms: Time | None
    p99_ms: Time | None
    outcome: str
    variant: str = ""


Fate = Literal["won", "baseline", "beaten", "tied", "dominated", "not preferred", "over budget", "failed", "skipped"]
Preference = Literal["capacity", "accuracy", "memory"]
"""What decides among candidates within the goal."""
Kind = Literal["proven", "estimated", "predicted"]
"""How a capacity is known: by a confirmed pass, from load without one, or by simulation."""


class Trial(msgspec.Struct, frozen=True):
    """One candidate and its fate.

    Attributes:
        candidate: its name in `measurements.jsonl` (`Entry.subject`): `int8/openvino/int8/s2t1b32`.
        bundle: that it serves: `reference`, `int8`, `prune-0.5-int8`. A network that was not served has the name of its
            recipe.
        accuracy: of the compiled artefact on the validation part; None where it was not measured.
        predicted_rps: by simulation on its service times, before it was loaded; corrected by what was measured of
            others until then.
        capacity_rps: under load; None where it was dropped before that.
        fate: `won`; `baseline` (the untouched model); `beaten` under load; `tied` with the winner under load;
            `dominated` by prediction; `not preferred` (within the goal, but not what was preferred); `over budget`;
            `failed` (it cannot be made, or its engine cannot run it); `skipped` (no time left, or its network cannot be
            trained).
        why: the reason, with the numbers.
        name: shown to users: `int8 on OpenVINO, 2 streams`.
        rule: why it was loaded although its prediction did not ask for it (a forced test); empty for all others.
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
    rule: str = ""


class FrontPoint(msgspec.Struct, frozen=True):
    """A point of the Pareto front: no other candidate within the budget exceeds it in accuracy, capacity and size.

    Attributes:
        candidate: as in `Trial`.
        name: shown to users.
        kind: how its capacity is known.
        capacity_rps: within the SLO.
        capacity_interval_rps: 95%; of a prediction, from the errors of other predictions in the run. None where it is
            proven, or not known.
        accuracy: of the compiled artefact on the validation part.
        accuracy_drop: reference minus this one, paired.
        accuracy_drop_interval: 95%.
        model_bytes: size on disk of its graph.
        chosen: whether the plan serves it.
    """

    candidate: str
    name: str
    kind: Kind
    capacity_rps: Rate
    capacity_interval_rps: Interval | None
    accuracy: Number
    accuracy_drop: Number
    accuracy_drop_interval: Interval
    model_bytes: _Count
    chosen: bool = False


class Relaxation(msgspec.Struct, frozen=True):
    """What a looser goal, or more cores, would buy: one change, all else unchanged.

    Attributes:
        what: that is changed.
        to: its new value, as a user writes it: `p99<75ms`, `2.3%`, `4 cores`.
        capacity_rps: with it.
        kind: `measured` in a window of load, or `predicted`.
        candidate: that would be served, as in `Trial`.
        name: the same, shown to users.
    """

    what: Change
    to: str
    capacity_rps: Rate
    kind: Literal["measured", "predicted"]
    candidate: str
    name: str


class LadderStep(msgspec.Struct, frozen=True):
    """The gain of one more step: the capacity with all steps up to this one, measured under load.

    Attributes:
        step: `as it is`, `compiled`, `batched`, `quantised`, `pruned, split and distilled`: shown to users.
        candidate: what was measured, as in `Trial`.
        name: the same, shown to users.
    """

    step: str
    candidate: str
    capacity_rps: Rate
    p99_ms: Time | None
    accuracy: Number | None
    name: str = ""


class Decision(msgspec.Struct, frozen=True):
    """One step of a tuning run: what was seen, what followed, and what it cost.

    Attributes:
        step: `time`, `race`, `rung 1`, ...: shown to users.
        seen: the measurements, in words with their numbers.
        decided: what followed.
        why: the rule.
        cost_s: seconds of the measurements and trainings that no earlier decision needed, whenever they were made: a
            run that was killed counts those from before, too.
        load_tests: load tests among them. A load test is one candidate put under load on a server, for its
            throughput, its capacity or a proof, however many windows that takes; or one race of two.
    """

    step: str
    seen: str
    decided: str
    why: str
    cost_s: Time = 0.0
    load_tests: _Count = 0


class Cut(msgspec.Struct, frozen=True):
    """Plans that one rule removed from the search.

    Attributes:
        step: at which they left, in the order of the search: `shape`, `train`, `make`, `time`, `simulate`, `accuracy`,
            `predict`, `race`, `confirm`.
        fate: theirs, as of a `Trial`.
        rule: the reason that they share.
        plans: how many.
        candidates: networks (where a network left whole) or candidates that these plans belong to.
    """

    step: str
    fate: Fate
    rule: str
    plans: _Count
    candidates: _Count


class Certificate(msgspec.Struct, frozen=True):
    """How good the answer is among all plans that could have been chosen (docs/decisions/0039).

    A plan is a network on an engine at a precision, in a layout of the cores, with a batch bound. The regret is the
    share by which the best plan that is known to be within the accuracy budget exceeds the one that was chosen.

    Attributes:
        statement: in one sentence.
        plans: size of the space.
        networks: of these, different networks; int8 of one counts as the same.
        simulated: plans whose capacity was simulated on measured service times.
        measured: candidates that were under load, the baseline included.
        load_tests: see `Decision.load_tests`.
        cuts: plans that were removed, by rule; all but the one that was chosen.
        covered: plans that the bound is about: those known to be within the accuracy budget.
        expected_regret: the mean; None where there is no bound.
        regret_bound: with probability `confidence` the regret is no larger; None where there is no bound.
        confidence: of the bound.
        sigma: standard deviation of the predictions' log error, within one run.
        residuals: measured candidates that `sigma` was learnt from; 0 where it was taken from earlier runs.
        not_covered: what the bound says nothing about, in sentences.
        why: there is no bound; empty where there is one.
    """

    statement: str
    plans: _Count
    networks: _Count
    simulated: _Count
    measured: _Count
    load_tests: _Count
    cuts: tuple[Cut, ...]
    covered: _Count
    expected_regret: Number | None
    regret_bound: Number | None
    confidence: Number
    sigma: Number | None
    residuals: _Count
    not_covered: tuple[str, ...] = ()
    why: str = ""


class Evidence(msgspec.Struct, frozen=True):
    """The main results of a run. The measurements themselves are in `measurements.jsonl`.

    Attributes:
        capacity_rps: the highest rate with a pass that was confirmed on fresh seeds; without one, the estimate from all
            windows. 0 only where the SLO held at no rate.
        lowest_failing_rps: the lowest rate that is proven to fail, if there is one.
        p99_ms: at `capacity_rps`.
        accuracy: of the compiled artefact on the untouched test set.
        accuracy_drop: reference minus plan, paired on the same samples.
        accuracy_interval: 95%, as every interval here.
        baseline_capacity_rps: of the untouched baseline (torch eager, one sample at a time), in the same run.
        model_bytes: size on disk of the graph that is served.
        at: when the plan was made, ISO 8601.
        trials: every candidate and its fate.
        ladder: the gain of each step, in order.
        proven: whether `capacity_rps` is a confirmed pass, not an estimate.
        alone_rps: the predicted capacity without the load generator on the same machine.
        capacity_interval_rps: the estimate's 95% interval, from all windows of the winner; None where the SLO held in
            none.
        prefer: what decided among candidates within the goal.
        front: the Pareto front of accuracy, capacity and size of all candidates within the accuracy budget, the fastest
            first.
        choice: which point of the front the plan is, and why not its neighbours; in words.
        relaxations: what one change of the goal would buy, the cheapest of each kind first.
        service_times: of the plan's engine on this machine, as it was beside the load, to compare another machine with;
            None in plans of older versions.
        decisions: every step of the run, in order; empty in plans of older versions.
        certificate: how far the best other plan may be above this one; None in plans of older versions.
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
    ladder: tuple[LadderStep, ...] = ()
    proven: bool = True
    capacity_interval_rps: Interval | None = None
    alone_rps: Rate | None = None
    prefer: Preference = "capacity"
    front: tuple[FrontPoint, ...] = ()
    choice: str = ""
    relaxations: tuple[Relaxation, ...] = ()
    service_times: ServiceTimes | None = None
    decisions: tuple[Decision, ...] = ()
    certificate: Certificate | None = None


class Plan(msgspec.Struct, frozen=True):
    """How to serve a model: variants, policy and operating points that meet the goal, with the evidence.

    The first variant is served. Further ones are for machines that cannot run it; with a ladder they are what the
    server chooses from as the load changes.

    Attributes:
        model: the name of the tuned model, under which every variant is served; empty in plans of older versions, which
            are served under the name of the run's reference.
        ladder: variants from the most accurate to the fastest; empty where the variant stays.
        accuracy_window: over any so many answers in a row, the mean accuracy drop of a ladder is within the goal's
            budget.
        cascade: where requests go through several of the variants; None where the first one answers all.
    """

    goal: Goal
    variants: Annotated[tuple[Variant, ...], msgspec.Meta(min_length=1)]
    policy: Policy
    operating_points: tuple[OperatingPoint, ...] = ()
    evidence: Evidence | None = None
    feasible: bool = True
    """False for the nearest miss: nothing met the goal, and this plan came closest."""
    model: str = ""
    schema: _Schema = SCHEMA
    ladder: tuple[LadderPoint, ...] = ()
    accuracy_window: Window = WINDOW
    cascade: CascadeRule | None = None

    def check(self) -> None:
        """Refuse a ladder or a cascade that could not be served.

        Raises:
            PlanError: naming the first fault.
        """
        if self.ladder:
            check_ladder(self.ladder, {variant.name for variant in self.variants}, self.goal.budget.max_drop)
        if self.cascade is not None:
            self.cascade.check({variant.name for variant in self.variants}, has_ladder=bool(self.ladder))

    def with_ladder(self, points: Sequence[LadderPoint], *, window: int = WINDOW) -> Plan:
        """The same with a ladder.

        Args:
            points: from the most accurate to the fastest; each names one of the plan's variants.
            window: as `accuracy_window`.

        Raises:
            PlanError: if it could not be served.
        """
        plan = msgspec.structs.replace(self, ladder=tuple(points), accuracy_window=window, schema=SCHEMA)
        plan.check()
        return plan

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
            PlanError: if it is missing, damaged, of a newer schema than this program knows, or its ladder could not be
                served.
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
                    "upgrade Rushhour, or make the plan again with `rushhour tune`",
                )
            plan = msgspec.json.decode(content, type=cls)
        except (msgspec.DecodeError, GoalError, RecursionError) as error:
            raise PlanError(
                f"the plan {path} cannot be read",
                str(error),
                "restore it, or make it again with `rushhour tune`",
            ) from error
        plan.check()
        return plan


class _SchemaOnly(msgspec.Struct):
    schema: _Schema
